"""A worker's network, but for what the scheduler orders: to leave, to take the other role. The worker never hears of these.

Made by `life.py`, which carries them out.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.messages import Leave, Message, Ok, SwitchRole
from protocol.network import Handler, Network, Peer

Order = Leave | SwitchRole


class OrderedNetwork:
    """A `protocol.network.Network`. on_order may raise a TandemError, which is the answer then; it must not wait."""

    def __init__(self, inner: Network, on_order: Callable[[Order], None]) -> None:
        self._inner = inner
        self._on_order = on_order
        self._handler: Handler

    @property
    def address(self) -> str:
        return self._inner.address

    async def serve(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None:
        self._handler = handler
        await self._inner.serve(self._handle, on_lost)

    async def connect(self, address: str, timeout: float = 5.0) -> Peer:
        return await self._inner.connect(address)

    async def close(self) -> None:
        await self._inner.close()

    async def _handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, Leave | SwitchRole):
            self._on_order(message)
            return Ok()
        return await self._handler(peer, message)
