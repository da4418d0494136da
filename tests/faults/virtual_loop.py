"""An asyncio event loop in virtual time, and the nodes whose code runs on it. No threads, no sockets, no sleeping.

`time()` stands still while anything is ready and then jumps to the next timer, so a run is a pure function of its inputs.
Every handle belongs to the node in whose context it was scheduled (a context variable, which tasks inherit). Before a handle
runs, the loop looks at its node: a stopped node's handles are set aside until it continues, a dead node's never run. That is
SIGSTOP and SIGKILL: such a node executes nothing at all, its timers included.

Not here: the network between nodes (wire.py) and memory that one node maps of another (stores.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

MAX_HANDLES = 2_000_000  # of one run
MAX_AT_ONCE = 50_000  # handles without time passing: somebody spins
CURRENT: contextvars.ContextVar[Node | None] = contextvars.ContextVar("current node", default=None)


class Hang(AssertionError):
    """The run does not come to its end; the message names what is pending."""


class State(enum.Enum):
    UP = "up"
    STOPPED = "stopped"
    DEAD = "dead"


class Node:
    """One process. `offset`: what its monotonic clock shows when the loop's shows 0; no two hosts agree on that."""

    def __init__(self, loop: VirtualLoop, name: str, host: str = "", offset: float = 0.0) -> None:
        self.name = name
        self.host = host
        self.offset = offset
        self.state = State.UP
        self.parked: deque[Handle] = deque()
        self.died_at = 0.0
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        self.kept: list[Any] = []  # a dead node's tasks: were they collected, their `finally` blocks would run
        self._loop = loop

    def __repr__(self) -> str:
        return f"Node({self.name}, {self.state.value})"

    @property
    def is_up(self) -> bool:
        return self.state is State.UP

    @property
    def is_dead(self) -> bool:
        return self.state is State.DEAD

    def clock(self) -> float:
        return self._loop.now + self.offset

    def soon(self, callback: Callable[..., object], *args: Any) -> Handle:
        return self._loop.call_soon(callback, *args, context=self.context)

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> Handle:
        return self._loop.call_at(when, callback, *args, context=self.context)

    def task(self, coroutine: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        return self._loop.create_task(coroutine, name=name, context=self.context)

    def stop(self) -> None:
        assert self.state is State.UP, self
        self.state = State.STOPPED

    def resume(self, io_first: bool = False) -> None:
        """What became due meanwhile runs now. io_first: what arrived before what was timed."""
        assert self.state is State.STOPPED, self
        self.state = State.UP
        parked, self.parked = self.parked, deque()
        if io_first:
            parked = deque(sorted(parked, key=lambda handle: handle.when_due > 0))
        self._loop.ready.extend(parked)

    def kill(self) -> None:
        assert self.state is not State.DEAD, self
        self.state = State.DEAD
        self.died_at = self._loop.now
        self.kept += [task for task in asyncio.all_tasks(self._loop) if node_of(task) is self]
        self.kept += self.parked
        self.parked = deque()


class _Task(asyncio.Task[Any]):
    node: Node | None = None


def node_of(task: asyncio.Task[Any]) -> Node | None:
    return getattr(task, "node", None)


class Handle:
    """What `call_soon` and `call_at` return. when_due 0: as soon as possible."""

    __slots__ = ("callback", "args", "context", "node", "when_due", "is_cancelled")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, when_due: float
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.node: Node | None = context.get(CURRENT)
        self.when_due = when_due
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.args = ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_due


class VirtualLoop(asyncio.AbstractEventLoop):
    """`run(main)` is all that its owner calls. Errors that nobody awaited are in `errors`."""

    def __init__(self, max_time: float = 600.0) -> None:
        self.now = 0.0
        self.max_time = max_time
        self.ready: deque[Handle] = deque()
        self.errors: list[str] = []
        self.num_handled = 0
        self._timers: list[tuple[float, int, Handle]] = []
        self._order = itertools.count()
        self._readers: dict[int, Handle] = {}
        self._is_running = False
        self._is_closed = False

    # ---- what asyncio asks of a loop -------------------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._is_running

    def is_closed(self) -> bool:
        return self._is_closed

    def call_soon(self, callback, *args, context=None):  # type: ignore[no-untyped-def,override]
        handle = Handle(callback, args, context if context is not None else contextvars.copy_context(), 0.0)
        self.ready.append(handle)
        return handle

    def call_later(self, delay, callback, *args, context=None):  # type: ignore[no-untyped-def,override]
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):  # type: ignore[no-untyped-def,override]
        handle = Handle(callback, args, context if context is not None else contextvars.copy_context(), when)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    call_soon_threadsafe = call_soon  # there are no threads

    def add_reader(self, fd, callback, *args):  # type: ignore[no-untyped-def,override]
        self._readers[fd] = Handle(callback, args, contextvars.copy_context(), 0.0)

    def remove_reader(self, fd):  # type: ignore[no-untyped-def,override]
        return self._readers.pop(fd, None) is not None

    def readable(self, fd: int) -> None:
        """What somebody waits for on this descriptor has come."""
        if fd in self._readers:
            self.ready.append(self._readers[fd])

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro, *, name=None, context=None):  # type: ignore[no-untyped-def,override]
        task = _Task(coro, loop=self, name=name, context=context)
        task.node = CURRENT.get() if context is None else context.get(CURRENT)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._is_closed:
            self.errors.append(f"{context.get('message')}: {context.get('exception')!r} {context.get('future') or ''}")

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Raises Hang when nothing can happen any more, time passes max_time, or somebody spins."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        self._is_running = True
        try:
            task = self.create_task(main, name="main")
            self._run_until(task)
            return task.result()
        finally:
            self._is_running = False
            asyncio._set_running_loop(before)

    def _run_until(self, main: asyncio.Task[Any]) -> None:
        ready, timers = self.ready, self._timers
        at_once = 0
        while not main.done():
            if not ready:
                while timers and timers[0][2].is_cancelled:
                    heapq.heappop(timers)
                if not timers:
                    raise Hang(f"nothing is ready and no timer is set; pending:\n{self.pending()}")
                self.now = max(self.now, timers[0][0])
                at_once = 0
                if self.now > self.max_time:
                    raise Hang(f"{self.max_time:g} s of virtual time were not enough; pending:\n{self.pending()}")
                while timers and timers[0][0] <= self.now:
                    ready.append(heapq.heappop(timers)[2])
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            node = handle.node
            if node is not None and node.state is not State.UP:
                if node.state is State.STOPPED:
                    node.parked.append(handle)
                continue
            self.num_handled += 1
            at_once += 1
            if at_once > MAX_AT_ONCE or self.num_handled > MAX_HANDLES:
                raise Hang(f"{self.num_handled} handles, {at_once} of them at {self.now:g} s; pending:\n{self.pending()}")
            try:
                handle.context.run(handle.callback, *handle.args)
            except Exception as error:
                self.errors.append(f"{handle.callback} raised {error!r}")

    def pending(self) -> str:
        """One line for each task that is not done."""
        lines = []
        for task in asyncio.all_tasks(self):
            node = node_of(task)
            frames = task.get_stack(limit=1)
            where = f"{frames[-1].f_code.co_qualname}:{frames[-1].f_lineno}" if frames else "?"
            lines.append(f"  {node.name if node else '-'} ({node.state.value if node else '-'}): {where}")
        return "\n".join(sorted(lines))

    def close(self) -> None:
        """End whatever is still pending without running any of it."""
        self._is_closed = True
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            for _ in range(2):  # once more for what `finally` blocks began
                for task in asyncio.all_tasks(self):
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(Exception):  # a `finally` may await, or ask for what is gone
                        task.get_coro().close()  # type: ignore[union-attr]
        finally:
            asyncio._set_running_loop(before)
        self.ready.clear()
        self._timers.clear()
