"""The default placer: prefill and decode worker of one request chosen together, over columns of numbers (`scheduler.table`).

    prefill worker  least TTFT + work * pressure: queue + uncached part + transfer, where a second of work counts for itself and for
                    everybody who waits behind it, as long as the promise holds
    decode worker   of those whose step time keeps every promise there (its own, and the ones it has) and whose KV and sequences fit
                    when the prefill ends: the one with the least step time; a looser class than others goes to the fullest of them,
                    so that whole workers stay quick for who needs them
    neither         a prompt with few uncached tokens, or no prefill worker: the decode worker prefills by itself
    deflected       the prefill pool would miss the promise, or has more to do than it can in time: a decode worker with slack
    does it
    overflow        only when nobody else keeps the promise

Late binding: work is given to a prefill worker only while its queue is short (`lookahead_s`); the rest waits in the scheduler's
queue, where order and choice can still change. docs/decision.md has the formulas and where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from protocol.messages import Admit
from scheduler.cost import TRUSTED_AFTER, OutputLength
from scheduler.explain import Candidate
from scheduler.ledger import WorkerState
from scheduler.placement import Blocked, Placement, Refused, Rules
from scheduler.table import (
    AT_END,
    BACKLOG_S,
    COMING,
    CONTEXT,
    DECODING,
    FIRST_S,
    HEAD_TOKENS,
    NUM_PREFILLS,
    TAKES,
    TOKENS,
    Bools,
    Floats,
    Ints,
    Pool,
    Rows,
)
from scheduler.view import Decodes, Prefills, View

EQUAL = 0.01  # relative: predictions that differ by less are equals, between which price decides
LOOKAHEAD_SHARE = 0.1  # of the promised TTFT: how much work a prefill worker may have before it
MIN_LOOKAHEAD_S, MAX_LOOKAHEAD_S = 0.02, 0.5
MAX_PRESSURE = 4.0
NUM_CANDIDATES = 4  # of each role that an explanation shows


class Circumstances(NamedTuple):
    """What else is about when one request is placed."""

    pressure: float = 0.0  # requests that wait for each prefill worker of its model
    backlog_s: float = 0.0  # of their prefill work, for each prefill worker
    prefers_spot: bool = False
    has_others: bool = False  # several tenants are about: what is given to a worker early stands before theirs
    leaves_room: bool = False  # its tenant has more than its share: room for some of others' stays free
    goes_first: bool = False  # its tenant has well less than its share: a prefill worker's next step is its own
    keeps_short: bool = False  # the same where few tenants are about: only the step under way stands before others' prompts


class Joint:
    """See the module. `circumstances` and `tightest_tpot_s` are set by the scheduler, which knows queue, tenants and classes."""

    def __init__(self, rules: Rules, max_deflected_share: float = 0.5) -> None:
        self._rules = rules
        self._max_deflected_share = max_deflected_share
        self.circumstances = Circumstances()
        self.tightest_tpot_s = math.inf
        self.lacks_size = True  # a smaller one might have found room
        self.free_in_s = 0.0  # when the first prefill worker's queue will be short
        self.waits_for_decode = True  # what the last one that was blocked had no room in; else it waits for a prefill worker
        self.view: View | None = None
        self._seen: tuple[Prefills | None, Decodes | None] = (None, None)

    def place(
        self,
        admit: Admit,
        workers: Sequence[WorkerState],
        output: OutputLength,
        matches: Mapping[str, int],
        queued_at: float,
        now: float,
    ) -> Placement | Blocked | Refused:
        pool = workers if isinstance(workers, Pool) else Pool(workers)
        view = self.view = View(admit, pool, output, matches, self._rules, now)
        view.leaves_room = self.circumstances.leaves_room
        view.leaves_blocks = self.circumstances.keeps_short
        view.goes_first = self.circumstances.goes_first
        self._seen = (None, None)
        self.waits_for_decode = self.lacks_size = True
        rows = pool.decode
        usable = view.usable(rows) if len(rows) else np.zeros(0, dtype=bool)
        if admit.excluded and not np.count_nonzero(usable):
            usable = self._again(rows, queued_at)
        if not np.count_nonzero(usable):
            return Blocked.NO_WORKER
        found: Placement | Blocked = Blocked.NO_ROOM
        ours = usable & ~rows.is_overflow if rows.has_overflow else usable
        left = self._left(admit, queued_at, now)
        if np.count_nonzero(ours):
            found = self._place(view, ours, left)
        if rows.has_overflow and (isinstance(found, Blocked) or found.ttft_s > left):
            return self._on_overflow(view, usable & rows.is_overflow, left) or found
        return found

    def _left(self, admit: Admit, queued_at: float, now: float) -> float:
        """Seconds until its first token is due."""
        if admit.resumption or admit.ttft_slo_s is None:
            return math.inf
        return queued_at - admit.waited_s + admit.ttft_slo_s - now

    @staticmethod
    def _again(rows: Rows, queued_at: float) -> Bools:
        """Excluded workers are the last choice, not a forbidden one, once a heartbeat shows that they live."""
        alive: Bools = np.array([w.takes_work and not w.is_full and w.last_beat_at > queued_at for w in rows.workers], dtype=bool)
        return alive

    def _place(self, view: View, usable: Bools, left: float) -> Placement | Blocked:
        admit, rules, rows = view.admit, self._rules, view.pool.decode
        prefills, best = self._best_prefill(view, usable, left)
        local = view.local(rows, usable) if best is None or self._may_be_local(view) else None
        at = None
        if local is not None:
            short = np.isfinite(local.ttft_s)
            if best is not None:
                short &= admit.prompt_len - local.cached < rules.disaggregation_threshold
            if short.any():
                at = self._choose(view, view.decodes(rows, short, local.ttft_s, local.work_s), is_last=best is None)
                if at is not None:
                    return self._here(view, local, at)
        if best is None or prefills is None:
            return Blocked.NO_ROOM
        ttft = float(prefills.ttft_s[best])
        is_busy = self._is_busy(view, prefills, best)
        if is_busy or ttft > left:
            deflected = self._deflect(view, usable, local, ttft, left)
            if deflected is not None:
                return deflected
            if is_busy:
                self.waits_for_decode = False
                return Blocked.NO_ROOM
        at = self._choose(view, view.decodes(rows, usable, ttft), is_last=True)
        if at is None:
            self.lacks_size = view.has_seats
            return Blocked.NO_ROOM
        worker = view.pool.prefill.workers[best]
        seen = self._seen[1]
        assert seen is not None
        return self._placement(view, rows.workers[at], worker, prefills, best, ttft, float(seen.tpot_s[at]))

    def _may_be_local(self, view: View) -> bool:
        return bool(view.matches) or view.admit.prompt_len < self._rules.disaggregation_threshold

    def _best_prefill(self, view: View, usable: Bools, left: float) -> tuple[Prefills | None, int | None]:
        rows, admit = view.pool.prefill, view.admit
        if not len(rows) or admit.local_prefill:
            return None, None
        could = view.usable(rows)
        if admit.excluded and not could.any() and not (view.pool.decode.can_prefill & usable).any():
            could = rows.live[TAKES] > 0
        found = view.prefills(rows, could)
        self._seen = (found, None)
        ttft = found.ttft_s
        soonest = int(ttft.argmin())
        least = float(ttft[soonest])
        if least == math.inf:
            return found, None
        score = ttft
        pressure = min(MAX_PRESSURE, self.circumstances.pressure)
        if pressure > 0 and not view.is_blind:
            score = ttft + pressure * found.work_s
            if left > least:  # work may be saved with what the promise leaves, never with more
                score = np.where(ttft <= max(least, 0.5 * left), score, math.inf)
            soonest = int(score.argmin())
        return found, self._among_equals(rows, score, float(score[soonest]), rows.live[NUM_PREFILLS])

    def _among_equals(self, rows: Rows, score: Floats, least: float, load: Floats) -> int:
        """Of those that are as good as the best: by price and kind, then the least loaded, then who came first."""
        equal = (score <= least + abs(least) * EQUAL + 1e-4).nonzero()[0]
        if len(equal) == 1:
            return int(equal[0])
        if rows.differ:
            liked = rows.is_spot[equal] == self.circumstances.prefers_spot
            price = rows.price[equal] + np.where(liked, 0.0, 1e12)
            equal = equal[price <= price.min()]
        return int(equal[load[equal].argmin()])

    def _is_busy(self, view: View, prefills: Prefills, best: int) -> bool:
        """Nobody has a short queue: it waits where order and choice can still change. Whose prefix lies on a busy worker goes there
        all the same while others are free, because it has been weighed against them."""
        rows = view.pool.prefill
        waiting = rows.live[NUM_PREFILLS]
        if not self.is_known(rows):  # no order of magnitude is known yet
            deep = (prefills.queue_s > self._rules.max_prefill_queue_s) & (waiting >= 2)
            return bool(deep[best])
        lookahead_s = self.lookahead_s(view.admit)
        if self.circumstances.keeps_short:
            lookahead_s = 0.0
        if self.circumstances.goes_first:
            return bool(rows.live[FIRST_S, best] > self._promised_lookahead_s(view.admit))
        if waiting[best] < 1 or prefills.queue_s[best] <= lookahead_s:
            return False
        can = np.isfinite(prefills.ttft_s)
        # What goes into its next step with others would only lose by waiting here.
        fits = rows.live[TOKENS] - rows.live[HEAD_TOKENS] + view.admit.prompt_len - prefills.cached <= rows.batch
        if self.circumstances.keeps_short:
            fits = waiting < 1
        free = ((prefills.queue_s <= lookahead_s) | (waiting < 1) | fits) & can
        if np.count_nonzero(free):
            return False
        self.free_in_s = float(prefills.queue_s[can].min()) - lookahead_s
        return True

    def lookahead_s(self, admit: Admit) -> float:
        return MIN_LOOKAHEAD_S if self.circumstances.has_others else self._promised_lookahead_s(admit)

    def _promised_lookahead_s(self, admit: Admit) -> float:
        promise = admit.ttft_slo_s or self._rules.max_prefill_queue_s
        return max(MIN_LOOKAHEAD_S, min(MAX_LOOKAHEAD_S, LOOKAHEAD_SHARE * promise))

    def _choose(self, view: View, decodes: Decodes, *, is_last: bool) -> int | None:
        """The row to decode on; None without room. is_last: nobody else is asked, so a promise that nobody keeps may be broken
        where the predictions are not to be trusted yet."""
        self._seen = (self._seen[0], decodes)
        rows = view.pool.decode
        packs = view.limit() > self.tightest_tpot_s * (1 + EQUAL)
        if np.count_nonzero(decodes.keeps):
            if packs:
                score = np.where(decodes.keeps, -rows.live[DECODING] - rows.live[COMING], 1.0)
                return self._among_equals(rows, score, float(score[score.argmin()]), -rows.live[AT_END])
            score = np.where(decodes.keeps, decodes.tpot_s, math.inf)
            return self._among_equals(rows, score, float(score[score.argmin()]), rows.live[AT_END])
        if is_last and not self.is_trusted(rows) and np.count_nonzero(decodes.has_room):
            return int(np.where(decodes.has_room, decodes.tpot_s, math.inf).argmin())
        return None

    @staticmethod
    def is_known(rows: Rows) -> bool:
        """Whether enough prefills of each kind were seen."""
        return all(cost.prefill.num_observations >= TRUSTED_AFTER for cost in rows.costs)

    @staticmethod
    def is_trusted(rows: Rows) -> bool:
        return all(cost.decode.num_observations >= TRUSTED_AFTER for cost in rows.costs)

    def _deflect(self, view: View, usable: Bools, local: Prefills | None, ttft_s: float, left: float) -> Placement | None:
        """A decode worker does the prefill where the pool would miss the promise, or has more waiting than it can do in time."""
        rows, admit = view.pool.decode, view.admit
        # What waits is before it only where it does not go first.
        waits = self.circumstances.backlog_s if not self.circumstances.goes_first else 0.0
        is_needed = ttft_s > left or waits > 0.5 * (admit.ttft_slo_s or math.inf)
        if not is_needed or self._max_deflected_share <= 0 or left == math.inf or not self.is_trusted(rows):
            return None
        local = local or view.local(rows, usable)
        # Work there / (work there + what a request's life lasts) is the share of its steps that prompts take.
        life = view.mean * view.step_s(rows, rows.live[DECODING], rows.live[CONTEXT])
        work = rows.live[BACKLOG_S] + local.work_s
        in_time = usable & (local.ttft_s <= left) & (work <= self._max_deflected_share * (work + life))
        if not in_time.any():
            return None
        seen = self._seen[1]
        decodes = view.decodes(rows, in_time, local.ttft_s, local.work_s)
        at = self._choose(view, decodes, is_last=False)
        if at is None:
            self._seen = (self._seen[0], seen)
            return None
        return self._here(view, local, at)

    def _on_overflow(self, view: View, usable: Bools, left: float) -> Placement | None:
        rows = view.pool.decode
        if not usable.any():
            return None
        local = view.local(rows, usable)
        decodes = view.decodes(rows, np.isfinite(local.ttft_s), local.ttft_s)
        fits = decodes.has_room & (rows.live[DECODING] + rows.live[COMING] < rows.max_seqs)
        fits &= (local.ttft_s <= left) if math.isfinite(left) else usable
        if not fits.any():
            return None
        at = self._among_equals(rows, np.where(fits, local.ttft_s, math.inf), float(local.ttft_s[fits].min()), rows.live[AT_END])
        self._seen = (self._seen[0], decodes)
        return self._here(view, local, at)

    def _here(self, view: View, local: Prefills, at: int) -> Placement:
        worker = view.pool.decode.workers[at]
        seen = self._seen[1]
        assert seen is not None
        return self._placement(view, worker, None, local, at, float(local.ttft_s[at]), float(seen.tpot_s[at]))

    def _placement(
        self, view: View, decode: WorkerState, prefill: WorkerState | None, found: Prefills, at: int, ttft_s: float, tpot_s: float
    ) -> Placement:
        # A promise that this very worker could not keep alone holds nobody back later.
        limit = view.limit()
        alone = decode.cost.decode_s(1, view.admit.prompt_len + view.expected / 2) * decode.decode_drift.factor
        limit = limit if alone * view.margin(view.pool.decode) <= limit else math.inf
        cached = int(found.cached[at])
        return Placement(decode, prefill, cached, float(found.work_s[at]), ttft_s, view.expected, tpot_s, limit, view.goes_first)

    # ---- why -------------------------------------------------------------------------------------------------------

    def candidates(self) -> Looked:
        """The best few of each role, as the last `place` saw them."""
        prefills, decodes = self._seen
        if self.view is None:
            return Looked((), None, (), None)
        pool = self.view.pool
        first: list[WorkerState] = []
        of_first = second = None
        if prefills is not None:
            few = _smallest(prefills.ttft_s)
            first = [pool.prefill.workers[i] for i in few.tolist()]
            of_first = np.array(
                (prefills.queue_s[few], prefills.ttft_s[few], prefills.cached[few], pool.prefill.live[NUM_PREFILLS][few])
            )
        after: list[WorkerState] = []
        if decodes is not None:
            few = _smallest(np.where(decodes.keeps, decodes.tpot_s, decodes.tpot_s + 1e6))
            after = [pool.decode.workers[i] for i in few.tolist()]
            live = pool.decode.live
            load = live[DECODING][few] + live[COMING][few]
            second = np.array((decodes.tpot_s[few], decodes.keeps[few], decodes.has_room[few], load))
        return Looked(first, of_first, after, second)


class Looked(NamedTuple):
    """Numbers of the best few of each role as they were; made into candidates when somebody asks why."""

    prefills: Sequence[WorkerState]
    of_prefills: Floats | None  # [queue, ttft, cached, load; few]
    decodes: Sequence[WorkerState]
    of_decodes: Floats | None  # [tpot, keeps, has room, load; few]

    def candidates(self) -> tuple[Candidate, ...]:
        out: list[Candidate] = []
        if self.of_prefills is not None:
            for worker, (queue_s, ttft_s, cached, load) in zip(self.prefills, self.of_prefills.T.tolist(), strict=True):
                can = math.isfinite(ttft_s)
                seen = (ttft_s, "") if can else (None, "cannot take it")
                out.append(Candidate(worker.info.name, "prefill", queue_s, seen[0], None, int(cached), int(load), seen[1]))
        if self.of_decodes is not None:
            for worker, (tpot_s, keeps, has_room, load) in zip(self.decodes, self.of_decodes.T.tolist(), strict=True):
                why = "" if keeps else "would break a promise" if has_room else "no room"
                out.append(Candidate(worker.info.name, "decode", None, None, tpot_s, 0, int(load), why))
        return tuple(out)


def _smallest(values: Floats) -> Ints:
    if len(values) > NUM_CANDIDATES:
        few = values.argpartition(NUM_CANDIDATES)[:NUM_CANDIDATES]
        return few[values[few].argsort()]
    return values.argsort()
