"""Every request as OpenTelemetry spans: one SERVER span with GenAI attributes, one child per phase, the client's trace as parent.

Optional (`pip install tandem-serve[otel]`), and off unless told where spans go: by gateway.otlp_endpoint, or by OpenTelemetry's own
variables (OTEL_EXPORTER_OTLP_ENDPOINT, its _TRACES_ENDPOINT and _HEADERS, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER). Made by door.py
and called by the gateway once a request is over, so that a token costs nothing; sending has a thread and a bounded queue of its
own, and drops what it cannot keep. No text of a prompt or an answer is in a span.

Names are those of the GenAI conventions (open-telemetry/semantic-conventions-genai), which are still in development.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from protocol.errors import ConfigError
from protocol.messages import Outcome
from protocol.request import Request
from protocol.timeline import Trace, phases

log = logging.getLogger(__name__)

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SHUTDOWN_MS = 3000


def is_wanted(endpoint: str | None, env: Mapping[str, str]) -> bool:
    """Whether spans go anywhere. OTEL_SDK_DISABLED wins."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(endpoint) or any(env.get(name) for name in VARIABLES)


def open_spans(endpoint: str | None) -> Spans:
    """To an OTLP receiver over HTTP. endpoint: its base URL; None: as the environment says. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"spans are to be sent, but {error.name} is not installed: pip install 'tandem-serve[otel]' "
            "(or unset gateway.otlp_endpoint and OTEL_EXPORTER_OTLP_ENDPOINT)",
            param="gateway.otlp_endpoint",
        ) from None
    url = None if endpoint is None else endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    return Spans(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))


class Spans:
    """The observer: call it with each request that ended. processor: the SDK's; it owns sending."""

    def __init__(self, processor: Any, unix_ns: Callable[[], int] = time.time_ns) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = Resource.create()  # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(named.attributes.get("service.name", "")).startswith("unknown_service"):
            named = named.merge(Resource({"service.name": "tandem"}))
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)  # its sampler is OTEL_TRACES_SAMPLER's
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tandem")
        self._propagator = TraceContextTextMapPropagator()
        self._unix_ns = unix_ns

    def __call__(self, request: Request, outcome: Outcome) -> None:
        """Never raises: a request is over, and nobody can be told."""
        try:
            self._record(request, outcome)
        except Exception:
            log.exception("the spans of request %s", request.request_id)

    def close(self) -> None:
        """Send what waits, for at most SHUTDOWN_MS; blocks meanwhile."""
        self._provider.force_flush(SHUTDOWN_MS)
        self._provider.shutdown()

    def _record(self, request: Request, outcome: Outcome) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        trace = outcome.trace or Trace()
        end_ns = self._unix_ns()
        start_ns = end_ns - round(outcome.e2e_s * 1e9)
        parent = self._propagator.extract({"traceparent": request.origin.traceparent}) if request.origin.traceparent else None
        span = self._tracer.start_span(
            f"{request.origin.operation} {request.model}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=attributes_of(request, outcome, trace),
            start_time=start_ns,
        )
        if outcome.kind == "failed":
            span.set_status(Status(StatusCode.ERROR, trace.failure or outcome.failure_kind))
        if span.is_recording():
            inside = set_span_in_context(span)
            for phase in phases(trace.marks, outcome.kind):
                attributes: dict[str, Any] = {"tandem.lost": True} if phase.is_lost else {}
                if phase.worker is not None:
                    attributes["tandem.worker"] = phase.worker
                child = self._tracer.start_span(
                    phase.name, context=inside, attributes=attributes, start_time=start_ns + round(phase.start_s * 1e9)
                )
                child.end(start_ns + round(phase.end_s * 1e9))
            for mark in trace.marks:
                if mark.name in ("first_token", "resumed"):
                    detail = {"tandem.detail": mark.detail} if mark.detail else None
                    span.add_event(mark.name, detail, start_ns + round(mark.at_s * 1e9))
        span.end(end_ns)


def attributes_of(request: Request, outcome: Outcome, trace: Trace) -> dict[str, Any]:
    """Numbers and names, no text of a client but its request id."""
    sampling = request.sampling
    found: dict[str, Any] = {
        "gen_ai.operation.name": request.origin.operation,
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.top_k": sampling.top_k if sampling.top_k > 0 else None,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
        "gen_ai.response.finish_reasons": [outcome.finish_reason] if outcome.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": outcome.ttft_s if outcome.output_tokens else None,
        "error.type": outcome.failure_kind or None,
        "tandem.tenant": outcome.tenant,
        "tandem.class": outcome.slo_class,
        "tandem.outcome": outcome.kind,
        "tandem.client_request_id": request.origin.client_id or None,
        "tandem.prefill_worker": trace.prefill_worker,
        "tandem.decode_worker": trace.decode_worker,
        "tandem.resumptions": trace.num_resumptions,
        "tandem.queue_seconds": outcome.queue_s,
        "tandem.transfer_seconds": trace.transfer_s or None,
    }
    return {name: value for name, value in found.items() if value is not None}
