"""A scheduling decision, in CPU time of one core: many workers, a long queue, no cluster and no sockets.

Half of the workers prefill. Every decode worker runs as many sequences as it may, and `--queued` requests of 50 tenants in two
classes wait; then one sequence after the other ends, and each end lets one request in: `decide` is that one call of
Scheduler.decisions, `submit` the call that puts another request into the queue behind it. Prompts of 24 hash blocks, half of them
shared.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Iterator
from typing import Any

from configs.schema import SchedulerConfig
from configs.tenants import SloClass, Tenant, Tenants
from protocol.kv import KVLayout
from protocol.messages import Admit, Outcome, Progress, WorkerInfo
from protocol.ticket import Ticket
from scheduler.latency import quantile
from scheduler.scheduler import Scheduler

NUM_TENANTS = 50
NUM_HASHES = 24
PROMPT_LEN = NUM_HASHES * 64 + 20
GOALS_US = {64: 150.0, 1024: 400.0}  # p50 of decide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("-n", "--decisions", type=int, default=2000)
    parser.add_argument("--seqs", type=int, default=8, help="sequences that each decode worker runs when it is full")


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = [measure(num, args.queued, args.decisions, args.seqs) for num in args.workers]
    print(f"{'workers':>8} {'queued':>7} {'decide p50':>11} {'p99':>8} {'submit p50':>11} {'p99':>8} {'decisions/s':>12}   (us)")
    for row in rows:
        print(
            f"{row['workers']:>8} {row['queued']:>7} {row['decide_us']['p50']:>11.0f} {row['decide_us']['p99']:>8.0f} "
            f"{row['submit_us']['p50']:>11.0f} {row['submit_us']['p99']:>8.0f} {row['decisions_per_s']:>12.0f}"
        )
    return {"rows": rows, "goals_us": GOALS_US}


def measure(num_workers: int, num_queued: int, num_decisions: int, num_seqs: int) -> dict[str, Any]:
    """One row. Times in microseconds; decisions_per_s: submit, decide, first token and end of a request together."""
    scheduler, rng = _scheduler(num_workers, num_queued, num_seqs), random.Random(1)
    admits = _admits(rng)
    now, running = 0.0, []
    while len(running) < num_workers // 2 * num_seqs:  # until all are full
        scheduler.submit(next(admits), now)
        now += 0.001
        for ticket in scheduler.decisions(now):
            assert isinstance(ticket, Ticket), ticket
            running.append(ticket)
            scheduler.progress(Progress(ticket.request_id, ticket.epoch, 0.01), now)
    while len(scheduler.queue) < num_queued:
        scheduler.submit(next(admits), now)
    running += [ticket for ticket in scheduler.decisions(now) if isinstance(ticket, Ticket)]
    rng.shuffle(running)
    decide, submit, whole = [], [], []
    gc.collect()
    gc.freeze()
    for _ in range(num_decisions):
        now += 0.001
        over, admit = running.pop(), next(admits)
        began = time.process_time()
        scheduler.outcome(_outcome(over), now)
        ended = time.process_time()
        placed = scheduler.decisions(now)
        decided = time.process_time()
        scheduler.submit(admit, now)
        submitted = time.process_time()
        tickets = [ticket for ticket in placed if isinstance(ticket, Ticket)]
        for ticket in tickets:
            scheduler.progress(Progress(ticket.request_id, ticket.epoch, 0.01), now)
        done = time.process_time()
        if len(tickets) == 1:
            decide.append(1e6 * (decided - ended))
        submit.append(1e6 * (submitted - decided))
        whole.append(done - began)
        running = tickets + running
        assert running, "nothing was placed"
    gc.unfreeze()
    scheduler.check_integrity()
    assert len(decide) > num_decisions // 2, f"only {len(decide)} of {num_decisions} ends let one request in"
    return {
        "workers": num_workers,
        "queued": num_queued,
        "decisions": len(decide),
        "decide_us": _summary(decide),
        "submit_us": _summary(submit),
        "decisions_per_s": len(whole) / sum(whole),
    }


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": quantile(ordered, 0.5), "p99": quantile(ordered, 0.99), "mean": sum(ordered) / len(ordered)}


def _scheduler(num_workers: int, num_queued: int, num_seqs: int) -> Scheduler:
    slow = SloClass(ttft_s=3600.0, tpot_s=1.0, band=1, when_late="queue")
    classes = {"interactive": SloClass(ttft_s=1800.0, tpot_s=0.5, band=0), "standard": slow}
    tenants = {f"t{i}": Tenant(slo_class="standard", weight=1.0 + i % 3) for i in range(NUM_TENANTS)}
    config = SchedulerConfig(
        max_queue_requests=2 * num_queued, max_queue_tokens=10**12, max_queue_bytes=10**12, queue_timeout_s=3600
    )
    scheduler = Scheduler(config, tenants=Tenants(classes=classes, tenants=tenants), draw=lambda: 0.5)
    for i in range(num_workers):
        role = "prefill" if i % 2 else "decode"
        info = WorkerInfo(
            incarnation=f"{role}-{i}#1", role=role, name=f"{role}:{i}", address=f"h{i}:1", model="m",
            layout=KVLayout(32, 8, 128, 16, "float16", "hash"), num_blocks=100_000, max_model_len=131_072, max_num_seqs=num_seqs,
            pid=i, host=f"h{i}", device="cuda", max_num_batched_tokens=2048,
        )  # fmt: skip
        scheduler.register(info, 0.0)
    for cost in scheduler.costs.models.values():
        for n in (256, 512, 1024, 2048, 4096) * 5:
            cost.observe_prefill(n, 0, 0.01 + 2e-5 * n)
            cost.observe_decode(n // 64, n * 16, 0.01 + 1e-4 * n / 64 + 1e-8 * n * 16)
            cost.observe_transfer(n * 1e5, 0.002 + n * 1e-7)
    return scheduler


def _admits(rng: random.Random) -> Iterator[Admit]:
    number = 0
    while True:
        number += 1
        prefix, tenant = rng.randrange(200), rng.randrange(NUM_TENANTS)
        shared = tuple(b"%4d%4d%8d" % (tenant, prefix, i) for i in range(NUM_HASHES // 2))
        own = tuple(b"%8d%8d" % (number, i) for i in range(NUM_HASHES // 2))
        yield Admit(
            request_id=f"r{number}", model="m", tenant=f"t{tenant}", slo_class="interactive" if number % 4 == 0 else "standard",
            priority=0, prompt_len=PROMPT_LEN + rng.randrange(400), max_tokens=256, prefix_hashes=shared + own, deadline_s=3600.0,
        )  # fmt: skip


def _outcome(ticket: Ticket) -> Outcome:
    return Outcome(
        request_id=ticket.request_id, epoch=ticket.epoch, kind="finished", tenant="t1", slo_class="standard",
        prompt_tokens=PROMPT_LEN, cached_tokens=0, output_tokens=100, queue_s=0.1, ttft_s=0.2, tpot_s=0.012, e2e_s=2.0,
    )  # fmt: skip
