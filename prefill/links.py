"""The links of a prefill worker to decode workers: hand-shakes, senders, and the words it still owes after a link broke.

`WriterDone` ends a quarantine at the decode worker (R2), and with mapped memory nothing else does while both live. A closed
connection swallows it. So what was said over a link is kept until that link is replaced, and whenever a link breaks `tick`
makes a new one and says it again; by the new hand-shake the decode worker can ask for the rest itself (`StopWriting`).
Owned by `worker.py`; all of it on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, ValuesView

from kvtransfer.transport import Sender
from protocol.errors import TandemError, TransferFailed, WorkerLost
from protocol.kv import KVEndpoint, ShmEndpoint, TcpEndpoint
from protocol.messages import Handshake, HandshakeAccepted, LinkStats, WriterDone
from protocol.network import Clock, Network, Peer
from protocol.ticket import Grant

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
MAX_OWED_PEERS = 64  # decode workers; beyond it the one that was lost first is forgotten, its next hand-shake still ends all
MAX_OWED_GRANTS = 4096  # per decode worker; what is forgotten the decode worker asks for after the hand-shake
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 30.0
OWED_S = 3600.0  # a decode worker that cannot be reached for so long is gone


class GoneAway(TransferFailed):
    """At that address lives another incarnation: the one that was meant is gone for ever."""


class Link:
    """What a hand-shake with one decode worker yielded."""

    def __init__(self, address: str, peer: Peer, endpoint: KVEndpoint, sender: Sender) -> None:
        self.address = address
        self.peer = peer
        self.endpoint = endpoint
        self.sender = sender
        self.told: dict[str, None] = {}  # WriterDone sent over this link; whether they arrived is not known

    def tell_done(self, grant_id: str) -> None:
        _remember(self.told, (grant_id,))  # first: sending may break the link, and then it is owed
        self.peer.send(WriterDone(grant_id))


class _Owed:
    """A decode worker that we lost, and what we told it or wanted to."""

    def __init__(self, address: str, now: float) -> None:
        self.address = address
        self.grant_ids: dict[str, None] = {}
        self.since = now
        self.delay_s = FIRST_DELAY_S
        self.next_at = now + FIRST_DELAY_S


class Links:
    """on_void(grant_id): the decode worker took this grant back before it knew us; it must never be written."""

    def __init__(
        self,
        handshake: Handshake,
        make_sender: Callable[[KVEndpoint, str], Sender],
        network: Network,
        clock: Clock,
        on_void: Callable[[str], None],
    ) -> None:
        self._handshake = handshake
        self._make_sender = make_sender
        self._network = network
        self._clock = clock
        self._on_void = on_void
        self._links: dict[str, Link] = {}  # by decode incarnation
        self._linking: dict[str, asyncio.Task[Link]] = {}  # hand-shakes under way, shared by all who wait for one
        self._owed: dict[str, _Owed] = {}  # by decode incarnation
        self._settling: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._links)

    def values(self) -> ValuesView[Link]:
        return self._links.values()

    def stats(self) -> tuple[LinkStats, ...]:
        """Of the links there are now."""
        kinds = {ShmEndpoint: "shm", TcpEndpoint: "tcp"}
        found = []
        for incarnation, link in self._links.items():
            sent = link.sender.stats
            transport = kinds.get(type(link.endpoint), "memory")
            found.append(LinkStats(incarnation, transport, sent.transfers, sent.failed, sent.nbytes))
        return tuple(found)

    @property
    def num_owed(self) -> int:
        """Decode workers that we still have to reach."""
        return len(self._owed)

    async def to(self, incarnation: str, address: str) -> Link:
        """The link to a decode worker's present life, by hand-shake where there is none. Raises WorkerLost,
        DeadlineExceeded, HandshakeRefused, TransferFailed (another incarnation lives there)."""
        known = self._links.get(incarnation)
        if known is not None and not known.peer.is_closed:
            return known
        task = self._linking.get(incarnation)
        if task is None:
            task = self._linking[incarnation] = asyncio.create_task(self._shake_hands(incarnation, address))
            task.add_done_callback(lambda ended: self._linked(incarnation, ended))
        return await asyncio.shield(task)

    def lost(self, peer: Peer) -> None:
        """A connection broke, whoever was at its other end."""
        for incarnation, link in list(self._links.items()):
            if link.peer is peer:
                self._retire(incarnation)

    def writer_done(self, grant: Grant) -> None:
        """Nothing of ours can be stored into this grant any more; the decode worker hears of it, now or later."""
        link = self._links.get(grant.decode_incarnation)
        if link is None or link.peer.is_closed:
            self._owe(grant.decode_incarnation, grant.control_address, (grant.grant_id,))
        else:
            link.tell_done(grant.grant_id)

    def tick(self) -> None:
        """Try again to reach those whom we owe a word; one round at a time."""
        if self._settling is not None and not self._settling.done():
            return
        now = self._clock()
        due = [incarnation for incarnation, owed in self._owed.items() if owed.next_at <= now]
        if due:
            self._settling = asyncio.create_task(self._settle(due))

    async def _settle(self, incarnations: list[str]) -> None:
        await asyncio.gather(*(self._settle_one(incarnation) for incarnation in incarnations))

    async def _settle_one(self, incarnation: str) -> None:
        owed = self._owed.get(incarnation)
        if owed is None:
            return
        try:
            await self.to(incarnation, owed.address)  # pays
        except Exception as error:
            if not isinstance(error, TandemError):
                log.exception("reaching decode worker %s", incarnation)
            now = self._clock()
            is_gone = isinstance(error, GoneAway) or now - owed.since > OWED_S
            if is_gone and self._owed.get(incarnation) is owed:
                del self._owed[incarnation]
            owed.delay_s = min(2 * owed.delay_s, MAX_DELAY_S)
            owed.next_at = now + owed.delay_s

    async def _shake_hands(self, incarnation: str, address: str) -> Link:
        peer = await self._network.connect(address)
        answer = await peer.call(self._handshake, CALL_TIMEOUT_S)
        assert isinstance(answer, HandshakeAccepted)
        if answer.incarnation != incarnation:
            raise GoneAway(f"at {address} lives {answer.incarnation}, not {incarnation}")
        for grant_id in answer.void_grants:
            self._on_void(grant_id)
        if incarnation in self._links:  # its peer is closed, or there would be no hand-shake
            self._retire(incarnation)
        link = Link(address, peer, answer.endpoint, self._make_sender(answer.endpoint, incarnation))
        if peer.is_closed:
            link.sender.close()
            raise WorkerLost(f"the connection to {address} broke during the hand-shake")
        self._links[incarnation] = link
        owed = self._owed.pop(incarnation, None)
        for grant_id in owed.grant_ids if owed is not None else ():
            link.tell_done(grant_id)
        return link

    def _linked(self, incarnation: str, task: asyncio.Task[Link]) -> None:
        del self._linking[incarnation]
        if not task.cancelled():
            task.exception()  # whoever waited has it

    def _retire(self, incarnation: str) -> None:
        link = self._links.pop(incarnation)
        self._owe(incarnation, link.address, link.told)
        link.sender.close()

    def _owe(self, incarnation: str, address: str, grant_ids: Iterable[str]) -> None:
        """Also with nothing to say: our answer to a StopWriting may be what was lost."""
        owed = self._owed.get(incarnation)
        if owed is None:
            while len(self._owed) >= MAX_OWED_PEERS:
                del self._owed[next(iter(self._owed))]
            owed = self._owed[incarnation] = _Owed(address, self._clock())
        _remember(owed.grant_ids, grant_ids)


def _remember(kept: dict[str, None], grant_ids: Iterable[str]) -> None:
    for grant_id in grant_ids:
        kept.pop(grant_id, None)
        kept[grant_id] = None
    while len(kept) > MAX_OWED_GRANTS:
        del kept[next(iter(kept))]
