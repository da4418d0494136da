"""The sender of one route over a transport that works in a thread of its own: a bounded queue in front, one lane behind.

    engine thread: push ──> [bounded queue] ──> sender thread: hash, lane.store ──> the peer's blocks
    event loop:    finish, abort ──> [same queue, never refused] ──> lane.fence ──> future

Not here: how bytes travel; that is the lane's (shm.py, tcp.py). Made by link.make_sender.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from kvtransfer.outgoing import Lane, LinkBroken, Source, Transfer, never_pushed, tell_stored
from kvtransfer.transport import OnStored, Pair, TransferStats
from protocol.errors import DeadlineExceeded, HandshakeRefused, InternalError, TandemError, TransferFailed
from protocol.kv import KVEndpoint
from protocol.ticket import Grant

log = logging.getLogger(__name__)

CLOSE_S = 0.1  # for the thread to end; one that is still connecting ends by itself, and the event loop does not wait for it
MAX_RETRIES = 1  # per transfer: the second break of a link in one transfer is the network's answer


class _Kind(enum.Enum):
    WARM = "warm"
    PUSH = "push"
    FENCE = "fence"
    ABORT = "abort"
    REPAIR = "repair"


class _Job(NamedTuple):
    kind: _Kind
    transfer: Transfer | None = None
    layer: int = 0
    pairs: Sequence[Pair] = ()
    mark: Any = None  # of a device: what the engine had launched when it pushed


class Outbox:
    """A `RouteSender` (transport.py) over a lane.

    max_queued: pushes waiting. push_timeout_s: how long a push may hold up the engine when the queue is full.
    on_stored(grant, layer, first, digests) is called by the sender's thread for runs that the lane has taken.
    """

    def __init__(
        self,
        lane: Lane,
        source: Source,
        *,
        name: str = "peer",
        max_queued: int = 4096,
        push_timeout_s: float = 0.25,
        on_stored: OnStored | None = None,
    ) -> None:
        self.stats = TransferStats()
        self._lane = lane
        self._source = source
        self._on_stored = on_stored
        self._max_queued = max_queued
        self._push_timeout_s = push_timeout_s
        self._changed = threading.Condition()  # guards all below; reentrant
        self._jobs: deque[_Job] = deque([_Job(_Kind.WARM)])
        self._warmed: Future[None] = Future()
        self._warmed.set_running_or_notify_cancel()  # a waiter that gives up must not cancel it under the thread
        self._num_pushes = 0
        self._transfers: dict[str, Transfer] = {}
        self._stopping: dict[str, Transfer] = {}  # aborted, and something of it may still be under way
        self._is_closing = False
        self._has_ended = False  # the thread: it stores nothing any more
        lane.attach(lambda: self._post(_Job(_Kind.REPAIR)))
        # daemon: a process that is going down must not wait for a peer that does not answer
        self._thread = threading.Thread(target=self._run, name=f"kv-send:{name}", daemon=True)
        self._thread.start()

    # ---- any thread ------------------------------------------------------------------------------------------------

    async def ready(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._warmed), timeout)
        except TimeoutError:
            raise HandshakeRefused(f"{self._lane.endpoint} was not reached within {timeout:g} s") from None

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        self._source.check_grant(grant, endpoint, self._lane.endpoint, self._lane.num_blocks)
        with self._changed:
            assert grant.grant_id not in self._transfers, f"grant {grant.grant_id} is open already"
            transfer = self._transfers[grant.grant_id] = Transfer(grant, self._source)
            if self._is_closing:
                transfer.fail(TransferFailed("the KV sender is closed"))

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        transfer = self._transfers.get(grant_id)
        if transfer is None or transfer.failure is not None:
            return False
        transfer.check_push(layer, pairs)
        assert not transfer.is_fenced, "push after finish"
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: self._num_pushes < self._max_queued or self._is_closing or transfer.failure is not None,
                self._push_timeout_s,
            )
            if transfer.failure is not None or self._is_closing:
                return False
            if has_room:
                self._num_pushes += 1
                transfer.num_queued += 1
                self._jobs.append(_Job(_Kind.PUSH, transfer, layer, tuple(pairs), self._source.view.mark()))
                self._changed.notify_all()
                return True
        transfer.fail(
            TransferFailed(
                f"{self._max_queued} pushes were waiting for {self._lane.endpoint} for {self._push_timeout_s:g} s: "
                "the link or the peer is too slow"
            )
        )
        return False

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        with self._changed:
            transfer = self._transfers.get(grant_id)
            if transfer is None:
                raise TransferFailed(f"no transfer of grant {grant_id} is open")
            future = transfer.wanted()
            if not transfer.is_over:
                if transfer.num_queued == 0 and getattr(self._lane, "lands_at_once", False):
                    self._fence_here(transfer)  # everything has landed already: the thread need not be woken
                else:
                    self._post(_Job(_Kind.FENCE, transfer))
        started = time.perf_counter()
        try:
            if future.done():
                digests = future.result()
            else:
                digests = await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except TimeoutError:
            error = DeadlineExceeded(f"KV of grant {grant_id} had not landed after {timeout:g} s (transfer.timeout_s)")
            transfer.fail(error)
            raise error from None
        with self._changed:
            self._transfers.pop(grant_id, None)
            self.stats.transfers += 1
            self.stats.exposed_s += time.perf_counter() - started
        return digests

    async def abort(self, grant_id: str) -> None:
        """See transport.Sender. However many callers: each returns when the one stop of this grant is complete."""
        with self._changed:
            transfer = self._transfers.pop(grant_id, None)
            if transfer is not None:
                self._begin_stop(transfer)
            transfer = transfer or self._stopping.get(grant_id)
            if transfer is None:
                return
            stopped = transfer.stopping()
        await asyncio.wrap_future(stopped)

    def _begin_stop(self, transfer: Transfer) -> None:
        """The transfer is known in `_stopping` from here until its future ends, whoever waits for that or gives up waiting."""
        grant_id = transfer.grant.grant_id
        self.stats.failed += transfer.failure is not None
        transfer.fail(TransferFailed(f"grant {grant_id} was aborted"))
        self._num_pushes -= sum(job.kind is _Kind.PUSH for job in self._jobs if job.transfer is transfer)
        self._jobs = deque(job for job in self._jobs if job.transfer is not transfer)
        self._stopping[grant_id] = transfer
        # It ends in any thread, perhaps without our lock; one pop is atomic, and those who iterate do it over a copy.
        transfer.stopping().add_done_callback(lambda _: self._stopping.pop(grant_id, None))
        if self._has_ended:
            transfer.stopped()
            return
        # The thread may be in the middle of a store of this transfer; the answer comes when it has got this far.
        self._jobs.appendleft(_Job(_Kind.ABORT, transfer))
        self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            for transfer in self._transfers.values():
                transfer.fail(TransferFailed("the KV sender was closed"))
            self._changed.notify_all()
        self._lane.interrupt()  # the peer may be stopped or gone, and whoever calls is an event loop
        self._thread.join(CLOSE_S)

    def _post(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    # ---- the sender's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            started = time.perf_counter()
            try:
                self._work(job)
            except LinkBroken as error:
                self._repair(error)
            except TandemError as error:
                self._give_up(job.transfer, error)
            except Exception:  # one request's fault must not end the thread that serves the others (R11)
                log.exception("KV sender: %s failed", job.kind.value)
                self._give_up(job.transfer, InternalError("the KV sender failed; the worker's log has the details"))
            if job.kind is not _Kind.WARM:
                self.stats.seconds += time.perf_counter() - started
            if job.kind is _Kind.PUSH and job.transfer is not None:
                with self._changed:
                    job.transfer.num_queued -= 1
        try:
            self._lane.close()
        except Exception:
            log.exception("KV sender: closing the lane failed")
        if not self._warmed.done():
            self._warmed.set_exception(HandshakeRefused("the KV sender was closed"))
        with self._changed:
            self._has_ended = True
            for transfer in list(self._stopping.values()):
                transfer.stopped()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._is_closing)
            if self._is_closing:
                return None
            job = self._jobs.popleft()
            if job.kind is _Kind.PUSH:
                self._num_pushes -= 1
                self._changed.notify_all()
            return job

    def _work(self, job: _Job) -> None:
        transfer = job.transfer
        if job.kind is _Kind.WARM:
            self._warm()
        elif job.kind is _Kind.REPAIR:
            if self._lane.is_broken():
                self._repair(LinkBroken("the peer closed the connection"))
        elif transfer is None:
            raise AssertionError(f"a {job.kind.value} job without a transfer")
        elif job.kind is _Kind.ABORT:
            self._stop(transfer)
        elif transfer.failure is not None:
            return
        elif job.kind is _Kind.PUSH:
            transfer.pushed.append((job.layer, job.pairs))
            self._source.view.wait(job.mark)
            self._store(transfer, job.layer, job.pairs)
        elif job.kind is _Kind.FENCE:
            self._fence(transfer)

    def _warm(self) -> None:
        """Whoever waits in `ready` hears how it went; a transfer that comes nevertheless tries again."""
        try:
            self._lane.warm()
        except (LinkBroken, TandemError) as error:
            self._warmed.set_exception(HandshakeRefused(str(error)))
        except Exception as error:
            self._warmed.set_exception(HandshakeRefused(f"{type(error).__name__}: {error}"))
            raise
        else:
            self._warmed.set_result(None)

    def _give_up(self, transfer: Transfer | None, error: TandemError) -> None:
        if transfer is not None:
            transfer.fail(error)

    def _store(self, transfer: Transfer, layer: int, pairs: Sequence[Pair]) -> None:
        before = transfer.nbytes
        self._lane.store(transfer, layer, transfer.prepare(layer, pairs))
        self.stats.nbytes += transfer.nbytes - before
        if self._on_stored is not None:
            tell_stored(self._on_stored, transfer, layer, pairs)

    def _fence(self, transfer: Transfer) -> None:
        if transfer.num_missing:
            raise never_pushed(transfer)
        transfer.is_fenced = True
        self._lane.fence(transfer)

    def _fence_here(self, transfer: Transfer) -> None:
        """By whoever finishes, where every push has been worked off and the lane needs nobody's answer."""
        try:
            self._fence(transfer)
        except TandemError as error:
            transfer.fail(error)

    def _stop(self, transfer: Transfer) -> None:
        """Nothing was stored, or a fence says when it has landed. Without a link only the receiver's forget() can
        refuse.
        """
        if not transfer.pushed:
            transfer.stopped()
            return
        try:
            self._lane.fence(transfer)
        except (LinkBroken, TandemError):
            transfer.stopped()
        except Exception:  # whoever aborts waits for this, and this thread is past its last store
            log.exception("KV sender: fencing an aborted transfer failed")
            transfer.stopped()

    def _repair(self, error: LinkBroken) -> None:
        """Send again, over a new link, what may not have landed; each transfer once. Its source blocks are still
        untouched.
        """
        while True:
            self._lane.reset()
            with self._changed:
                for transfer in list(self._stopping.values()):
                    transfer.stopped()
                begun = [t for t in self._transfers.values() if t.pushed and not t.is_over]
            for transfer in begun:
                if transfer.num_retries >= MAX_RETRIES:
                    transfer.fail(TransferFailed(f"the link to {self._lane.endpoint} broke twice: {error}"))
                transfer.num_retries += 1
            try:
                for transfer in begun:
                    if not transfer.is_over:
                        self._replay(transfer)
                return
            except LinkBroken as next_error:
                error = next_error

    def _replay(self, transfer: Transfer) -> None:
        try:
            for layer, pairs in transfer.pushed:
                self._store(transfer, layer, pairs)
            if transfer.is_fenced:
                self._lane.fence(transfer)
        except LinkBroken:
            raise
        except TandemError as error:
            transfer.fail(error)
        except Exception:  # as in `_run`, for whoever broke it is not the only one that is served here
            log.exception("KV sender: sending again failed")
            transfer.fail(InternalError("the KV sender failed; the worker's log has the details"))
