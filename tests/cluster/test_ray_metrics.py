"""Ray's metrics: names that it takes, numbers of real outcomes; and that Ray's own classes accept what is made here."""

from __future__ import annotations

import re
import types
from typing import Any

import msgspec
import pytest

from cluster.metric_table import DISTRIBUTIONS
from cluster.ray_metrics import RayMetrics
from protocol.messages import Outcome
from protocol.request import Request, SamplingParams
from protocol.timeline import Trace

REQUEST = Request(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams())
FINISHED = Outcome(
    request_id="r", epoch=1, kind="finished", tenant="t", slo_class="standard", prompt_tokens=30, cached_tokens=16, output_tokens=9,
    queue_s=0.25, ttft_s=1.0, tpot_s=0.125, e2e_s=2.0, finish_reason="length", trace=Trace(max_tokens=9, max_output=9),
)  # fmt: skip


class Recorder:
    """Stands in for one of Ray's metrics."""

    all: dict[str, Recorder] = {}

    def __init__(self, name: str, **options: Any) -> None:
        self.options = options
        self.seen: list[tuple[float, dict[str, str]]] = []
        self.all[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.seen.append((value, tags or {}))

    observe = inc


@pytest.fixture
def recorded() -> dict[str, Recorder]:
    Recorder.all = {}
    return Recorder.all


def test_what_a_request_leaves(recorded: dict[str, Recorder]) -> None:
    metrics = RayMetrics("m", types.SimpleNamespace(Histogram=Recorder, Counter=Recorder))
    metrics(REQUEST, FINISHED)
    assert recorded["vllm_time_to_first_token_seconds"].seen == [(1.0, {})]
    assert recorded["vllm_e2e_request_latency_seconds"].seen == [(2.0, {})]
    assert recorded["vllm_generation_tokens"].seen == [(9, {})]
    assert recorded["vllm_request_success"].seen == [(1, {"finished_reason": "length"})]
    assert all(re.fullmatch(r"vllm_[a-z0-9_]+", name) for name in recorded)
    assert {metric.tags["model_name"] for metric in recorded.values()} == {"m"}
    metrics(REQUEST, msgspec.structs.replace(FINISHED, kind="failed", output_tokens=0))
    assert recorded["vllm_request_success"].seen[1:] == [(1, {"finished_reason": "error"})]
    assert len(recorded["vllm_time_to_first_token_seconds"].seen) == 1
    metrics(REQUEST, msgspec.structs.replace(FINISHED, kind="failed", epoch=0, failure_kind="Overloaded"))
    assert len(recorded["vllm_request_success"].seen) == 2, "refused, never admitted"


def test_rays_own_classes_take_it() -> None:
    """Without a running Ray they keep nothing, but they check names, tags and boundaries."""
    module = pytest.importorskip("ray.util.metrics")
    RayMetrics("m", module)(REQUEST, FINISHED)
    assert all(bound > 0 for one in DISTRIBUTIONS for bound in one.buckets), "Ray wants boundaries above zero"


def test_a_bug_costs_nobody_an_answer(recorded: dict[str, Recorder], caplog: pytest.LogCaptureFixture) -> None:
    metrics = RayMetrics("m", types.SimpleNamespace(Histogram=Recorder, Counter=Recorder))
    recorded["vllm_request_success"].inc = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
    metrics(REQUEST, FINISHED)
    assert "Ray's metrics of request r" in caplog.text
