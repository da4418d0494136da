"""Sockets of our own: length-prefixed msgpack frames over TCP, one authenticated, multiplexed connection per pair.

Implements `protocol.network` for production. Nothing here knows what a message means. Either side of a connection calls
and sends; a call may wait for minutes (admission), a send is handled in order. A connection that is silent for
`HEARTBEAT_S * HEARTBEAT_MISSES` is dead: that is how a stopped process is told from a slow one.

    frame:     length u32 | kind u8 | call id u64 | mac(16) | msgpack message
    handshake: server -> nonce(32);  client -> nonce(32) mac(32) name;  server -> mac(32)

Each direction has a key of its own, made of the secret and both nonces; a frame's mac covers its header, its message and how many
frames came before it. So a bit that flips on the way, which TCP's checksum may miss, breaks the connection and is nobody's token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from kvtransfer.listening import ANY, Ports, listen, why
from protocol import messages
from protocol.errors import DeadlineExceeded, Failure, TandemError, WorkerLost, from_failure, to_failure
from protocol.messages import Message
from protocol.network import Handler, Peer

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20
MAX_UNSENT_BYTES = 32 << 20  # a peer that reads slower than this is cut off, so that nobody else waits for it
MAX_CALLS = 65_536  # calls of one peer that may wait here at once
HEARTBEAT_S = 1.0
HEARTBEAT_MISSES = 3
HANDSHAKE_TIMEOUT_S = HEARTBEAT_S * HEARTBEAT_MISSES  # a stopped process still accepts; it must not hold us up longer than this


class Codec(NamedTuple):
    """A union of messages and its wire form. Answers of calls may be `Failure`, so it has to be one of them."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


class Pulse(NamedTuple):
    """How often a connection is pinged, and after how many silent periods it is dead."""

    period_s: float
    misses: int


BACKLOG = 100  # asyncio's own
CLUSTER = Codec(messages.encode, messages.decode)
_HEADER = struct.Struct("!IBQ")
_MAC_NBYTES = 16
_SEND, _CALL, _ANSWER, _PING = range(4)


def _proof(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, label + b"".join(parts), hashlib.sha256).digest()


class _Direction:
    """The macs of one direction of one connection, in the order of its frames."""

    def __init__(self, secret: bytes, label: bytes, server_nonce: bytes, client_nonce: bytes) -> None:
        self._key = _proof(secret, label, server_nonce, client_nonce)
        self._count = 0

    def mac(self, header: bytes, body: bytes | memoryview) -> bytes:
        digest = hashlib.blake2b(header, digest_size=_MAC_NBYTES, key=self._key, salt=self._count.to_bytes(16, "big"))
        digest.update(body)
        self._count += 1
        return digest.digest()


class Connection:
    """One side of one connection; a `protocol.network.Peer`. Made by `SocketNetwork` only."""

    def __init__(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
        on_closed: Callable[[Connection], None],
        directions: tuple[_Direction, _Direction],
        codec: Codec = CLUSTER,
        pulse: Pulse | None = None,
    ) -> None:
        self.name = name
        self.is_closed = False
        self.closed_because = ""
        self._outgoing, self._incoming = directions
        self._codec = codec
        self.pulse = pulse or Pulse(HEARTBEAT_S, HEARTBEAT_MISSES)  # may be changed; it counts from the next ping on
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._on_closed = on_closed
        self._next_id = 0
        self._calls: dict[int, asyncio.Future[Message]] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._last_heard = asyncio.get_running_loop().time()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    def send(self, message: Message) -> None:
        self._write(_SEND, 0, self._codec.encode(message))

    async def call(self, message: Message, timeout: float) -> Message:
        if self.is_closed:
            raise WorkerLost(f"the connection to {self.name} is closed")
        self._next_id += 1
        call_id = self._next_id
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._write(_CALL, call_id, self._codec.encode(message))
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} did not answer {type(message).__name__} within {timeout:.1f} s") from None
        finally:
            self._calls.pop(call_id, None)
        if isinstance(answer, Failure):
            raise from_failure(answer)
        return answer

    def close(self, reason: str = "closed") -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.closed_because = reason
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerLost(f"the connection to {self.name} broke: {reason}"))
                future.exception()  # a caller that was cancelled meanwhile will not fetch it
        current = asyncio.current_task()
        for task in (*self._tasks, *self._serving):
            if task is not current:
                task.cancel()
        self._writer.transport.abort()
        self._on_closed(self)

    def _write(self, kind: int, call_id: int, body: bytes) -> None:
        if self.is_closed:
            return
        if len(body) > MAX_FRAME_BYTES:
            if kind == _CALL:
                raise TandemError(f"a message of {len(body)} bytes is above the frame cap of {MAX_FRAME_BYTES}")
            self.close(f"a message of {len(body)} bytes is above the frame cap of {MAX_FRAME_BYTES}")
            return
        if self._writer.transport.is_closing():  # it broke, and `_read` has not had its turn yet: uvloop would raise
            self.close("it broke while something was being sent")
            return
        header = _HEADER.pack(len(body), kind, call_id)
        self._writer.write(header + self._outgoing.mac(header, body) + body)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close(f"it left more than {MAX_UNSENT_BYTES} bytes unread")

    async def _read(self) -> None:
        reason = "the other side closed it"
        loop = asyncio.get_running_loop()
        try:
            while True:
                header = await self._reader.readexactly(_HEADER.size)
                length, kind, call_id = _HEADER.unpack(header)
                if length > MAX_FRAME_BYTES:
                    reason = f"a frame of {length} bytes is above the cap"
                    break
                sealed = memoryview(await self._reader.readexactly(_MAC_NBYTES + length))
                body = sealed[_MAC_NBYTES:]
                if not hmac.compare_digest(sealed[:_MAC_NBYTES], self._incoming.mac(header, body)):
                    reason = "a frame is damaged"
                    log.warning("%s sent a frame that is damaged or forged", self.name)
                    break
                self._last_heard = loop.time()
                if kind in (_SEND, _CALL):
                    try:
                        message = self._codec.decode(body)
                    except TandemError as error:  # a field of one request is outside of our bounds; the others have no part in it
                        self._refuse(kind, call_id, error)
                        continue
                    if kind == _SEND:
                        await self._serve_send(message)
                        continue
                    if len(self._serving) >= MAX_CALLS:
                        reason = "too many calls at once"
                        break
                    task = asyncio.create_task(self._serve_call(call_id, message))
                    self._serving.add(task)
                    task.add_done_callback(self._serving.discard)
                elif kind == _ANSWER and (future := self._calls.get(call_id)) and not future.done():
                    future.set_result(self._codec.decode(body))
        except asyncio.IncompleteReadError:
            pass
        except (ConnectionError, OSError) as error:
            reason = str(error) or reason
        except ValueError as error:  # msgspec's DecodeError and ValidationError
            reason = f"not one of our messages: {error}"
            log.warning("%s sent something that is %s", self.name, reason)
        self.close(reason)

    def _refuse(self, kind: int, call_id: int, error: TandemError) -> None:
        log.warning("%s sent what is not taken here: %s", self.name, error)
        if kind == _CALL:
            self._write(_ANSWER, call_id, self._codec.encode(to_failure(error)))

    async def _serve_send(self, message: Message) -> None:
        try:
            await self._handler(self, message)
        except TandemError as error:
            log.warning("%s from %s: %s", type(message).__name__, self.name, error)
        except Exception:
            log.exception("while handling %s from %s", type(message).__name__, self.name)

    async def _serve_call(self, call_id: int, message: Message) -> None:
        try:
            answer = await self._handler(self, message)
            assert answer is not None, f"no answer to {type(message).__name__}"
        except TandemError as error:
            answer = to_failure(error)
        except Exception as error:
            log.exception("while answering %s of %s", type(message).__name__, self.name)
            answer = to_failure(error)
        self._write(_ANSWER, call_id, self._codec.encode(answer))

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            period_s, misses = self.pulse
            before = loop.time()
            await asyncio.sleep(period_s)
            self._write(_PING, 0, b"")
            late = loop.time() - before - period_s  # this process itself was stopped or starved: not the peer's fault
            self._last_heard += max(0.0, late)
            silent = loop.time() - self._last_heard
            if silent > period_s * misses:
                self.close(f"silent for {silent:.1f} s")
                return


class SocketNetwork:
    """A process's listening socket and its connections, by the address they were made to. A `protocol.network.Network`."""

    def __init__(
        self,
        name: str,
        secret: bytes,
        host: str = "127.0.0.1",
        ports: Ports = ANY,
        port: int = 0,
        codec: Codec = CLUSTER,
        pulse: Pulse | None = None,
    ) -> None:
        self.name = name
        self._codec = codec
        self._pulse = pulse
        self._secret = secret
        self._host = host
        self._ports = ports
        self._port = port
        self._server: asyncio.Server | None = None
        self._handler: Handler = _not_serving
        self._on_lost: Callable[[Peer], None] = lambda peer: None
        self._outgoing: dict[str, Connection] = {}
        self._dialing: dict[str, asyncio.Task[Connection]] = {}
        self._all: set[Connection] = set()

    @property
    def address(self) -> str:
        assert self._port, "serve() comes first"
        return f"{self._host}:{self._port}"

    def answer(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None:
        """Who takes what comes over connections made from here; nobody listens for others."""
        self._handler = handler
        self._on_lost = on_lost

    async def serve(self, handler: Handler, on_lost: Callable[[Peer], None]) -> None:
        self.answer(handler, on_lost)
        sock = listen(self._host, self._ports, BACKLOG, self._port)
        self._server = await asyncio.start_server(self._accept, sock=sock, limit=MAX_FRAME_BYTES)
        self._port = self._server.sockets[0].getsockname()[1]

    async def connect(self, address: str, timeout: float = HANDSHAKE_TIMEOUT_S) -> Peer:
        """The connection to this address, made if there is none. All who ask meanwhile share one attempt and how it ends: one
        after the other they would each wait for a process that does not answer."""
        known = self._outgoing.get(address)
        if known is not None and not known.is_closed:
            return known
        dialing = self._dialing.get(address)
        if dialing is None:
            dialing = self._dialing[address] = asyncio.create_task(self._reach(address, timeout))
            dialing.add_done_callback(lambda task: self._reached(address, task))
        try:
            return await asyncio.shield(dialing)
        except WorkerLost as error:
            raise WorkerLost(error.message) from None  # each his own: a traceback grows with everyone who raises it
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not dialing.cancelled() or (current is not None and current.cancelling()):
                raise
            raise WorkerLost(f"{self.name} is going away") from None

    async def _reach(self, address: str, timeout: float) -> Connection:
        try:
            async with asyncio.timeout(timeout):
                connection = await self._dial(address)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise WorkerLost(
                f"{self.name} on {socket.gethostname()} cannot reach {address} (tcp, from here to there): {why(error)}"
            ) from None
        self._outgoing[address] = connection
        return connection

    def _reached(self, address: str, task: asyncio.Task[Connection]) -> None:
        del self._dialing[address]
        if not task.cancelled():
            task.exception()  # whoever waited has it

    def is_connected(self, address: str) -> bool:
        known = self._outgoing.get(address)
        return known is not None and not known.is_closed

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for dialing in list(self._dialing.values()):
            dialing.cancel()
        for connection in list(self._all):
            connection.close("this process is going away")
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._server.wait_closed()

    def _adopt(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, directions: tuple[_Direction, _Direction]
    ) -> Connection:
        connection = Connection(name, reader, writer, self._handle, self._closed, directions, self._codec, self._pulse)
        self._all.add(connection)
        return connection

    async def _handle(self, peer: Peer, message: Message) -> Message | None:
        return await self._handler(peer, message)

    def _closed(self, connection: Connection) -> None:
        self._all.discard(connection)
        for address, known in list(self._outgoing.items()):
            if known is connection:
                del self._outgoing[address]
        self._on_lost(connection)

    async def _dial(self, address: str) -> Connection:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=MAX_FRAME_BYTES)
        try:
            _tune(writer)
            theirs = await reader.readexactly(32)
            ours, name = os.urandom(32), self.name.encode()
            writer.write(ours + _proof(self._secret, b"client", theirs, ours, name) + struct.pack("!H", len(name)) + name)
            answer = await reader.readexactly(32)
            if not hmac.compare_digest(answer, _proof(self._secret, b"server", theirs, ours, name)):
                raise WorkerLost(f"{address} does not know this cluster's secret: it belongs to another cluster")
            there, back = (_Direction(self._secret, label, theirs, ours) for label in (b"to server", b"to client"))
            return self._adopt(address, reader, writer, (there, back))
        except BaseException:
            writer.transport.abort()
            raise

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _tune(writer)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                ours = os.urandom(32)
                writer.write(ours)
                theirs = await reader.readexactly(32)
                proof = await reader.readexactly(32)
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                name = await reader.readexactly(min(length, 256))
            if not hmac.compare_digest(proof, _proof(self._secret, b"client", ours, theirs, name)):
                log.warning("refused a connection that does not know the cluster secret")
                writer.transport.abort()
                return
            writer.write(_proof(self._secret, b"server", ours, theirs, name))
            there, back = (_Direction(self._secret, label, ours, theirs) for label in (b"to server", b"to client"))
            self._adopt(name.decode(errors="replace"), reader, writer, (back, there))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            writer.transport.abort()


async def _not_serving(peer: Peer, message: Message) -> Message | None:
    """Until serve(): a process may already tell others how its start-up goes."""
    raise TandemError(f"this process does not serve yet ({type(message).__name__})")


def _tune(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
