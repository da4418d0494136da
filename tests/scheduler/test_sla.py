"""Promises: what is counted, over which window, how exactly, and in how much memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Outcome
from scheduler import sla
from scheduler.series import NAMES, NUM_POINTS, Series
from scheduler.sla import Histogram, Names, Prices, Promise, Sla, budget_left

PROMISE = Promise(1.0, 0.1, 0.9)


def outcome(**values: Any) -> Outcome:
    given = {
        "request_id": "r", "epoch": 1, "kind": "finished", "tenant": "a", "slo_class": "standard", "prompt_tokens": 10,
        "cached_tokens": 4, "output_tokens": 5, "queue_s": 0.1, "ttft_s": 0.5, "tpot_s": 0.05, "e2e_s": 1.0,
    }  # fmt: skip
    return Outcome(**{**given, **values})


def made(**prices: float) -> Sla:
    return Sla({"standard": PROMISE}, Prices(**prices))


# ---- quantiles -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=300), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_is_within_one_bucket_of_the_exact_one(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    exact = ordered[max(1, -(-int(q * 1000) * len(values) // 1000)) - 1]
    found = histogram.quantile(q)
    assert found is not None
    assert exact / 1.1 <= found <= exact * 1.1


def test_merging_is_adding() -> None:
    rng = random.Random(3)
    parts, whole = [Histogram() for _ in range(4)], Histogram()
    for _ in range(1000):
        value = rng.lognormvariate(-2, 2)
        rng.choice(parts).add(value)
        whole.add(value)
    total = Histogram()
    for part in parts:
        total.merge(part)
    assert total.counts == whole.counts
    assert total.summary() == whole.summary()


def test_the_ends_of_the_range() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for value in (0.0, 1e-9, 1e12):
        histogram.add(value)
    assert histogram.quantile(0.5) == 1e-5
    assert (histogram.quantile(0.99) or 0) > 3600


# ---- what counts -----------------------------------------------------------------------------------------------------


def test_attainment_budget_and_goodput() -> None:
    sla_ = made()
    for i in range(20):
        sla_.outcome(outcome(ttft_s=2.0 if i == 0 else 0.5), 100.0)
    row = sla_.rows(300, 110.0)[0]
    assert row["attainment"] == 0.95
    assert row["budget_left"] == pytest.approx(0.5), "one of the two that may break it in 20"
    assert row["goodput_per_s"] == pytest.approx(1.9)
    assert (row["requests"], row["finished"], row["failed"]) == (20, 20, 0)
    assert row["promise"] == {"ttft_s": 1.0, "tpot_s": 0.1, "attainment": 0.9}


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, 1.0),
        ({"ttft_s": 1.0, "tpot_s": 0.1}, 1.0),
        ({"ttft_s": 1.001}, 0.0),
        ({"tpot_s": 0.101}, 0.0),
        ({"tpot_s": 9.0, "output_tokens": 1}, 1.0),  # one token has no pace
        ({"kind": "failed"}, 0.0),
        ({"kind": "nonsense"}, 0.0),
        ({"kind": "cancelled"}, None),
    ],
)
def test_what_keeps_a_promise(values: dict[str, Any], kept: float | None) -> None:
    sla_ = made()
    sla_.outcome(outcome(**values), 1.0)
    assert sla_.rows(300, 2.0)[0]["attainment"] == kept


def test_refusals_stand_beside() -> None:
    sla_ = made()
    sla_.outcome(outcome(), 1.0)
    for reason in ("tenant_share", "tenant_share", "queue_tokens"):
        sla_.refused("a", "standard", reason, 1.0)
    row = sla_.rows(300, 2.0)[0]
    assert row["refused"] == {"tenant_share": 2, "queue_tokens": 1}
    assert row["attainment"] == 1.0
    assert row["requests"] == 4


def test_budget_left_never_leaves_its_range() -> None:
    assert budget_left(0, 0, 0.99) is None
    assert budget_left(100, 100, 0.99) == 1.0
    assert budget_left(50, 100, 0.99) == 0.0
    assert budget_left(100, 100, 1.0) == 1.0
    assert budget_left(99, 100, 1.0) == 0.0


def test_cost_needs_prices() -> None:
    assert made().prices.cost(10, 5, 5) is None
    assert Prices(input=2.0, output=10.0).cost(1_000_000, 500_000, 100_000) == pytest.approx(3.0)
    assert Prices(input=2.0, cached=0.5, output=10.0).cost(1_000_000, 500_000, 100_000) == pytest.approx(2.25)
    sla_ = made(input=1.0, output=4.0)
    sla_.outcome(outcome(prompt_tokens=100, cached_tokens=50, output_tokens=25), 1.0)
    row = sla_.rows(300, 2.0)[0]
    assert row["tokens"] == {"input": 100, "cached": 50, "output": 25}
    assert row["cost"] == pytest.approx(200 / 1e6)


# ---- windows and memory ----------------------------------------------------------------------------------------------


def test_a_window_forgets_and_an_hour_does_not() -> None:
    sla_ = made()
    sla_.outcome(outcome(), 1000.0)
    sla_.outcome(outcome(ttft_s=9.0), 2000.0)
    assert sla_.rows(300, 2010.0)[0]["attainment"] == 0.0
    assert sla_.rows(3600, 2010.0)[0]["attainment"] == 0.5, "the older one is in its minute's slot by now"
    assert sla_.rows(3600, 4700.0)[0]["finished"] == 1
    assert sla_.rows(3600, 9000.0) == []
    assert sla_._slots == {}, "nobody is remembered for longer than an hour"


def test_no_request_is_lost_or_counted_twice_on_its_way_into_minutes() -> None:
    sla_ = made()
    for second in range(0, 3000, 3):
        sla_.outcome(outcome(), float(second))
        if second % 500 == 0:
            sla_.rows(300, float(second))
    assert sla_.rows(3600, 3000.0)[0]["finished"] == 1000


def test_memory_is_bounded_whoever_comes() -> None:
    sla_ = made()
    for second in range(7200):
        for i in range(3):
            name = f"tenant-{second * 3 + i}"
            sla_.outcome(outcome(tenant=name, slo_class=name), float(second))
            sla_.refused(name, name, name, float(second))
    assert len(sla_._slots) <= (sla.MAX_TENANTS + 1) * (sla.MAX_CLASSES + 1)
    slots = [len(s.fine) + len(s.coarse) for s in sla_._slots.values()]
    assert max(slots) <= 60 + 7 + 61
    cells = [cell for s in sla_._slots.values() for _, cell in (*s.fine, *s.coarse)]
    assert max(len(cell.refused) for cell in cells) <= sla.MAX_REASONS + 1


def test_names_that_may_be_labels() -> None:
    names = Names(("known",), 3)
    assert [names.of(n) for n in ("known", 'x"} 1\n', "", "a" * 65, "one", "two", "three", "one")] == [
        "known", "other", "other", "other", "one", "two", "other", "one",
    ]  # fmt: skip


# ---- the curves ------------------------------------------------------------------------------------------------------

LEVELS = {"queue": 1.0, "running": 2.0, "kv_used_share": 0.5}


def flows(tokens: float) -> dict[str, float]:
    return {"output_tokens": tokens, "input_tokens": 0.0, "kv_bytes": 0.0}


def test_rates_are_of_the_time_that_passed() -> None:
    series = Series()
    series.tick(LEVELS, flows(100), 0.0, 1e9)
    for _ in range(30):
        series.count("requests")
    series.finished(0.25, None)
    series.judged(True)
    series.judged(False)
    series.tick(LEVELS, flows(1000), 4.0, 1e9 + 4)  # not over yet
    assert series.point() is None
    series.tick(LEVELS, flows(1000), 10.0, 1e9 + 10)  # a late tick
    point = series.point()
    assert point is not None
    assert point["requests_per_s"] == 3.0
    assert point["output_tokens_per_s"] == 90.0
    assert point["goodput_per_s"] == 0.1
    assert point["attainment"] == 0.5
    assert point["ttft_p95"] == pytest.approx(0.25, rel=0.1)
    assert (point["tpot_p50"], point["queue"], point["kv_used_share"]) == (None, 1.0, 0.5)
    series.tick(LEVELS, flows(0), 15.0, 1e9 + 15)  # a counter that began anew
    assert series.point()["output_tokens_per_s"] == 0.0
    assert series.point()["attainment"] is None


def test_an_hour_and_no_more() -> None:
    series = Series()
    for i in range(2 * NUM_POINTS):
        series.tick(LEVELS, flows(i), 5.0 * i, 5.0 * i)
    history = series.history()
    assert set(history) == {"t", *NAMES}
    assert {len(column) for column in history.values()} == {NUM_POINTS}
    assert history["t"][-1] == series.point()["t"]
