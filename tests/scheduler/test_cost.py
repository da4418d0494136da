"""The cost models find the truth, stay sane without it, and never say that more work takes less time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import MAX_SECONDS, CostModel, Drift, OutputLength


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_prefill_is_found_from_noisy_requests(scale: float) -> None:
    rng, cost = random.Random(7), CostModel("cpu")

    def truth(n: int, cached: int = 0) -> float:
        return scale * (0.02 + 0.0005 * (n - cached) + 4e-8 * (n**2 - cached**2))

    for _ in range(300):
        n = rng.randint(16, 4096)
        cost.observe_prefill(n, 0, truth(n) * rng.uniform(0.9, 1.1))
    for n, cached in ((256, 0), (500, 0), (4000, 0), (4000, 2048)):
        assert cost.prefill_s(n, cached) == pytest.approx(truth(n, cached), rel=0.15), (n, cached)


def test_decode_is_found_and_follows_a_change() -> None:
    rng, cost = random.Random(7), CostModel("cpu")

    def feed(factor: float, count: int) -> None:
        for _ in range(count):
            b = rng.randint(1, 64)
            k = b * rng.randint(50, 1500)
            cost.observe_decode(b, k, factor * (0.03 + 1e-6 * k + 0.002 * b) * rng.uniform(0.95, 1.05))

    feed(1.0, 200)
    assert cost.decode_s(32, 32 * 500) == pytest.approx(0.11, rel=0.1)
    feed(3.0, 400)  # somebody else took the machine's other core
    assert cost.decode_s(32, 32 * 500) == pytest.approx(0.33, rel=0.2)


def test_one_size_of_prompt_is_learnt_though_the_rest_is_unknown() -> None:
    cost = CostModel("cpu")
    for _ in range(100):
        cost.observe_prefill(512, 0, 2.5)
    assert cost.prefill_s(512, 0) == pytest.approx(2.5, rel=0.02)
    assert 0.01 < cost.prefill_s(16, 0) < 2.5 < cost.prefill_s(4096, 0) < 200


def test_an_outlier_does_not_ruin_a_good_fit() -> None:
    cost = CostModel("cpu")
    for i in range(100):
        cost.observe_prefill(100 + i, 0, 0.1 + 0.001 * i)
    before = cost.prefill_s(150, 0)
    cost.observe_prefill(150, 0, 900.0)
    cost.observe_prefill(150, 0, 1e-5)
    assert cost.prefill_s(150, 0) == pytest.approx(before, rel=0.5)


@given(
    observations=st.lists(st.tuples(st.integers(1, 100_000), st.floats(allow_nan=True, allow_infinity=True)), max_size=60),
    n=st.integers(1, 100_000),
    more=st.integers(0, 100_000),
    device=st.sampled_from(["cpu", "cuda", "cuda:3", "abacus"]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_observed_predictions_stay_positive_and_monotonic(
    observations: list[tuple[int, float]], n: int, more: int, device: str
) -> None:
    cost = CostModel(device)
    for size, seconds in observations:
        cost.observe_prefill(size, size // 2, seconds)
        cost.observe_decode(size % 64 + 1, size, seconds)
        cost.observe_transfer(size, seconds)
    assert 0 < cost.prefill_s(n, 0) <= cost.prefill_s(n + more, 0) <= MAX_SECONDS
    assert 0 < cost.prefill_s(n + more, n) <= cost.prefill_s(n + more, 0)
    assert 0 < cost.decode_s(1, n) <= cost.decode_s(1 + more, n + more) <= MAX_SECONDS
    assert 0 < cost.transfer_s(n) <= cost.transfer_s(n + more)


def test_drift_and_output_length_stay_in_their_bounds() -> None:
    drift, length = Drift(), OutputLength()
    for _ in range(500):
        drift.observe(1000.0, 1.0)
        length.observe(10.0)
    assert drift.factor == pytest.approx(2.0, rel=0.01)
    assert length.expected(1000) == pytest.approx(10.0, rel=0.01)
    assert length.expected(3) == 3.0
    drift.observe(float("nan"), 1.0)
    length.observe(float("inf"))
    assert drift.factor == pytest.approx(2.0, rel=0.01)
    assert length.expected(1000) == pytest.approx(10.0, rel=0.01)
