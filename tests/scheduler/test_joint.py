"""The default placer against a slow, obvious twin, and its choices one by one."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from configs.schema import SchedulerConfig
from configs.tenants import SloClass, Tenant, Tenants
from protocol.messages import Progress, WorkerBeat, WorkerStats
from protocol.ticket import Ticket
from scheduler.ledger import WorkerState
from scheduler.scheduler import Scheduler
from scheduler.view import View
from tests.scheduler.play import ask, info, teach

MODEL = "m"


def made(of: list[Any], ttft_s: float = 5.0, tpot_s: float = 0.05, **config: Any) -> Scheduler:
    classes = {"standard": SloClass(ttft_s=ttft_s, tpot_s=tpot_s), "loose": SloClass(ttft_s=50.0, tpot_s=0.5, band=2)}
    scheduler = Scheduler(
        SchedulerConfig(heartbeat_misses=1000, **config),
        tenants=Tenants(classes=classes, tenants={"default": Tenant()}),
        draw=lambda: 0.5,
    )
    for worker in of:
        scheduler.register(worker, 0.0)
    teach(scheduler)
    return scheduler


def place(scheduler: Scheduler, request_id: str, now: float = 0.0, **changes: Any) -> Ticket:
    scheduler.submit(ask(request_id, **changes), now)
    (ticket,) = scheduler.decisions(now)
    assert isinstance(ticket, Ticket), ticket
    return ticket


def twin_ttft(worker: WorkerState, prompt_len: int, cached: int, now: float) -> float:
    prefill = worker.cost.prefill_s(prompt_len, cached) * worker.prefill_drift.factor
    layout = worker.info.layout
    return worker.prefill_queue_s(now) + prefill + worker.cost.transfer_s(layout.num_blocks_for(prompt_len) * layout.block_nbytes)


def twin_tpot(worker: WorkerState, prompt_len: int, expected: float, mean: float, until: float) -> float:
    cost, drift = worker.cost, worker.decode_drift.factor
    step = cost.decode_s(worker.num_decoding, worker.num_context_tokens) * drift
    survivors = worker.num_decoding * math.exp(-until / (step * mean))
    coming = sum(e.num_context_tokens for e in worker.entries.values() if e.first_token_at is None)
    decoding = worker.num_context_tokens - coming
    context = decoding * survivors / max(1, worker.num_decoding) + coming + prompt_len + expected / 2
    stalls = worker.prefill_backlog_s / mean
    return cost.decode_s(survivors + worker.num_coming + 1, context) * drift + stalls


@pytest.mark.parametrize("seed", range(5))
def test_the_columns_say_what_the_workers_say(seed: int) -> None:
    rng = random.Random(seed)
    workers = [info(f"p{i}", "prefill", num_blocks=rng.choice([300, 5000])) for i in range(4)]
    workers += [info(f"d{i}", "decode", max_num_seqs=rng.choice([8, 64])) for i in range(5)]
    scheduler = made(workers, max_deflected_share=0.0)
    now, running = 0.0, []
    hashes = [tuple(bytes([k, i]) * 8 for i in range(20)) for k in range(3)]
    for i in range(120):
        now += rng.random() * 0.05
        prefix = rng.choice(hashes)[: rng.randrange(20)]
        scheduler.submit(ask(f"r{i}", prompt_len=64 * len(prefix) + rng.randint(1, 300), prefix_hashes=prefix), now)
        running += [d for d in scheduler.decisions(now) if isinstance(d, Ticket)]
        if running and rng.random() < 0.7:
            ticket = running.pop(rng.randrange(len(running)))
            scheduler.progress(Progress(ticket.request_id, ticket.epoch, 0.1), now)
        scheduler.check_integrity()
        admit = ask("look", prompt_len=rng.randint(2, 1500), prefix_hashes=prefix)
        pool, matches, output = scheduler.pools[MODEL], scheduler.index.match(prefix), scheduler.costs.output(MODEL)
        view = View(admit, pool, output, matches, scheduler.rules, now)
        seen = view.prefills(pool.prefill, view.usable(pool.prefill))
        for row, worker in enumerate(pool.prefill.workers):
            cached = min(64 * matches.get(worker.incarnation, 0), admit.prompt_len - 1)
            fits = worker.info.layout.num_blocks_for(admit.prompt_len) <= worker.info.num_blocks
            wanted = twin_ttft(worker, admit.prompt_len, cached, now) if fits else math.inf
            assert seen.ttft_s[row] == pytest.approx(wanted)
        decodes = view.decodes(pool.decode, view.usable(pool.decode), 0.3)
        for row, worker in enumerate(pool.decode.workers):
            wanted = twin_tpot(worker, admit.prompt_len, view.expected, view.mean, 0.3)
            assert decodes.tpot_s[row] == pytest.approx(wanted)


def test_a_busy_pool_goes_where_the_prefix_is_and_an_idle_one_where_it_is_quickest() -> None:
    scheduler = made([info("p0", "prefill"), info("p1", "prefill"), info("d", "decode")], max_deflected_share=0.0)
    hashes = tuple(bytes([i]) * 16 for i in range(20))
    first = place(scheduler, "a", prompt_len=1300, prefix_hashes=hashes)
    assert first.prefill is not None
    idle = place(scheduler, "b", prompt_len=1300, prefix_hashes=hashes[:4])
    assert idle.prefill is not None
    assert idle.prefill.incarnation != first.prefill.incarnation, "a quarter of it is not worth the queue"


def test_a_promise_that_is_there_already_is_kept() -> None:
    """A loose request may not slow down the worker on which a tight one runs, though its own promise would allow it."""
    scheduler = made([info("d", "decode")], tpot_s=0.0125, disaggregation_threshold=10_000)
    place(scheduler, "tight", prompt_len=100)
    placed = 0
    for i in range(20):
        scheduler.submit(ask(f"loose{i}", prompt_len=20, slo_class="loose"), 0.0)
        placed += sum(isinstance(d, Ticket) for d in scheduler.decisions(0.0))
    assert 0 <= placed <= 3, "half a millisecond each, 12.5 are promised and ten are taken"


def test_a_looser_class_fills_one_worker_and_leaves_the_other_quick() -> None:
    scheduler = made([info("d0", "decode"), info("d1", "decode")], disaggregation_threshold=10_000)
    found = {place(scheduler, f"l{i}", prompt_len=20, slo_class="loose").decode.incarnation for i in range(8)}
    assert len(found) == 1
    spread = {place(scheduler, f"s{i}", prompt_len=20).decode.incarnation for i in range(4)}
    assert spread - found, "the tightest class goes where steps are short"


def test_a_burst_is_deflected_to_decode_workers_with_slack_and_not_without() -> None:
    for share, wanted in ((0.5, True), (0.0, False)):
        scheduler = made([info("p", "prefill"), info("d0", "decode"), info("d1", "decode")], ttft_s=0.2, max_deflected_share=share)
        scheduler.admission = False  # the door would send them away
        for i in range(6):
            scheduler.submit(ask(f"r{i}", prompt_len=1000), 0.0)
        tickets = [d for d in scheduler.decisions(0.0) if isinstance(d, Ticket)]
        assert any(t.prefill is None for t in tickets) == wanted, share


def test_overflow_workers_come_last() -> None:
    scheduler = made(
        [info("p", "prefill"), info("d", "decode", max_num_seqs=2), info("o", "decode", is_overflow=True, can_prefill=False)]
    )
    assert [place(scheduler, f"r{i}", prompt_len=20).decode.incarnation for i in range(4)] == ["d#1", "d#1", "o#1", "o#1"]
    alone = made([info("o", "decode", is_overflow=True)])
    assert place(alone, "a").prefill is None


def test_the_lowest_band_takes_what_may_be_taken_away_and_the_others_do_not() -> None:
    for slo_class, wanted in (("loose", "p1#1"), ("standard", "p0#1")):
        scheduler = made([info("p0", "prefill"), info("p1", "prefill", is_spot=True), info("d", "decode")])
        ticket = place(scheduler, "a", slo_class=slo_class)
        assert ticket.prefill is not None
        assert ticket.prefill.incarnation == wanted


def test_between_equals_the_cheaper_is_taken() -> None:
    scheduler = made([info("p0", "prefill", price_per_hour=3.0), info("p1", "prefill", price_per_hour=1.0), info("d", "decode")])
    ticket = place(scheduler, "a")
    assert ticket.prefill is not None
    assert ticket.prefill.incarnation == "p1#1"


def two_tenants() -> Tenants:
    return Tenants(classes={"standard": SloClass(ttft_s=5.0, tpot_s=0.5)}, tenants={"quiet": Tenant(), "loud": Tenant()})


def test_who_asks_for_less_goes_first_on_the_prefill_worker() -> None:
    scheduler = made([info("p", "prefill"), info("d", "decode", num_blocks=10_000)])
    scheduler.set_tenants(two_tenants(), 0.0)
    first = place(scheduler, "l0", tenant="loud", prompt_len=800)
    assert not first.goes_first, "nobody else is about"
    for i in range(1, 30):
        scheduler.submit(ask(f"l{i}", tenant="loud", prompt_len=800), 0.001 * i)
        scheduler.decisions(0.001 * i)
    assert len(scheduler.queue) > 10, "the flood waits"
    scheduler.submit(ask("q", tenant="quiet", prompt_len=800), 0.05)
    (ticket,) = [found for found in scheduler.decisions(0.05) if isinstance(found, Ticket) and found.request_id == "q"]
    assert ticket.goes_first
    assert ticket.prefill is not None, "it need not wait for the prompt under way, nor go elsewhere"
    overtaken = scheduler.ledger.entries["l0"]
    assert overtaken.was_overtaken, "how long that one takes now says nothing of prompts"
    scheduler.check_integrity()


def test_who_outlives_its_expected_length_is_taken_to_hold_more() -> None:
    scheduler = made([info("p", "prefill"), info("d", "decode", num_blocks=10_000)])
    ticket = place(scheduler, "r", prompt_len=320, max_tokens=4096)
    worker = next(w for w in scheduler.workers.values() if w.info.role == "decode")
    scheduler.progress(Progress("r", ticket.epoch, 0.1), 1.0)
    entry = scheduler.ledger.entries["r"]
    before, step = worker.blocks_at_end, worker.cost.decode_s(1, entry.num_context_tokens)
    for now, grows in ((1.0 + 0.5 * entry.expected_output * step, False), (1.0 + 3 * entry.expected_output * step, True)):
        scheduler.heartbeat(WorkerBeat("d#1", "ready", WorkerStats(num_free_blocks=9000), (("r", ticket.epoch),)), now)
        assert (worker.blocks_at_end > before) is grows
    assert worker.blocks_at_end <= 4096 // 16 + 20 + 1, "never beyond what it may have"
    scheduler.check_integrity()
