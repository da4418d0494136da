"""A cluster of three lines for the scheduler's tests: prefill workers serve one after the other, decode steps grow with the batch.

Not the simulator (simulation/): small enough that what it does can be seen at once, so that a test of admission tests admission.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from protocol.errors import Failure, TandemError
from protocol.kv import KVLayout
from protocol.messages import Admit, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler

PREFILL = (0.01, 0.0001)  # seconds, seconds a token
DECODE = (0.01, 0.0005)  # seconds, seconds a sequence
LAYOUT = KVLayout(2, 2, 16, 16, "float32", "hash")


def info(name: str, role: str, **changes: Any) -> WorkerInfo:
    fields: dict[str, Any] = {
        "incarnation": f"{name}#1", "role": role, "name": name, "address": f"{name}:1", "model": "m", "layout": LAYOUT,
        "num_blocks": 10_000, "max_model_len": 100_000, "max_num_seqs": 64, "pid": 1, "host": "h", "device": "cuda",
    }  # fmt: skip
    return WorkerInfo(**{**fields, **changes})


def teach(scheduler: Scheduler) -> None:
    """Cost models that know this cluster."""
    for cost in scheduler.costs.models.values():
        for i in range(40):
            n = 100 + 150 * (i % 10)
            cost.observe_prefill(n, 0, PREFILL[0] + PREFILL[1] * n)
            cost.observe_decode(1 + i % 20, (1 + i % 20) * 300, DECODE[0] + DECODE[1] * (1 + i % 20))
            cost.observe_transfer(1e6, 1e-5)


class Play:
    """Events in virtual time. `at` schedules; `submit` asks the scheduler; `on_end` hears how each request ended."""

    def __init__(self, scheduler: Scheduler, num_prefill: int = 1, num_decode: int = 1, **changes: Any) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.output: dict[str, int] = {}
        self.asked: dict[str, tuple[Admit, float]] = {}
        self.first_at: dict[str, float] = {}
        self.ended: dict[str, str] = {}  # "finished" or the failure's kind
        self.running: dict[str, int] = {}  # decode worker -> sequences
        self.placed: list[Ticket] = []
        self.on_refused: Callable[[Admit, Any], None] = lambda *_: None
        self.on_step: Callable[[], None] = lambda: None
        self._steps: dict[str, tuple[int, float, int]] = {}
        self._free_at: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        for i in range(num_prefill):
            scheduler.register(info(f"p{i}", "prefill"), 0.0)
        for i in range(num_decode):
            scheduler.register(info(f"d{i}", "decode", **changes), 0.0)
        teach(scheduler)
        self.at(0.5, self._beat)

    def at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._count), act))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self.decide()
            self.on_step()

    def _beat(self) -> None:
        for worker in list(self.scheduler.workers.values()):
            running = tuple((r, e.epoch) for r, e in (*worker.entries.items(), *worker.prefills.items()))
            free = worker.info.num_blocks - sum(e.num_blocks_now for e in worker.entries.values())
            self.scheduler.heartbeat(
                WorkerBeat(worker.incarnation, "ready", self._stats(worker.incarnation, free), running), self.now
            )
        self.at(self.now + 0.5, self._beat)

    def _stats(self, incarnation: str, num_free_blocks: int) -> WorkerStats:
        """As many steps as fit between two beats, of those who decode now."""
        steps, step_s, tokens = self._steps.get(incarnation, (0, 0.0, 0))
        decoding = self.running.get(incarnation, 0)
        if decoding:
            took = DECODE[0] + DECODE[1] * decoding
            count = int(0.5 / took)
            steps, step_s, tokens = steps + count, step_s + count * took, tokens + count * decoding
            self._steps[incarnation] = steps, step_s, tokens
        return WorkerStats(num_free_blocks=num_free_blocks, num_steps=steps, step_s=step_s, generation_tokens=tokens)

    def submit(self, admit: Admit, output: int) -> bool:
        """Whether it was let in."""
        self.output[admit.request_id] = output
        self.asked[admit.request_id] = admit, self.now
        try:
            self.scheduler.submit(admit, self.now)
        except TandemError as error:
            self.ended[admit.request_id] = type(error).__name__
            self.on_refused(admit, error.retry_after)
            return False
        return True

    def decide(self) -> None:
        for decision in self.scheduler.decisions(self.now):
            if isinstance(decision, Ticket):
                self._start(decision)
            else:
                request_id, failure = decision
                assert isinstance(failure, Failure)
                self.ended[request_id] = failure.kind
                self.on_refused(self.asked[request_id][0], failure.retry_after)

    def _start(self, ticket: Ticket) -> None:
        self.placed.append(ticket)
        admit = self.asked[ticket.request_id][0]
        at = (ticket.prefill or ticket.decode).incarnation
        began = max(self.now, self._free_at.get(at, 0.0))
        self._free_at[at] = began + PREFILL[0] + PREFILL[1] * admit.prompt_len
        self.at(self._free_at[at], lambda: self._first(ticket))

    def _first(self, ticket: Ticket) -> None:
        request_id, decode = ticket.request_id, ticket.decode.incarnation
        self.first_at[request_id] = self.now
        placed_at = self.scheduler.ledger.entries[request_id].placed_at
        self.scheduler.progress(Progress(request_id, ticket.epoch, self.now - placed_at), self.now)
        self.running[decode] = self.running.get(decode, 0) + 1
        step_s = DECODE[0] + DECODE[1] * self.running[decode]
        self.at(self.now + step_s * (self.output[request_id] - 1), lambda: self._end(ticket, step_s))

    def _end(self, ticket: Ticket, step_s: float) -> None:
        request_id = ticket.request_id
        admit, asked_at = self.asked[request_id]
        self.running[ticket.decode.incarnation] -= 1
        self.ended[request_id] = "finished"
        self.scheduler.outcome(
            Outcome(
                request_id=request_id, epoch=ticket.epoch, kind="finished", tenant=admit.tenant, slo_class=admit.slo_class,
                prompt_tokens=admit.prompt_len, cached_tokens=0, output_tokens=self.output[request_id], queue_s=0.0,
                ttft_s=self.first_at[request_id] - asked_at, tpot_s=step_s, e2e_s=self.now - asked_at,
            ),
            self.now,
        )  # fmt: skip

    def ttft_s(self, request_id: str) -> float:
        return self.first_at[request_id] - self.asked[request_id][1]


def ask(request_id: str, **changes: Any) -> Admit:
    fields: dict[str, Any] = {
        "request_id": request_id, "model": "m", "tenant": "t", "slo_class": "standard", "priority": 0, "prompt_len": 400,
        "max_tokens": 100,
    }  # fmt: skip
    return Admit(**{**fields, **changes})
