"""Who runs what right now: the scheduler's own in-flight ledger, which is the truth for load.

Polled metrics are too old to place by, so every placement is booked here at once and every end is booked when the gateway
tells it; heartbeats only correct what got lost on the way (`WorkerState.beat`). All sums are kept, none is recomputed:
a decision looks at hundreds of workers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protocol.messages import WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import WorkerRef
from scheduler.cost import CostModel, Drift

if TYPE_CHECKING:
    from scheduler.table import Rows

MISSES = 3  # heartbeats without a request that was there: its end got lost
REST = 0.75  # of the expected length, beyond which a request that still runs is taken for a longer one
UNSEEN_S = 15.0  # a placement that no heartbeat ever mentioned: the gateway never came


class Entry:
    """One request that is placed. Prefilling until `first_token_at` is set, then decoding."""

    def __init__(
        self,
        *,
        request_id: str,
        epoch: int,
        model: str,
        prompt_len: int,
        num_choices: int,
        expected_output: float,
        placed_at: float,
        decode: WorkerState,
        prefill: WorkerState | None,
        cached: int,
        prefill_s: float,
        tenant: str = "",
        tpot_limit: float = math.inf,
        ttft_s: float = 0.0,
        tpot_s: float = 0.0,
        max_tokens: int = 2**30,
        goes_first: bool = False,
    ) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.model = model
        self.prompt_len = prompt_len
        self.num_choices = num_choices
        self.expected_output = expected_output
        self.placed_at = placed_at
        self.decode = decode
        self.prefill = prefill
        self.cached = cached  # prompt tokens that the prefilling worker is believed to hold
        self.prefill_s = prefill_s  # predicted, without queueing
        self.tenant = tenant
        self.tpot_limit = tpot_limit  # seconds; what was promised, infinite where that could not be kept anyway
        self.ttft_s = ttft_s  # predicted, from the placement
        self.tpot_s = tpot_s  # predicted; 0: not
        self.first_token_at: float | None = None
        self.gateway_id: str | None = None
        self.is_seen = False  # a heartbeat of its decode worker named it
        self.num_missed = 0  # heartbeats since then that did not
        self.num_missed_prefill = 0
        self.prefill_is_seen = False
        # Summed over its choices, half way through their expected output.
        self.num_context_tokens = num_choices * (prompt_len + expected_output / 2)
        self.num_blocks_now = blocks_to_reserve(decode.info, prompt_len, num_choices)
        self.max_tokens = max_tokens
        self.goes_first = goes_first  # at its prefill worker
        self.was_overtaken = False  # there, by one that does
        self.num_blocks_held = 0  # at its end, once that is known
        self.num_blocks_at_end = blocks_at_end(decode.info, prompt_len, num_choices, expected_output)

    def ended(self, output_tokens: int) -> None:
        """With so many tokens of all its choices."""
        each = output_tokens / self.num_choices
        self.num_blocks_held = blocks_at_end(self.decode.info, self.prompt_len, self.num_choices, each)

    @property
    def prefilling_at(self) -> WorkerState:
        """The worker whose prefill queue it is, or was, in."""
        return self.prefill or self.decode

    @property
    def uncached(self) -> int:
        """Prompt tokens to be computed."""
        return self.prompt_len - self.cached


def blocks_to_reserve(info: WorkerInfo, prompt_len: int, num_choices: int) -> int:
    """What the decode worker sets aside: the prompt's blocks, and a place of its own for each choice's next token."""
    layout = info.layout
    return layout.num_blocks_for(prompt_len) + num_choices - (prompt_len % layout.block_size != 0)


def blocks_at_end(info: WorkerInfo, prompt_len: int, num_choices: int, expected_output: float) -> int:
    """Shared prompt, and each choice's own expected output."""
    layout = info.layout
    return layout.num_blocks_for(prompt_len) + num_choices * layout.num_blocks_for(math.ceil(expected_output))


class WorkerState:
    """One life of one worker, as the ledger sees it."""

    rows: Rows | None = None  # where its numbers stand as a row

    def __init__(self, info: WorkerInfo, cost: CostModel, now: float, bit: int = 0) -> None:
        self.info = info
        self.bit = bit  # its place in the prefix index's sets
        self.incarnation = info.incarnation
        self.cost = cost  # shared by all workers of this model, device and role
        self.ref = WorkerRef(info.incarnation, info.role, info.address, info.parallel)
        self.state = "ready"
        self.registered_at = now
        self.last_beat_at = now
        self.is_alive = True
        self.stats: WorkerStats | None = None
        self.prefill_drift = Drift()
        self.decode_drift = Drift()
        self.clean_decode_at = now  # when a heartbeat last showed decode steps with nothing else in them
        self.entries: dict[str, Entry] = {}  # requests that decode here, by request_id
        # Prefill queue: everything that will be prefilled here, in order, with its predicted seconds.
        self.prefills: OrderedDict[str, Entry] = OrderedDict()
        self.prefill_backlog_s = 0.0
        self.prefill_tokens = 0  # of these prompts, what no cache holds
        self.prefill_head_since = now  # when the one at the head began
        self.first_backlog_s = 0.0  # of `prefill_backlog_s`, of those that go first
        # Sums over `entries`.
        self.num_coming = 0  # choices whose prefill is not over
        self.num_decoding = 0
        self.num_context_tokens = 0.0
        self.num_coming_tokens = 0.0  # of these, of those whose prefill is not over
        self.blocks_at_end = 0
        self.limits: dict[float, int] = {}  # seconds a token -> how many of `entries` were promised it
        self.tpot_limit = math.inf  # the least of them
        # What happened since the heartbeat whose free blocks are known.
        self.blocks_unseen = 0
        self.blocks_returned = 0
        self.is_full = False  # it refused a reservation; until it tells news or something ends here

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever changes anything of a worker changes its row: a forgotten notice would be a decision by old numbers.
        object.__setattr__(self, name, value)
        if self.rows is not None:
            self.rows.dirty.add(self)

    def touch(self) -> None:
        """Something that its row shows has changed in an object of its own."""
        if self.rows is not None:
            self.rows.dirty.add(self)

    def promise(self, tpot_s: float, by: int) -> None:
        """One more, or one less, of those that decode here was promised so much."""
        if tpot_s == math.inf:
            return
        left = self.limits.get(tpot_s, 0) + by
        if left > 0:
            self.limits[tpot_s] = left
        else:
            self.limits.pop(tpot_s, None)
        self.tpot_limit = min(self.limits, default=math.inf)

    @property
    def takes_work(self) -> bool:
        return self.is_alive and self.state == "ready"

    @property
    def num_free_blocks(self) -> int:
        """The last heartbeat's, less what was placed and plus what ended since."""
        free = self.info.num_blocks if self.stats is None else self.stats.num_free_blocks
        return min(self.info.num_blocks, free - self.blocks_unseen + self.blocks_returned)

    def prefill_queue_s(self, now: float) -> float:
        """Seconds until a prefill that joins now would begin."""
        if not self.prefills:
            return 0.0
        head = next(iter(self.prefills.values())).prefill_s
        done = min(head, max(0.0, now - self.prefill_head_since))
        return max(0.0, self.prefill_backlog_s - done)


class Ledger:
    """Entries by request and by worker. The only place where a worker's sums change."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.total_held: dict[str, int] = {}  # by model
        self.held: dict[tuple[str, str], int] = {}  # model, tenant -> KV blocks at the end of what runs for it

    def _hold(self, entry: Entry, by: int) -> None:
        key = entry.model, entry.tenant
        held = self.held.get(key, 0) + by * entry.num_blocks_at_end
        if held > 0:
            self.held[key] = held
        else:
            self.held.pop(key, None)
        self.total_held[entry.model] = self.total_held.get(entry.model, 0) + by * entry.num_blocks_at_end

    def book(self, entry: Entry, now: float) -> None:
        """A placement, booked before anybody is told of it."""
        assert entry.request_id not in self.entries, "a request has one attempt at a time"
        self.entries[entry.request_id] = entry
        decode = entry.decode
        decode.entries[entry.request_id] = entry
        decode.num_coming += entry.num_choices
        decode.num_context_tokens += entry.num_context_tokens
        decode.num_coming_tokens += entry.num_context_tokens
        decode.blocks_at_end += entry.num_blocks_at_end
        decode.blocks_unseen += entry.num_blocks_now
        decode.promise(entry.tpot_limit, 1)
        self._hold(entry, 1)
        prefilling = entry.prefilling_at
        if not prefilling.prefills:
            prefilling.prefill_head_since = now
        prefilling.prefills[entry.request_id] = entry
        prefilling.prefill_tokens += entry.uncached
        prefilling.prefill_backlog_s += entry.prefill_s
        if entry.goes_first:
            prefilling.first_backlog_s += entry.prefill_s
            for other in prefilling.prefills.values():
                other.was_overtaken |= not other.goes_first

    def first_token(self, entry: Entry, now: float) -> None:
        """Its prefill is over: it no longer loads the prefill worker and is one of the decoding."""
        if entry.first_token_at is not None:
            return
        entry.first_token_at = now
        self._leave_prefill(entry, now)
        entry.decode.num_coming -= entry.num_choices
        entry.decode.num_coming_tokens -= entry.num_context_tokens
        entry.decode.num_decoding += entry.num_choices

    def free(self, entry: Entry, now: float) -> None:
        """The attempt is over, however it ended."""
        del self.entries[entry.request_id]
        decode = entry.decode
        del decode.entries[entry.request_id]
        if entry.first_token_at is None:
            self._leave_prefill(entry, now)
            decode.num_coming -= entry.num_choices
            decode.num_coming_tokens -= entry.num_context_tokens
        else:
            decode.num_decoding -= entry.num_choices
        decode.num_context_tokens -= entry.num_context_tokens
        decode.blocks_at_end -= entry.num_blocks_at_end
        decode.promise(entry.tpot_limit, -1)
        self._hold(entry, -1)
        if not decode.entries:
            decode.num_context_tokens = decode.num_coming_tokens = 0.0  # floats that were added and taken away
        if not entry.is_seen:
            decode.blocks_unseen -= entry.num_blocks_now
        elif entry.num_missed == 0:  # the last heartbeat still counted its blocks as used
            decode.blocks_returned += max(entry.num_blocks_now, entry.num_blocks_held)
        decode.is_full = False

    def _leave_prefill(self, entry: Entry, now: float) -> None:
        worker = entry.prefilling_at
        was_head = next(iter(worker.prefills), None) == entry.request_id
        if worker.prefills.pop(entry.request_id, None) is None:
            return
        worker.prefill_tokens -= entry.uncached
        if entry.goes_first:
            worker.first_backlog_s = max(0.0, worker.first_backlog_s - entry.prefill_s) if worker.prefills else 0.0
        worker.prefill_backlog_s = max(0.0, worker.prefill_backlog_s - entry.prefill_s) if worker.prefills else 0.0
        if was_head:
            worker.prefill_head_since = now

    def beat(self, worker: WorkerState, beat: WorkerBeat, now: float, is_over: Callable[[str, int], bool]) -> list[Entry]:
        """Correct what this heartbeat contradicts. Returns the requests that it runs and nobody here knows: adopted.

        is_over: whether this (request_id, epoch) is known to be over, though its worker has not heard of that yet.
        """
        worker.last_beat_at = now
        worker.state = beat.state
        worker.stats = beat.stats
        running = dict(beat.running)
        if worker.info.role == "prefill":
            self._correct_prefills(worker, running, now)
            return []
        worker.is_full = False
        worker.blocks_returned = 0
        step_s = worker.cost.decode_s(worker.num_decoding, worker.num_context_tokens - worker.num_coming_tokens)
        step_s *= worker.decode_drift.factor
        for entry in list(worker.entries.values()):
            if entry.first_token_at is not None and now - entry.first_token_at > REST * entry.expected_output * step_s:
                self._outlives(entry, (now - entry.first_token_at) / step_s)
            if running.get(entry.request_id, -1) >= entry.epoch:
                if not entry.is_seen:
                    entry.is_seen = True
                    worker.blocks_unseen -= entry.num_blocks_now
                entry.num_missed = 0
            elif entry.is_seen:
                entry.num_missed += 1
                if entry.num_missed >= MISSES:
                    self.free(entry, now)
            elif now - entry.placed_at > UNSEEN_S:
                self.free(entry, now)
        unknown = [(r, e) for r, e in running.items() if r not in self.entries]
        if not unknown or not any(not is_over(r, e) for r, e in unknown):
            return []
        return self._adopt(worker, {r: e for r, e in running.items() if not is_over(r, e)}, now)

    def _outlives(self, entry: Entry, generated: float) -> None:
        """It has had more tokens than it was expected to get, or nearly: it will hold more at its end. Nobody knows its length;
        what has come so far says that it is a long one."""
        info, before = entry.decode.info, entry.num_blocks_at_end
        expected = max(entry.expected_output, min(float(entry.max_tokens), generated + (1 - REST) * entry.expected_output))
        after = blocks_at_end(info, entry.prompt_len, entry.num_choices, expected)
        if after <= before:
            return
        self._hold(entry, -1)
        entry.num_blocks_at_end = after
        self._hold(entry, 1)
        entry.decode.blocks_at_end += after - before

    def _correct_prefills(self, worker: WorkerState, running: dict[str, int], now: float) -> None:
        for entry in list(worker.prefills.values()):
            if entry.request_id in running:
                entry.prefill_is_seen, entry.num_missed_prefill = True, 0
            elif entry.prefill_is_seen:
                entry.num_missed_prefill += 1
                if entry.num_missed_prefill >= MISSES:
                    self.first_token(entry, now)

    def _adopt(self, worker: WorkerState, running: dict[str, int], now: float) -> list[Entry]:
        """Truth rule R9: running work is rebuilt from workers. Sizes are what the worker's block count says on average."""
        unknown = [(r, e) for r, e in running.items() if r not in self.entries]
        if not unknown or worker.stats is None:
            return []
        num_tokens = worker.stats.num_used_blocks * worker.info.layout.block_size // len(running)
        adopted = []
        for request_id, epoch in unknown:
            entry = Entry(
                request_id=request_id,
                epoch=epoch,
                model=worker.info.model,
                prompt_len=max(1, num_tokens),
                num_choices=1,
                expected_output=1.0,
                placed_at=now,
                decode=worker,
                prefill=None,
                cached=0,
                prefill_s=0.0,
            )
            self.book(entry, now)
            self.first_token(entry, now)
            entry.is_seen = True
            worker.blocks_unseen -= entry.num_blocks_now
            adopted.append(entry)
        return adopted

    def lose(self, worker: WorkerState, now: float) -> list[Entry]:
        """The worker is gone: free, and return, every attempt that needed it."""
        worker.is_alive = False
        lost = list(worker.entries.values())
        lost += [entry for entry in worker.prefills.values() if entry.decode is not worker]
        for entry in lost:
            self.free(entry, now)
        return lost

    def check_integrity(self, workers: list[WorkerState]) -> None:
        """Every sum is what its entries say. Raises AssertionError with the worker and both numbers."""
        for worker in workers:
            entries = list(worker.entries.values())
            name = worker.incarnation
            coming = sum(e.num_choices for e in entries if e.first_token_at is None)
            decoding = sum(e.num_choices for e in entries if e.first_token_at is not None)
            assert worker.num_coming == coming, f"{name}: {worker.num_coming} coming, entries say {coming}"
            assert worker.num_decoding == decoding, f"{name}: {worker.num_decoding} decoding, entries say {decoding}"
            tokens = sum(e.num_context_tokens for e in entries if e.first_token_at is None)
            assert math.isclose(worker.num_coming_tokens, tokens, abs_tol=1e-3), f"{name}: {worker.num_coming_tokens} coming"
            at_end = sum(e.num_blocks_at_end for e in entries)
            assert worker.tpot_limit == min((e.tpot_limit for e in entries), default=math.inf), f"{name}: {worker.tpot_limit}"
            assert worker.blocks_at_end == at_end, f"{name}: {worker.blocks_at_end} blocks, entries say {at_end}"
            unseen = sum(e.num_blocks_now for e in entries if not e.is_seen)
            assert worker.blocks_unseen == unseen, f"{name}: {worker.blocks_unseen} unseen, entries say {unseen}"
            assert set(worker.prefills) <= self.entries.keys(), f"{name}: prefills of nobody"
            backlog = sum(e.prefill_s for e in worker.prefills.values())
            assert worker.prefill_tokens == sum(e.uncached for e in worker.prefills.values()), f"{name}: {worker.prefill_tokens}"
            assert math.isclose(worker.prefill_backlog_s, backlog, abs_tol=1e-6), f"{name}: {worker.prefill_backlog_s}"
        held = sum(e.num_blocks_at_end for e in self.entries.values())
        assert sum(self.held.values()) == held, f"tenants hold {self.held}, entries say {held}"
        assert sum(len(w.entries) for w in workers) == len(self.entries), "an entry without a living worker"
