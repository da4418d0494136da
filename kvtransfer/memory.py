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

from kvtransfer.arrivals import Arrivals
from kvtransfer.layout import Area
from kvtransfer.outgoing import Lane, Piece, Source, Transfer, never_pushed, tell_stored
from kvtransfer.pool import KVPool
from kvtransfer.transport import OnStored, Pair, TransferStats
from kvtransfer.view import AnyView, view_of
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

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
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

    def store(self, view: AnyView, grant: Grant, incarnation: str, layer: int, pieces: Iterable[Piece]) -> None:
        """Called by the sender, with the part of our pool that is its route's. Raises TransferFailed when the grant is not live."""
        with self._lock:
            if self._can_refuse and self._live.get(grant.grant_id) != grant:
                raise TransferFailed(f"the decode worker refuses grant {grant.grant_id}: it is unknown or over")
            if incarnation != grant.prefill_incarnation:
                raise TransferFailed(f"grant {grant.grant_id} is for {grant.prefill_incarnation}, not for {incarnation}")
            for first, data in pieces:
                view.write(layer, grant.block_ids[first : first + len(data)], data)


class MemoryLane:
    """See outgoing.Lane. layout: of the peer rank's pool; area: the route's part of it.

    Raises HandshakeRefused when there is no such pool in this process.
    """

    def __init__(self, endpoint: MemoryEndpoint, layout: KVLayout, incarnation: str, area: Area | None = None) -> None:
        receiver = _receivers.get(endpoint.pool_id)
        if receiver is None:
            raise HandshakeRefused(f"there is no KV pool {endpoint.pool_id} in this process")
        if difference := layout.difference(receiver.pool.layout):
            raise HandshakeRefused(f"KV layouts differ: {difference}")
        self.endpoint = endpoint
        self.num_blocks = receiver.pool.num_blocks
        self._receiver = receiver
        self._view = view_of(receiver.pool, area)
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
        self._receiver.store(self._view, transfer.grant, self._incarnation, layer, pieces)

    def fence(self, transfer: Transfer) -> None:
        transfer.landed(transfer.num_runs - transfer.num_missing)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


class DirectSender:
    """A `RouteSender` (transport.py) over a lane that never waits: everything has been stored when `push` returns.

    on_stored: as in outbox.py, here called in the thread that pushes.
    """

    def __init__(self, lane: Lane, source: Source, on_stored: OnStored | None = None) -> None:
        self.stats = TransferStats()
        self._lane = lane
        self._source = source
        self._on_stored = on_stored
        self._transfers: dict[str, Transfer] = {}
        self._storing = threading.Lock()  # held during a store: `push` is the engine's thread, `abort` the event loop

    async def ready(self, timeout: float) -> None:
        pass

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        self._source.check_grant(grant, endpoint, self._lane.endpoint, self._lane.num_blocks)
        assert grant.grant_id not in self._transfers, f"grant {grant.grant_id} is open already"
        self._transfers[grant.grant_id] = Transfer(grant, self._source)

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        transfer = self._transfers.get(grant_id)
        if transfer is None or transfer.failure is not None:
            return False
        transfer.check_push(layer, pairs)
        started = time.perf_counter()
        try:
            with self._storing:
                if transfer.failure is None:
                    self._source.view.wait(self._source.view.mark())
                    self._lane.store(transfer, layer, transfer.prepare(layer, pairs))
                    if self._on_stored is not None:
                        tell_stored(self._on_stored, transfer, layer, pairs)
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
