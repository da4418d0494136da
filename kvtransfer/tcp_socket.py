"""A socket with a deadline on everything: exact reads, gathered writes, keepalive. Used by tcp.py and tcp_lane.py.

Sockets are non-blocking, and all waiting happens in poll(), so `shutdown` from another thread wakes whoever waits, and
a receiver never sits inside recv() with a view of a pool that is no longer its to write (tcp.py).
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

MAX_VIEWS = 512  # per system call; the kernel's IOV_MAX is 1024


class Closed(OSError):
    """The other end closed the connection, or `shutdown` was called here."""


class Stalled(OSError):
    """Nothing moved for as long as the deadline allows."""


def accept_all(listener: socket.socket, take_on: Callable[[socket.socket], None], is_closed: Callable[[], bool]) -> None:
    """Serve whoever connects, until the listener is closed; for a thread of its own, which nothing else ends."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if is_closed():
                return
            log.warning("accepting a KV connection failed: %s", error)  # out of descriptors, for one: it may pass
            time.sleep(0.1)
            continue
        try:
            take_on(sock)
        except Exception as error:  # out of threads, for one; whoever comes later finds this thread still here
            log.warning("a KV connection cannot be served: %s", error)
            sock.close()


class DeadlineSocket:
    """stall_timeout_s: how long a read or write that has begun may stand still. Also the TCP_USER_TIMEOUT."""

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self._sock = sock
        self._stall_s = stall_timeout_s
        self.is_shut = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer that vanished without a word (power, network) is noticed even while nothing is sent.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_timeout_s * 1000))

    def wait(self, event: int, timeout: float | None) -> bool:
        """Until readable (POLLIN) or writable (POLLOUT), or broken. False: the time is up. Raises Closed after
        `shutdown`.
        """
        if self.is_shut:
            raise Closed("closed here")
        poll = select.poll()
        poll.register(self._sock, event)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def read_some(self, views: Sequence[memoryview]) -> int | None:
        """Whatever is there now, into these views. None: nothing is. Never waits. Raises Closed at the end of the
        stream.
        """
        if self.is_shut:  # what the kernel still holds is void as well
            raise Closed("closed here")
        try:
            count = self._sock.recvmsg_into(views[:MAX_VIEWS])[0]
        except (BlockingIOError, InterruptedError):
            return None
        if count == 0:
            raise Closed("the other end closed the connection")
        return count

    def read_exactly(self, nbytes: int, timeout: float | None = None) -> bytearray:
        """timeout None: the stall timeout. It bounds the whole read. Raises Closed, Stalled, OSError."""
        data = bytearray(nbytes)
        view = memoryview(data)
        deadline = time.monotonic() + (self._stall_s if timeout is None else timeout)
        while view.nbytes:
            count = self.read_some([view])
            if count is not None:
                view = view[count:]
            elif not self.wait(select.POLLIN, deadline - time.monotonic()):
                raise Stalled(f"{view.nbytes} of {nbytes} bytes did not come in time")
        return data

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """All of it, straight from where it lies. The stall timeout begins anew with every byte that moves."""
        views = [memoryview(part) for part in parts if len(part)]
        deadline = time.monotonic() + self._stall_s
        first = 0
        while first < len(views):
            try:
                count = self._sock.sendmsg(views[first : first + MAX_VIEWS])
            except (BlockingIOError, InterruptedError):
                if not self.wait(select.POLLOUT, deadline - time.monotonic()):
                    raise Stalled(f"the peer took nothing for {self._stall_s:g} s") from None
                continue
            deadline = time.monotonic() + self._stall_s
            first = advance(views, first, count)

    def shutdown(self) -> None:
        """End the stream both ways, from any thread; whoever waits wakes. Idempotent."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only by the thread that owns the connection, when no other uses it any more: the number may be reused at
        once.
        """
        self.shutdown()
        self._sock.close()


def advance(views: list[memoryview], first: int, count: int) -> int:
    """Drop `count` bytes from views[first:]; returns the new first, and cuts a view that is half done."""
    while count:
        if count < views[first].nbytes:
            views[first] = views[first][count:]
            return first
        count -= views[first].nbytes
        first += 1
    return first
