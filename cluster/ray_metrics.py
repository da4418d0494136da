"""The same requests as `ray.util.metrics`, under the names that Ray's own Serve LLM dashboard reads (`ray_vllm_*`).

Optional (gateway.ray_metrics), for clusters whose Prometheus scrapes Ray's agents rather than /metrics. Made in the gateway's
replica, because that dashboard joins by the WorkerId of a Serve replica, which Ray adds by itself; each gateway tells of its own
requests, so they add up. Ray forbids ':' in names and writes '_' for it. Gauges of workers are not told here: they are not a
gateway's, and several gateways would add them up wrongly.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from cluster.metric_table import DISTRIBUTIONS, GAPS
from protocol.messages import Outcome
from protocol.request import Request
from protocol.timeline import Trace

log = logging.getLogger(__name__)


class RayMetrics:
    """An observer of the gateway. module: `ray.util.metrics`."""

    def __init__(self, model_name: str, module: Any) -> None:
        tags = {"model_name": model_name}

        def made(kind: str, name: str, text: str, more: tuple[str, ...] = (), **options: Any) -> Any:
            metric = getattr(module, kind)(name.replace(":", "_"), description=text, tag_keys=("model_name", *more), **options)
            metric.set_default_tags(tags)
            return metric

        self._distributions = [
            (one.value, made("Histogram", one.name, one.text, boundaries=list(one.buckets)))
            for one in DISTRIBUTIONS
            if one.name.startswith("vllm:") and one.name != GAPS
        ]
        self._prompt = made("Counter", "vllm:prompt_tokens", "Prompt tokens of requests that ended after their first token.")
        self._generation = made("Counter", "vllm:generation_tokens", "Output tokens of requests that ended.")
        self._ended = made("Counter", "vllm:request_success", "Requests that ended.", ("finished_reason",))

    def __call__(self, request: Request, outcome: Outcome) -> None:
        """Never raises: a request is over, and nobody can be told."""
        try:
            self._observe(outcome)
        except Exception:
            log.exception("Ray's metrics of request %s", outcome.request_id)

    def _observe(self, outcome: Outcome) -> None:
        if outcome.was_refused:
            return
        reason = outcome.finish_reason if outcome.finish_reason in ("stop", "length") else "stop"
        ended = {"finished": reason, "cancelled": "abort"}.get(outcome.kind, "error")
        self._ended.inc(1, tags={"finished_reason": ended})
        if outcome.output_tokens > 0:
            self._generation.inc(outcome.output_tokens)
            if outcome.prompt_tokens > 0:
                self._prompt.inc(outcome.prompt_tokens)
        if outcome.kind == "finished":
            trace = outcome.trace or Trace()
            for value_of, histogram in self._distributions:
                value = value_of(outcome, trace)
                if value is not None and math.isfinite(value):
                    histogram.observe(max(0.0, value))
