"""One transfer as its sender sees it (what was pushed, its digests, whether it ended), and the lane that carries its
bytes.

Not here: how bytes travel (the lanes in shm.py, tcp_lane.py, memory.py) and when (outbox.py, memory.py). Used by all of
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from kvtransfer.digest import run_digest
from kvtransfer.handoff import DIGEST_NBYTES
from kvtransfer.layout import contiguous, num_used_slots, partial_index, tail_spans
from kvtransfer.pool import KVPool
from kvtransfer.transport import Pair
from protocol.errors import HandshakeRefused, TandemError, TransferFailed
from protocol.kv import KVEndpoint
from protocol.ticket import Grant

Piece = tuple[int, np.ndarray]  # (index of the first block, its and its successors' bytes: [count, run_nbytes] uint8)

PIECE_NBYTES = 1 << 20


class Transfer:
    """State of one grant at its sender.

    `prepare` runs in one thread at a time. `wanted`, `landed`, `fail`, `stopped` may race from several; the first
    ending wins.
    """

    def __init__(self, grant: Grant, pool: KVPool) -> None:
        self.grant = grant
        self.pushed: list[tuple[int, Sequence[Pair]]] = []  # what has been handed to the lane, for a replay
        self.num_retries = 0
        self.is_fenced = False  # finish() was reached in the queue
        self.failure: TandemError | None = None
        self.nbytes = 0
        self._pool = pool
        self._num_written = len(grant.block_ids) - grant.num_cached_blocks
        self._partial = partial_index(grant)
        self._digests = bytearray(self.num_runs * DIGEST_NBYTES)
        self._is_hashed = bytearray(self.num_runs)
        self._num_hashed = 0
        self._lock = threading.Lock()
        self._done: Future[bytes] | None = None
        self._stopped: Future[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.failure is not None or (self._done is not None and self._done.done())

    @property
    def num_runs(self) -> int:
        return self.grant.layout.num_layers * self._num_written

    @property
    def num_missing(self) -> int:
        """Runs that were never pushed."""
        return self.num_runs - self._num_hashed

    def check_push(self, layer: int, pairs: Sequence[Pair]) -> None:
        """Asserts that the caller stays inside the grant and its own pool."""
        grant = self.grant
        assert 0 <= layer < grant.layout.num_layers, f"push of layer {layer} of {grant.layout.num_layers}"
        for block, index in pairs:
            assert 0 <= block < self._pool.num_blocks, f"push of block {block} of {self._pool.num_blocks}"
            assert grant.num_cached_blocks <= index < len(grant.block_ids), f"push to index {index}, outside of the grant"

    def prepare(self, layer: int, pairs: Sequence[Pair]) -> Iterator[Piece]:
        """Hash the runs and yield them as few pieces, views of the pool where possible. A piece fits into a core's own cache,
        so that copying or sending it right away does not read memory a second time.

        The end of a partly filled last block still holds whatever the block held before, perhaps another tenant's KV.
        Zeroing it in place would be a second writer in the engine's block, so that one run per layer goes through a
        small copy with a zeroed end: what is sent, and what is hashed, holds this request's tokens and nothing else.
        """
        rows = self._pool.runs[layer]  # [num_blocks, run_nbytes]
        most = max(1, PIECE_NBYTES // self.grant.layout.run_nbytes)
        for block, index, count in contiguous(pairs, alone=self._partial):
            for done in range(0, count, most):
                data = rows[block + done : block + min(done + most, count)]
                if index == self._partial:
                    data = self._with_zeroed_end(data)
                self._hash(layer, index + done, data)
                self.nbytes += data.nbytes
                yield index + done, data

    def _with_zeroed_end(self, data: np.ndarray) -> np.ndarray:
        layout = self.grant.layout
        copy = data.copy()
        assert self._partial is not None
        for span in tail_spans(layout, num_used_slots(layout, self.grant.num_tokens, self._partial)):
            copy[0, span.start : span.end] = 0
        return copy

    def _hash(self, layer: int, index: int, data: np.ndarray) -> None:
        width = data.shape[1]
        flat = data.reshape(-1).data
        place = layer * self._num_written + index - self.grant.num_cached_blocks
        for i in range(data.shape[0]):
            at = (place + i) * DIGEST_NBYTES
            self._digests[at : at + DIGEST_NBYTES] = run_digest(flat[i * width : (i + 1) * width])
            if not self._is_hashed[place + i]:
                self._is_hashed[place + i] = 1
                self._num_hashed += 1

    def wanted(self) -> Future[bytes]:
        """The future that ends with the digests or with the failure. One per transfer."""
        with self._lock:
            if self._done is None:
                self._done = Future()
                self._done.set_running_or_notify_cancel()  # a waiter that times out must not cancel it under the thread
                if self.failure is not None:
                    self._done.set_exception(self.failure)
            return self._done

    def stopping(self) -> Future[None]:
        """The transfer is given up. -> the future that ends when nothing of it can be stored any more. One per transfer."""
        with self._lock:
            if self._stopped is None:
                self._stopped = Future()
                self._stopped.set_running_or_notify_cancel()  # a waiter that is cancelled must not end it for the others
            return self._stopped

    def stopped(self) -> None:
        """Nothing of it can be stored any more. Idempotent."""
        with self._lock:
            if self._stopped is not None and not self._stopped.done():
                self._stopped.set_result(None)

    def landed(self, num_stored: int) -> None:
        """The other end has stored so many distinct runs, and nothing of ours is under way."""
        if num_stored != self.num_runs:
            self.fail(TransferFailed(f"{num_stored} of {self.num_runs} runs of grant {self.grant.grant_id} arrived"))
        with self._lock:
            if self.failure is None and self._done is not None and not self._done.done():
                self._done.set_result(bytes(self._digests))
        self.stopped()

    def fail(self, error: TandemError) -> None:
        """The transfer is over, badly; the first reason stays. Never raises."""
        with self._lock:
            if self.is_over:
                return
            self.failure = error
            if self._done is not None:
                self._done.set_exception(error)


class LinkBroken(Exception):
    """The lane's connection is gone; a new one may work. Stays inside kvtransfer/."""


class Lane(Protocol):
    """How bytes reach one peer's pool.

    Called from one thread, the outbox's, except `endpoint`, `num_blocks` and `attach`.
    """

    @property
    def endpoint(self) -> KVEndpoint: ...

    @property
    def num_blocks(self) -> int | None:
        """Of the peer's pool, where it is known."""
        ...

    def attach(self, on_broken: Callable[[], None]) -> None:
        """What to call, from any thread, when the link breaks while nothing is being sent."""
        ...

    def warm(self) -> None:
        """Connect ahead of the first transfer. May raise what `store` raises; the first transfer tries again."""
        ...

    def is_broken(self) -> bool:
        """A link was there and is gone, and `reset` was not called since."""
        ...

    def reset(self) -> None:
        """Forget a broken link; the next `store` makes a new one."""
        ...

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        """Raises LinkBroken when a new connection may help, a TandemError when not."""
        ...

    def fence(self, transfer: Transfer) -> None:
        """Have transfer.landed(n) called, now or later, once everything stored for it has reached the peer's pool."""
        ...

    def close(self) -> None: ...


def never_pushed(transfer: Transfer) -> TransferFailed:
    return TransferFailed(
        f"{transfer.num_missing} of {transfer.num_runs} runs of grant {transfer.grant.grant_id} were never pushed"
    )


def check_grant(grant: Grant, endpoint: KVEndpoint, ours: KVEndpoint, pool: KVPool, num_blocks: int | None) -> None:
    """What every sender checks when a grant is opened. num_blocks: of the peer's pool, where it is known.

    Raises HandshakeRefused with both values.
    """
    if endpoint != ours:
        raise HandshakeRefused(f"this sender writes to {ours}, the grant wants {endpoint}; shake hands again")
    if endpoint not in grant.endpoints:
        raise HandshakeRefused(f"grant {grant.grant_id} names the endpoints {grant.endpoints}, not {endpoint}")
    if difference := pool.layout.difference(grant.layout):
        raise HandshakeRefused(f"KV layouts differ: {difference}")
    if num_blocks is not None and grant.block_ids and not 0 <= min(grant.block_ids) <= max(grant.block_ids) < num_blocks:
        raise HandshakeRefused(
            f"grant {grant.grant_id} names blocks {min(grant.block_ids)}..{max(grant.block_ids)}, the peer's pool has {num_blocks}"
        )
