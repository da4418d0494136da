"""One request looked at against one pool: predictions for every worker at once, over columns of numbers (`scheduler.table`).

What `scheduler.joint` chooses by and `scheduler.forecast` admits by; it decides nothing itself. Formulas: docs/decision.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from protocol.messages import Admit
from scheduler.cost import TRUSTED_AFTER, CostModel, OutputLength
from scheduler.placement import Rules
from scheduler.prefix_index import Matches
from scheduler.table import (
    AT_END,
    BACKLOG_S,
    COMING,
    COMING_CONTEXT,
    CONTEXT,
    DECODE_DRIFT,
    DECODING,
    FIRST_S,
    FREE,
    HEAD_S,
    HEAD_SINCE,
    NUM_PREFILLS,
    PREFILL_DRIFT,
    RESIDENT,
    SEEN_AT,
    TAKES,
    TOGETHER,
    TPOT_LIMIT,
    Bools,
    Floats,
    Pool,
    Rows,
)

MAX_UNSEEN_S = 2.0  # of growth since a heartbeat that are believed
MOST_DRIFT = 2.0  # of scheduler.cost.Drift
ROOM_FOR = 4.0  # requests like its own that a tenant with more than its share leaves room for on each decode worker
UNTRIED = 1.5  # how much slower than a prefill worker a decode worker is taken to prefill before it has shown it

_prefill_theta: Callable[[CostModel], list[float]] = lambda cost: cost.prefill.theta  # noqa: E731
_decode_theta: Callable[[CostModel], list[float]] = lambda cost: cost.decode.theta  # noqa: E731
_transfer_theta: Callable[[CostModel], list[float]] = lambda cost: cost.transfer.theta  # noqa: E731


class Prefills(NamedTuple):
    """Predictions for every row of a role; seconds, infinite for those that cannot have it."""

    queue_s: Floats
    work_s: Floats
    ttft_s: Floats
    cached: Floats


class Decodes(NamedTuple):
    tpot_s: Floats
    has_room: Bools
    keeps: Bools  # every promise there, its own included


class View:
    """One request looked at against one pool: what `Joint.place` and admission share. All lengths in tokens, times in seconds."""

    def __init__(
        self, admit: Admit, pool: Pool, output: OutputLength, matches: Mapping[str, int], rules: Rules, now: float
    ) -> None:
        pool.refresh()
        self.admit = admit
        self.pool = pool
        self.rules = rules
        self.now = now
        own = output.of_tenant(admit.tenant)
        self.expected = own.expected(admit.max_tokens)
        self.mean = max(1.0, output.mean)
        self.matches = matches
        self.is_blind = not matches
        self.leaves_room = False
        self.leaves_blocks = False  # the same in KV blocks
        self.goes_first = False
        self.has_seats = True

    def cached(self, rows: Rows) -> Any:
        """Tokens of the prompt that each of these holds; 0 if nobody holds any."""
        if self.is_blind or not len(rows):
            return 0.0
        if isinstance(self.matches, Matches):
            lengths = self.matches.column(rows.bits)
        else:
            lengths = np.array([self.matches.get(w.incarnation, 0) for w in rows.workers], dtype=np.float64)
        found: Floats = np.minimum(lengths * self.rules.hash_block_len, self.admit.prompt_len - 1)
        return found

    def usable(self, rows: Rows) -> Bools:
        takes: Bools = rows.live[TAKES] > 0
        for incarnation in self.admit.excluded:
            at = rows.at.get(incarnation)
            if at is not None:
                takes[at] = False
        return takes

    def prefills(self, rows: Rows, usable: Bools) -> Prefills:
        live, admit = rows.live, self.admit
        n = float(admit.prompt_len)
        c = self.cached(rows)
        a, b, square = rows.theta(_prefill_theta)
        queue = self._queue_s(rows, a)
        if self.goes_first:  # it waits for the step under way, and for others like it
            queue = np.minimum(
                queue, live[FIRST_S] + np.where(rows.batch > 0, (a + b * rows.batch / 1e3) * live[PREFILL_DRIFT], math.inf)
            )
        work = (a + b * (n - c) / 1e3 + square * (n * n - c * c) / 1e6) * live[PREFILL_DRIFT]
        blocks = rows.num_blocks_for(n)
        ttft = queue + work + self.transfer_s(rows)
        if not isinstance(blocks, float) or blocks > rows.least_blocks:
            usable = usable & (blocks <= rows.num_blocks)
        if np.count_nonzero(usable) < len(usable):
            ttft = np.where(usable, ttft, math.inf)
        return Prefills(queue, work, ttft, c if isinstance(c, np.ndarray) else np.zeros(len(rows)))

    def _queue_s(self, rows: Rows, a: Any) -> Any:
        """Until a prompt that joins now would begin; a: the constant of a step."""
        live = rows.live
        if not np.count_nonzero(live[NUM_PREFILLS]):
            return np.zeros(len(rows))
        done = np.minimum(live[HEAD_S], np.maximum(0.0, self.now - live[HEAD_SINCE]))
        # Prompts that go into one step together pay its constant once.
        return np.maximum(0.0, live[BACKLOG_S] - done - live[TOGETHER] * a * live[PREFILL_DRIFT])

    def transfer_s(self, rows: Rows) -> Any:
        """What of the KV's way is left when the prefill is over; its layers travel while the next ones compute."""
        a, b = rows.theta(_transfer_theta)
        return a + b * rows.num_blocks_for(float(self.admit.prompt_len)) * rows.one_block_nbytes / 1e9

    def local(self, rows: Rows, usable: Bools) -> Prefills:
        """The same for decode workers that prefill by themselves: in chunks between others' tokens."""
        live, admit = rows.live, self.admit
        n = float(admit.prompt_len)
        c = self.cached(rows)
        a, b, square = rows.theta(self._local_theta)
        done = np.minimum(live[HEAD_S], np.maximum(0.0, self.now - live[HEAD_SINCE]))
        queue = np.maximum(0.0, live[BACKLOG_S] - done)
        work = (a + b * (n - c) / 1e3 + square * (n * n - c * c) / 1e6) * live[PREFILL_DRIFT]
        ttft = np.where(usable & (rows.can_prefill | rows.is_overflow), queue + work + self._between_s(rows, n - c), math.inf)
        return Prefills(queue, work, ttft, c if isinstance(c, np.ndarray) else np.zeros(len(rows)))

    def _local_theta(self, cost: CostModel) -> list[float]:
        """A decode worker that has hardly prefilled yet is taken for a somewhat slower prefill worker, where those are known."""
        pool = self.pool.prefill.costs
        if cost.prefill.num_observations >= TRUSTED_AFTER or not pool or pool[0].prefill.num_observations < TRUSTED_AFTER:
            return cost.prefill.theta
        return [max(UNTRIED * theirs, own) for theirs, own in zip(pool[0].prefill.theta, cost.prefill.theta, strict=True)]

    def _between_s(self, rows: Rows, num_tokens: Any) -> Floats:
        """Seconds that the tokens of those who decode there take out of a prompt's prefill."""
        live = rows.live
        decoding = live[DECODING]
        step = self.step_s(rows, decoding, live[CONTEXT])
        chunks = np.ceil(num_tokens / np.maximum(1.0, rows.chunk - decoding))
        return np.where(decoding > 0, step * chunks, 0.0)

    @staticmethod
    def step_s(rows: Rows, num_seqs: Any, context: Any) -> Floats:
        a, b, c = rows.theta(_decode_theta)
        found: Floats = (a + b * context / 1e3 + c * num_seqs) * rows.live[DECODE_DRIFT]
        return found

    def decodes(self, rows: Rows, usable: Bools, until_first: Any, extra_s: Any = None) -> Decodes:
        """until_first: seconds until its prefill ends; extra_s: of prefill that the decode worker would do for it."""
        live, admit = rows.live, self.admit
        choices, prompt_len = admit.num_choices, float(admit.prompt_len)
        decoding, coming, drift = live[DECODING], live[COMING], live[DECODE_DRIFT]
        there = decoding + coming
        is_empty = there == 0
        a, b, c = rows.theta(_decode_theta)
        # A step's seconds in parts, so that few passes over the columns do: of those that decode now, and of those that are coming.
        present = live[RESIDENT] * (b / 1e3) + decoding * c
        future = live[COMING_CONTEXT] * (b / 1e3)
        step = (present + future + a) * drift
        # Of those that decode now, some will have ended. Lengths are memoryless here: nobody knows when one stops.
        surviving = np.exp((-1.0 / self.mean) * until_first / step)
        mine = choices * (prompt_len + self.expected / 2)
        tpot = (present * surviving + future + coming * c + (a + b * mine / 1e3 + c * choices)) * drift
        stalls: Any = 0.0
        if extra_s is not None or np.count_nonzero(live[BACKLOG_S]):
            # What it prefills by itself, spread over the tokens that each of those who decode there has before them.
            stalls = (live[BACKLOG_S] + (0.0 if extra_s is None else extra_s)) / self.mean
            tpot += stalls
        blocks = rows.num_blocks_for(prompt_len)
        begin = blocks + choices - (prompt_len % rows.one_block_size != 0)
        if admit.resumption and admit.local_prefill:
            # Choices that differ come back one after the other, so alone it needs no more than the first of them does.
            begin = np.where(is_empty, np.minimum(begin, blocks), begin)
        seats = usable & (is_empty | (decoding * surviving + coming <= rows.max_seqs - choices))
        self.has_seats = bool(np.count_nonzero(seats))
        if not self.has_seats:
            return Decodes(tpot, seats, seats)
        at_end = live[AT_END] + (blocks + choices * np.ceil(math.ceil(self.expected) / rows.one_block_size))
        # A worker keeps a block free for every other running sequence's next token; so must this prediction.
        # Since its heartbeat those that decode have grown.
        since = np.minimum(MAX_UNSEEN_S, self.now - live[SEEN_AT])
        grown = decoding * since / (step * rows.one_block_size)
        if self.leaves_blocks:
            more = ROOM_FOR * blocks
            begin, at_end = begin + more, at_end + more + ROOM_FOR * choices * np.ceil(self.expected / rows.one_block_size)
        room = seats & (live[FREE] - grown >= begin + there // 2) & (is_empty | (at_end <= rows.num_blocks))
        later = tpot
        if self.leaves_room:
            later = tpot + ROOM_FOR * (b * mine / 1e3 + c * choices) * drift
        return Decodes(tpot, room, self._keeps(rows, later, mine, is_empty, choices) & room)

    def limit(self) -> float:
        return self.admit.tpot_slo_s or self.rules.tpot_target_s

    def _keeps(self, rows: Rows, tpot: Floats, mine: float, is_empty: Bools, choices: int) -> Bools:
        margin = self.margin(rows)
        limit = self.limit()
        # What it could not keep even alone is lost already, and holds nobody back.
        a, b, c = rows.theta(_decode_theta)
        alone = a + b * mine / 1e3 + c * choices
        own: Any = limit
        if len(rows.costs) > 1 or alone * margin * MOST_DRIFT > limit:
            own = np.where(alone * rows.live[DECODE_DRIFT] * margin <= limit, limit, math.inf)
        kept: Bools = is_empty | (tpot * margin <= np.minimum(own, rows.live[TPOT_LIMIT]))
        return kept

    def margin(self, rows: Rows) -> float:
        """By how much a step time is to be overestimated, so that the promised share of requests keeps its promise."""
        return max(cost.tpot_margin.factor for cost in rows.costs)
