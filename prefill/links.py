"""The links of a prefill worker to decode workers: hand-shakes, senders, and the words it still owes after a link broke.

`WriterDone` ends a quarantine at the decode worker (R2), and with mapped memory nothing else does while both live. A closed
connection swallows it. So what was said over a link is kept until that link is replaced, and whenever a link breaks `tick`
makes a new one and says it again; by the new hand-shake the decode worker can ask for the rest itself (`StopWriting`).

A hand-shake settles on the best transport that works: where setting one up fails, hands are shaken again without it (`pairs.py`).
Owned by `worker.py`; all of it on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, ValuesView

import msgspec

from kvtransfer.link import name_of
from kvtransfer.transport import Sender
from prefill.pairs import Pair
from protocol.errors import (
    DeadlineExceeded,
    HandshakeRefused,
    IncompatibleWorkers,
    TandemError,
    TransferFailed,
    Unsupported,
    WorkerLost,
)
from protocol.kv import KVEndpoint
from protocol.messages import Handshake, HandshakeAccepted, WriterDone
from protocol.network import Clock, Network, Peer
from protocol.parallel import Parallel
from protocol.ticket import Grant

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
MAX_OWED_PEERS = 64  # decode workers; beyond it the one that was lost first is forgotten, its next hand-shake still ends all
MAX_OWED_GRANTS = 4096  # per decode worker; what is forgotten the decode worker asks for after the hand-shake
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 30.0
OWED_S = 3600.0  # a decode worker that cannot be reached for so long is gone
MAX_PAIRS = 256  # decode workers whose transports we remember something about

Connect = Callable[[str, Parallel, tuple[KVEndpoint, ...]], Awaitable[Sender]]


class GoneAway(TransferFailed):
    """At that address lives another incarnation: the one that was meant is gone for ever."""


class Link:
    """What a hand-shake with one decode worker yielded. num_jobs: prompts that still may use the sender."""

    def __init__(self, incarnation: str, address: str, peer: Peer, transport: str, sender: Sender) -> None:
        self.incarnation = incarnation
        self.address = address
        self.peer = peer
        self.transport = transport
        self.sender = sender
        self.num_jobs = 0
        self.is_leaving = False  # another transport has taken its place; the sender is closed with its last prompt
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
    """connect(incarnation, target, endpoints) makes a sender and reaches the peer; it raises HandshakeRefused when it cannot.
    on_void(grant_id): the decode worker took this grant back before it knew us; it must never be written.
    """

    def __init__(
        self,
        handshake: Handshake,
        connect: Connect,
        network: Network,
        clock: Clock,
        on_void: Callable[[str], None],
    ) -> None:
        self._handshake = handshake
        self._connect = connect
        self._network = network
        self._clock = clock
        self._on_void = on_void
        self._links: dict[str, Link] = {}  # by decode incarnation
        self._linking: dict[str, asyncio.Task[Link]] = {}  # hand-shakes under way, shared by all who wait for one
        self._owed: dict[str, _Owed] = {}  # by decode incarnation
        self._settling: dict[str, asyncio.Task[None]] = {}  # by decode incarnation
        self._pairs: OrderedDict[str, Pair] = OrderedDict()  # by decode incarnation, least recently used first

    def __len__(self) -> int:
        return len(self._links)

    def values(self) -> ValuesView[Link]:
        return self._links.values()

    @property
    def num_owed(self) -> int:
        """Decode workers that we still have to reach."""
        return len(self._owed)

    async def to(self, incarnation: str, address: str) -> Link:
        """The link to a decode worker's present life, by hand-shake where there is none. Raises WorkerLost, DeadlineExceeded,
        TransferFailed (another incarnation lives there), HandshakeRefused (no transport works now), IncompatibleWorkers (at once,
        once it is known)."""
        known = self._links.get(incarnation)
        if known is not None and not known.peer.is_closed and not self._may_improve(known):
            return known
        task = self._linking.get(incarnation)
        if task is None:
            task = self._linking[incarnation] = asyncio.create_task(self._shake_hands(incarnation, address))
            task.add_done_callback(lambda ended: self._linked(incarnation, ended))
        return await asyncio.shield(task)

    def transfer_succeeded(self, link: Link) -> None:
        self._pair(link.incarnation).transfer_succeeded(link.transport)

    def transfer_failed(self, link: Link, reason: str) -> None:
        """A transfer ended badly and neither side had given it up. After two in a row this pair uses another transport."""
        if self._pair(link.incarnation).transfer_failed(link.transport, reason, self._clock()):
            log.warning("%s to %s is left out for a while: %s", link.transport, link.incarnation, reason)
            if self._links.get(link.incarnation) is link:
                del self._links[link.incarnation]
                self._owe(link.incarnation, link.address, link.told)
                link.is_leaving = True
                self._close_if_unused(link)

    def released(self, link: Link) -> None:
        """One of its prompts is over."""
        link.num_jobs -= 1
        self._close_if_unused(link)

    @property
    def num_fallbacks(self) -> int:
        return sum(pair.num_fallbacks for pair in self._pairs.values())

    def num_fallbacks_to(self, incarnation: str) -> int:
        pair = self._pairs.get(incarnation)
        return pair.num_fallbacks if pair is not None else 0

    def _pair(self, incarnation: str) -> Pair:
        pair = self._pairs.pop(incarnation, None) or Pair(self._handshake.transports)
        self._pairs[incarnation] = pair
        while len(self._pairs) > MAX_PAIRS:
            self._pairs.popitem(last=False)
        return pair

    def _may_improve(self, link: Link) -> bool:
        """Only while nobody uses it: to change transports is no reason to end a transfer."""
        return link.num_jobs == 0 and self._pair(link.incarnation).may_improve(link.transport, self._clock())

    def _close_if_unused(self, link: Link) -> None:
        if link.is_leaving and link.num_jobs == 0:
            link.sender.close()

    def close(self) -> None:
        for link in self._links.values():
            link.sender.close()
        self._links.clear()

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
        """Try again to reach those whom we owe a word, each at its own pace: some do not answer for long."""
        now = self._clock()
        for incarnation in [i for i, owed in self._owed.items() if owed.next_at <= now and i not in self._settling]:
            task = self._settling[incarnation] = asyncio.create_task(self._settle(incarnation))
            task.add_done_callback(lambda _, incarnation=incarnation: self._settling.pop(incarnation))

    async def _settle(self, incarnation: str) -> None:
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
        pair = self._pair(incarnation)
        if pair.incompatible:
            raise IncompatibleWorkers(pair.incompatible)
        peer = await self._network.connect(address)
        while True:
            answer = await self._ask(peer, incarnation, address, pair)
            if incarnation in self._links:  # its peer is closed, or a better transport may work again
                self._retire(incarnation)
            transport = name_of(answer.endpoints[0])
            try:
                sender = await self._connect(incarnation, answer.parallel, answer.endpoints)
            except (HandshakeRefused, TransferFailed, Unsupported, DeadlineExceeded) as error:
                log.warning("%s to %s does not work: %s", transport, incarnation, error.message)
                pair.unusable(transport, error.message, self._clock())
                continue
            break
        if peer.is_closed:
            sender.close()
            self._owe(incarnation, address, ())
            raise WorkerLost(f"the connection to {address} broke during the hand-shake")
        link = self._links[incarnation] = Link(incarnation, address, peer, transport, sender)
        owed = self._owed.pop(incarnation, None)
        for grant_id in owed.grant_ids if owed is not None else ():
            link.tell_done(grant_id)
        return link

    async def _ask(self, peer: Peer, incarnation: str, address: str, pair: Pair) -> HandshakeAccepted:
        """One hand-shake, with what may work now. Raises HandshakeRefused with every transport's reason when nothing is left."""
        offered = pair.offered(self._clock())
        ends = f"prefill {self._handshake.incarnation} and decode {incarnation}"
        if not offered:
            raise HandshakeRefused(f"no KV transport is left between {ends}: {pair.reasons()}", param="transfer.transport")
        try:
            answer = await peer.call(msgspec.structs.replace(self._handshake, transports=offered), CALL_TIMEOUT_S)
        except IncompatibleWorkers as error:
            pair.incompatible = error.message
            raise
        except HandshakeRefused as error:
            raise HandshakeRefused(f"{ends}: {error.message}; {pair.reasons()}", param=error.param) from None
        except (WorkerLost, DeadlineExceeded):
            # It may have taken us for its writer all the same, and would wait for our word over a connection that is gone.
            self._owe(incarnation, address, ())
            raise
        assert isinstance(answer, HandshakeAccepted)
        if answer.incarnation != incarnation:
            if answer.incarnation not in self._links:
                self._owe(answer.incarnation, address, ())  # it takes us for its writer now
            raise GoneAway(f"at {address} lives {answer.incarnation}, not {incarnation}")
        for grant_id in answer.void_grants:
            self._on_void(grant_id)
        return answer

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
