"""A mock prefill worker (see workers.py): prompts in chunks, first come, first served. Called by `cluster.py`."""

from __future__ import annotations

from collections import deque

from protocol.messages import WorkerInfo, WorkerStats
from simulation.blocks import Pool
from simulation.costs import Cost, Span, span_of
from simulation.links import Link
from simulation.requests import Events, Req
from simulation.workers import Worker


def _join(line: list[Req] | deque[Req], req: Req) -> None:
    """Behind everybody, or, if it goes first, behind those that do."""
    at = len(line)
    while req.goes_first and at > 0 and not line[at - 1].goes_first:
        at -= 1
    line.insert(at, req)


class PrefillWorker(Worker):
    """prefill/planner.py: first come, first served, in chunks; a step is as large as its budget."""

    def __init__(self, sim: Events, info: WorkerInfo, cost: Cost, pool: Pool, link: Link, hash_len: int) -> None:
        super().__init__(sim, info, cost, pool, link, hash_len)
        self.limits = cost.prefill_limits
        self.slow_when_shared = cost.contention.prefill
        self.waiting: deque[Req] = deque()
        self.active: list[Req] = []
        self.chunks: list[tuple[Req, int]] = []  # of each step of the span
        self.jobs: dict[int, Req] = {}  # all that hold something here, or wait

    def accept(self, req: Req, now: float) -> None:
        self.jobs[req.index] = req
        _join(self.waiting, req)
        if self.span is None:
            self._plan(now)
        elif req.goes_first:
            self.cut(now)  # the next step is its own
        elif req.prefix and len(self.active) < self.limits.max_num_seqs:
            self.cut(now)  # it looks into the cache when it is let in, at the end of a chunk

    def _let_in(self, now: float) -> None:
        block_size = self.info.layout.block_size
        while self.waiting and len(self.active) < self.limits.max_num_seqs:
            req = self.waiting[0]
            if -(-req.prompt // block_size) > self.pool.free:
                break
            if not self._attach(req, req.at_prefill, req.prompt, 0, self.pool.free):
                break
            self.waiting.popleft()
            req.cached = req.computed
            _join(self.active, req)

    def _plan(self, now: float) -> None:
        self._let_in(now)
        if not self.active:
            return
        budget = self.limits.max_num_batched_tokens
        head = self.active[0]
        if head.begun_at < 0:
            head.begun_at = now
        if head.todo > budget:
            self.chunks = [(head, budget)]
            length = (head.todo - 1) // budget
            self._start(span_of(self.cost, 0, 0, budget, head.computed, self._slow()), length, now)
            return
        self.chunks = []
        cost = self.cost.prefill
        took = cost.per_step_s
        for req in self.active:
            part = min(budget, req.todo)
            if part <= 0:
                break
            if req.begun_at < 0:
                req.begun_at = now
            self.chunks.append((req, part))
            budget -= part
            end = req.computed + part
            took += cost.per_token_s * part + cost.per_token2_s * (end * end - req.computed * req.computed)
        self._start(Span(took * self._slow(), 0.0), 1, now)

    def _stepped(self, length: int, now: float) -> None:
        done = []
        for req, part in self.chunks:
            self._chunked(req, part * length)
            if req.prefix:
                self._seal(req, req.at_prefill)
            if req.todo == 0:
                done.append(req)
        for req in done:
            self.active.remove(req)
        if done:
            self.last_token_at = now
            self._plan(now)  # the next step does not wait for what follows this one
        for req in done:
            req.generated = 1
            self.generation_tokens += 1
            self.sim.first_token(req)
            self.sim.prefilled(req)

    def forget(self, req: Req, now: float) -> None:
        """Its KV has been taken, or nobody wants it."""
        del self.jobs[req.index]
        self.pool.release(req.at_prefill)
        if self.span is None:
            self._plan(now)

    def stats(self, now: float) -> WorkerStats:
        done = self.steps_done(now)
        chunked = done * sum(part for _, part in self.chunks) if done else 0
        return WorkerStats(
            num_running=len(self.active),
            num_waiting=len(self.waiting),
            num_free_blocks=self.pool.free,
            num_used_blocks=self.pool.used,
            num_cached_blocks=self.pool.cached,
            num_steps=self.num_steps + done,
            step_s=self.busy_s + (self.span.seconds(done) if self.span is not None and done else 0.0),
            prompt_tokens=self.prompt_tokens + chunked,
            generation_tokens=self.generation_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            transfers=self.transfers,
            transfer_bytes=self.transfer_bytes,
            transfer_s=self.transfer_s,
            last_token_age_s=self._age(now),
        )

    def running(self) -> tuple[tuple[str, int], ...]:
        return tuple(req.key for req in self.jobs.values())
