"""What both mock workers are: planners of the real ones with counts instead of tensors, and many steps in one event.

Between two changes of a batch its steps are alike, so k of them have a closed form (`costs.Span`): a worker sleeps until the
first of them that changes something (a sequence ends, a prompt's last chunk, no block for the next token), and whoever joins
meanwhile cuts the span short at the end of the step under way. Nothing happens per token. tests/simulation steps
token by token; both must agree. `prefill.py` and `decode.py` are the two roles.
"""

from __future__ import annotations

from protocol.messages import WorkerInfo, WorkerStats
from simulation.blocks import Holding, Pool
from simulation.costs import Cost, Span
from simulation.links import Link
from simulation.requests import Events, Req

EPSILON = 1e-9  # of a step: floats


class Worker:
    """What both roles are: a pool, a span of steps under way, cumulative counters."""

    def __init__(self, sim: Events, info: WorkerInfo, cost: Cost, pool: Pool, link: Link, hash_len: int) -> None:
        self.sim = sim
        self.info = info
        self.incarnation = info.incarnation
        self.cost = cost
        self.pool = pool
        self.link = link
        self.hash_len = hash_len
        self.neighbours: list[Worker] = []  # share its cores
        self.slow_when_shared = 1.0
        self.span: Span | None = None  # the steps under way
        self.span_len = 0
        self.span_at = 0.0
        self.version = 0
        self.num_steps = 0
        self.busy_s = 0.0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.num_preemptions = 0
        self.transfers = 0
        self.transfer_bytes = 0
        self.transfer_s = 0.0
        self.last_token_at = -1.0

    @property
    def is_busy(self) -> bool:
        return self.span is not None

    def steps_done(self, now: float) -> int:
        """Of the span under way, whole ones."""
        if self.span is None:
            return 0
        return min(self.span_len, int(self.span.steps(now - self.span_at) + EPSILON))

    def cut(self, now: float) -> None:
        """End the span with the step under way: something is to join after it."""
        if self.span is None or self.span_len <= 1:
            return
        wanted = self.steps_done(now) + 1
        if wanted < self.span_len:
            self.span_len = wanted
            self._schedule()

    def _schedule(self) -> None:
        assert self.span is not None
        self.version += 1
        self.sim.at(self.span_at + self.span.seconds(self.span_len), self._wake, self.version)

    def _start(self, span: Span, length: int, now: float) -> None:
        was_idle = self.span is None
        self.span, self.span_len, self.span_at = span, length, now
        self._schedule()
        if was_idle and self.neighbours:
            self._tell_neighbours(now)

    def _tell_neighbours(self, now: float) -> None:
        for neighbour in self.neighbours:
            neighbour.cut(now)  # its next steps take longer, or no longer

    def _slow(self) -> float:
        if self.slow_when_shared != 1.0 and any(n.span is not None for n in self.neighbours):
            return self.slow_when_shared
        return 1.0

    def _wake(self, version: int) -> None:
        if version != self.version:
            return  # the span was cut or begun anew
        now = self.sim.now
        span, length = self.span, self.span_len
        self.span = None
        if span is not None:
            self.num_steps += length
            self.busy_s += now - self.span_at
            self._stepped(length, now)
        if self.span is None:
            self._plan(now)
        if self.span is None and span is not None and self.neighbours:
            self._tell_neighbours(now)

    def _stepped(self, length: int, now: float) -> None:
        raise NotImplementedError

    def _plan(self, now: float) -> None:
        raise NotImplementedError

    def _busy_s(self, now: float) -> float:
        return self.busy_s + (now - self.span_at if self.span is not None else 0.0)

    def _chunked(self, req: Req, num_tokens: int) -> None:
        """So many tokens of its prompt are computed now."""
        req.computed += num_tokens
        req.todo -= num_tokens
        req.prefill_tokens += num_tokens
        self.prompt_tokens += num_tokens

    def _seal(self, req: Req, holding: Holding) -> None:
        """Whole hash blocks that are computed may be shared."""
        whole = min(len(req.prefix), req.computed // self.hash_len)
        while req.sealed < whole:
            self.pool.seal(req.prefix[req.sealed], holding)
            req.sealed += 1

    def _attach(self, req: Req, holding: Holding, num_tokens: int, headroom: int, free: int) -> bool:
        """Blocks for so many tokens, the cached prefix first; the last token is always computed (engine/prefix.py)."""
        usable = min(len(req.prefix), (min(num_tokens, req.prompt) - 1) // self.hash_len)
        pool = self.pool
        before = pool.used
        found = pool.match(req.prefix[:usable], holding) if usable > 0 else 0
        missing = -(-num_tokens // self.info.layout.block_size) - found * pool.weight
        if missing + headroom > free - (pool.used - before) or not pool.take(missing, holding):
            pool.release(holding)
            return False
        req.computed = found * self.hash_len
        req.sealed = found
        req.todo = num_tokens - req.computed
        self.prefix_queries += num_tokens
        self.prefix_hits += req.computed
        return True

    def stats(self, now: float) -> WorkerStats:
        raise NotImplementedError

    def _age(self, now: float) -> float:
        return -1.0 if self.last_token_at < 0 else now - self.last_token_at
