"""The same `protocol.network` inside one process: for `LLM(...)` without Ray and for one-process fault tests.

Messages are delivered as the frozen structs that they are, in order, by the event loop. `Hub(encoded=True)` sends each one
through its wire form, as the tests do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from protocol.errors import DeadlineExceeded, Failure, TandemError, WorkerLost, from_failure, to_failure
from protocol.messages import Message, decode, encode
from protocol.network import Handler, Peer

log = logging.getLogger(__name__)


class Hub:
    """The wires between the networks of one process, by address."""

    def __init__(self, encoded: bool = False) -> None:
        self.encoded = encoded
        self.networks: dict[str, LoopbackNetwork] = {}

    def network(self, name: str) -> LoopbackNetwork:
        return LoopbackNetwork(self, name)


class LoopbackPeer:
    """One side of a pair; what is sent here arrives at `other`'s handler."""

    def __init__(self, owner: LoopbackNetwork, name: str) -> None:
        self.name = name
        self.is_closed = False
        self.other: LoopbackPeer
        self._owner = owner
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())
        self._serving: set[asyncio.Task[Message]] = set()

    def send(self, message: Message) -> None:
        if not self.is_closed and not self.other.is_closed:
            self.other._inbox.put_nowait(self._owner.hub_copy(message))

    async def call(self, message: Message, timeout: float) -> Message:
        if self.is_closed or self.other.is_closed:
            raise WorkerLost(f"the connection to {self.name} is closed")
        task = asyncio.create_task(self.other._answer(self._owner.hub_copy(message)))
        self.other._serving.add(task)
        task.add_done_callback(self.other._serving.discard)
        try:
            async with asyncio.timeout(timeout):
                answer = self._owner.hub_copy(await asyncio.shield(task))
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer {type(message).__name__} within {timeout:.1f} s") from None
        except asyncio.CancelledError:
            if task.cancelled():
                raise WorkerLost(f"the connection to {self.name} broke") from None
            raise
        if isinstance(answer, Failure):
            raise from_failure(answer)
        return answer

    def close(self) -> None:
        for side in (self, self.other):
            if not side.is_closed:
                side.is_closed = True
                current = asyncio.current_task()
                for task in (side._reader, *side._serving):
                    if task is not current:
                        task.cancel()
                side._owner.closed(side)

    async def _answer(self, message: Message) -> Message:
        try:
            answer = await self._owner.handler(self, message)
            assert answer is not None, f"no answer to {type(message).__name__}"
            return answer
        except TandemError as error:
            return to_failure(error)
        except Exception as error:
            log.exception("while answering %s of %s", type(message).__name__, self.name)
            return to_failure(error)

    async def _read(self) -> None:
        while True:
            message = await self._inbox.get()
            try:
                await self._owner.handler(self, message)
            except TandemError as error:
                log.warning("%s from %s: %s", type(message).__name__, self.name, error)
            except Exception:
                log.exception("while handling %s from %s", type(message).__name__, self.name)


class LoopbackNetwork:
    """One participant. A `protocol.network.Network`."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.address = f"{name}:0"
        self._hub = hub
        self._name = name
        self._peers: dict[str, LoopbackPeer] = {}
        self._accepted: list[LoopbackPeer] = []
        self.handler: Handler
        self._on_lost: Callable[[Peer], None]

    def hub_copy(self, message: Message) -> Message:
        return decode(encode(message)) if self._hub.encoded else message

    async def serve(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None:
        self.handler = handler
        self._on_lost = on_lost
        self._hub.networks[self.address] = self

    async def connect(self, address: str, timeout: float = 5.0) -> Peer:
        known = self._peers.get(address)
        if known is not None and not known.is_closed:
            return known
        target = self._hub.networks.get(address)
        if target is None:
            raise WorkerLost(f"{self._name} cannot reach {address}: nobody is there")
        here, there = LoopbackPeer(self, address), LoopbackPeer(target, self._name)
        here.other, there.other = there, here
        self._peers[address] = here
        target._accepted.append(there)
        return here

    def closed(self, peer: LoopbackPeer) -> None:
        self._on_lost(peer)

    async def close(self) -> None:
        self._hub.networks.pop(self.address, None)
        for peer in [*self._peers.values(), *self._accepted]:
            peer.close()
