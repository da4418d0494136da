"""What the ledger knows of a model's workers as columns of numbers, so that a decision looks at a thousand of them at once.

Derived, never the truth: a `WorkerState` tells its rows that it has changed, and its row is written anew before the next look. One
`Rows` for each role of each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from protocol.messages import WorkerInfo
from scheduler.cost import CostModel
from scheduler.ledger import WorkerState

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

# Columns.
TAKES, BACKLOG_S, HEAD_S, HEAD_SINCE, NUM_PREFILLS, PREFILL_DRIFT = range(6)
DECODING, COMING, CONTEXT, AT_END, FREE, DECODE_DRIFT, TPOT_LIMIT = range(6, 13)
TOKENS, HEAD_TOKENS, COMING_CONTEXT = range(13, 16)  # uncached ones of all prompts in the prefill queue, of its first
TOGETHER, RESIDENT = range(16, 18)  # prompts that go into a step with another one; tokens of context of those that decode
SEEN_AT, FIRST_S = 18, 19  # when the last heartbeat came; seconds of the prefill queue of those that go first
NUM_COLUMNS = 20


def _row(worker: WorkerState) -> tuple[float, ...]:
    first = next(iter(worker.prefills.values())) if worker.prefills else None
    return (
        worker.takes_work and not worker.is_full,
        worker.prefill_backlog_s if worker.prefills else 0.0,
        first.prefill_s if first is not None else 0.0,
        worker.prefill_head_since,
        len(worker.prefills),
        worker.prefill_drift.factor,
        worker.num_decoding,
        worker.num_coming,
        worker.num_context_tokens,
        worker.blocks_at_end,
        worker.num_free_blocks,
        worker.decode_drift.factor,
        worker.tpot_limit,
        worker.prefill_tokens,
        first.uncached if first is not None else 0,
        worker.num_coming_tokens,
        _together(worker) if len(worker.prefills) > 1 else 0.0,
        worker.num_context_tokens - worker.num_coming_tokens,
        worker.last_beat_at,
        worker.first_backlog_s,
    )


def _together(worker: WorkerState) -> float:
    """Of the prompts that wait there, how many do not begin a step of their own."""
    batch = worker.info.max_num_batched_tokens
    return max(0.0, len(worker.prefills) - max(1.0, worker.prefill_tokens / batch)) if batch > 0 else 0.0


class Rows:
    """Workers of one role. Columns that change are in `live`, [NUM_COLUMNS, workers]; the others are written when somebody
    joins."""

    def __init__(self) -> None:
        self.workers: list[WorkerState] = []
        self.dirty: set[WorkerState] = set()
        self.at: dict[str, int] = {}  # incarnation -> row
        self._rebuild()

    def __len__(self) -> int:
        return len(self.workers)

    def add(self, worker: WorkerState) -> None:
        self.workers.append(worker)
        self._rebuild()

    def remove(self, worker: WorkerState) -> None:
        self.workers.remove(worker)
        worker.rows = None
        self._rebuild()

    def refresh(self) -> None:
        """Write what has changed since the last look."""
        for worker in self.dirty:
            self.live[:, self.at[worker.incarnation]] = _row(worker)
        self.dirty.clear()

    def _rebuild(self) -> None:
        workers = self.workers
        self.at = {worker.incarnation: i for i, worker in enumerate(workers)}
        self.live: Floats = np.zeros((NUM_COLUMNS, len(workers)))
        self.costs: list[CostModel] = list({id(w.cost): w.cost for w in workers}.values())
        which = {id(cost): i for i, cost in enumerate(self.costs)}
        self.cost_of: Ints = np.array([which[id(w.cost)] for w in workers], dtype=np.int64)
        infos = [w.info for w in workers]
        self.num_blocks = _floats(i.num_blocks for i in infos)
        self.block_size = _floats(i.layout.block_size for i in infos)
        self.max_seqs = _floats(i.max_num_seqs for i in infos)
        sizes = {i.layout.block_size for i in infos}
        self.one_block_size: Any = float(sizes.pop()) if len(sizes) == 1 else self.block_size
        self.block_nbytes = _floats(i.layout.block_nbytes for i in infos)
        nbytes = {i.layout.block_nbytes for i in infos}
        self.least_blocks = min((i.num_blocks for i in infos), default=0)
        self.one_block_nbytes: Any = float(nbytes.pop()) if len(nbytes) == 1 else self.block_nbytes
        self.batch = _floats(i.max_num_batched_tokens for i in infos)  # of one step; 0: not told
        self.chunk = _floats(i.max_num_batched_tokens or 256 for i in infos)
        self.can_prefill: Bools = np.array([i.can_prefill for i in infos], dtype=bool)
        self.is_overflow: Bools = np.array([i.is_overflow for i in infos], dtype=bool)
        self.is_spot: Bools = np.array([i.is_spot for i in infos], dtype=bool)
        self.price = _floats(i.price_per_hour for i in infos)
        self.has_overflow = bool(self.is_overflow.any())
        self.differ = len({(i.price_per_hour, i.is_spot) for i in infos}) > 1
        self.bits: Ints = np.array([w.bit for w in workers], dtype=np.int64)
        for worker in workers:
            worker.rows = self
        self.dirty = set(workers)

    def theta(self, of: Callable[[CostModel], list[float]]) -> tuple[Any, ...]:
        """The coefficients of one fit: numbers while all workers share it, else a column each."""
        if len(self.costs) == 1:
            return tuple(of(self.costs[0]))
        matrix = np.array([of(cost) for cost in self.costs])
        return tuple(matrix[self.cost_of].T)

    def num_blocks_for(self, num_tokens: float) -> Any:
        """A number while all workers have blocks of one size, else a column."""
        if isinstance(self.one_block_size, float):
            return float(math.ceil(num_tokens / self.one_block_size))
        return np.ceil(num_tokens / self.block_size)

    def check_integrity(self) -> None:
        """What is not marked as changed is what the workers say."""
        for worker in self.workers:
            if worker not in self.dirty:
                row = self.live[:, self.at[worker.incarnation]]
                assert tuple(row) == tuple(map(float, _row(worker))), f"{worker.incarnation}: its row is old"


def _floats(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)


class Pool(list[WorkerState]):
    """A model's workers, in the order in which they came, and their rows by role."""

    def __init__(self, workers: Iterable[WorkerState] = ()) -> None:
        super().__init__()
        self.prefill = Rows()
        self.decode = Rows()
        self.largest: WorkerInfo | None = None  # the decode worker whose pool holds most tokens
        for worker in workers:
            self.join(worker)

    def join(self, worker: WorkerState) -> None:
        self.append(worker)
        self.of(worker.info.role).add(worker)
        self._measure()

    def leave(self, worker: WorkerState) -> None:
        self.remove(worker)
        self.of(worker.info.role).remove(worker)
        self._measure()

    def _measure(self) -> None:
        infos = [worker.info for worker in self.decode.workers]
        self.largest = max(infos, key=lambda info: info.num_blocks * info.layout.block_size, default=None)

    def of(self, role: str) -> Rows:
        return self.prefill if role == "prefill" else self.decode

    def refresh(self) -> None:
        if self.prefill.dirty:
            self.prefill.refresh()
        if self.decode.dirty:
            self.decode.refresh()
