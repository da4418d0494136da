"""Transport inside one process: the sender copies straight into the other worker's pool, in the caller's thread.

For `LLM(prefill=1, decode=1)` and for fault tests under a virtual clock, where a thread of our own would live in
another time. The papers, checks and digests are the same as between machines. Made by link.py.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvtransfer.outgoing import Lane, Piece, Transfer, check_grant, never_pushed
from kvtransfer.pool import KVPool
from kvtransfer.transport import Pair, TransferStats
from protocol.errors import HandshakeRefused, TandemError, TransferFailed
from protocol.kv import KVEndpoint, KVLayout, MemoryEndpoint
from protocol.ticket import Grant

_ids = itertools.count(1)
_receivers: weakref.WeakValueDictionary[int, MemoryReceiver] = weakref.WeakValueDictionary()


class MemoryReceiver:
    """A `Receiver`. can_refuse False makes it behave like mapped memory: late stores get in and `forget` says so (for
    tests of R2).
    """

    def __init__(self, pool: KVPool, *, can_refuse: bool = True) -> None:
        self.pool = pool
        self._can_refuse = can_refuse
        self._endpoint = MemoryEndpoint(next(_ids))
        self._live: dict[str, Grant] = {}
        self._lock = threading.Lock()
        _receivers[self._endpoint.pool_id] = self

    def endpoint(self) -> MemoryEndpoint:
        return self._endpoint

    def expect(self, grant: Grant) -> None:
        with self._lock:
            self._live[grant.grant_id] = grant

    def forget(self, grant_id: str) -> bool:
        with self._lock:  # a store holds it, so none is under way when this returns
            self._live.pop(grant_id, None)
        return self._can_refuse

    def close(self) -> None:
        _receivers.pop(self._endpoint.pool_id, None)
        with self._lock:
            self._live.clear()
            self._can_refuse = True

    def store(self, grant: Grant, incarnation: str, layer: int, pieces: Iterable[Piece]) -> None:
        """Called by the sender. Raises TransferFailed when the grant is not live."""
        with self._lock:
            if self._can_refuse and self._live.get(grant.grant_id) != grant:
                raise TransferFailed(f"the decode worker refuses grant {grant.grant_id}: it is unknown or over")
            if incarnation != grant.prefill_incarnation:
                raise TransferFailed(f"grant {grant.grant_id} is for {grant.prefill_incarnation}, not for {incarnation}")
            store_pieces(self.pool.runs[layer], grant, pieces)


def store_pieces(rows: np.ndarray, grant: Grant, pieces: Iterable[Piece]) -> None:
    """Copy pieces into the granted blocks of one layer. rows: [num_blocks, run_nbytes] of the receiving pool.

    np.copyto lets the GIL go, which slice assignment between memoryviews does not.
    """
    for first, data in pieces:
        start = 0
        blocks = grant.block_ids[first : first + len(data)]
        for i in range(1, len(blocks) + 1):
            if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
                np.copyto(rows[blocks[start] : blocks[start] + i - start], data[start:i])
                start = i


class MemoryLane:
    """See outgoing.Lane. Raises HandshakeRefused when there is no such pool in this process."""

    def __init__(self, endpoint: MemoryEndpoint, layout: KVLayout, incarnation: str) -> None:
        receiver = _receivers.get(endpoint.pool_id)
        if receiver is None:
            raise HandshakeRefused(f"there is no KV pool {endpoint.pool_id} in this process")
        if difference := layout.difference(receiver.pool.layout):
            raise HandshakeRefused(f"KV layouts differ: {difference}")
        self.endpoint = endpoint
        self.num_blocks = receiver.pool.num_blocks
        self._receiver = receiver
        self._incarnation = incarnation

    def attach(self, on_broken: Callable[[], None]) -> None:
        pass

    def warm(self) -> None:
        pass

    def is_broken(self) -> bool:
        return False

    def reset(self) -> None:
        pass

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        self._receiver.store(transfer.grant, self._incarnation, layer, pieces)

    def fence(self, transfer: Transfer) -> None:
        transfer.landed(transfer.num_runs - transfer.num_missing)

    def close(self) -> None:
        pass


class DirectSender:
    """A `Sender` (transport.py) over a lane that never waits: everything has been stored when `push` returns."""

    def __init__(self, lane: Lane, pool: KVPool) -> None:
        self.stats = TransferStats()
        self._lane = lane
        self._pool = pool
        self._transfers: dict[str, Transfer] = {}
        self._storing = threading.Lock()  # held during a store: `push` is the engine's thread, `abort` the event loop

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        check_grant(grant, endpoint, self._lane.endpoint, self._pool, self._lane.num_blocks)
        assert grant.grant_id not in self._transfers, f"grant {grant.grant_id} is open already"
        self._transfers[grant.grant_id] = Transfer(grant, self._pool)

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        transfer = self._transfers.get(grant_id)
        if transfer is None or transfer.failure is not None:
            return False
        transfer.check_push(layer, pairs)
        started = time.perf_counter()
        try:
            with self._storing:
                if transfer.failure is None:
                    self._lane.store(transfer, layer, transfer.prepare(layer, pairs))
        except TandemError as error:
            transfer.fail(error)
        self.stats.seconds += time.perf_counter() - started
        return transfer.failure is None

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        transfer = self._transfers.get(grant_id)
        if transfer is None:
            raise TransferFailed(f"no transfer of grant {grant_id} is open")
        future = transfer.wanted()
        if transfer.num_missing:
            transfer.fail(never_pushed(transfer))
        else:
            self._lane.fence(transfer)
        digests = future.result(0)
        self._transfers.pop(grant_id, None)
        self.stats.transfers += 1
        self.stats.nbytes += transfer.nbytes
        return digests

    async def abort(self, grant_id: str) -> None:
        transfer = self._transfers.pop(grant_id, None)
        if transfer is not None:
            self.stats.failed += transfer.failure is not None
            transfer.fail(TransferFailed(f"grant {grant_id} was aborted"))
        with self._storing:  # also for a second caller: a store that began before is over when this returns
            pass

    def close(self) -> None:
        for transfer in self._transfers.values():
            transfer.fail(TransferFailed("the KV sender was closed"))
        self._lane.close()
