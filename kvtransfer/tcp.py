"""The decode side of the TCP transport: lets authenticated writers store into live grants, and nobody else anywhere.

One thread accepts, one per connection reads. Payload is received straight into the pool, a piece at a time, each piece
under the grant's lock and without ever waiting inside it; so `forget` is immediate and absolute: when it returns, no
byte can follow. The thread that receives a frame also hashes it at once, while its bytes are in the core's cache, so that
sealing finds the digests ready. Not here: the prefill side (tcp_lane.py), the bytes themselves (tcp_frames.py). Made by
link.make_receivers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from kvtransfer import tcp_frames as frames
from kvtransfer.arrivals import Arrivals, stretches
from kvtransfer.handoff import DIGEST_NBYTES
from kvtransfer.layout import Place, route_between
from kvtransfer.listening import ANY, Ports, listen
from kvtransfer.pool import KVPool
from kvtransfer.tcp_frames import FrameError, Header, Kind, Reason
from kvtransfer.tcp_socket import Closed, DeadlineSocket, Stalled, accept_all, advance
from kvtransfer.view import view_of
from protocol.errors import ConfigError, TransferFailed, Unsupported
from protocol.kv import TcpEndpoint
from protocol.ticket import Grant

log = logging.getLogger(__name__)

MAX_PENDING = 32  # connections that have not yet shown that they know the secret
MAX_CONNECTIONS = 1024
PIECE_NBYTES = 1 << 20  # received under a grant's lock at a time: about 0.3 ms
SCRAP_NBYTES = 1 << 18


class Inflow:
    """One live grant: its lock, and which of its runs are stored."""

    def __init__(self, grant: Grant, arrivals: Arrivals) -> None:
        self.grant = grant
        self.arrivals = arrivals
        self.lock = threading.Lock()
        self.is_live = True
        self.num_stored: Counter[int] = Counter()  # distinct runs, by the source rank they came from
        self._is_stored = bytearray(arrivals.num_runs)

    def stored(self, source: int, row: int, indexes: Sequence[int], digests: bytes) -> None:
        for place, first, count in stretches(indexes):
            self.arrivals.put(row, first, digests[place * DIGEST_NBYTES : (place + count) * DIGEST_NBYTES])
            start = row * self.arrivals.num_written + first - self.grant.num_cached_blocks
            self.num_stored[source] += self._is_stored.count(0, start, start + count)
            self._is_stored[start : start + count] = b"\x01" * count


class TcpReceiver:
    """A `Receiver` (transport.py) on a socket of its own.

    host: what to bind; beyond loopback only when asked. advertise_host: what peers are told, needed when host is a
    wildcard. port 0: any free one of `ports`. secret: must not be empty; there is no unauthenticated mode. Raises ConfigError.
    """

    def __init__(
        self,
        pool: KVPool,
        secret: bytes,
        incarnation: str,
        *,
        place: Place | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        ports: Ports = ANY,
        advertise_host: str | None = None,
        stall_timeout_s: float = 5.0,
        handshake_timeout_s: float = 5.0,
    ) -> None:
        if not secret:
            raise ConfigError("the tcp KV transport needs the cluster secret; it has no unauthenticated mode")
        if host in ("", "0.0.0.0", "::") and not advertise_host:
            raise ConfigError(
                f"transfer.bind_host {host!r} binds every interface; say which one peers shall use", param="transfer.bind_host"
            )
        self.pool = pool
        self.place = place or Place(pool.layout)
        self.secret = secret
        self.incarnation = incarnation
        self.stall_timeout_s = stall_timeout_s
        self.handshake_timeout_s = handshake_timeout_s
        self.num_refused = 0  # frames of writers that may not, or may no longer, write there
        try:
            self._listener = listen(host, ports, port=port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen for KV on {host}:{port or ports}: {error.strerror}", param="transfer.bind_host"
            ) from error
        self._endpoint = TcpEndpoint(advertise_host or host, self._listener.getsockname()[1])
        self._live: dict[bytes, Inflow] = {}
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._thread.start()

    def endpoint(self) -> TcpEndpoint:
        return self._endpoint

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        inflow = Inflow(grant, arrivals or Arrivals(grant, self.place))
        with self._lock:
            self._live[frames.grant_key(grant.grant_id)] = inflow

    def forget(self, grant_id: str) -> bool:
        with self._lock:
            inflow = self._live.pop(frames.grant_key(grant_id), None)
        if inflow is not None:
            with inflow.lock:  # held for one piece at most, never while waiting for the network
                inflow.is_live = False
        return True

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            connections = list(self._connections)
            inflows = list(self._live.values())
            self._live.clear()
        for inflow in inflows:
            with inflow.lock:
                inflow.is_live = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        for connection in connections:
            connection.end()
        self._thread.join(1.0)
        self._listener.close()

    # ---- for the connections ---------------------------------------------------------------------------------------

    def inflow(self, key: bytes) -> Inflow | None:
        return self._live.get(key)

    def joined(self, connection: _Connection) -> None:
        """It has proved itself. Its predecessor from the same rank of the same incarnation ends first: bytes of a broken
        connection that are still in our buffers must not be stored over what is sent again."""
        with self._lock:
            others = [c for c in self._connections if c is not connection]
            older = [c for c in others if (c.peer, c.rank) == (connection.peer, connection.rank)]
        for other in older:
            other.end()
            other.thread.join(self.stall_timeout_s)

    def left(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        accept_all(self._listener, self._take_on, lambda: self._is_closed)

    def _take_on(self, sock: socket.socket) -> None:
        with self._lock:
            num_pending = sum(not connection.peer for connection in self._connections)
            if self._is_closed or num_pending >= MAX_PENDING or len(self._connections) >= MAX_CONNECTIONS:
                sock.close()
                return
            connection = _Connection(self, DeadlineSocket(sock, self.stall_timeout_s))
            self._connections.add(connection)
        try:
            connection.thread.start()
        except BaseException:
            self.left(connection)
            raise


class _Connection:
    """The connection of one rank of one writer, and its thread. `peer` is empty until it has proved itself."""

    def __init__(self, receiver: TcpReceiver, sock: DeadlineSocket) -> None:
        self.peer = ""
        self.rank = 0
        self.thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)
        self._receiver = receiver
        self._sock = sock
        self._scrap = memoryview(bytearray(SCRAP_NBYTES))

    def end(self) -> None:
        self._sock.shutdown()

    def _run(self) -> None:
        try:
            self._shake_hands()
            while True:
                self._sock.wait(select.POLLIN, None)
                self._one_frame(self._reader.header(self._sock.read_exactly(frames.HEADER_NBYTES)))
        except Closed:
            pass
        except (FrameError, Stalled, OSError) as error:
            log.warning("KV connection from %s ended: %s", self.peer or "a stranger", error)
        except Exception:  # whatever one peer makes us trip over, the others keep their connections
            log.exception("KV connection from %s ended", self.peer or "a stranger")
        finally:
            self._sock.close()
            self._receiver.left(self)

    def _shake_hands(self) -> None:
        receiver = self._receiver
        deadline = time.monotonic() + receiver.handshake_timeout_s
        nonce_s = os.urandom(frames.NONCE_NBYTES)
        self._sock.write([frames.GREETING.pack(frames.MAGIC, frames.VERSION, nonce_s)])

        def read(nbytes: int) -> bytes:
            return bytes(self._sock.read_exactly(nbytes, deadline - time.monotonic()))

        length = frames.preamble_length(read(frames.PREAMBLE.size))
        nonce_c = read(frames.NONCE_NBYTES)
        data = read(length)
        if not frames.compare(read(frames.PROOF_NBYTES), frames.proof(receiver.secret, "client", nonce_s, nonce_c, data)):
            raise FrameError("it does not know the cluster secret")
        hello = msgspec.msgpack.decode(data, type=frames.Hello)
        refusal = self._refusal(hello)
        welcome = msgspec.msgpack.encode(frames.Welcome(receiver.incarnation, receiver.place.layout, refusal))
        self._reader, self._writer = frames.session(receiver.secret, nonce_s, nonce_c, is_server=True)
        if not refusal:
            self.peer, self.rank = hello.incarnation, hello.rank
            receiver.joined(self)
        self._sock.write([frames.pack_welcome(receiver.secret, nonce_s, nonce_c, data, welcome)])
        if refusal:
            raise FrameError(refusal)

    def _refusal(self, hello: frames.Hello) -> str:
        if not hello.incarnation:
            return "a hello without an incarnation"
        if hello.peer_incarnation not in ("", self._receiver.incarnation):
            return f"this is decode incarnation {self._receiver.incarnation}, you meant {hello.peer_incarnation}"
        place = self._receiver.place
        if difference := hello.layout.difference(place.layout):
            return f"KV layouts differ: {difference}"
        if (hello.target, hello.target_rank) != (place.parallel, place.rank):
            return f"this is rank {place.rank} of {place.parallel}, you meant rank {hello.target_rank} of {hello.target}"
        try:
            route = route_between(place.layout, hello.source, hello.rank, place.parallel, place.rank)
        except Unsupported as error:
            return error.message
        if route is None:
            return f"rank {hello.rank} of {hello.source} writes nothing to rank {place.rank} of {place.parallel}"
        self._hello = hello
        try:
            self._view = view_of(self._receiver.pool, route.target_area, hello.digest)
        except TransferFailed as error:
            return error.message
        return ""

    def _one_frame(self, header: Header) -> None:
        if header.kind is Kind.FENCE:
            inflow = self._receiver.inflow(header.key)
            count = inflow.num_stored[self.rank] if inflow is not None and self._is_ours(inflow.grant) else 0
            self._answer(Kind.LANDED, header.key, count=count)
            return
        if header.kind is not Kind.DATA:
            raise FrameError(f"a {header.kind.name} frame from a writer")
        run_nbytes = self._view.layout.run_nbytes
        if not 0 < header.count <= frames.MAX_RUNS or header.payload_nbytes != header.count * run_nbytes:
            raise FrameError(f"a frame of {header.count} runs with {header.payload_nbytes} bytes")
        if header.count > 1 and header.payload_nbytes > frames.MAX_PAYLOAD_NBYTES:
            raise FrameError(f"a frame of {header.payload_nbytes} bytes")
        table = self._sock.read_exactly(4 * header.count)
        if frames.table_digest(table) != header.table:
            raise FrameError("an index table is damaged")
        reason = self._store(header, frames.unpack_indexes(table))
        if reason is not None:
            self._receiver.num_refused += 1  # several threads may count at once and lose one; it is there to be seen, not summed
            self._answer(Kind.NACK, header.key, layer=reason)

    def _store(self, header: Header, indexes: Sequence[int]) -> Reason | None:
        """Receive the payload into the granted blocks. -> why it was thrown away instead, or None."""
        inflow = self._receiver.inflow(header.key)
        reason = self._why_not(inflow, header.layer, indexes)
        if inflow is None or reason is not None:
            self._discard(header.payload_nbytes)
            return reason
        blocks = [inflow.grant.block_ids[index] for index in indexes]
        views = self._view.buffers(header.layer, blocks)
        row = inflow.arrivals.first_row(self.rank) + header.layer
        inflow.arrivals.forget(row, indexes)
        first, left = 0, header.payload_nbytes
        deadline = time.monotonic() + self._receiver.stall_timeout_s
        while left:
            with inflow.lock:
                if not inflow.is_live:
                    break
                count = self._sock.read_some(_at_most(views, first, PIECE_NBYTES))
            if count is None:
                if not self._sock.wait(select.POLLIN, deadline - time.monotonic()):
                    raise Stalled(f"{left} bytes of a frame did not come in time")
                continue
            deadline = time.monotonic() + self._receiver.stall_timeout_s
            first = advance(views, first, count)
            left -= count
        if self._view.is_staged and not left:
            with inflow.lock:
                if inflow.is_live:
                    self._view.commit(header.layer, blocks)
        digests = b"" if left else self._view.digests(header.layer, blocks)
        with inflow.lock:
            if inflow.is_live:
                inflow.stored(self.rank, row, indexes, digests)
                return None
        self._discard(left)
        return Reason.NOT_LIVE

    def _why_not(self, inflow: Inflow | None, layer: int, indexes: Sequence[int]) -> Reason | None:
        if inflow is None:
            return Reason.NOT_LIVE
        grant = inflow.grant
        if not self._is_ours(grant):
            return Reason.NOT_YOURS
        if layer >= self._view.layout.num_layers or min(indexes) < grant.num_cached_blocks or max(indexes) >= len(grant.block_ids):
            return Reason.OUTSIDE
        return None

    def _is_ours(self, grant: Grant) -> bool:
        return (grant.prefill_incarnation, grant.source) == (self.peer, self._hello.source)

    def _discard(self, nbytes: int) -> None:
        deadline = time.monotonic() + self._receiver.stall_timeout_s
        while nbytes:
            count = self._sock.read_some([self._scrap[: min(nbytes, SCRAP_NBYTES)]])
            if count is not None:
                nbytes -= count
                deadline = time.monotonic() + self._receiver.stall_timeout_s
            elif not self._sock.wait(select.POLLIN, deadline - time.monotonic()):
                raise Stalled(f"{nbytes} bytes of a frame did not come in time")

    def _answer(self, kind: Kind, key: bytes, *, layer: int = 0, count: int = 0) -> None:
        self._sock.write([self._writer.header(kind, key, layer, count)])


def _at_most(views: list[memoryview], first: int, nbytes: int) -> list[memoryview]:
    """The front of views[first:], cut to `nbytes` in all."""
    taken: list[memoryview] = []
    while first < len(views) and nbytes:
        view = views[first][:nbytes]
        taken.append(view)
        nbytes -= view.nbytes
        first += 1
    return taken
