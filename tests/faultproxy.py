"""A TCP proxy that spoils what goes through it: delay, jitter, rate, stall (one way or both), flipped bits, cuts, resets.

It stands between any two sockets of the product, control or KV; nothing in production imports it. It runs in a thread of its own,
so tests may block, and its attributes may be changed while bytes flow:

    proxy = FaultProxy(target); proxy.there.delay_s = 0.1; proxy.back.is_stalled = True; proxy.reset()
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable

from protocol.kv import TcpEndpoint

PIECE_NBYTES = 1 << 16
MAX_HELD = 64  # pieces on their way in one direction; then the sender feels it

# edit(connection, is_to_target, offset, data) -> what is passed on. `connection` counts from 0, `offset` is the place of data[0] in
# that direction of that connection.
Edit = Callable[[int, bool, int, bytes], bytes]


class Cut(bytes):
    """From an edit: pass these bytes on, then end the connection."""


class Way:
    """One direction. Stalled means that bytes are held, as in a network that has lost its way, and arrive when it is found."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.bytes_per_s = 0.0  # 0: no limit
        self.is_stalled = False
        self.num_bytes = 0


class FaultProxy:
    """On loopback, at `address` and `endpoint`. target: "host:port", a TcpEndpoint, or None to be set before anybody connects."""

    def __init__(self, target: TcpEndpoint | str | None = None, edit: Edit | None = None, seed: int = 0) -> None:
        self.target = target
        self.there = Way()
        self.back = Way()
        self.num_connections = 0
        self._edit = edit
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.endpoint = TcpEndpoint("127.0.0.1", self._listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.endpoint.port}"
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()

    def stall(self, is_stalled: bool = True) -> None:
        """Both ways: a partition, or its end."""
        self.there.is_stalled = self.back.is_stalled = is_stalled

    def reset(self) -> None:
        """RST on all connections, both ends, at once; returns when it is done."""
        asyncio.run_coroutine_threadsafe(self._reset(), self._loop).result(5.0)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(5.0)
        self._listener.close()

    # ---- in the proxy's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._closing = self._loop.create_future()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serve())
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _stop(self) -> None:
        if not self._closing.done():
            self._closing.set_result(None)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._closing
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _accept(self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        number = self.num_connections
        self.num_connections += 1
        self._writers.add(near_writer)
        far_writer: asyncio.StreamWriter | None = None
        try:
            host, port = self._where()
            far_reader, far_writer = await asyncio.open_connection(host, port)
            self._writers.add(far_writer)
            ways = (
                self._pump(number, True, self.there, near_reader, far_writer),
                self._pump(number, False, self.back, far_reader, near_writer),
            )
            # The end of one direction is the end of both, as it is for all users of our protocols.
            _, pending = await asyncio.wait([asyncio.create_task(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
        except OSError:
            pass  # nobody there: the connection ends, as it would without a proxy
        finally:
            for writer in (near_writer, far_writer):
                if writer is not None:
                    self._writers.discard(writer)
                    writer.close()

    def _where(self) -> tuple[str, int]:
        assert self.target is not None, "a proxy needs a target before anybody connects"
        if isinstance(self.target, TcpEndpoint):
            return self.target.host, self.target.port
        host, _, port = self.target.rpartition(":")
        return host, int(port)

    async def _pump(
        self, number: int, is_to_target: bool, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        held: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(MAX_HELD)
        sending = asyncio.create_task(self._send(way, held, writer))
        offset, due = 0, 0.0
        try:
            while not sending.done():
                data = await reader.read(PIECE_NBYTES)
                edited = self._edit(number, is_to_target, offset, data) if self._edit is not None and data else data
                offset += len(data)
                way.num_bytes += len(data)
                due = max(due, self._loop.time() + way.delay_s + self._rng.random() * way.jitter_s)  # in order, as TCP is
                await held.put((due, edited))
                if not data or isinstance(edited, Cut):
                    await held.put((due, None))
                    break
            await sending
        except OSError:
            pass  # a reset, ours or theirs
        finally:
            sending.cancel()

    async def _send(self, way: Way, held: asyncio.Queue[tuple[float, bytes | None]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await held.get()
                while way.is_stalled or due > self._loop.time():
                    await asyncio.sleep(0.005 if way.is_stalled else due - self._loop.time())
                if data is None:
                    return
                if way.bytes_per_s:
                    await asyncio.sleep(len(data) / way.bytes_per_s)
                writer.write(data)
                await writer.drain()


def flip_at(place: int, bit: int = 0, *, is_to_target: bool = True) -> Edit:
    """An edit that flips one bit of byte `place` of the first connection, in one direction."""

    def edit(connection: int, direction: bool, offset: int, data: bytes) -> bytes:
        if connection == 0 and direction is is_to_target and offset <= place < offset + len(data):
            spoilt = bytearray(data)
            spoilt[place - offset] ^= 1 << bit
            return bytes(spoilt)
        return data

    return edit


def cut_at(place: int, *, every_connection: bool = False) -> Edit:
    """An edit that passes `place` bytes to the target and then cuts the connection."""

    def edit(connection: int, direction: bool, offset: int, data: bytes) -> bytes:
        if direction and (every_connection or connection == 0) and offset + len(data) >= place:
            return Cut(data[: max(0, place - offset)])
        return data

    return edit


class RandomFlips:
    """An edit that flips a random bit about once in `mean_nbytes` of what goes to the target; `count` says how many it has."""

    def __init__(self, rng: random.Random, mean_nbytes: int) -> None:
        self.count = 0
        self._rng = rng
        self._rate = 1.0 / mean_nbytes
        self._gap = int(rng.expovariate(self._rate))

    def __call__(self, connection: int, is_to_target: bool, offset: int, data: bytes) -> bytes:
        if not is_to_target:
            return data
        spoilt, place = bytearray(data), self._gap
        while place < len(spoilt):
            spoilt[place] ^= 1 << self._rng.randrange(8)
            self.count += 1
            place += 1 + int(self._rng.expovariate(self._rate))
        self._gap = place - len(spoilt)
        return bytes(spoilt)
