"""Requests as spans: parents, phases, attributes; off unless asked for; and over real OTLP to a small receiver."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from cluster import otel  # noqa: E402
from protocol.errors import ConfigError  # noqa: E402
from protocol.messages import Outcome  # noqa: E402
from protocol.request import Request, SamplingParams  # noqa: E402
from protocol.timeline import Mark, Origin, Trace  # noqa: E402
from tests.system.local import cluster, events_of, request  # noqa: E402

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOW_NS = 1_700_000_000_000_000_000


def asked(**origin: Any) -> Request:
    given = {"client_id": "mine", "traceparent": PARENT, "operation": "chat", **origin}
    return Request(
        request_id="r1",
        model="m",
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0.5, max_tokens=7, n=2, seed=1),
        origin=Origin(**given),
    )


def ended(**values: Any) -> Outcome:
    marks = (
        Mark(0.0, "received"), Mark(0.125, "tokenized"), Mark(0.25, "admitted"), Mark(0.375, "reserved", "decode:0"),
        Mark(0.5, "prefill_start", "prefill:0"), Mark(1.0, "prefill_end", "prefill:0"), Mark(1.0, "first_token"),
        Mark(1.25, "transfer_end", "decode:0"), Mark(2.0, "end"),
    )  # fmt: skip
    given = {
        "request_id": "r1", "epoch": 1, "kind": "finished", "tenant": "a", "slo_class": "standard", "prompt_tokens": 3,
        "cached_tokens": 2, "output_tokens": 5, "queue_s": 0.25, "ttft_s": 1.0, "tpot_s": 0.25, "e2e_s": 2.0,
        "finish_reason": "length",
        "trace": Trace(prefill_worker="prefill:0", decode_worker="decode:0", transfer_s=0.25, marks=marks),
    }  # fmt: skip
    return Outcome(**{**given, **values})


@pytest.fixture
def recorded() -> Iterator[tuple[otel.Spans, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    spans = otel.Spans(SimpleSpanProcessor(exporter), lambda: NOW_NS)
    yield spans, exporter
    spans.close()


def test_a_request_and_its_phases(recorded: Any) -> None:
    spans, exporter = recorded
    spans(asked(), ended())
    *children, root = exporter.get_finished_spans()
    assert (root.name, root.kind) == ("chat m", SpanKind.SERVER)
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert (root.end_time, root.end_time - root.start_time) == (NOW_NS, 2_000_000_000)
    assert [child.name for child in children] == ["intake", "queue", "reserve", "wait", "prefill", "transfer", "decode"]
    assert {child.parent.span_id for child in children} == {root.context.span_id}
    prefill = children[4]
    assert (prefill.start_time - root.start_time, prefill.end_time - prefill.start_time) == (500_000_000, 500_000_000)
    assert prefill.attributes["tandem.worker"] == "prefill:0"
    assert [event.name for event in root.events] == ["first_token"]
    attributes = dict(root.attributes)
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.response.time_to_first_chunk"] == 1.0
    assert attributes["tandem.tenant"] == "a"
    assert "error.type" not in attributes
    assert root.status.status_code is StatusCode.UNSET
    assert root.resource.attributes["service.name"] == "tandem"


def test_a_failure_is_an_error(recorded: Any) -> None:
    spans, exporter = recorded
    trace = Trace(failure="it is gone", marks=(Mark(0.0, "received"), Mark(1.0, "tokenized"), Mark(2.0, "end")))
    spans(asked(traceparent=""), ended(kind="failed", failure_kind="WorkerLost", output_tokens=0, finish_reason="", trace=trace))
    *children, root = exporter.get_finished_spans()
    assert root.parent is None
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "it is gone")
    assert root.attributes["error.type"] == "WorkerLost"
    assert [(child.name, child.attributes.get("tandem.lost")) for child in children] == [("intake", None), ("queue", True)]


def test_an_unsampled_parent_is_obeyed(recorded: Any) -> None:
    spans, exporter = recorded
    spans(asked(traceparent=PARENT[:-2] + "00"), ended())
    assert exporter.get_finished_spans() == ()


def test_a_bug_of_an_exporter_costs_nobody_an_answer(recorded: Any, caplog: pytest.LogCaptureFixture) -> None:
    spans, _ = recorded
    spans(asked(), msgspec.structs.replace(ended(), e2e_s=float("nan")))
    assert "the spans of request r1" in caplog.text


def test_off_unless_configured() -> None:
    assert not otel.is_wanted(None, {})
    assert otel.is_wanted("http://collector:4318", {})
    assert otel.is_wanted(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"})
    assert not otel.is_wanted("http://collector:4318", {"OTEL_SDK_DISABLED": "true"})
    assert not otel.is_wanted(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""})


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"tandem-serve\[otel\]"):
        otel.open_spans("http://127.0.0.1:1")


# ---- over the wire ---------------------------------------------------------------------------------------------------


class Receiver(http.server.BaseHTTPRequestHandler):
    bodies: list[tuple[str, bytes]] = []

    def do_POST(self) -> None:
        self.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


async def test_a_real_walk_arrives_at_an_otlp_receiver() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the otel extra is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    Receiver.bodies.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spans = otel.open_spans(f"http://127.0.0.1:{server.server_address[1]}")
    try:
        async with cluster() as made:
            made.gateway._observers = (spans,)
            wanted = msgspec.structs.replace(request(range(40)), origin=Origin("mine", PARENT))
            await events_of(made, wanted)
        spans.close()
    finally:
        server.shutdown()
        server.server_close()
    assert [path for path, _ in Receiver.bodies] == ["/v1/traces"]
    received = ExportTraceServiceRequest.FromString(Receiver.bodies[0][1]).resource_spans[0]
    found = {span.name: span for scope in received.scope_spans for span in scope.spans}
    assert found.keys() == {"text_completion toy", "intake", "queue", "reserve", "wait", "prefill", "transfer", "decode"}
    assert {span.trace_id.hex() for span in found.values()} == {PARENT.split("-")[1]}
    root = found["text_completion toy"]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    assert {span.parent_span_id for name, span in found.items() if name != root.name} == {root.span_id}
