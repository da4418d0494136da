"""A mock decode worker (see workers.py): continuous batching, its own prefills between others' tokens, preemption. For
`cluster.py`."""

from __future__ import annotations

import heapq
from collections import deque

from protocol.messages import WorkerInfo, WorkerStats
from simulation.blocks import Pool
from simulation.costs import Cost, Span, span_of
from simulation.links import Link
from simulation.requests import Events, Req
from simulation.workers import Worker

STALL_S = 0.05  # as decode/worker.py: work, but no block for it


class DecodeWorker(Worker):
    """decode/planner.py: everybody who decodes is in each step; what is left of the budget goes to prompts prefilled here."""

    def __init__(self, sim: Events, info: WorkerInfo, cost: Cost, pool: Pool, link: Link, hash_len: int) -> None:
        super().__init__(sim, info, cost, pool, link, hash_len)
        self.limits = cost.decode_limits
        self.slow_when_shared = cost.contention.decode
        self.block_size = info.layout.block_size
        self.jobs: dict[int, Req] = {}  # all that hold something here, or want it back
        self.decoding: dict[int, Req] = {}  # in the order in which they came
        self.joins: deque[Req] = deque()  # sealed, and not in a step yet
        self.local: list[Req] = []  # being prefilled here, oldest first
        self.preempted: deque[Req] = deque()
        self.chunk: list[tuple[Req, int]] = []  # of each step of the span
        self.step = 0  # since the start; sequences name their end by it
        self.context = 0  # tokens of all that decode, before the span
        self._ends: list[tuple[int, int, Req]] = []  # (step, index, req)
        self._phase = [0] * self.block_size  # how many need a block at a step with this remainder
        self._batch = 0  # that decode in the span under way
        self._grown = 0  # blocks that the pool has given for it already

    # ---- room ------------------------------------------------------------------------------------------------------

    def _growth(self, num_steps: int) -> int:
        """Blocks that those who decode need for the next so many steps."""
        size = self.block_size
        whole, rest = divmod(num_steps, size)
        total = whole * len(self.decoding)
        if rest:
            begin = self.step % size
            end = begin + rest
            phase = self._phase
            total += sum(phase[begin:end]) if end <= size else sum(phase[begin:]) + sum(phase[: end - size])
        return total

    def _grow(self, num_steps: int) -> None:
        """The first so many steps of the span have taken their blocks, and evicted what lay there."""
        wanted = self._growth(num_steps)
        if wanted > self._grown:
            self.pool.grow(wanted - self._grown)
            self._grown = wanted

    @property
    def _headroom(self) -> int:
        return (len(self.decoding) + len(self.local)) // 2

    def reserve(self, req: Req, now: float) -> bool:
        """Blocks for one attempt, as decode/reservation.py sets them aside. False: refused, for want of room."""
        if self._batch and self.span is not None:
            self._grow(min(self.span_len, self.steps_done(now) + 1))
        free = self.pool.free
        if req.prefill is None:
            if not self._attach(req, req.at_decode, req.prompt + req.generated, self._headroom, free):
                return False
            req.cached = req.computed if req.first_at < 0 else req.cached
            self.jobs[req.index] = req
            self.local.append(req)
        else:
            if not self._set_aside(req, free):
                return False
            self.jobs[req.index] = req
        if self.span is None:
            self._plan(now)
        elif req.prefill is None or self._growth(self.span_len) - self._grown > self.pool.free:
            self.cut(now)  # to start on it, or because the blocks are not there any more that later steps counted on
        return True

    def _set_aside(self, req: Req, free: int) -> bool:
        num_tokens = req.prompt + req.generated
        pool, before = self.pool, self.pool.used
        found = pool.match(req.prefix[: num_tokens // self.hash_len], req.at_decode)
        missing = -(-num_tokens // self.block_size) - found * pool.weight
        spare = int(num_tokens % self.block_size == 0)
        if missing + spare + self._headroom > free - (pool.used - before) or not pool.take(missing + spare, req.at_decode):
            pool.release(req.at_decode)
            return False
        req.spare, req.held, req.context = spare, found, num_tokens
        self.prefix_queries += num_tokens
        self.prefix_hits += found * self.hash_len
        return True

    def num_missing_tokens(self, req: Req) -> int:
        """What a prefill worker has to send."""
        return req.context - req.held * self.hash_len

    # ---- coming and going ------------------------------------------------------------------------------------------

    def join(self, req: Req, now: float) -> None:
        """Its KV is here, verified, and its first token known."""
        req.computed, req.sealed = req.context, req.held  # its prefill worker counted those of its own pool
        if req.prefix:
            self._seal(req, req.at_decode)
        self.joins.append(req)
        if self.span is None:
            self._plan(now)
        elif len(self.decoding) < self.limits.max_num_seqs:
            self.cut(now)

    def _adopt(self, req: Req) -> None:
        """It decodes from the next step on."""
        if req.spare:
            req.at_decode.own -= req.spare
            self.pool.used -= req.spare
            req.spare = 0
        self.decoding[req.index] = req
        self.context += req.context
        req.joined_step = self.step
        req.finish_step = self.step + req.output - req.generated
        heapq.heappush(self._ends, (req.finish_step, req.index, req))
        # Before the step at which its context fills whole blocks it needs another one.
        self._phase[(self.step - req.context) % self.block_size] += 1

    def _leave(self, req: Req) -> None:
        """It decodes no more; what it holds is brought up to date."""
        del self.decoding[req.index]
        grown = self.step - req.joined_step
        self._phase[(req.joined_step - req.context) % self.block_size] -= 1
        before = -(-req.context // self.block_size)
        req.context += grown
        req.generated += grown
        req.at_decode.own += -(-req.context // self.block_size) - before
        self.context -= req.context

    def forget(self, req: Req, now: float) -> None:
        """Over, before or after it decoded."""
        del self.jobs[req.index]
        self.pool.release(req.at_decode)
        req.spare = 0
        if self.span is not None and self.preempted:
            self.cut(now)  # whoever gave way may come back
        elif self.span is None and (self.preempted or self.joins or self.local):
            self._plan(now)

    def _preempt(self) -> bool:
        """The newest of the lowest band gives up its blocks. False: only one is left, who waits."""
        candidates = [*self.decoding.values(), *self.local]
        if len(candidates) < 2:
            return False
        victim = max(candidates, key=lambda req: (req.band, req.placed_at, req.index))
        if victim.index in self.decoding:
            self._leave(victim)
            self._ends = [entry for entry in self._ends if entry[2] is not victim]
            heapq.heapify(self._ends)
        else:
            self.local.remove(victim)
        victim.recomputed += victim.computed if victim.first_at < 0 else victim.context
        self.pool.release(victim.at_decode)
        victim.todo = victim.computed = victim.sealed = 0
        self.preempted.append(victim)
        self.num_preemptions += 1
        return True

    def _restart(self) -> None:
        """In order, only whole, with a block of headroom for everybody."""
        while self.preempted:
            num_alive = len(self.decoding) + len(self.local)
            if num_alive >= self.limits.max_num_seqs:
                return
            req = self.preempted[0]
            if not self._attach(req, req.at_decode, req.prompt + req.generated, num_alive, self.pool.free):
                return
            self.preempted.popleft()
            self.local.append(req)

    # ---- the step --------------------------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        while self.joins and len(self.decoding) < self.limits.max_num_seqs:
            self._adopt(self.joins.popleft())
        has_preempted = False
        while self._growth(1) > self.pool.free:
            if not self._preempt():
                self.version += 1
                self.sim.at(now + STALL_S, self._wake, self.version)
                return
            has_preempted = True
        if self.preempted and not has_preempted:
            self._restart()
        batch = self._batch = len(self.decoding)
        if not batch and not self.local:
            return
        chunks, length = self._chunks(self.limits.max_num_batched_tokens - batch)
        if not batch and not chunks:
            return
        if batch:
            length = min(length, self._ends[0][0] - self.step) if length else self._ends[0][0] - self.step
            length = self._affordable(length)
        self.chunk = chunks
        if len(chunks) <= 1:
            req, part = chunks[0] if chunks else (None, 0)
            begin = req.computed if req is not None else 0
            self._start(span_of(self.cost, batch, self.context, part, begin, self._slow()), length, now)
        else:
            self._start(self._mixed(chunks, batch), 1, now)
        for req, _ in chunks:
            if req.begun_at < 0:
                req.begun_at = now

    def _mixed(self, chunks: list[tuple[Req, int]], batch: int) -> Span:
        """One step with several prompts in it."""
        cost = self.cost.prefill
        first, part = chunks[0]
        lin, quad = span_of(self.cost, batch, self.context, part, first.computed)
        took = lin + quad
        for req, part in chunks[1:]:
            end = req.computed + part
            took += cost.per_token_s * part + cost.per_token2_s * (end * end - req.computed * req.computed)
        return Span(took * self._slow(), 0.0)

    def _chunks(self, left: int) -> tuple[list[tuple[Req, int]], int]:
        """(prompt, its tokens in each of the next steps), and for how many steps that holds; 0 steps: no prompt, any number."""
        if not self.local or left <= 0:
            return [], 0
        head = self.local[0]
        if head.todo > left:
            return [(head, left)], (head.todo - 1) // left
        chunks = []
        for req in self.local:
            part = min(left, req.todo)
            if part <= 0:
                break
            chunks.append((req, part))
            left -= part
        return chunks, 1

    def _affordable(self, length: int) -> int:
        """The most of so many steps for which there are blocks; at least one."""
        free = self.pool.free
        if self._growth(length) <= free:
            return length
        low, high = 1, length  # growth(low) fits, growth(high) does not
        while high - low > 1:
            middle = (low + high) // 2
            if self._growth(middle) <= free:
                low = middle
            else:
                high = middle
        return low

    def _stepped(self, length: int, now: float) -> None:
        if self._batch:
            self._grow(length)
            self._grown = 0
            self.step += length
            self.context += self._batch * length
            self.generation_tokens += self._batch * length
            self.last_token_at = now
        done: list[Req] = []
        while self._ends and self._ends[0][0] <= self.step:
            req = heapq.heappop(self._ends)[2]
            self._leave(req)
            done.append(req)
        started = []
        for req, part in self.chunk:
            self._chunked(req, part * length)
            if req.prefix:
                self._seal(req, req.at_decode)
            if req.todo == 0:
                started.append(req)
        self.chunk = []
        for req in started:
            self.local.remove(req)
            req.context = req.computed
            req.generated += 1
            self.generation_tokens += 1
            self.last_token_at = now
            if req.generated < req.output:
                self._adopt(req)
            else:
                done.append(req)
        for req in done:
            del self.jobs[req.index]
            self.pool.release(req.at_decode)
        self._plan(now)  # the next step does not wait for what follows this one
        for req in started:
            if req.first_at < 0:
                self.sim.first_token(req)
        for req in done:
            self.sim.finished(req)

    # ---- what others see -------------------------------------------------------------------------------------------

    def stats(self, now: float) -> WorkerStats:
        done = self.steps_done(now)
        chunked = done * sum(part for _, part in self.chunk) if done else 0
        free = self.pool.free - (max(0, self._growth(done) - self._grown) if done and self._batch else 0)
        return WorkerStats(
            num_running=len(self.decoding) + len(self.local) + len(self.joins),
            num_waiting=len(self.preempted) + len(self.jobs) - len(self.decoding) - len(self.local) - len(self.joins),
            num_free_blocks=free,
            num_used_blocks=self.pool.num_blocks - free,
            num_cached_blocks=self.pool.cached,
            num_steps=self.num_steps + done,
            step_s=self.busy_s + (self.span.seconds(done) if self.span is not None and done else 0.0),
            prompt_tokens=self.prompt_tokens + chunked,
            generation_tokens=self.generation_tokens + done * self._batch,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            num_preemptions=self.num_preemptions,
            last_token_age_s=self._age(now),
        )

    def running(self) -> tuple[tuple[str, int], ...]:
        return tuple(req.key for req in self.jobs.values())
