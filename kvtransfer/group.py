"""A prefill worker's senders over all its ranks, and what a rank that is not the leader does about KV for either role.

    leader (rank 0)                                  another rank
    Connector ── connect ──> RankSender, or GroupSender(own RankSender, RankCaller of each other rank)
                                 open, finish, abort ──── RankOpen, RankFinish, RankAbort ───> RankTransfers
                                 push: each rank's own, told by the step broadcast ─────────> RankTransfers.push
                                 on_landed  <──────────── RankLanded, signed by the rank ──── RankTransfers

Not here: who may write what (outbound.py), the connection between the ranks and the steps (cluster/, engine/).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kvtransfer.landing import Landings
from kvtransfer.layout import Place, Route, num_rows, rows_of
from kvtransfer.link import TRANSPORTS, make_sender, name_of
from kvtransfer.outgoing import Source
from kvtransfer.pool import KVPool
from kvtransfer.ranks import RankSender, RankSenders
from kvtransfer.receiving import RankCaller, RankReceivers
from kvtransfer.transport import OnLanded, OnStored, Pair, RouteSender, Sender, TransferStats
from protocol.errors import Failure, HandshakeRefused, TandemError, TransferFailed, from_failure
from protocol.kv import KVEndpoint
from protocol.messages import Ok
from protocol.parallel import Parallel
from protocol.rank import (
    RankAbort,
    RankConnect,
    RankDigests,
    RankDisconnect,
    RankFinish,
    RankLanded,
    RankMessage,
    RankOpen,
)
from protocol.ticket import Grant

CALL_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 3.0  # below the gateway's patience with a Prefill, in which the hand-shake happens
ABORT_TIMEOUT_S = 30.0


class GroupSender:
    """A `Sender` (transport.py) over our own rank and the others."""

    def __init__(self, place: Place, target: Parallel, link: int, own: RankSender, others: Mapping[int, RankCaller]) -> None:
        assert place.rank == 0, "the leader drives"
        self._place = place
        self._target = target
        self._link = link
        self._own = own
        self._others = dict(sorted(others.items()))
        self._closing: set[asyncio.Task[object]] = set()

    def stats(self) -> TransferStats:
        return self._own.stats()

    async def open(self, grant: Grant) -> None:
        try:
            await _first_error(self._own.open(grant), *self._ask(RankOpen(self._link, grant), CALL_TIMEOUT_S))
        except TandemError:
            await self.abort(grant.grant_id)
            raise

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        return self._own.push(grant_id, layer, pairs)

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        asked = self._ask(RankFinish(grant_id, timeout), timeout + CALL_TIMEOUT_S)
        own, *answers = await _first_error(self._own.finish(grant_id, timeout), *asked)
        assert isinstance(own, bytes)
        by_rank = {0: own}
        for rank, answer in zip(self._others, answers, strict=True):
            assert isinstance(answer, RankDigests), answer
            by_rank[rank] = answer.digests
        return self._in_manifest_order(by_rank)

    async def abort(self, grant_id: str) -> None:
        await _first_error(self._own.abort(grant_id), *self._ask(RankAbort(grant_id), ABORT_TIMEOUT_S))

    def close(self) -> None:
        self._own.close()
        for caller in self._others.values():
            task = asyncio.ensure_future(_tolerant(caller.call(RankDisconnect(self._link), CALL_TIMEOUT_S)))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _ask(self, message: RankMessage, timeout: float) -> list[Awaitable[object]]:
        return [caller.call(message, timeout) for caller in self._others.values()]

    def _in_manifest_order(self, by_rank: Mapping[int, bytes]) -> bytes:
        """Each rank gave the digests of its own routes, in their order; the manifest has all routes in theirs."""
        placed = rows_of(self._place.layout, self._place.parallel, self._target)
        total = sum(len(digests) for digests in by_rank.values())
        rows = num_rows(self._place.layout, self._place.parallel, self._target)
        width, rest = divmod(total, rows)
        if rest:
            raise TransferFailed(f"the ranks gave {total} bytes of digests for {rows} rows")
        taken = dict.fromkeys(by_rank, 0)
        parts = []
        for route, _ in placed:
            start, nbytes = taken[route.source], route.num_layers * width
            parts.append(by_rank[route.source][start : start + nbytes])
            taken[route.source] += nbytes
        return b"".join(parts)


async def _tolerant(call: Awaitable[object]) -> None:
    with contextlib.suppress(TandemError):  # the rank ends with its leader, and its senders with it
        await call


async def _first_error(*waits: Awaitable[object]) -> list[object]:
    """All results once everybody has ended; the first error, if there was one."""
    ended = await asyncio.gather(*waits, return_exceptions=True)
    results: list[object] = []
    for result in ended:
        if isinstance(result, BaseException):
            raise result
        if isinstance(result, Failure):
            raise from_failure(result)
        results.append(result)
    return results


class Connector:
    """Makes the senders of one rank, and of the worker where that rank is the leader. others: how to call the other ranks.

    options: of link.make_sender; fault tests put a `tamper` there.
    """

    def __init__(
        self,
        pool: KVPool,
        secret: bytes,
        incarnation: str,
        place: Place | None = None,
        others: Mapping[int, RankCaller] | None = None,
        **options: Any,
    ) -> None:
        self.place = place or Place(pool.layout)
        self.place.check_pool(pool.layout)
        self._pool = pool
        self._secret = secret
        self._incarnation = incarnation
        self._others = dict(others or {})
        self._num_links = 0
        self.options = options

    async def connect(
        self, peer_incarnation: str, target: Parallel, endpoints: tuple[KVEndpoint, ...], on_landed: OnLanded
    ) -> Sender:
        """The sender to one decode worker, over one transport, reached once by every rank. Raises HandshakeRefused, saying why
        this transport does not work between these two; then nothing is left open."""
        if len(endpoints) != target.num_ranks:
            raise HandshakeRefused(f"{len(endpoints)} endpoints for the {target.num_ranks} ranks of {peer_incarnation}")
        try:
            own = self.rank_sender(peer_incarnation, target, endpoints, on_landed)
        except (OSError, RuntimeError) as error:  # no descriptor, no thread: another transport, or another time, may do
            raise HandshakeRefused(f"{name_of(endpoints[0])}: {error}") from error
        self._num_links = link = self._num_links + 1
        message = RankConnect(link, peer_incarnation, target, endpoints)
        calls = [caller.call(message, CALL_TIMEOUT_S + READY_TIMEOUT_S) for caller in self._others.values()]
        try:
            await _first_error(own.ready(READY_TIMEOUT_S), *calls)
        except TandemError as error:
            own.close()
            for caller in self._others.values():
                await _tolerant(caller.call(RankDisconnect(link), CALL_TIMEOUT_S))
            raise HandshakeRefused(error.message) from error
        return GroupSender(self.place, target, link, own, self._others) if self._others else own

    def rank_sender(
        self, peer_incarnation: str, target: Parallel, endpoints: Sequence[KVEndpoint], on_landed: OnLanded
    ) -> RankSender:
        """Our own rank's part. Raises HandshakeRefused."""
        layout, source = self.place.layout, self.place.parallel
        kind = TRANSPORTS[name_of(endpoints[0])].digest

        def make(route: Route, endpoint: KVEndpoint, on_stored: OnStored) -> RouteSender:
            return make_sender(
                endpoint,
                self._pool,
                self._secret,
                incarnation=self._incarnation,
                peer_incarnation=peer_incarnation,
                source=Source(self._pool, route, layout, source, target, kind=kind),
                on_stored=on_stored,
                **self.options,
            )

        landings = Landings(self._secret, on_landed, kind)
        return RankSender(layout, source, self.place.rank, target, endpoints, make, landings)


class RankTransfers:
    """What a rank that is not the leader does about KV. One of the two is None: connector at a decode worker, receivers at a
    prefill worker. tell: sends to the leader (RankLanded).
    """

    def __init__(self, connector: Connector | None, receivers: RankReceivers | None, tell: Callable[[RankMessage], None]) -> None:
        self._connector = connector
        self._receivers = receivers
        self._tell = tell
        self._senders = RankSenders()

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        """Sender.push on this rank; in the engine's thread."""
        return self._senders.push(grant_id, layer, pairs)

    async def handle(self, message: RankMessage) -> RankMessage | None:
        """The answer; None: it wants none, or is not about KV. Raises the TandemError that the leader is to hear."""
        if self._receivers is not None:
            return await self._receivers.handle(message)
        if isinstance(message, RankConnect):
            await self._connect(message)
        elif isinstance(message, RankDisconnect):
            self._senders.disconnected(message.link)
        elif isinstance(message, RankOpen):
            await self._senders.open(message.link, message.grant)
        elif isinstance(message, RankFinish):
            return RankDigests(await self._senders.finish(message.grant_id, message.timeout))
        elif isinstance(message, RankAbort):
            await self._senders.abort(message.grant_id)
        else:
            return None
        return Ok()

    def close(self) -> None:
        self._senders.close()
        if self._receivers is not None:
            self._receivers.close()

    async def _connect(self, message: RankConnect) -> None:
        assert self._connector is not None
        sender = self._connector.rank_sender(
            message.peer_incarnation,
            message.target,
            message.endpoints,
            lambda grant, landed: self._tell(RankLanded(grant, landed)),
        )
        try:
            await sender.ready(READY_TIMEOUT_S)
        except TandemError:
            sender.close()
            raise
        self._senders.connected(message.link, sender)
