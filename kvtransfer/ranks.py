"""The sending side of one rank of a prefill worker: one `RouteSender` for each decode rank that it has a route to.

`RankSender` is a `Sender` (transport.py) by itself where the worker is alone; group.py joins several. `RankSenders` is what a rank
that is not the leader keeps of them, by link. Made by group.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvtransfer.landing import Landings
from kvtransfer.layout import Route, rows_of
from kvtransfer.transport import OnStored, Pair, RouteSender, TransferStats
from protocol.errors import TandemError, TransferFailed
from protocol.kv import KVEndpoint, KVLayout
from protocol.parallel import Parallel
from protocol.ticket import Grant

MakeRouteSender = Callable[[Route, KVEndpoint, OnStored], RouteSender]


class RankSender:
    """See the module. endpoints: one per decode rank. make(route, endpoint, on_stored) builds the sender of one route.

    Raises what `make` raises, and then nothing is left open.
    """

    def __init__(
        self,
        layout: KVLayout,
        source: Parallel,
        rank: int,
        target: Parallel,
        endpoints: Sequence[KVEndpoint],
        make: MakeRouteSender,
        landings: Landings,
    ) -> None:
        self._landings = landings
        self._routes: list[tuple[Route, RouteSender, KVEndpoint]] = []
        self._num_failed = 0
        try:
            for route, first_row in rows_of(layout, source, target):
                if route.source == rank:
                    endpoint = endpoints[route.target]
                    self._routes.append((route, make(route, endpoint, self._teller(first_row)), endpoint))
        except BaseException:
            self.close()
            raise

    def stats(self) -> TransferStats:
        total = TransferStats()
        for _, sender, _ in self._routes:
            total += sender.stats
        total.transfers = max((sender.stats.transfers for _, sender, _ in self._routes), default=0)
        total.failed = max((sender.stats.failed for _, sender, _ in self._routes), default=0)
        total.exposed_s = max((sender.stats.exposed_s for _, sender, _ in self._routes), default=0.0)
        return total

    async def ready(self, timeout: float) -> None:
        """Wait until every peer rank has been reached once. Raises HandshakeRefused, saying why one was not."""
        for _, sender, _ in self._routes:
            await sender.ready(timeout)

    async def open(self, grant: Grant) -> None:
        self._landings.attach()
        opened: list[RouteSender] = []
        try:
            for _, sender, endpoint in self._routes:
                sender.open(grant, endpoint)
                opened.append(sender)
        except TandemError:
            for sender in opened:
                await sender.abort(grant.grant_id)
            raise

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        is_live = True
        for route, sender, _ in self._routes:
            if 0 <= layer - route.source_layer < route.num_layers:
                is_live &= sender.push(grant_id, layer - route.source_layer, pairs)
        return is_live

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        """The digests of this rank's routes, in their order."""
        if len(self._routes) == 1:  # the usual case: no tasks
            digests = await self._routes[0][1].finish(grant_id, timeout)
        else:
            waits = (sender.finish(grant_id, timeout) for _, sender, _ in self._routes)
            ended = await asyncio.gather(*waits, return_exceptions=True)
            digests = b"".join(_results(ended))
        self._landings.flush()
        return digests

    async def abort(self, grant_id: str) -> None:
        if len(self._routes) == 1:
            await self._routes[0][1].abort(grant_id)
        else:
            await asyncio.gather(*(sender.abort(grant_id) for _, sender, _ in self._routes))

    def close(self) -> None:
        for _, sender, _ in self._routes:
            sender.close()

    def _teller(self, first_row: int) -> OnStored:
        landings = self._landings

        def tell(grant: Grant, layer: int, first: int, digests: bytes) -> None:
            landings.add(grant, first_row + layer, first, digests)

        return tell


def _results(ended: Sequence[bytes | BaseException]) -> list[bytes]:
    """All results, or the first error once everybody has ended."""
    results: list[bytes] = []
    for result in ended:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


class RankSenders:
    """The senders of a rank that is not the leader, by the leader's number of their link; pushes find theirs by grant."""

    def __init__(self) -> None:
        self._senders: dict[int, RankSender] = {}
        self._by_grant: dict[str, RankSender] = {}

    def connected(self, link: int, sender: RankSender) -> None:
        """Another link to the same decode worker goes on until the leader ends it."""
        self._senders[link] = sender

    def disconnected(self, link: int) -> None:
        sender = self._senders.pop(link, None)
        if sender is not None:
            sender.close()

    async def open(self, link: int, grant: Grant) -> None:
        sender = self._senders.get(link)
        if sender is None:
            raise TransferFailed(f"this rank has no sender to decode worker {grant.decode_incarnation}")
        await sender.open(grant)
        self._by_grant[grant.grant_id] = sender

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        sender = self._by_grant.get(grant_id)
        return sender is not None and sender.push(grant_id, layer, pairs)

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        sender = self._by_grant.get(grant_id)
        if sender is None:
            raise TransferFailed(f"no transfer of grant {grant_id} is open on this rank")
        digests = await sender.finish(grant_id, timeout)
        self._by_grant.pop(grant_id, None)
        return digests

    async def abort(self, grant_id: str) -> None:
        """Known until nothing of it can be stored any more, so that a second caller waits for the same."""
        sender = self._by_grant.get(grant_id)
        if sender is not None:
            await sender.abort(grant_id)
            self._by_grant.pop(grant_id, None)

    def close(self) -> None:
        for link in list(self._senders):
            self.disconnected(link)
