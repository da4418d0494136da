"""The receiving side of a decode worker: `RankReceivers` for one rank's pool, `GroupReceivers` for all ranks of the worker.

Hashes what is said to have landed while later runs are on their way, so that at the seal little or nothing is left to read. Not
here: who may store and when blocks come back (handoff.py, decode/handover.py). One rank costs what it cost before there were
groups: nothing is awaited that could wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from kvtransfer.arrivals import Arrivals
from kvtransfer.digest import hash_landed, is_known_good, verify
from kvtransfer.layout import Place
from kvtransfer.link import TRANSPORTS
from kvtransfer.pool import KVPool
from kvtransfer.transport import Receiver
from protocol.errors import Failure, TandemError, TransferFailed
from protocol.kv import KVEndpoint
from protocol.messages import Ok
from protocol.rank import RankDrop, RankExpect, RankForget, RankForgot, RankLanded, RankMessage, RankVerdict, RankVerify
from protocol.ticket import Grant, Landed, Manifest

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
MAX_ARRIVALS_NBYTES = 64 << 20  # beyond it the oldest grant's digests are dropped, and the seal reads its runs again

Compute = Callable[[Callable[[], Any]], Awaitable[Any]]


class RankCaller(Protocol):
    """The leader's connection to another rank of its group (a protocol.network.Peer that speaks protocol.rank)."""

    async def call(self, message: RankMessage, timeout: float) -> RankMessage:
        """Raises the TandemError that a Failure stands for, DeadlineExceeded, WorkerLost."""
        ...

    def send(self, message: RankMessage) -> None: ...


class RankReceivers:
    """One rank's pool and its receivers, by transport name. compute: runs a function in the verifying thread, in order.

    All methods on the event loop.
    """

    def __init__(self, pool: KVPool, receivers: Mapping[str, Receiver], compute: Compute, place: Place | None = None) -> None:
        self.place = place or Place(pool.layout)
        self.place.check_pool(pool.layout)
        self._pool = pool
        self._receivers = dict(receivers)
        self._compute = compute
        self._arrivals: OrderedDict[str, Arrivals] = OrderedDict()  # by grant_id, oldest first
        self._nbytes = 0
        self._pending: deque[tuple[Arrivals, Landed]] = deque()  # landed, not yet hashed
        self._hashing: asyncio.Future[Any] | None = None

    def endpoints(self) -> dict[str, KVEndpoint]:
        return {name: receiver.endpoint() for name, receiver in self._receivers.items()}

    def expect(self, grant: Grant) -> None:
        arrivals = Arrivals(grant, self.place)
        self._arrivals[grant.grant_id] = arrivals
        self._nbytes += arrivals.nbytes
        while self._nbytes > MAX_ARRIVALS_NBYTES and len(self._arrivals) > 1:
            self.drop(next(iter(self._arrivals)))
        for receiver in self._receivers.values():
            receiver.expect(grant, arrivals)

    def forget(self, grant_id: str) -> dict[str, bool]:
        """Let no more stores in; by transport, whether a late one is impossible now."""
        return {name: receiver.forget(grant_id) for name, receiver in self._receivers.items()}

    def drop(self, grant_id: str) -> None:
        """The digests of this grant are of no use any more. Idempotent."""
        arrivals = self._arrivals.pop(grant_id, None)
        if arrivals is not None:
            self._nbytes -= arrivals.nbytes

    def landed(self, landed: Landed) -> None:
        """Hash these runs soon, in the verifying thread; a backlog is worked off by one call."""
        arrivals = self._arrivals.get(landed.grant_id)
        if arrivals is None:
            return
        self._pending.append((arrivals, landed))
        if self._hashing is None:
            self._hashing = asyncio.ensure_future(self._compute(self._hash_pending))
            self._hashing.add_done_callback(self._hashed)

    async def verify(self, grant: Grant, manifest: Manifest) -> list[tuple[int, int]]:
        """See digest.verify. Reads only what has no good digest yet; the grant's digests are dropped. Call `forget` before."""
        arrivals = self._arrivals.get(grant.grant_id)
        try:
            if arrivals is not None and grant == arrivals.grant:
                if not self._is_pending(arrivals) and is_known_good(arrivals, manifest):
                    return []
            else:  # of another shape: part of a grant, to see what of it is worth keeping
                arrivals = None
            bad: list[tuple[int, int]] = await self._compute(lambda: verify(self._pool, grant, manifest, self.place, arrivals))
            return bad
        finally:
            self.drop(grant.grant_id)

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()

    def _is_pending(self, arrivals: Arrivals) -> bool:
        """A hash of it is under way or due; the verifying thread works in order, so what is asked of it next sees the result."""
        return self._hashing is not None or any(waiting is arrivals for waiting, _ in self._pending)

    def _hash_pending(self) -> None:
        """In the verifying thread."""
        while self._pending:
            arrivals, landed = self._pending.popleft()
            hash_landed(self._pool, arrivals, landed)

    def _hashed(self, task: asyncio.Future[Any]) -> None:
        self._hashing = None
        if not task.cancelled() and task.exception() is not None:  # the seal will read those runs itself
            log.error("hashing landed KV failed", exc_info=task.exception())
        elif self._pending and not task.cancelled():  # came while the thread was on its way back
            self._hashing = asyncio.ensure_future(self._compute(self._hash_pending))
            self._hashing.add_done_callback(self._hashed)

    async def handle(self, message: RankMessage) -> RankMessage | None:
        """What the leader asks of a rank of its own group; None: not about receiving, or not answered."""
        if isinstance(message, RankExpect):
            self.expect(message.grant)
            return Ok()
        if isinstance(message, RankForget):
            refuses = self.forget(message.grant_id)
            if message.is_over:
                self.drop(message.grant_id)
            return RankForgot(refuses)
        if isinstance(message, RankDrop):
            self.drop(message.grant_id)
        elif isinstance(message, RankLanded):
            self.landed(message.landed)
        elif isinstance(message, RankVerify):
            return RankVerdict(tuple(await self.verify(message.grant, message.manifest)))
        return None


class GroupReceivers:
    """All ranks of a decode worker, as its leader sees them. others: rank -> (how to call it, its endpoints)."""

    def __init__(self, own: RankReceivers, others: Mapping[int, tuple[RankCaller, Mapping[str, KVEndpoint]]] | None = None) -> None:
        self._own = own
        self._others = {rank: caller for rank, (caller, _) in sorted((others or {}).items())}
        self.place = own.place
        assert len(self._others) + 1 == self.place.parallel.num_ranks, f"{len(self._others)} others of {self.place.parallel}"
        by_rank = [own.endpoints(), *(dict(endpoints) for _, (_, endpoints) in sorted((others or {}).items()))]
        self.endpoints: dict[str, tuple[KVEndpoint, ...]] = {
            name: tuple(endpoints[name] for endpoints in by_rank)
            for name in by_rank[0]
            if all(name in endpoints for endpoints in by_rank)
        }

    @property
    def is_alone(self) -> bool:
        return not self._others

    async def expect(self, grant: Grant) -> None:
        """On every rank; only then may the grant leave. Raises what a rank answers: then forget it."""
        self._own.expect(grant)
        await self._ask(RankExpect(grant))

    def forget_here(self, grant_id: str) -> dict[str, bool]:
        """On our own rank alone, at once. Where the worker is alone that is all there is to forget."""
        return self._own.forget(grant_id)

    async def forget(self, grant_id: str, *, is_over: bool) -> dict[str, bool]:
        """On every rank; by transport, whether no rank can take a late store now. A rank that does not answer may. is_over: it will
        not be verified.
        """
        refused = self._own.forget(grant_id)
        if not self._others:
            return refused
        try:
            answers = await self._ask(RankForget(grant_id, is_over))
        except TandemError as error:
            log.warning("a rank does not say that it refuses grant %s: %s", grant_id, error.message)
            return dict.fromkeys(refused, False)
        return {name: refuses and all(_refuses(answer, name) for answer in answers) for name, refuses in refused.items()}

    def landed(self, grant: Grant, landed: Landed, transport: str) -> None:
        """Have these runs hashed ahead of the seal, on the ranks where they lie. Where receivers hash by themselves, nothing."""
        if TRANSPORTS[transport].hashes_itself:
            return
        self._own.landed(landed)
        for caller in self._others.values():
            caller.send(RankLanded(grant, landed))

    async def verify(self, grant: Grant, manifest: Manifest) -> list[tuple[int, int]]:
        """All runs that differ from the manifest, on whatever rank. Raises when a rank cannot say."""
        if not self._others:
            return await self._own.verify(grant, manifest)
        own, *verdicts = await asyncio.gather(self._own.verify(grant, manifest), self._ask(RankVerify(grant, manifest), 60.0))
        bad = list(own)
        for verdict in verdicts[0]:
            assert isinstance(verdict, RankVerdict), verdict
            bad += verdict.bad
        return bad

    def drop(self, grant_id: str) -> None:
        self._own.drop(grant_id)
        for caller in self._others.values():
            caller.send(RankDrop(grant_id))

    def close(self) -> None:
        self._own.close()

    async def _ask(self, message: RankMessage, timeout: float = CALL_TIMEOUT_S) -> list[RankMessage]:
        if not self._others:
            return []
        answers = await asyncio.gather(*(caller.call(message, timeout) for caller in self._others.values()))
        for answer in answers:
            if isinstance(answer, Failure):
                raise TransferFailed(f"a rank of this worker: {answer.message}")
        return list(answers)


def _refuses(answer: RankMessage, name: str) -> bool:
    return isinstance(answer, RankForgot) and answer.refuses.get(name, False)
