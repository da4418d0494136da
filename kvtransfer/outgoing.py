"""One transfer over one route as its sender sees it (what was pushed, its digests, whether it ended), what it reads, and the
lane that carries its bytes.

Not here: how bytes travel (the lanes in shm.py, tcp_lane.py, memory.py) and when (outbox.py, memory.py). Used by all of
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from kvtransfer.handoff import DIGEST_NBYTES
from kvtransfer.layout import Route, contiguous, num_used_slots, partial_index, plan_routes, tail_spans
from kvtransfer.pool import KVPool
from kvtransfer.transport import OnStored, Pair
from kvtransfer.view import run_digest, view_of
from protocol.errors import HandshakeRefused, TandemError, TransferFailed
from protocol.kv import XXH3, KVEndpoint, KVLayout
from protocol.parallel import ALONE, Parallel
from protocol.ticket import Grant

Piece = tuple[int, np.ndarray]  # (index of the first block, its and its successors' bytes: [count, run_nbytes] uint8)
Digest = Callable[[memoryview], bytes]

PIECE_NBYTES = 1 << 20


class Source:
    """What a sender reads: the part of our pool that one route takes. layout: the whole model's, as it stands in papers.

    Without a route: a pool that is alone, to a decode worker that is alone. digest: None, which only a benchmark
    says, computes none. kind: of the digests, as papers name it.
    """

    def __init__(
        self,
        pool: KVPool,
        route: Route | None = None,
        layout: KVLayout | None = None,
        source: Parallel = ALONE,
        target: Parallel = ALONE,
        digest: Digest | None = run_digest,
        kind: str = XXH3,
    ) -> None:
        self.whole = layout or pool.layout
        self.source, self.target = source, target
        self.route = route or plan_routes(self.whole, source, target)[0]
        self.view = view_of(pool, self.route.source_area, kind)
        self.digest = digest if self.view.digest == XXH3 else self.view.host_digest()

    def check_grant(self, grant: Grant, endpoint: KVEndpoint, ours: KVEndpoint, num_blocks: int | None) -> None:
        """What every sender checks when a grant is opened. num_blocks: of the peer's pool, where it is known.

        Raises HandshakeRefused with both values.
        """
        if endpoint != ours:
            raise HandshakeRefused(f"this sender writes to {ours}, the grant wants {endpoint}; shake hands again")
        if endpoint not in grant.endpoints:
            raise HandshakeRefused(f"grant {grant.grant_id} names the endpoints {grant.endpoints}, not {endpoint}")
        if difference := self.whole.difference(grant.layout):
            raise HandshakeRefused(f"KV layouts differ: {difference}")
        if (grant.source, grant.target) != (self.source, self.target):
            raise HandshakeRefused(
                f"grant {grant.grant_id} is from {grant.source} ranks to {grant.target}, this sender is from {self.source} to "
                f"{self.target}"
            )
        ids = grant.block_ids
        if num_blocks is not None and ids and not 0 <= min(ids) <= max(ids) < num_blocks:
            raise HandshakeRefused(f"grant {grant.grant_id} names blocks {min(ids)}..{max(ids)}, the peer's pool has {num_blocks}")


class Transfer:
    """State of one grant at its sender.

    `prepare` runs in one thread at a time. `wanted`, `landed`, `fail`, `stopped` may race from several; the first
    ending wins.
    """

    def __init__(self, grant: Grant, source: Source) -> None:
        self.grant = grant
        self.layout = source.view.layout  # of the route
        self.pushed: list[tuple[int, Sequence[Pair]]] = []  # what has been handed to the lane, for a replay
        self.num_queued = 0  # pushes that the outbox has not worked off; guarded by its lock
        self.num_retries = 0
        self.is_fenced = False  # finish() was reached in the queue
        self.failure: TandemError | None = None
        self.nbytes = 0
        self._view = source.view
        self._digest = source.digest
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
        return self.layout.num_layers * self._num_written

    @property
    def num_missing(self) -> int:
        """Runs that were never pushed."""
        return self.num_runs - self._num_hashed

    def check_push(self, layer: int, pairs: Sequence[Pair]) -> None:
        """Asserts that the caller stays inside the grant and its own pool."""
        grant = self.grant
        assert 0 <= layer < self.layout.num_layers, f"push of layer {layer} of {self.layout.num_layers}"
        if pairs:
            blocks, indexes = zip(*pairs, strict=True)
            assert 0 <= min(blocks) <= max(blocks) < self._view.num_blocks, f"push of {blocks} of {self._view.num_blocks} blocks"
            inside = grant.num_cached_blocks <= min(indexes) <= max(indexes) < len(grant.block_ids)
            assert inside, f"push to indexes {indexes}, outside of the grant"

    def prepare(self, layer: int, pairs: Sequence[Pair]) -> Prepared:
        """The runs of one push, for a lane: hashed as they are iterated over, in host memory."""
        return Prepared(self, layer, pairs)

    def pieces(self, layer: int, pairs: Sequence[Pair]) -> Iterator[Piece]:
        """Hash the runs and yield them as few pieces, the pool's own memory where possible. A piece fits into a core's own cache,
        so that copying or sending it right away does not read memory a second time.

        The end of a partly filled last block still holds whatever the block held before, perhaps another tenant's KV.
        Zeroing it in place would be a second writer in the engine's block, so that one run per layer goes through a
        small copy with a zeroed end: what is sent, and what is hashed, holds this request's tokens and nothing else.
        """
        most = max(1, PIECE_NBYTES // self.layout.run_nbytes)
        for block, index, count in contiguous(pairs, alone=self._partial):
            for done in range(0, count, most):
                data = self._view.read(layer, block + done, min(most, count - done))
                if index == self._partial:
                    data = self._with_zeroed_end(data)
                self._hash(layer, index + done, data)
                self.nbytes += data.nbytes
                yield index + done, data

    def _with_zeroed_end(self, data: np.ndarray) -> np.ndarray:
        layout = self.layout
        copy = data.copy()
        assert self._partial is not None
        for span in tail_spans(layout, num_used_slots(layout, self.grant.num_tokens, self._partial)):
            copy[0, span.start : span.end] = 0
        return copy

    def _hash(self, layer: int, index: int, data: np.ndarray) -> None:
        width = data.shape[1]
        flat, digest = data.reshape(-1).data, self._digest
        place = layer * self._num_written + index - self.grant.num_cached_blocks
        count = data.shape[0]
        if digest is None:
            digests = bytes(count * DIGEST_NBYTES)
        else:
            digests = b"".join([digest(flat[i * width : (i + 1) * width]) for i in range(count)])
        self._digests[place * DIGEST_NBYTES : (place + count) * DIGEST_NBYTES] = digests
        self._num_hashed += self._is_hashed.count(0, place, place + count)
        self._is_hashed[place : place + count] = b"\x01" * count

    def num_used(self, index: int) -> int:
        """Slots of a block of the grant that hold a token; the rest goes out as zeros."""
        return num_used_slots(self.layout, self.grant.num_tokens, index)

    def carried(self, layer: int, indexes: Sequence[int]) -> None:
        """A lane that does not iterate has taken these runs; their digests come by `put_digests`, before `landed`."""
        for first, _, count in _stretches(indexes):
            place = layer * self._num_written + first - self.grant.num_cached_blocks
            self._num_hashed += self._is_hashed.count(0, place, place + count)
            self._is_hashed[place : place + count] = b"\x01" * count
        self.nbytes += len(indexes) * self.layout.run_nbytes

    def put_digests(self, layer: int, indexes: Sequence[int], digests: bytes) -> None:
        """16 bytes for each of these runs."""
        for first, done, count in _stretches(indexes):
            at = (layer * self._num_written + first - self.grant.num_cached_blocks) * DIGEST_NBYTES
            self._digests[at : at + count * DIGEST_NBYTES] = digests[done * DIGEST_NBYTES : (done + count) * DIGEST_NBYTES]

    def digests_of(self, layer: int, first: int, count: int) -> bytes:
        """The digests of `count` runs that were prepared, from index `first` of the grant's blocks on."""
        place = (layer * self._num_written + first - self.grant.num_cached_blocks) * DIGEST_NBYTES
        return bytes(self._digests[place : place + count * DIGEST_NBYTES])

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


def _stretches(indexes: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(first index, how many came before it, count). Most pushes are one stretch, and that is seen at C speed."""
    if indexes and list(indexes) == list(range(indexes[0], indexes[0] + len(indexes))):
        return [(indexes[0], 0, len(indexes))]
    return contiguous(list(zip(indexes, range(len(indexes)), strict=True)))


class Prepared:
    """The runs of one push. Iterating reads and hashes them; a lane from GPU to GPU takes `pairs` and reads the device itself."""

    def __init__(self, transfer: Transfer, layer: int, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self._transfer = transfer
        self._layer = layer

    def __iter__(self) -> Iterator[Piece]:
        return self._transfer.pieces(self._layer, self.pairs)


class LinkBroken(Exception):
    """The lane's connection is gone; a new one may work. Stays inside kvtransfer/."""


class Lane(Protocol):
    """How bytes reach one peer's pool.

    Called from one thread, the outbox's, except `endpoint`, `num_blocks`, `attach` and `interrupt`.
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
        """Called from any thread instead where a lane says `lands_at_once = True`: what `store` has taken lies in the peer's pool.
        Have transfer.landed(n) called, now or later, once everything stored for it has reached the peer's pool."""
        ...

    def interrupt(self) -> None:
        """From any thread, when this lane is about to be closed: a call that waits for the network gives up at once."""
        ...

    def close(self) -> None: ...


def never_pushed(transfer: Transfer) -> TransferFailed:
    return TransferFailed(
        f"{transfer.num_missing} of {transfer.num_runs} runs of grant {transfer.grant.grant_id} were never pushed"
    )


def tell_stored(on_stored: OnStored, transfer: Transfer, layer: int, pairs: Sequence[Pair]) -> None:
    """One call for each stretch of neighbouring indexes that one push held."""
    for _, first, count in contiguous([(index, index) for _, index in pairs]):
        on_stored(transfer.grant, layer, first, transfer.digests_of(layer, first, count))
