"""The scheduler's promises, one by one under a clock of our own. The same under random events: test_scheduler_properties.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable

import pytest

from configs.schema import SchedulerConfig
from protocol.errors import Failure, InvalidRequest, NoWorker, Overloaded, PromptTooLong, TenantOverLimit
from protocol.kv import KVLayout
from protocol.messages import Admit, GatewayBeat, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerPhase, WorkerStats
from protocol.ticket import Ticket
from scheduler.ledger import Entry
from scheduler.scheduler import Scheduler

MODEL = "m"


def worker(name: str, role: str = "decode", **changes: object) -> WorkerInfo:
    fields: dict[str, object] = {
        "incarnation": f"{name}#1",
        "role": role,
        "name": name,
        "address": f"{name}:1",
        "model": MODEL,
        "layout": KVLayout(2, 2, 16, 16, "float32", "hash"),
        "num_blocks": 1000,
        "max_model_len": 16_000,
        "max_num_seqs": 64,
        "pid": 1,
        "host": "h",
        "device": "cpu",
    }
    return WorkerInfo(**{**fields, **changes})  # type: ignore[arg-type]


def admit(request_id: str, **changes: object) -> Admit:
    fields: dict[str, object] = {
        "request_id": request_id,
        "model": MODEL,
        "tenant": "t",
        "slo_class": "standard",
        "priority": 0,
        "prompt_len": 200,
        "max_tokens": 50,
    }
    return Admit(**{**fields, **changes})  # type: ignore[arg-type]


def outcome(request_id: str, epoch: int = 1, **changes: object) -> Outcome:
    fields: dict[str, object] = {
        "request_id": request_id,
        "epoch": epoch,
        "kind": "finished",
        "tenant": "t",
        "slo_class": "standard",
        "prompt_tokens": 200,
        "cached_tokens": 0,
        "output_tokens": 50,
        "queue_s": 0.0,
        "ttft_s": 0.5,
        "tpot_s": 0.05,
        "e2e_s": 3.0,
    }
    return Outcome(**{**fields, **changes})  # type: ignore[arg-type]


def beat(name: str, running: Iterable[tuple[str, int]] = (), state: str = "ready", **stats: object) -> WorkerBeat:
    return WorkerBeat(f"{name}#1", state, WorkerStats(**{"num_free_blocks": 1000, **stats}), tuple(running))  # type: ignore[arg-type]


def make(*workers: WorkerInfo, config: SchedulerConfig | None = None, **kwargs: object) -> Scheduler:
    scheduler = Scheduler(config or SchedulerConfig(), draw=lambda: 0.5, **kwargs)  # type: ignore[arg-type]
    for info in workers:
        scheduler.register(info, 0.0)
    return scheduler


def tickets(scheduler: Scheduler, now: float) -> list[Ticket]:
    found = scheduler.decisions(now)
    scheduler.check_integrity()
    assert all(isinstance(d, Ticket) for d in found), found
    return found  # type: ignore[return-value]


def place(scheduler: Scheduler, message: Admit, now: float = 0.0) -> Ticket:
    scheduler.submit(message, now)
    (ticket,) = tickets(scheduler, now)
    return ticket


# ---- placement -------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_disaggregated_and_a_short_one_is_not() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"))
    long, short = place(scheduler, admit("a", prompt_len=200)), place(scheduler, admit("b", prompt_len=15))
    assert long.prefill is not None
    assert long.prefill.incarnation == "p#1"
    assert long.decode.address == "d:1"
    assert long.predicted_ttft_s > 0
    assert short.prefill is None


def test_without_a_prefill_worker_decode_prefills_itself() -> None:
    scheduler = make(worker("d"))
    assert place(scheduler, admit("a", prompt_len=2000)).prefill is None
    scheduler.register(worker("p", "prefill"), 1.0)
    assert place(scheduler, admit("b", prompt_len=2000), 1.0).prefill is not None
    assert place(scheduler, admit("c", prompt_len=2000, local_prefill=True), 1.0).prefill is None
    assert place(scheduler, admit("e", prompt_len=2000, excluded=("p#1",)), 1.0).prefill is None


def test_a_prompt_that_decode_holds_already_stays_there() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"), worker("e"))
    hashes = tuple(bytes([i]) * 16 for i in range(4))  # 256 of 260 tokens
    first = place(scheduler, admit("a", prompt_len=260, prefix_hashes=hashes))
    again = place(scheduler, admit("b", prompt_len=260, prefix_hashes=hashes))
    other = place(scheduler, admit("c", prompt_len=260, prefix_hashes=tuple(h[::-1] + b"x" for h in hashes)))
    assert first.prefill is not None
    assert again.prefill is None, "4 uncached tokens are below the threshold"
    assert again.decode == first.decode
    assert other.prefill is not None
    cold = make(worker("p", "prefill"), worker("d"), enable_prefix_caching=False)
    place(cold, admit("a", prompt_len=260, prefix_hashes=hashes))
    assert place(cold, admit("b", prompt_len=260, prefix_hashes=hashes)).prefill is not None


def test_prefill_goes_where_the_first_token_is_predicted_soonest() -> None:
    scheduler = make(worker("p", "prefill"), worker("q", "prefill"), worker("d", max_num_seqs=1000))
    hashes = tuple(bytes([i]) * 16 for i in range(30))
    busy = place(scheduler, admit("a", prompt_len=2000, prefix_hashes=hashes))
    idle = place(scheduler, admit("b", prompt_len=2000))
    assert busy.prefill != idle.prefill, "the second goes to the idle one"
    warm = place(scheduler, admit("c", prompt_len=2000, prefix_hashes=hashes))
    assert warm.prefill == busy.prefill, "80 tokens behind a queue beat 2000 behind a queue as long"
    scheduler.progress(Progress("b", 1, 0.1), 0.1)
    free = place(scheduler, admit("d", prompt_len=500), 0.1)
    assert free.prefill == idle.prefill, "its queue is empty again"


def test_one_class_is_spread_over_the_decode_workers() -> None:
    scheduler = make(worker("d"), worker("e"), config=SchedulerConfig(tpot_target_s=0.03))
    first = [place(scheduler, admit(f"a{i}", prompt_len=10)).decode.address for i in range(4)]
    assert sorted(first) == ["d:1", "d:1", "e:1", "e:1"], "the least step time: with one class packing helps nobody"
    rest = [place(scheduler, admit(f"b{i}", prompt_len=10)).decode.address for i in range(16)]
    assert set(rest) == {"d:1", "e:1"}
    loads = sorted(w.num_coming for w in scheduler.workers.values())
    assert loads == [10, 10], "a promise that nobody keeps is broken evenly while predictions are not to be trusted yet"


def test_a_decode_worker_is_not_filled_beyond_its_sequences_or_blocks() -> None:
    scheduler = make(worker("d", max_num_seqs=4))
    for i in range(6):
        scheduler.submit(admit(f"r{i}", prompt_len=10), 0.0)
    assert [t.request_id for t in tickets(scheduler, 0.0)] == ["r0", "r1", "r2", "r3"]
    scheduler.outcome(outcome("r2"), 1.0)
    assert [t.request_id for t in tickets(scheduler, 1.0)] == ["r4"]
    small = make(worker("d", num_blocks=40))  # 640 tokens; one of these takes about 13 + 4 blocks
    for i in range(4):
        small.submit(admit(f"r{i}"), 0.0)
    assert len(tickets(small, 0.0)) == 2


def test_free_blocks_are_what_the_last_heartbeat_said_and_what_happened_since() -> None:
    scheduler = make(worker("d", num_blocks=100))
    scheduler.heartbeat(beat("d", num_free_blocks=14, num_used_blocks=86), 0.5)
    scheduler.submit(admit("a"), 0.6)
    scheduler.submit(admit("b"), 0.6)
    assert [t.request_id for t in tickets(scheduler, 0.6)] == ["a"], "13 of 14 blocks"
    scheduler.heartbeat(beat("d", [("a", 1)], num_free_blocks=1, num_used_blocks=99), 1.5)
    assert tickets(scheduler, 1.5) == []
    scheduler.outcome(outcome("a"), 1.6)
    assert [t.request_id for t in tickets(scheduler, 1.6)] == ["b"], "the 13 came back before any heartbeat said so"


# ---- order, epochs, refusals -----------------------------------------------------------------------------------------


def test_first_come_first_served_and_resumptions_at_the_head() -> None:
    scheduler = make(worker("d", max_num_seqs=1))
    place(scheduler, admit("running", prompt_len=10))
    for name in ("a", "b", "c"):
        scheduler.submit(admit(name, prompt_len=10), 0.0)
    scheduler.submit(admit("x", prompt_len=10, resumption=True, last_epoch=4), 0.0)
    order = []
    current = "running"
    for _ in range(4):
        scheduler.outcome(outcome(current), 1.0)
        (ticket,) = tickets(scheduler, 1.0)
        order.append((ticket.request_id, ticket.epoch))
        current = ticket.request_id
    assert order == [("x", 5), ("a", 1), ("b", 1), ("c", 1)]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    scheduler = make(worker("d", num_blocks=100))
    place(scheduler, admit("running"))
    scheduler.submit(admit("large", prompt_len=1500), 0.0)
    scheduler.submit(admit("small", prompt_len=10), 0.0)
    assert tickets(scheduler, 0.0) == []
    scheduler.outcome(outcome("running"), 1.0)
    assert [t.request_id for t in tickets(scheduler, 1.0)] == ["large"]


def test_a_refused_reservation_keeps_its_position_and_does_not_come_back_at_once() -> None:
    scheduler = make(worker("d", max_num_seqs=8))
    assert place(scheduler, admit("a")).epoch == 1
    scheduler.submit(admit("b"), 0.0)
    assert len(tickets(scheduler, 0.0)) == 1
    scheduler.submit(admit("a", resumption=True, last_epoch=1), 0.1)  # nobody is blamed: there was no room
    scheduler.submit(admit("b", resumption=True, last_epoch=1), 0.1)
    assert tickets(scheduler, 0.1) == [], "the worker said that it is full; asking again at once is no use"
    scheduler.heartbeat(beat("d"), 1.0)
    assert [(t.request_id, t.epoch) for t in tickets(scheduler, 1.0)] == [("a", 2), ("b", 2)]
    assert scheduler.status(1.0)["counters"]["reservations_refused"] == 2


def test_epochs_only_grow_whatever_the_gateway_says() -> None:
    scheduler = make(worker("d"))
    assert place(scheduler, admit("a", last_epoch=7)).epoch == 8
    assert place(scheduler, admit("a", resumption=True, excluded=("x",), last_epoch=0), 2.0).epoch == 9
    scheduler.outcome(outcome("a", 9), 3.0)
    assert place(scheduler, admit("a"), 4.0).epoch == 10


def test_a_full_queue_refuses_with_a_computed_time() -> None:
    config = SchedulerConfig(max_queue_requests=4, max_queue_tokens=10**6)
    scheduler = make(worker("d", max_num_seqs=1), config=config)
    place(scheduler, admit("running", prompt_len=10))
    for i in range(4):
        scheduler.submit(admit(f"r{i}"), 0.0)
    with pytest.raises(Overloaded, match="max_queue_requests = 4") as refused:
        scheduler.submit(admit("late"), 0.0)
    slow = refused.value.retry_after
    assert slow is not None
    assert 1.0 <= slow <= 600 * 1.2
    scheduler.submit(admit("back", resumption=True, last_epoch=1), 0.0)  # admitted once, never refused
    scheduler.costs.of(MODEL, "cpu", "decode").decode.theta[0] /= 10
    scheduler.costs.of(MODEL, "cpu", "decode").prefill.theta[1] /= 10
    with pytest.raises(Overloaded) as refused:
        scheduler.submit(admit("late"), 0.0)
    assert refused.value.retry_after is not None
    assert refused.value.retry_after < slow, "a faster cluster says so"
    assert scheduler.status(0.0)["rejections"] == {"queue_requests": 2}


@pytest.mark.parametrize("bound", ["requests", "tokens", "bytes"])
def test_each_bound_holds(bound: str) -> None:
    limits = {"max_queue_requests": 10**6, "max_queue_tokens": 10**9, "max_queue_bytes": 10**9}
    limits[f"max_queue_{bound}"] = {"requests": 3, "tokens": 700, "bytes": 9000}[bound]
    scheduler = make(config=SchedulerConfig(**limits))  # nobody is alive yet, so everything waits
    for i in range(3):
        scheduler.submit(admit(f"r{i}"), 0.0)
    with pytest.raises(Overloaded, match=f"scheduler.max_queue_{bound}"):
        scheduler.submit(admit("late"), 0.0)
    assert len(scheduler.queue) == 3
    alone = make(config=SchedulerConfig(max_queue_tokens=100))
    alone.submit(admit("huge", prompt_len=5000), 0.0)
    assert len(alone.queue) == 1, "an empty queue takes any one request"


def test_who_fills_the_queue_alone_is_told_so() -> None:
    scheduler = make(config=SchedulerConfig(max_queue_requests=4))
    for i in range(3):
        scheduler.submit(admit(f"r{i}", tenant="greedy"), 0.0)
    scheduler.submit(admit("x", tenant="modest", prompt_len=10), 0.0)
    with pytest.raises(TenantOverLimit, match="greedy"):
        scheduler.submit(admit("r9", tenant="greedy"), 0.0)
    scheduler.submit(admit("y", tenant="modest"), 0.0)  # makes the one who has more give way
    ((request_id, failure),) = scheduler.decisions(0.0)
    assert (request_id, failure.kind) == ("r2", "TenantOverLimit")
    assert failure.retry_after is not None
    assert failure.retry_after >= 1.0
    assert scheduler.status(0.0)["rejections"] == {"tenant_share": 2}


def test_waiting_ends_at_the_deadline() -> None:
    scheduler = make(worker("d", max_num_seqs=1), config=SchedulerConfig(queue_timeout_s=10))
    place(scheduler, admit("running", prompt_len=10))
    scheduler.submit(admit("a"), 0.0)
    scheduler.submit(admit("b", deadline_s=3.0), 0.0)
    assert scheduler.next_wakeup(0.0) == 0.0
    scheduler.decisions(0.0)
    scheduler.heartbeat(beat("d"), 2.0)
    scheduler.decisions(2.0)
    ((request_id, failure),) = scheduler.decisions(3.5)
    assert (request_id, failure.kind) == ("b", "DeadlineExceeded")
    assert failure.retry_after is not None
    assert failure.retry_after > 0
    ((request_id, _),) = scheduler.decisions(10.0)
    assert request_id == "a"
    assert scheduler.status(10.0)["rejections"] == {"queue_timeout": 2}


def test_what_no_pool_can_hold_is_refused_at_the_door() -> None:
    scheduler = make(worker("d", num_blocks=10), worker("e", num_blocks=20))
    with pytest.raises(PromptTooLong, match="320"):
        scheduler.submit(admit("a", prompt_len=300, max_tokens=21), 0.0)
    with pytest.raises(InvalidRequest, match="choices"):
        scheduler.submit(admit("b", prompt_len=250, max_tokens=10, num_choices=8), 0.0)
    assert place(scheduler, admit("c", prompt_len=300, max_tokens=20)).decode.address == "e:1"


# ---- liveness --------------------------------------------------------------------------------------------------------


def test_a_silent_worker_is_dead_and_what_it_ran_is_told() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"), worker("e"))
    a = place(scheduler, admit("a"))
    other = "e" if a.decode.address == "d:1" else "d"
    for now in (1.0, 2.0, 3.0):
        scheduler.heartbeat(beat("p"), now)
        scheduler.heartbeat(beat(other), now)
        assert scheduler.tick(now) == []
    assert scheduler.tick(3.5) == [("a", 1)]
    assert scheduler.ledger.entries == {}
    again = place(scheduler, admit("a", resumption=True, excluded=(a.decode.incarnation,), last_epoch=1), 3.5)
    assert again.decode.address == f"{other}:1"
    assert again.epoch == 2
    assert not scheduler.heartbeat(WorkerBeat(a.decode.incarnation, "ready", WorkerStats()), 3.6), "register again"
    assert scheduler.status(4.0)["counters"]["workers_lost"] == 1


def test_a_prefill_worker_takes_only_what_it_still_prefills_with_it() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"))
    place(scheduler, admit("a"))
    place(scheduler, admit("b"))
    scheduler.progress(Progress("a", 1, 0.3), 0.3)
    assert scheduler.worker_lost("p#1", 0.5) == [("b", 1)]
    assert list(scheduler.ledger.entries) == ["a"]
    scheduler.check_integrity()
    scheduler.outcome(outcome("a"), 1.0)
    assert scheduler.ledger.entries == {}


def test_requests_wait_for_a_worker_that_comes_back_and_not_for_ever() -> None:
    scheduler = make(worker("d"), config=SchedulerConfig(recovery_s=30))
    place(scheduler, admit("a"))
    scheduler.worker_lost("d#1", 10.0)
    scheduler.submit(admit("a", resumption=True, excluded=("d#1",), last_epoch=1), 10.1)
    scheduler.submit(admit("b"), 12.0)
    assert scheduler.decisions(25.0) == []
    scheduler.register(worker("d", incarnation="d#2"), 26.0)
    assert [t.request_id for t in tickets(scheduler, 26.0)] == ["a", "b"]
    scheduler.worker_lost("d#2", 30.0)
    scheduler.submit(admit("c"), 31.0)
    ((request_id, failure),) = scheduler.decisions(62.0)
    assert (request_id, failure.kind) == ("c", "NoWorker")
    with pytest.raises(NoWorker) as refused:
        scheduler.submit(admit("e"), 63.0)
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1.0


def test_one_that_may_use_nobody_does_not_hold_up_the_others() -> None:
    scheduler = make(worker("d"))
    scheduler.submit(admit("picky", resumption=True, excluded=("d#1",), last_epoch=1), 0.0)
    scheduler.submit(admit("a"), 0.0)
    assert [t.request_id for t in tickets(scheduler, 0.0)] == ["a"]


def test_who_was_blamed_is_used_again_where_there_is_no_other_and_it_lives() -> None:
    scheduler = make(worker("d"), config=SchedulerConfig(recovery_s=5))
    place(scheduler, admit("a"))
    again = admit("a", resumption=True, excluded=("d#1",), last_epoch=1)
    scheduler.submit(again, 1.0)
    assert tickets(scheduler, 1.0) == [], "it may be dead, and nobody has noticed yet"
    scheduler.heartbeat(beat("d"), 1.5)
    (ticket,) = tickets(scheduler, 1.5)
    assert (ticket.decode.incarnation, ticket.epoch) == ("d#1", 2)
    scheduler.register(worker("e"), 2.0)
    scheduler.submit(admit("a", resumption=True, excluded=("d#1",), last_epoch=2), 2.0)
    scheduler.heartbeat(beat("d"), 2.1)
    assert [t.decode.incarnation for t in tickets(scheduler, 2.1)] == ["e#1"], "another one is better"


def test_a_blamed_prefill_worker_is_used_again_where_decode_cannot_prefill() -> None:
    scheduler = make(worker("p", "prefill"), worker("d", can_prefill=False))
    assert place(scheduler, admit("a", prompt_len=2000, excluded=("p#1",))).prefill is not None


def test_a_prompt_that_no_prefill_pool_holds_is_prefilled_by_decode() -> None:
    scheduler = make(worker("p", "prefill", num_blocks=10), worker("d"))
    assert place(scheduler, admit("a", prompt_len=160)).prefill is not None
    assert place(scheduler, admit("b", prompt_len=161)).prefill is None
    scheduler.register(worker("q", "prefill"), 0.0)
    ticket = place(scheduler, admit("c", prompt_len=161))
    assert ticket.prefill is not None
    assert ticket.prefill.incarnation == "q#1"


def test_a_request_that_waits_again_is_not_adopted_from_its_former_worker() -> None:
    scheduler = make(worker("d"))
    place(scheduler, admit("a"))
    scheduler.heartbeat(beat("d", [("a", 1)]), 0.5)
    scheduler.submit(admit("a", resumption=True, excluded=("d#1",), last_epoch=1), 0.6)
    assert tickets(scheduler, 0.7) == []
    scheduler.heartbeat(beat("d", [("a", 1)], state="draining"), 1.0)  # it has not noticed yet
    assert scheduler.ledger.entries == {}
    scheduler.register(worker("e"), 1.1)
    scheduler.submit(admit("b"), 1.2)
    assert [(t.request_id, t.epoch) for t in tickets(scheduler, 1.3)] == [("a", 2), ("b", 1)]
    scheduler.worker_lost("e#1", 1.4)
    scheduler.heartbeat(beat("d", [("a", 1)]), 1.5)
    assert scheduler.ledger.entries == {}, "a later attempt was given away: this one is stale"


def test_a_bug_while_one_request_is_placed_fails_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(worker("d"))
    book = scheduler.ledger.book

    def broken(entry: Entry, now: float) -> None:
        book(entry, now)
        assert entry.request_id != "b", "of all invariants, this one"

    monkeypatch.setattr(scheduler.ledger, "book", broken)
    for name in "abc":
        scheduler.submit(admit(name), 0.0)
    found = scheduler.decisions(0.0)
    assert [d.request_id if isinstance(d, Ticket) else (d[0], d[1].kind) for d in found] == ["a", ("b", "InternalError"), "c"]
    assert set(scheduler.ledger.entries) == {"a", "c"}
    assert scheduler.status(0.0)["counters"]["failed"] == 1
    assert len(scheduler.queue) == 0
    scheduler.check_integrity()


def test_choices_that_differ_are_placed_again_though_together_they_have_outgrown_the_pool() -> None:
    scheduler = make(worker("d", num_blocks=20))
    place(scheduler, admit("a", prompt_len=10, max_tokens=300, num_choices=8))
    scheduler.submit(admit("other", prompt_len=10), 0.0)
    resumed = admit(
        "a", prompt_len=210, max_tokens=100, num_choices=8, resumption=True, local_prefill=True, excluded=("d#1",), last_epoch=1
    )
    scheduler.submit(resumed, 1.0)
    scheduler.heartbeat(beat("d", num_free_blocks=20), 1.5)
    assert "a" in [t.request_id for t in tickets(scheduler, 1.5)]


def test_a_draining_worker_gets_nothing_new() -> None:
    scheduler = make(worker("d"), worker("e"))
    scheduler.heartbeat(beat("e", state="draining"), 0.5)
    assert {place(scheduler, admit(f"r{i}"), 0.5).decode.address for i in range(5)} == {"d:1"}


def test_a_restarted_scheduler_learns_from_workers_what_runs() -> None:
    """Truth rule R9."""
    scheduler = make()
    assert not scheduler.heartbeat(beat("d", [("a", 3)]), 0.0)
    scheduler.register(worker("d"), 0.1)
    scheduler.heartbeat(beat("d", [("a", 3), ("b", 1)], num_used_blocks=40, num_free_blocks=960), 1.0)
    assert set(scheduler.ledger.entries) == {"a", "b"}
    assert scheduler.workers["d#1"].num_decoding == 2
    scheduler.check_integrity()
    assert place(scheduler, admit("a", resumption=True, excluded=("z",), last_epoch=3), 1.5).epoch == 4
    scheduler.outcome(outcome("a", 4), 2.0)
    scheduler.outcome(outcome("b", 1), 2.0)
    assert scheduler.ledger.entries == {}
    scheduler.heartbeat(beat("d", [("b", 1)]), 2.1)  # sent before it heard of the end
    assert scheduler.ledger.entries == {}, "what has ended is not adopted"


def test_heartbeats_free_what_ended_without_word() -> None:
    scheduler = make(worker("d"))
    place(scheduler, admit("a"))
    scheduler.heartbeat(beat("d", [("a", 1)]), 1.0)
    for now in (2.0, 3.0):
        scheduler.heartbeat(beat("d"), now)
        assert "a" in scheduler.ledger.entries, "one missing line may be a race"
    scheduler.heartbeat(beat("d"), 4.0)
    assert scheduler.ledger.entries == {}
    scheduler.check_integrity()


def test_a_gateway_frees_what_it_held_by_silence_or_by_omission() -> None:
    scheduler = make(worker("d", max_num_seqs=3), gateway_lease_s=5.0)
    for name in ("a", "b", "c", "waiting"):
        scheduler.submit(admit(name, prompt_len=10), 0.0)
    assert len(tickets(scheduler, 0.0)) == 3
    scheduler.gateway_beat(GatewayBeat("g", (("a", 1), ("b", 1), ("waiting", 0))), 1.0)
    scheduler.gateway_beat(GatewayBeat("h", (("c", 1),)), 1.0)
    scheduler.gateway_beat(GatewayBeat("g", (("b", 1), ("waiting", 0))), 2.0)
    assert set(scheduler.ledger.entries) == {"b", "c"}
    scheduler.gateway_beat(GatewayBeat("h", (("c", 1),)), 6.0)
    scheduler.heartbeat(beat("d", [("b", 1), ("c", 1)]), 6.9)
    scheduler.tick(7.5)
    assert set(scheduler.ledger.entries) == {"c"}
    assert len(scheduler.queue) == 0
    assert tickets(scheduler, 7.5) == []
    counters = scheduler.status(7.5)["counters"]
    assert (counters["gateways_lost"], counters["abandoned"]) == (1, 3)


def test_a_gateway_that_comes_back_has_its_requests_adopted_again() -> None:
    scheduler = make(worker("d"), gateway_lease_s=5.0)
    for name in ("a", "b"):
        place(scheduler, admit(name))
    scheduler.gateway_beat(GatewayBeat("g", (("a", 1), ("b", 1))), 1.0)
    for now in (2.0, 4.0, 6.0):
        scheduler.heartbeat(beat("d", [("a", 1), ("b", 1)]), now)
    scheduler.tick(6.5)
    assert scheduler.ledger.entries == {}
    scheduler.outcome(outcome("b"), 6.6)
    scheduler.gateway_beat(GatewayBeat("g", (("a", 1), ("b", 1))), 7.0)  # made before b's outcome was told
    scheduler.heartbeat(beat("d", [("a", 1), ("b", 1)]), 7.5)
    assert set(scheduler.ledger.entries) == {"a"}, "what was told is over"


# ---- what is seen from outside ---------------------------------------------------------------------------------------


def test_status_is_json_and_says_what_happened() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"))
    phase = WorkerPhase("decode:1", "decode", "e#1", "weights", "12 MB", 3.5)
    scheduler.phase(phase, 0.0)
    place(scheduler, admit("a"))
    scheduler.progress(Progress("a", 1, 0.4), 0.4)
    scheduler.heartbeat(beat("d", [("a", 1)], generation_tokens=3), 1.0)
    scheduler.outcome(outcome("a", ttft_s=0.4, tpot_s=0.25), 2.0)
    scheduler.outcome(outcome("b", kind="cancelled"), 2.0)
    place(scheduler, admit("c"), 2.0)
    status = json.loads(json.dumps(scheduler.status(2.0)))
    assert status["ready"] is True
    assert [w["name"] for w in status["workers"]] == ["p", "d"]
    assert status["workers"][1]["stats"]["generation_tokens"] == 3
    assert status["in_flight"] == {"total": 1, "prefilling": 1, "decoding": 0}
    standard = status["latencies"]["standard"]
    assert standard["ttft_s"]["p99"] == 0.4
    assert standard["kept"] == {"ttft": 1.0, "tpot": 0.0, "both": 0.0}
    assert status["promise"] == {"ttft_s": 2.0, "tpot_s": 0.2}
    assert status["counters"]["finished"] == 1
    assert status["counters"]["cancelled"] == 1
    assert status["starting"][0]["phase"] == "weights"
    scheduler.worker_lost("d#1", 3.0)
    status = scheduler.status(3.0)
    assert not status["ready"]
    assert [(w["name"], w["alive"], w["state"]) for w in status["workers"]] == [("p", True, "ready"), ("d", False, "lost")]
    assert status["totals"]["decode"]["generation_tokens"] == 3, "what the dead did stays counted"
    scheduler.register(worker("d", incarnation="d#2"), 4.0)
    assert [w["alive"] for w in scheduler.status(4.0)["workers"]] == [True, True], "one line per name"


def test_predictions_follow_the_machine() -> None:
    """A machine forty times slower than the prior: after some requests the predicted TTFT is right."""
    scheduler = make(worker("p", "prefill"), worker("d", max_num_seqs=1000))
    now, errors = 0.0, []
    for i in range(60):
        prompt_len = 100 + 37 * (i % 20)
        ticket = place(scheduler, admit(f"r{i}", prompt_len=prompt_len), now)
        actual = 0.3 + prompt_len * 0.04
        errors.append(abs(ticket.predicted_ttft_s - actual) / actual)
        now += actual
        for name in ("p", "d"):
            scheduler.heartbeat(beat(name), now)
        scheduler.progress(Progress(f"r{i}", 1, actual), now)
        scheduler.outcome(outcome(f"r{i}"), now)
    assert errors[0] > 0.9
    assert max(errors[20:]) < 0.1


def test_hundreds_of_workers_and_thousands_of_requests_in_seconds() -> None:
    workers = [worker(f"p{i}", "prefill") for i in range(70)] + [worker(f"d{i}", max_num_seqs=32) for i in range(140)]
    scheduler = make(*workers, config=SchedulerConfig(max_queue_requests=10_000))
    began, placed, now = time.process_time(), 0, 0.0
    running: list[Ticket] = []
    for i in range(5000):
        now += 0.001
        hashes = tuple(bytes([i % 50, j]) * 8 for j in range(24))
        scheduler.submit(admit(f"r{i}", prompt_len=1600, prefix_hashes=hashes), now)
        for ticket in scheduler.decisions(now):
            assert isinstance(ticket, Ticket)
            running.append(ticket)
            placed += 1
        while len(running) > 100:
            ticket = running.pop(0)
            scheduler.progress(Progress(ticket.request_id, ticket.epoch, 0.3), now)
            scheduler.outcome(outcome(ticket.request_id, ticket.epoch), now)
    took = time.process_time() - began
    assert placed == 5000
    assert took < 20.0, f"{took:.1f} s of CPU"
    scheduler.check_integrity()


def test_a_prefill_is_timed_from_when_its_turn_came() -> None:
    """Four prompts placed together and prefilled one after the other, a second each: a second each is what is learnt."""
    scheduler = make(worker("p", "prefill"), worker("d"), config=SchedulerConfig(ttft_target_s=1000))
    for i in range(4):
        place(scheduler, admit(f"r{i}", prompt_len=1000))
    for i in range(4):
        now = float(i + 1)
        scheduler.heartbeat(beat("p"), now)
        scheduler.heartbeat(beat("d"), now)
        scheduler.progress(Progress(f"r{i}", 1, now), now)
    assert scheduler.workers["p#1"].cost.prefill_s(1000, 0) == pytest.approx(1.0, rel=0.05)


def test_implausible_figures_teach_nothing() -> None:
    scheduler = make(worker("p", "prefill"), worker("d"))
    cost = scheduler.workers["d#1"].cost
    before = list(cost.decode.theta), list(cost.prefill.theta)
    place(scheduler, admit("a"))
    scheduler.progress(Progress("a", 1, math.nan), math.inf)
    scheduler.outcome(outcome("a", ttft_s=math.nan, tpot_s=math.inf, e2e_s=-1.0, output_tokens=-5), 1.0)
    scheduler.heartbeat(beat("d", step_s=math.nan, num_steps=5, generation_tokens=5), 1.0)
    scheduler.heartbeat(beat("d", step_s=math.inf, num_steps=9, generation_tokens=9), 2.0)
    assert (list(cost.decode.theta), list(cost.prefill.theta)) == before
    assert scheduler.status(2.0)["latencies"] == {}


def test_failures_are_failures() -> None:
    """What `decisions` returns for a request that waited in vain crosses the wire as it is."""
    scheduler = make()
    scheduler.submit(admit("a", deadline_s=1.0), 0.0)
    ((_, failure),) = scheduler.decisions(2.0)
    assert isinstance(failure, Failure)
