"""The decode side of the NCCL transport: authenticated writers, frames checked against live grants, payload by a communicator.

One thread accepts, one per connection reads frames, each connection has a `Pipe` (nccl.py has the drawing and the reasons). What a
frame brings is received whole into staging, then scattered into the granted blocks under the grant's lock if the grant is still
live, and summed where it lies; so `forget` is as absolute as over tcp. Made by link.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvtransfer import gpu
from kvtransfer import tcp_frames as frames
from kvtransfer.arrivals import Arrivals
from kvtransfer.layout import Area, Place, route_between
from kvtransfer.listening import ANY, Ports, listen
from kvtransfer.nccl import (
    RECEIVER,
    CupyCommunicator,
    Hello,
    MakeCommunicator,
    Pipe,
    Welcome,
    max_runs,
    new_unique_id,
    staging,
)
from kvtransfer.outgoing import LinkBroken
from kvtransfer.pool import KVPool
from kvtransfer.tcp import Inflow
from kvtransfer.tcp_frames import FrameError, Header, Kind, Reason
from kvtransfer.tcp_socket import Closed, DeadlineSocket, Stalled, accept_all
from protocol.errors import ConfigError, TransferFailed, Unsupported
from protocol.kv import NcclEndpoint, TcpEndpoint
from protocol.ticket import Grant

if TYPE_CHECKING:
    from kvtransfer.device import DeviceView

log = logging.getLogger(__name__)

MAX_PENDING = 32  # connections that have not yet shown that they know the secret


def device_view(pool: KVPool, area: Area, digest: str) -> DeviceView:
    from kvtransfer.device import DeviceView

    return DeviceView(pool.tensor, pool.layout, area, digest)


def is_usable(pool: KVPool) -> bool:
    """There is a GPU, CuPy, and NCCL in it."""
    if not pool.is_on_gpu or not gpu.has_cupy():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns of a library that it cannot load; here that is an answer
        from cupy.cuda import nccl

    return bool(nccl.available)


class NcclReceiver:
    """A `Receiver` (transport.py). host, advertise_host, secret: as for tcp.TcpReceiver. timeout_s: of each operation.

    make, unique_id, uuid: tests bring their own. Raises ConfigError, Unsupported.
    """

    def __init__(
        self,
        pool: KVPool,
        secret: bytes,
        incarnation: str,
        *,
        place: Place | None = None,
        host: str = "127.0.0.1",
        ports: Ports = ANY,
        advertise_host: str | None = None,
        timeout_s: float = 5.0,
        make: MakeCommunicator = CupyCommunicator,
        unique_id: Callable[[], bytes] = new_unique_id,
        uuid: str = "",
    ) -> None:
        if not secret:
            raise ConfigError("the nccl KV transport needs the cluster secret; it has no unauthenticated mode")
        if not uuid:
            if not is_usable(pool):
                raise Unsupported(
                    "nccl: it needs a KV pool on a GPU, and CuPy with NCCL (--kv-transport)", param="transfer.transport"
                )
            uuid = gpu.uuid_of(gpu.index_of(pool.device))
        self.pool = pool
        self.place = place or Place(pool.layout)
        self.secret = secret
        self.incarnation = incarnation
        self.timeout_s = timeout_s
        self.make = make
        self.unique_id = unique_id
        try:
            self._listener = listen(host, ports)
        except OSError as error:
            raise ConfigError(f"cannot listen for KV on {host}: {error.strerror}", param="transfer.bind_host") from error
        self._endpoint = NcclEndpoint(advertise_host or host, self._listener.getsockname()[1], uuid)
        self._live: dict[bytes, Inflow] = {}
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="kv-nccl-accept", daemon=True)
        self._thread.start()

    def falls_back_to(self, endpoint: TcpEndpoint) -> None:
        """The tcp receiver of the same pool. Before the endpoint is given to anybody."""
        self._endpoint = msgspec.structs.replace(self._endpoint, fallback=endpoint)

    def endpoint(self) -> NcclEndpoint:
        return self._endpoint

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        inflow = Inflow(grant, arrivals or Arrivals(grant, self.place))
        with self._lock:
            self._live[frames.grant_key(grant.grant_id)] = inflow

    def forget(self, grant_id: str) -> bool:
        with self._lock:
            inflow = self._live.pop(frames.grant_key(grant_id), None)
        if inflow is not None:
            with inflow.lock:  # held while one frame is scattered, never while waiting for the network
                inflow.is_live = False
        return True

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            connections, inflows = list(self._connections), list(self._live.values())
            self._live.clear()
        for inflow in inflows:
            with inflow.lock:
                inflow.is_live = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        for connection in connections:
            connection.end("the KV receiver is closed")
        self._thread.join(1.0)
        self._listener.close()

    # ---- for the connections ---------------------------------------------------------------------------------------

    def inflow(self, key: bytes) -> Inflow | None:
        return self._live.get(key)

    def joined(self, connection: _Connection) -> None:
        """Its predecessor from the same rank of the same incarnation ends first."""
        with self._lock:
            others = [c for c in self._connections if c is not connection]
            older = [c for c in others if (c.peer, c.rank) == (connection.peer, connection.rank)]
        for other in older:
            other.end("its writer has connected anew")
            other.thread.join(self.timeout_s)

    def left(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        accept_all(self._listener, self._take_on, lambda: self._is_closed)

    def _take_on(self, sock: socket.socket) -> None:
        with self._lock:
            num_pending = sum(not connection.peer for connection in self._connections)
            if self._is_closed or num_pending >= MAX_PENDING:
                sock.close()
                return
            connection = _Connection(self, DeadlineSocket(sock, self.timeout_s))
            self._connections.add(connection)
        try:
            connection.thread.start()
        except BaseException:
            self.left(connection)
            raise


class _Connection:
    """The connection of one rank of one writer, its thread and its pipe. `peer` is empty until it has proved itself."""

    def __init__(self, receiver: NcclReceiver, sock: DeadlineSocket) -> None:
        self.peer = ""
        self.rank = 0
        self.thread = threading.Thread(target=self._run, name="kv-nccl-receive", daemon=True)
        self._receiver = receiver
        self._sock = sock
        self._pipe: Pipe | None = None

    def end(self, reason: str) -> None:
        self._sock.shutdown()
        if self._pipe is not None:
            self._pipe.abort(reason)

    def _run(self) -> None:
        try:
            self._shake_hands()
            while True:
                self._sock.wait(select.POLLIN, None)
                self._one_frame(self._reader.header(self._sock.read_exactly(frames.HEADER_NBYTES)))
        except Closed:
            pass
        except (FrameError, Stalled, LinkBroken, OSError) as error:
            log.warning("KV connection from %s ended: %s", self.peer or "a stranger", error)
        except Exception:  # whatever one peer makes us trip over, the others keep their connections
            log.exception("KV connection from %s ended", self.peer or "a stranger")
        finally:
            if self._pipe is not None:
                self._pipe.abort("the connection ended")
            self._sock.close()
            self._receiver.left(self)

    def _shake_hands(self) -> None:
        receiver = self._receiver
        deadline = time.monotonic() + receiver.timeout_s
        nonce_s = os.urandom(frames.NONCE_NBYTES)
        self._sock.write([frames.GREETING.pack(frames.MAGIC, frames.VERSION, nonce_s)])

        def read(nbytes: int) -> bytes:
            return bytes(self._sock.read_exactly(nbytes, deadline - time.monotonic()))

        length = frames.preamble_length(read(frames.PREAMBLE.size))
        nonce_c = read(frames.NONCE_NBYTES)
        data = read(length)
        if not frames.compare(read(frames.PROOF_NBYTES), frames.proof(receiver.secret, "client", nonce_s, nonce_c, data)):
            raise FrameError("it does not know the cluster secret")
        hello = msgspec.msgpack.decode(data, type=Hello)
        refusal = self._refusal(hello)
        unique_id = b"" if refusal else receiver.unique_id()
        welcome = Welcome(receiver.incarnation, receiver.place.layout, unique_id, refusal)
        self._reader, self._writer = frames.session(receiver.secret, nonce_s, nonce_c, is_server=True)
        if not refusal:
            self.peer, self.rank = hello.hello.incarnation, hello.hello.rank
            receiver.joined(self)
        self._sock.write([frames.pack_welcome(receiver.secret, nonce_s, nonce_c, data, msgspec.msgpack.encode(welcome))])
        if refusal:
            raise FrameError(refusal)
        device = self._view.device
        self._pipe = Pipe(lambda: receiver.make(unique_id, RECEIVER, device), receiver.timeout_s, self.peer)
        self._staging = staging(self._view)
        self._pipe.ready()

    def _refusal(self, asked: Hello) -> str:
        hello, place = asked.hello, self._receiver.place
        ours = self._receiver.endpoint().device_uuid
        if not hello.incarnation:
            return "a hello without an incarnation"
        if hello.peer_incarnation not in ("", self._receiver.incarnation):
            return f"this is decode incarnation {self._receiver.incarnation}, you meant {hello.peer_incarnation}"
        if asked.device_uuid == ours:
            return f"both workers are on GPU {ours}, and NCCL does not connect a GPU with itself"
        if difference := hello.layout.difference(place.layout):
            return f"KV layouts differ: {difference}"
        if (hello.target, hello.target_rank) != (place.parallel, place.rank):
            return f"this is rank {place.rank} of {place.parallel}, you meant rank {hello.target_rank} of {hello.target}"
        try:
            route = route_between(place.layout, hello.source, hello.rank, place.parallel, place.rank)
            if route is None:
                return f"rank {hello.rank} of {hello.source} writes nothing to rank {place.rank} of {place.parallel}"
            self._view = device_view(self._receiver.pool, route.target_area, hello.digest)
        except (Unsupported, TransferFailed) as error:
            return error.message
        self._hello = hello
        return ""

    def _one_frame(self, header: Header) -> None:
        if header.kind is Kind.FENCE:
            inflow = self._receiver.inflow(header.key)
            count = inflow.num_stored[self.rank] if inflow is not None and self._is_ours(inflow.grant) else 0
            self._sock.write([self._writer.header(Kind.LANDED, header.key, count=count)])
            return
        if header.kind is not Kind.DATA:
            raise FrameError(f"a {header.kind.name} frame from a writer")
        run_nbytes = self._view.layout.run_nbytes
        if not 0 < header.count <= max_runs(run_nbytes) or header.payload_nbytes != header.count * run_nbytes:
            raise FrameError(f"a frame of {header.count} runs with {header.payload_nbytes} bytes")
        table = self._sock.read_exactly(4 * header.count)
        if frames.table_digest(table) != header.table:
            raise FrameError("an index table is damaged")
        reason = self._store(header, frames.unpack_indexes(table))
        if reason is not None:
            self._sock.write([self._writer.header(Kind.NACK, header.key, layer=reason)])

    def _store(self, header: Header, indexes: Sequence[int]) -> Reason | None:
        """Receive the payload, whatever becomes of it: the writer is sending it. -> why it was thrown away, or None."""
        assert self._pipe is not None
        packed = self._staging[: header.count]
        self._pipe.receive(packed)
        inflow = self._receiver.inflow(header.key)
        reason = self._why_not(inflow, header.layer, indexes)
        if inflow is None or reason is not None:
            return reason
        blocks = [inflow.grant.block_ids[index] for index in indexes]
        row = inflow.arrivals.first_row(self.rank) + header.layer
        with inflow.lock:
            if not inflow.is_live:
                return Reason.NOT_LIVE
            inflow.arrivals.forget(row, indexes)
            self._view.unpack(header.layer, blocks, packed)
            inflow.stored(self.rank, row, indexes, self._view.digests(header.layer, blocks))
        return None

    def _why_not(self, inflow: Any, layer: int, indexes: Sequence[int]) -> Reason | None:
        if inflow is None:
            return Reason.NOT_LIVE
        grant = inflow.grant
        if not self._is_ours(grant):
            return Reason.NOT_YOURS
        if layer >= self._view.layout.num_layers or min(indexes) < grant.num_cached_blocks or max(indexes) >= len(grant.block_ids):
            return Reason.OUTSIDE
        if len(set(indexes)) != len(indexes):  # two writers of one block within a launch
            return Reason.OUTSIDE
        return None

    def _is_ours(self, grant: Grant) -> bool:
        return (grant.prefill_incarnation, grant.source) == (self.peer, self._hello.source)
