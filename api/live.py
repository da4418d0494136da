"""The dashboard's live stream: one snapshot when a listener comes, then the same tick for all of them every second.

However many listen, the cluster is asked once a second, and only while somebody does. A listener that reads slowly misses
ticks, and one that does not read at all is cut off; nothing queues up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.errors import Overloaded

log = logging.getLogger(__name__)

MAX_LISTENERS = 64
TICK_S = 1.0
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": keep-alive\n\n"


class Live:
    """fetch: the next tick's document; it has a deadline of its own and does not raise."""

    def __init__(self, fetch: Callable[[], Awaitable[dict[str, Any]]], write_timeout_s: float, tick_s: float = TICK_S) -> None:
        self._fetch = fetch
        self._write_timeout_s = write_timeout_s
        self._tick_s = tick_s
        self._num_listeners = 0
        self._ticking: asyncio.Task[None] | None = None
        self._changed: asyncio.Event = asyncio.Event()
        self._tick = b""

    @property
    def num_listeners(self) -> int:
        return self._num_listeners

    def check_room(self) -> None:
        """Raises Overloaded (503) when as many listen as may."""
        if self._num_listeners >= MAX_LISTENERS:
            raise Overloaded(f"{MAX_LISTENERS} dashboards listen already; close one, or ask /dashboard/data", retry_after=10.0)

    def stream(self, first: bytes) -> Response:
        """An SSE response. first: the snapshot, as JSON."""
        return _LiveStream(self, first)

    async def listen(self, send: Callable[[bytes], Awaitable[None]], first: bytes) -> None:
        """Until it is cancelled, or a write takes too long."""
        self.check_room()
        self._num_listeners += 1
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._run())
        try:
            data = b"event: snapshot\ndata: " + first + b"\n\n"
            while True:
                async with asyncio.timeout(self._write_timeout_s):
                    await send(data)
                data = KEEP_ALIVE
                changed = self._changed
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        await changed.wait()
                        data = self._tick
        finally:
            self._num_listeners -= 1

    async def _run(self) -> None:
        while self._num_listeners:
            await asyncio.sleep(self._tick_s)
            try:
                self._tick = b"event: tick\ndata: " + msgspec.json.encode(await self._fetch()) + b"\n\n"
            except Exception:
                log.exception("a tick of the dashboard")
                continue
            self._changed.set()  # whoever waits on this one; the next wait is for the next tick
            self._changed = asyncio.Event()


class _LiveStream(Response):
    def __init__(self, live: Live, first: bytes) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self._live = live
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        listening = asyncio.ensure_future(self._live.listen(write, self._first))
        leaving = asyncio.ensure_future(gone())
        try:
            await asyncio.wait((listening, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, leaving):
                task.cancel()
            for result in await asyncio.gather(listening, leaving, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, (OSError, TimeoutError, Overloaded)):
                    log.error("a listener of the dashboard", exc_info=result)
