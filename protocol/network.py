"""How the parts talk, as Protocols: the walk, the workers and the scheduler service are written against these.

Implemented over sockets by `cluster/wire.py`, inside one process by `cluster/loopback.py`, and by the fault tests with a
nemesis in between. All waiting goes through asyncio, so a virtual event-loop clock makes every one of them virtual.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from protocol.messages import Message

Clock = Callable[[], float]  # seconds, monotonic; `asyncio.get_running_loop().time` in production and under virtual time


class Peer(Protocol):
    """One authenticated connection to another process; symmetric: either side calls and sends."""

    @property
    def name(self) -> str: ...

    @property
    def is_closed(self) -> bool: ...

    async def call(self, message: Message, timeout: float) -> Message:
        """Send and wait for the answer. Raises the TandemError that a Failure stands for, DeadlineExceeded, WorkerLost."""
        ...

    def send(self, message: Message) -> None:
        """Send without waiting; a closed peer swallows it (on_lost tells). A full buffer closes the connection."""
        ...


Handler = Callable[[Peer, Message], Awaitable[Message | None]]


class Network(Protocol):
    """One process's place on the network. `serve` before anyone can reach `address`."""

    @property
    def address(self) -> str: ...

    async def serve(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None: ...

    async def connect(self, address: str, timeout: float = 5.0) -> Peer:
        """The one connection to that address, made if there is none. Raises WorkerLost with address and direction."""
        ...

    async def close(self) -> None: ...
