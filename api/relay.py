"""Between the backend's generators and one HTTP response: a task per prompt that drains, a bounded buffer, one reader.

The reader gets whatever has come since it last looked, so a slow client makes larger writes instead of a longer queue.
When the buffer stays full the client is cut off and the work on its request stops. However it ends, every generator is
closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from api.backend import Backend
from api.inbox import Inbox
from protocol.errors import Failure, TandemError, to_failure
from protocol.events import Event, Failed, Finished
from protocol.request import Request

log = logging.getLogger(__name__)

MAX_BUFFERED = 1024  # events of one response that its client has not taken yet
MAX_JUDGED = 3  # times; the tenants file changes seldom, and a request is refused rather than chased


class Relay:
    """The events of one HTTP request's prompts. `close()` is called exactly once, in a finally.

    rejudge: the same request under the tenants file as it is now; asked when it changed before the request was admitted.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[Request],
        slow_client_timeout_s: float,
        rejudge: Callable[[Request], Request] = lambda request: request,
    ) -> None:
        self._backend = backend
        self._rejudge = rejudge
        self._slow_client_timeout_s = slow_client_timeout_s
        self._inbox: Inbox[tuple[int, Event]] = Inbox()
        self._room = asyncio.Event()
        self.is_abandoned = False
        self._tasks = [asyncio.create_task(self._drain(i, request)) for i, request in enumerate(requests)]

    def abandon(self, *_: object) -> None:
        """The client is gone: wakes the reader, which then closes."""
        self.is_abandoned = True
        self._inbox.wake()

    async def take(self, timeout: float | None = None) -> list[tuple[int, Event]]:
        """(prompt, event) pairs in order; [] when the timeout passed or the client is gone."""
        if not self.is_abandoned:
            await self._inbox.wait(timeout)
        batch = self._inbox.take_all()
        if len(batch) >= MAX_BUFFERED:
            self._room.set()
        return batch

    async def close(self) -> None:
        """Ends all work on the request. Returns when every generator is closed."""
        self._inbox.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _put(self, prompt: int, event: Event) -> None:
        self._inbox.put((prompt, event))

    async def _drain(self, prompt: int, request: Request) -> None:
        """Exactly one terminal event comes out, whatever the generator does."""
        for again in reversed(range(MAX_JUDGED)):
            last = await self._forward(prompt, request)
            if last is None:
                return
            if not again or not isinstance(last, Failed) or last.failure.kind != "TenantsChanged":
                break
            try:
                request = self._rejudge(request)
            except TandemError as error:
                last = Failed(to_failure(error))
                break
        assert last is not None
        self._put(prompt, last)

    async def _forward(self, prompt: int, request: Request) -> Finished | Failed | None:
        """All but the last event go into the buffer. None: the client was cut off."""
        events = self._backend.generate(request)
        last: Finished | Failed | None = None
        try:
            async for event in events:
                if last is not None:
                    log.error("request %s: %s after its last event", request.request_id, type(event).__name__)
                elif isinstance(event, (Finished, Failed)):
                    last = event
                else:
                    self._put(prompt, event)
                    if len(self._inbox) >= MAX_BUFFERED and not await self._wait_for_room():
                        log.info("request %s: the client reads too slowly, cut off", request.request_id)
                        self.abandon()
                        return None
        except Exception as error:
            log.exception("request %s", request.request_id)
            last = last or Failed(to_failure(error))
        finally:
            aclose = getattr(events, "aclose", None)
            if aclose is not None:
                await aclose()
        if last is None:
            log.error("request %s: its events ended without a last one", request.request_id)
            last = Failed(Failure("InternalError", "the answer broke off; the gateway's log has the details"))
        return last

    async def _wait_for_room(self) -> bool:
        self._room.clear()
        try:
            async with asyncio.timeout(self._slow_client_timeout_s):
                await self._room.wait()
        except TimeoutError:
            return False
        return True
