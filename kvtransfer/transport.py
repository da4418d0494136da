"""What a transport is: a `RouteSender` at a prefill rank, a `Receiver` at a decode rank. Push, never pull.

Implemented by shm.py, tcp.py and memory.py; chosen by link.py. A worker does not see them: it has one `Sender` per decode
worker, and one `receiving.GroupReceivers`, whatever the number of ranks on either side (routes: layout.py; ranks.py; group.py).
The order of the verbs, and what each side does with its blocks after each of them, is handoff.py's business; nothing here
decides that.

    prefill                                           decode
      |                                                 |  receivers.expect(grant)       before the grant leaves the worker
      |  sender.open(grant)                             |
      |  sender.push(grant_id, layer, pairs)  ======>   |  (bytes appear in the granted blocks)
      |  ---- Landed(digests), now and then ------->    |  receivers.landed(...)         hashed while others are under way
      |  digests = await sender.finish(grant_id, s)     |
      |  ---- Seal(manifest) ---------------------->    |  receivers.forget(grant_id), receivers.verify(grant, manifest)
      |  or: await sender.abort(grant_id), WriterDone   |  receivers.forget(grant_id); False: quarantine
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.arrivals import Arrivals
from protocol.kv import KVEndpoint
from protocol.ticket import Grant, Landed

Pair = tuple[int, int]  # (block of our own pool, index into the grant's block_ids)
OnStored = Callable[[Grant, int, int, bytes], None]  # (grant, layer of the route, first index, digests of that run and the next)
OnLanded = Callable[[Grant, Landed], None]  # on the event loop


class TransferStats:
    """Cumulative numbers of one sender. Read from any thread; a reading may be one transfer behind.

    seconds: the sender's thread was busy hashing, copying and sending. exposed_s: from finish() being called to the
    last byte having landed, the part of a transfer that computing did not hide.
    """

    def __init__(self) -> None:
        self.transfers = 0
        self.failed = 0
        self.nbytes = 0
        self.seconds = 0.0
        self.exposed_s = 0.0

    def __iadd__(self, other: TransferStats) -> TransferStats:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Sender(Protocol):
    """One per peer decode worker, for the whole prefill worker. `push` may be called from any thread, the rest from an event
    loop.

    Each grant that was opened ends with one `finish` that returned, or with an `abort`. Until then its source blocks
    must keep their bytes.
    """

    def stats(self) -> TransferStats:
        """Of this process; seconds and bytes are sums over its routes, transfers and failures are the largest of them."""
        ...

    async def open(self, grant: Grant) -> None:
        """Get ready for a grant. Raises HandshakeRefused when it names another endpoint, layout or group than the hand-shake."""
        ...

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        """Send runs of one layer (of our own rank, in its own numbers): for each pair the bytes of (layer, pair[0]) of our pool
        go to the grant's block pair[1]. The other ranks push theirs, told by whoever runs the model.

        Returns at once; the sender's thread works the pushes off in order. Pushing a run again replaces it. When the
        bounded queue stays full past its deadline the transfer fails, not the caller. False: this transfer is over
        (failed, aborted, never opened), so further pushes are in vain. Never raises for a fault of the peer or the
        link: `finish` does.
        """
        ...

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        """Wait until everything has landed; the digests in Manifest order. After it returns no store of ours can happen
        any more.

        Raises TransferFailed (link broken, refused, a run was never pushed), DeadlineExceeded after `timeout` seconds;
        then call `abort`.
        """
        ...

    async def abort(self, grant_id: str) -> None:
        """Give a transfer up. Returns when no store of ours can happen any more, to each of several callers. Idempotent;
        unknown grants return at once.
        """
        ...

    def close(self) -> None:
        """Fail what is open, end the thread, drop the connection or mapping. Blocks for a tenth of a second at most, for each
        route. Idempotent.
        """
        ...


class RouteSender(Protocol):
    """One per route (layout.py): a `Sender` for one rank's part of one decode rank's pool.

    Layers count from the route's first one, and `finish` returns the digests of its rows.
    """

    @property
    def stats(self) -> TransferStats: ...

    async def ready(self, timeout: float) -> None:
        """Wait until the peer has been reached once. Raises HandshakeRefused, saying why it was not."""
        ...

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        """Raises HandshakeRefused, as Sender.open."""
        ...

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool: ...

    async def finish(self, grant_id: str, timeout: float) -> bytes: ...

    async def abort(self, grant_id: str) -> None: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """One per transport of a decode rank. All verbs are quick and may be called from any thread."""

    def endpoint(self) -> KVEndpoint:
        """Where senders find it; goes into the handshake's answer and into grants."""
        ...

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        """From now on stores into this grant's written blocks, by its named prefill incarnation, are let in. arrivals: a receiver
        whose own thread takes the bytes puts their digests there; the others leave it alone.
        """
        ...

    def forget(self, grant_id: str) -> bool:
        """Let no more stores in. Call it before verification and before blocks are given back. Idempotent.

        True: no late store is possible, the blocks may be read or given back now. False: this transport cannot refuse
        a late store; wait for the writer's own word (manifest, WriterDone, the answer to StopWriting) or observed
        death.
        """
        ...

    def close(self) -> None: ...
