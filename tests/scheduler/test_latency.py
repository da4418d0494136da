"""Sliding quantiles: right, forgetting, bounded."""

from __future__ import annotations

import random

from scheduler.latency import MAX_CLASSES, MAX_SAMPLES, OTHER, WINDOW_S, Latencies, Sample, quantile, summary


def test_quantiles_are_nearest_ranks() -> None:
    values = [float(i) for i in range(1, 101)]
    random.Random(1).shuffle(values)
    found = summary(values)
    assert (found["p50"], found["p95"], found["p99"], found["mean"]) == (50.0, 95.0, 99.0, 50.5)
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([1.0, 2.0], 0.5) == 1.0
    assert summary([])["p50"] is None


def test_old_requests_are_forgotten_and_memory_is_bounded() -> None:
    latencies = Latencies()
    for i in range(3 * MAX_SAMPLES):
        latencies.add("standard", Sample(i / 1000, 0.1, None, 1.0, 0.0))
    now = 3 * MAX_SAMPLES / 1000
    status = latencies.status(now, 1.0, 1.0)["standard"]
    assert status["ttft_s"]["count"] == MAX_SAMPLES
    assert status["tpot_s"]["count"] == 0
    assert status["kept"] == {"ttft": 1.0, "tpot": 1.0, "both": 1.0}
    assert latencies.status(now + WINDOW_S + 1, 1.0, 1.0) == {}


def test_clients_cannot_invent_classes_without_end() -> None:
    latencies = Latencies()
    for i in range(1000):
        latencies.add(f"class-{i}", Sample(0.0, 0.1, 0.1, 1.0, 0.0))
    status = latencies.status(1.0, 1.0, 0.05)
    assert len(status) == MAX_CLASSES + 1
    assert status[OTHER]["ttft_s"]["count"] == 1000 - MAX_CLASSES
    assert status[OTHER]["kept"] == {"ttft": 1.0, "tpot": 0.0, "both": 0.0}


def test_impossible_times_are_not_counted() -> None:
    latencies = Latencies()
    for bad in (float("nan"), float("inf"), -1.0):
        latencies.add("standard", Sample(0.0, bad, 0.1, 1.0, 0.0))
    assert latencies.status(0.0, 1.0, 1.0) == {}
