"""How large a pool should be, and when a worker should change its role: pure functions of the ledger, under a clock of the test."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.kv import KVLayout
from protocol.messages import WorkerInfo, WorkerStats
from scheduler.cost import CostModel, OutputLength
from scheduler.ledger import WorkerState
from scheduler.roles import Roles, Switch
from scheduler.sizing import FILL, Bounds, Busy, PoolSize, Promise, Waiting, decode_need, max_seqs, prefill_need

PROMISE = Promise(ttft_s=1.0, tpot_s=0.1)


def worker(role: str, number: int = 0, *, max_num_seqs: int = 8, num_blocks: int = 10_000, **more: Any) -> WorkerState:
    info = WorkerInfo(
        incarnation=f"{role}-{number}",
        role=role,
        name=f"{role}:{number}",
        address=f"{role}{number}:0",
        model="m",
        layout=KVLayout(1, 1, 1, 16, "float32", "h"),
        num_blocks=num_blocks,
        max_model_len=4096,
        max_num_seqs=max_num_seqs,
        pid=1,
        host="h",
        device="cpu",
        **more,
    )
    cost = CostModel("cpu")
    cost.prefill.theta, cost.decode.theta = [0.0, 1.0, 0.0], [0.01, 0.0, 0.005]  # 1 s for 1000 tokens; 10 ms + 5 ms a sequence
    return WorkerState(info, cost, 0.0)


def output(mean: float = 100.0) -> OutputLength:
    made = OutputLength()
    made.mean = mean
    return made


def decoding(number: int, num_seqs: int, **more: Any) -> WorkerState:
    made = worker("decode", number, **more)
    made.num_decoding, made.num_context_tokens, made.blocks_at_end = num_seqs, 150.0 * num_seqs, 12 * num_seqs
    return made


# ---- what is needed --------------------------------------------------------------------------------------------------


def test_a_worker_carries_what_keeps_the_promise() -> None:
    one = worker("decode", max_num_seqs=64)
    assert max_seqs(one, 100.0, 0.1) == 18  # 10 ms + 18 x 5 ms
    assert max_seqs(one, 100.0, 0.001) == 1
    assert max_seqs(worker("decode", max_num_seqs=8), 100.0, 0.1) == 8


@pytest.mark.parametrize(("num_seqs", "need"), [(0, 0.0), (4, 0.5), (8, 1.0), (24, 3.0)])
def test_decode_needs_a_worker_for_what_one_carries(num_seqs: int, need: float) -> None:
    assert decode_need([decoding(0, num_seqs)], Waiting(), output(), PROMISE) == pytest.approx(need / FILL)


def test_blocks_count_where_they_are_scarcer_than_places() -> None:
    assert decode_need([decoding(0, 4, num_blocks=24)], Waiting(), output(), PROMISE) == pytest.approx(2.0 / FILL)


def test_what_waits_before_a_quick_prefill_counts_for_decode() -> None:
    workers = [decoding(0, 8), worker("prefill")]
    quick = decode_need(workers, Waiting(16, 16 * 10), output(), PROMISE)  # 100 prompts a second
    assert quick == pytest.approx(24 / 8 / FILL)


def test_what_waits_before_a_slow_prefill_does_not() -> None:
    """A prompt of 4 s, and an answer of 2 tokens: whatever waits, hardly one sequence decodes at a time."""
    workers = [decoding(0, 1), worker("prefill")]
    need = decode_need(workers, Waiting(100, 100 * 4000), output(2.0), PROMISE)
    assert need < 0.5
    assert prefill_need(workers, Waiting(100, 100 * 4000), output(2.0), {}, PROMISE, 0.0) > 10


def test_prefill_is_not_asked_for_what_decode_cannot_take() -> None:
    workers = [decoding(0, 8), worker("prefill")]
    assert prefill_need(workers, Waiting(100, 100 * 10), output(1000.0), {}, PROMISE, 0.0) < 0.2
    busy = {"prefill-0": 1.0}
    assert prefill_need(workers, Waiting(), output(), busy, PROMISE, 0.0) == pytest.approx(1 / FILL)


def test_a_broken_promise_asks_for_one_more_only_where_all_work() -> None:
    two = [decoding(0, 1), decoding(1, 1)]
    assert decode_need(two, Waiting(), output(), PROMISE, kept=0.5) == 3.0
    assert decode_need(two, Waiting(), output(), PROMISE, kept=0.99) < 1
    assert decode_need([decoding(0, 2), decoding(1, 0)], Waiting(), output(), PROMISE, kept=0.5) < 1


def test_overflow_servers_are_nobodys_capacity() -> None:
    workers = [decoding(0, 8), decoding(1, 40, is_overflow=True)]
    assert decode_need(workers, Waiting(), output(), PROMISE) == pytest.approx(1 / FILL)


def test_busy_is_read_from_heartbeats() -> None:
    one, busy = worker("prefill"), Busy()
    for at, step_s in ((1.0, 0.0), (2.0, 0.5), (4.0, 1.5), (5.0, 0.0), (6.0, 0.25)):  # then another life's counters
        one.last_beat_at, one.stats = at, WorkerStats(step_s=step_s)
        shares = dict(busy.look([one]))
    assert shares == {"prefill-0": 0.25}
    assert busy.look([]) == {}


# ---- patience --------------------------------------------------------------------------------------------------------


def sizes(needs: list[float]) -> list[int]:
    pool = PoolSize(Bounds(1, 4), 1, up_s=3.0, down_s=10.0)
    return [pool.observe(need, float(now)) for now, need in enumerate(needs)]


def test_a_pool_grows_to_what_it_needed_all_the_time() -> None:
    assert sizes([3.0] * 6) == [1, 1, 1, 3, 3, 3]
    assert sizes([3.0, 3.0, 0.0] * 4) == [1] * 12, "bursts add nobody"


def test_a_pool_shrinks_to_the_most_it_needed() -> None:
    found = sizes([3.0] * 5 + [0.2] * 20)
    assert found[4] == 3
    assert found[13:16] == [3, 3, 1], "the last second of the load is ten seconds old"
    assert sizes([3.0] * 5 + [0.2] * 6 + [2.5] + [0.2] * 20)[-12:-9] == [3, 3, 1], "a pause is no end"


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 3), st.integers(0, 5))
def test_a_pool_stays_within_its_bounds(needs: list[float], fewest: int, more: int) -> None:
    pool = PoolSize(Bounds(fewest, fewest + more), fewest, 2.0, 5.0)
    for now, need in enumerate(needs):
        assert fewest <= pool.observe(need, float(now)) <= fewest + more


@given(st.lists(st.floats(0, 8), min_size=1, max_size=80))
def test_a_pool_does_not_flap(needs: list[float]) -> None:
    """Between growing and shrinking again lies the whole patience of the way down."""
    pool = PoolSize(Bounds(1, 8), 1, 3.0, 10.0)
    grew_at = float("-inf")
    for now, need in enumerate(needs):
        before, after = pool.size, pool.observe(need, float(now))
        assert not (after < before and now - grew_at < 7), "what made it grow is still in the window"
        grew_at = float(now) if after > before else grew_at


# ---- roles -----------------------------------------------------------------------------------------------------------


def pools(num_prefill: int, num_decode: int) -> list[WorkerState]:
    return [worker("prefill", i) for i in range(num_prefill)] + [worker("decode", i) for i in range(num_decode)]


def run(
    workers: list[WorkerState], needs: dict[str, float], seconds: int, roles: Roles, start: int = 0
) -> list[tuple[int, Switch]]:
    found = [(now, roles.decide(workers, needs, float(now))) for now in range(start, start + seconds)]
    return [(now, switch) for now, switch in found if switch is not None]


def test_one_worker_goes_where_it_is_short_after_the_patience_and_the_next_after_the_cooldown() -> None:
    workers = pools(3, 1)
    found = run(workers, {"prefill": 0.3, "decode": 2.5}, 100, Roles(5.0, 60.0))
    assert found == [(5, Switch("prefill-0", "decode")), (70, Switch("prefill-0", "decode"))]


def test_the_one_with_least_to_hand_over_goes() -> None:
    workers = pools(1, 3)
    workers[1].blocks_at_end = 5
    workers[2].blocks_at_end = 3
    workers[3].blocks_at_end = 4
    ((_, switch),) = run(workers, {"prefill": 3.0, "decode": 0.5}, 10, Roles(5.0, 60.0))
    assert switch == Switch("decode-1", "prefill")


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "needs"),
    [
        (1, 1, {"prefill": 0.0, "decode": 5.0}),  # never the last
        (2, 1, {"prefill": 0.8, "decode": 5.0}),  # it would be short itself
        (2, 2, {"prefill": 0.1, "decode": 1.9}),  # nobody is short
        (2, 2, {"prefill": 3.0, "decode": 3.0}),  # both are
        (0, 3, {"prefill": 3.0, "decode": 0.1}),  # nobody prefills, because nobody wanted that
    ],
)
def test_who_stays(num_prefill: int, num_decode: int, needs: dict[str, float]) -> None:
    assert run(pools(num_prefill, num_decode), needs, 200, Roles(5.0, 10.0)) == []


def test_a_break_begins_the_patience_anew_and_so_does_a_worker_that_drains() -> None:
    workers, roles = pools(2, 1), Roles(5.0, 10.0)
    short, fine = {"prefill": 0.1, "decode": 2.0}, {"prefill": 0.1, "decode": 0.5}
    assert run(workers, short, 4, roles) == run(workers, fine, 1, roles, 4) == run(workers, short, 5, roles, 5) == []
    workers[0].state = "draining"
    assert run(workers, short, 50, roles, 10) == []
    workers[0].state = "ready"
    assert [now for now, _ in run(workers, short, 8, roles, 60)] == [65]
