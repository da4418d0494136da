"""What has come for one reader who has not looked at it yet, and the wait for more, with a deadline.

A queue and a timeout of asyncio's would do the same; this costs less per token. Its timer is set for the first wait and only looks
at the clock when it fires: a stream of tokens neither sets nor cancels one. Used by `relay.py`, and by the gateway's walk for what
workers send.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Inbox(Generic[_T]):
    """In order of arrival. One reader waits at a time. It bounds nothing: whoever puts does."""

    __slots__ = ("_items", "_waiter", "_timer", "_until")

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0  # of the wait under way, on the loop's clock

    def __bool__(self) -> bool:
        return bool(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _T) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wake(self) -> None:
        """Ends the wait under way, whatever there is."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> _T:
        return self._items.popleft()

    def take_all(self) -> list[_T]:
        taken = list(self._items)
        self._items.clear()
        return taken

    def give_back(self, item: _T) -> None:
        """It is the next one again."""
        self._items.appendleft(item)

    def clear(self) -> None:
        self._items.clear()

    async def wait(self, seconds: float | None) -> bool:
        """Until there is something. False: so long there was nothing, or it was woken. None: however long."""
        if self._items:
            return True
        loop = asyncio.get_running_loop()
        self._until = math.inf
        if seconds is not None:
            if seconds <= 0:
                return False
            self._until = loop.time() + seconds
            if self._timer is None or self._timer.when() > self._until:
                self.close()
                self._timer = loop.call_at(self._until, self._look, loop)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        return bool(self._items)

    def close(self) -> None:
        """Takes the timer away; a later wait would set another one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._until == math.inf:
            return
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._look, loop)
        else:
            self._waiter.set_result(None)
