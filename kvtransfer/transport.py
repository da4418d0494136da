"""What a transport is: a `Sender` at the prefill worker, a `Receiver` at the decode worker. Push, never pull.

Implemented by shm.py, tcp.py and memory.py; chosen by link.py; driven by prefill/ and decode/. The order of the verbs,
and what each side does with its blocks after each of them, is handoff.py's business; nothing here decides that.

    prefill                                           decode
      |                                                 |  receiver.expect(grant)        before the grant leaves the worker
      |  sender.open(grant, endpoint)                   |
      |  sender.push(grant_id, layer, pairs)  ======>   |  (bytes appear in the granted blocks)
      |  digests = await sender.finish(grant_id, s)     |
      |  ---- Seal(manifest) ---------------------->    |  receiver.forget(grant_id), then digest.verify(pool, grant, manifest)
      |  or: await sender.abort(grant_id), WriterDone   |  receiver.forget(grant_id); False: quarantine
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protocol.kv import KVEndpoint
from protocol.ticket import Grant

Pair = tuple[int, int]  # (block of our own pool, index into the grant's block_ids)


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


class Sender(Protocol):
    """One per peer decode worker. `open` and `push` may be called from any thread; `finish` and `abort` from an event
    loop.

    Each grant that was opened ends with one `finish` that returned, or with an `abort`. Until then its source blocks
    must keep their bytes.
    """

    @property
    def stats(self) -> TransferStats: ...

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        """Get ready for a grant. Raises HandshakeRefused when this is not the peer's endpoint, or its layout is not
        ours.
        """
        ...

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        """Send runs of one layer: for each pair the bytes of (layer, pair[0]) of our pool go to the grant's block
        pair[1].

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
        """Fail what is open, end the thread, drop the connection or mapping. Blocks for a second at most.
        Idempotent.
        """
        ...


class Receiver(Protocol):
    """One per transport of a decode worker. All verbs are quick and may be called from any thread."""

    def endpoint(self) -> KVEndpoint:
        """Where senders find it; goes into the handshake's answer and into grants."""
        ...

    def expect(self, grant: Grant) -> None:
        """From now on stores into this grant's written blocks, by its named prefill incarnation, are let in."""
        ...

    def forget(self, grant_id: str) -> bool:
        """Let no more stores in. Call it before verification and before blocks are given back. Idempotent.

        True: no late store is possible, the blocks may be read or given back now. False: this transport cannot refuse
        a late store; wait for the writer's own word (manifest, WriterDone, the answer to StopWriting) or observed
        death.
        """
        ...

    def close(self) -> None: ...
