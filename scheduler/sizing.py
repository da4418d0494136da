"""How large each pool should be for the load there is: so many workers that their promise holds, with patience both ways.

    decode    the sequences that are there, coming or waiting, by how many one worker carries at the promised TPOT; their blocks at
              the end, by the blocks of one worker; the larger of the two
    prefill   the seconds of prefill that are queued, by the promised TTFT; and how busy the workers are
    both      one worker more while the promise of that half is missed and its workers have work

A worker is given `FILL` of what it can carry. A pool grows to the least that it needed throughout the last `up_s` and shrinks to
the most that it needed within the last `down_s` (Kubernetes' stabilization windows: one quiet second does not take a worker
away, one burst does not add one). Pure: state in, numbers out; the clock is an argument. Asked by `cluster/sizes.py`, about once a
second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from scheduler.cost import OutputLength
from scheduler.ledger import WorkerState

TOO_LITTLE_KEPT = 0.9  # of the requests that ended; below it a pool whose every worker has work is short
FILL = 0.85  # of what a worker can carry, it is given
MAX_SAMPLES = 4096  # of what was needed, in one pool's windows


class Bounds(NamedTuple):
    fewest: int
    most: int


class Waiting(NamedTuple):
    """What a model's queue holds."""

    num_choices: int = 0
    num_tokens: int = 0  # of prompts


class Promise(NamedTuple):
    ttft_s: float
    tpot_s: float


class Kept(NamedTuple):
    """Share of the requests that ended lately which kept each half of their promise; None: none ended."""

    ttft: float | None = None
    tpot: float | None = None


class PoolSize:
    """What one pool should be, over time."""

    def __init__(self, bounds: Bounds, size: int, up_s: float, down_s: float) -> None:
        assert bounds.fewest <= size <= bounds.most
        self.bounds = bounds
        self.size = size
        self._up_s = up_s
        self._down_s = down_s
        self._needs: deque[tuple[float, int]] = deque(maxlen=MAX_SAMPLES)
        self._began_at: float | None = None

    def observe(self, need: float, now: float) -> int:
        """need: workers' worth of load, now. -> the size that the pool should have."""
        wanted = max(self.bounds.fewest, min(self.bounds.most, math.ceil(need - 1e-9)))
        self._began_at = now if self._began_at is None else self._began_at
        self._needs.append((now, wanted))
        while self._needs[0][0] < now - max(self._up_s, self._down_s):
            self._needs.popleft()
        # A window counts once it is full: until then too little was seen to decide by.
        if now - self._began_at >= self._up_s:
            self.size = max(self.size, min(n for at, n in self._needs if at >= now - self._up_s))
        if now - self._began_at >= self._down_s:
            self.size = min(self.size, max(n for at, n in self._needs if at >= now - self._down_s))
        return self.size


class Flow:
    """How fast one model's requests get through each of the two stages, as its pools are now. Requests and sequences a second."""

    def __init__(self, workers: Sequence[WorkerState], waiting: Waiting, output: OutputLength, promise: Promise) -> None:
        self.decodes = [w for w in workers if w.info.role == "decode" and w.is_alive and not w.info.is_overflow]
        self.prefills = [w for w in workers if w.info.role == "prefill" and w.is_alive]
        self.decoding = sum(w.num_decoding for w in self.decodes)
        self.coming = sum(w.num_coming for w in self.decodes)
        self.prompt_len = max(1, waiting.num_tokens // waiting.num_choices) if waiting.num_choices else self._mean_context(output)
        self.context_len = self.prompt_len + output.mean / 2
        if self.decodes:
            one = self.decodes[0]
            self.carried = max_seqs(one, self.context_len, promise.tpot_s)  # by one worker, within its promise
            step_s = one.cost.decode_s(self.carried, self.carried * self.context_len) * one.decode_drift.factor
            self.decode_s = step_s * output.mean  # of one sequence
            self.decode_rate = len(self.decodes) * self.carried / self.decode_s
            begin = self.prefills or self.decodes
            self.prefill_rate = sum(1.0 / w.cost.prefill_s(self.prompt_len, 0) for w in begin)

    def _mean_context(self, output: OutputLength) -> int:
        num_seqs = self.decoding + self.coming
        return max(1, round(sum(w.num_context_tokens for w in self.decodes) / num_seqs - output.mean / 2)) if num_seqs else 1


def decode_need(
    workers: Sequence[WorkerState], waiting: Waiting, output: OutputLength, promise: Promise, kept: float | None = None
) -> float:
    """Decode workers that the load of one model asks for, not rounded.

    Of what waits or is being prefilled, so much counts as can decode at a time: a queue before a slow prefill is none of decode's.
    """
    flow = Flow(workers, waiting, output, promise)
    present = flow.decoding + flow.coming + waiting.num_choices
    if not flow.decodes or not present:
        return 0.0
    num_seqs = min(float(present), max(float(flow.decoding), flow.prefill_rate * flow.decode_s))
    admitted = max(0.0, min(waiting.num_choices, num_seqs - flow.decoding - flow.coming))
    layout, num_blocks = flow.decodes[0].info.layout, flow.decodes[0].info.num_blocks
    blocks = sum(w.blocks_at_end for w in flow.decodes)
    blocks += round(admitted) * layout.num_blocks_for(max(1, round(flow.prompt_len + output.mean)))
    need = max(num_seqs / flow.carried, blocks / num_blocks) / FILL
    return max(need, _one_more(flow.decodes, kept, is_busy=lambda w: w.num_decoding > 0))


def max_seqs(worker: WorkerState, context_len: float, tpot_s: float) -> int:
    """Sequences of that mean context that one worker steps through within `tpot_s`; at least one."""
    drift = worker.decode_drift.factor
    low, high = 1, worker.info.max_num_seqs
    while low < high:  # decode_s grows with the number of sequences
        middle = (low + high + 1) // 2
        if worker.cost.decode_s(middle, middle * context_len) * drift <= tpot_s:
            low = middle
        else:
            high = middle - 1
    return low


def prefill_need(
    workers: Sequence[WorkerState],
    waiting: Waiting,
    output: OutputLength,
    busy: Mapping[str, float],
    promise: Promise,
    now: float,
    kept: float | None = None,
) -> float:
    """Prefill workers that the load of one model asks for. busy: incarnation -> share of the time that it computed lately.

    Of what waits, so much counts as decode has room for within the promised TTFT: a queue before a full decode pool is none of
    prefill's.
    """
    flow = Flow(workers, waiting, output, promise)
    if not flow.prefills:
        return 0.0
    queued_s = sum(w.prefill_queue_s(now) for w in flow.prefills)
    if waiting.num_choices and flow.decodes:
        free = max(0.0, len(flow.decodes) * flow.carried - flow.decoding - flow.coming)
        admitted = min(float(waiting.num_choices), free + flow.decode_rate * promise.ttft_s)
        queued_s += admitted * flow.prefills[0].cost.prefill_s(flow.prompt_len, 0)
    running = sum(min(1.0, busy.get(w.incarnation, 0.0)) for w in flow.prefills)
    need = max(running / FILL, queued_s / promise.ttft_s)
    return max(need, _one_more(flow.prefills, kept, is_busy=lambda w: bool(w.prefills)))


def _one_more(alive: Sequence[WorkerState], kept: float | None, is_busy: Callable[[WorkerState], bool]) -> float:
    is_short = kept is not None and kept < TOO_LITTLE_KEPT and all(is_busy(w) for w in alive)
    return len(alive) + 1.0 if is_short else 0.0


class Busy:
    """Share of its time that each worker computed between two looks, from the cumulative seconds of its heartbeats."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # incarnation -> (when, step_s)
        self.shares: dict[str, float] = {}

    def look(self, workers: Iterable[WorkerState]) -> Mapping[str, float]:
        here = {w.incarnation: w for w in workers if w.stats is not None}
        for gone in self._seen.keys() - here.keys():
            del self._seen[gone]
            self.shares.pop(gone, None)
        for name, worker in here.items():
            assert worker.stats is not None
            at, step_s = worker.last_beat_at, worker.stats.step_s
            before = self._seen.get(name)
            if before is None or step_s < before[1]:
                self._seen[name] = (at, step_s)
            elif at > before[0]:
                self.shares[name] = (step_s - before[1]) / (at - before[0])
                self._seen[name] = (at, step_s)
        return self.shares
