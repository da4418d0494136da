"""The prefill side of the NCCL transport: one connection and one communicator to one decode rank, a lane of outbox.py.

Packs, sends, waits; when anything takes too long the link is given up and the fallback lane takes over (nccl.py has the drawing and
the reasons). Made by link.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvtransfer import tcp_frames as frames
from kvtransfer.listening import why
from kvtransfer.nccl import SENDER, CupyCommunicator, Hello, MakeCommunicator, Pipe, Welcome, staging
from kvtransfer.outgoing import Lane, LinkBroken, Piece, Prepared, Source, Transfer
from kvtransfer.tcp_frames import FrameError, FrameReader, FrameWriter, Kind, Reason
from kvtransfer.tcp_socket import Closed, DeadlineSocket
from protocol.errors import HandshakeRefused, TransferFailed
from protocol.kv import NcclEndpoint

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class NcclLane:
    """See outgoing.Lane. fallback() makes the lane that takes over; None: there is none, and a broken link is the end of this lane.

    timeout_s: of each operation of the communicator. connect_timeout_s: for connection and hand-shake.
    """

    num_blocks = None

    def __init__(
        self,
        endpoint: NcclEndpoint,
        source: Source,
        secret: bytes,
        incarnation: str,
        peer_incarnation: str,
        device_uuid: str,
        fallback: Callable[[], Lane] | None,
        *,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 5.0,
        make: MakeCommunicator = CupyCommunicator,
    ) -> None:
        from kvtransfer.device import DeviceView

        if not isinstance(source.view, DeviceView):
            raise HandshakeRefused("nccl: our own KV pool is not on a GPU")
        self.endpoint = endpoint
        self._view = source.view
        self._source = source
        self._secret = secret
        route = source.route
        hello = frames.Hello(
            incarnation,
            peer_incarnation,
            source.whole,
            source.source,
            route.source,
            source.target,
            route.target,
            source.view.digest,
        )
        self._hello = msgspec.msgpack.encode(Hello(hello, device_uuid))
        self._make_fallback = fallback
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._make = make
        self._on_broken: Callable[[], None] = lambda: None
        self._link: _Link | None = None
        self._fallback: Lane | None = None

    def attach(self, on_broken: Callable[[], None]) -> None:
        self._on_broken = on_broken

    @property
    def has_fallen_back(self) -> bool:
        return self._fallback is not None

    def warm(self) -> None:
        """Raises HandshakeRefused also where the communicator cannot be made: then the two workers try another transport."""
        self._view.rehearse()
        try:
            self._connected()
        except LinkBroken as error:
            self._drop_link()
            raise HandshakeRefused(str(error)) from error

    def is_broken(self) -> bool:
        if self._fallback is not None:
            return self._fallback.is_broken()
        return self._link is not None and self._link.is_broken

    def reset(self) -> None:
        """After the first break nothing goes over NCCL any more: what broke it once would hold up the next transfer as long."""
        if self._fallback is not None:
            self._fallback.reset()
            return
        reason = self._link.reason if self._link is not None else "it could not be made"
        self._drop_link()
        if self._make_fallback is not None:
            log.warning("KV to %s:%d goes over tcp from now on: %s", self.endpoint.host, self.endpoint.port, reason)
            self._fallback = self._make_fallback()
            self._fallback.attach(self._on_broken)

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        if self._fallback is not None:
            self._fallback.store(transfer, layer, pieces)
            return
        assert isinstance(pieces, Prepared), "this lane reads the device itself"
        link = self._connected()
        most = len(link.staging)
        for start in range(0, len(pieces.pairs), most):
            self._send_frame(link, transfer, layer, pieces.pairs[start : start + most])

    def _send_frame(self, link: _Link, transfer: Transfer, layer: int, pairs: Sequence[tuple[int, int]]) -> None:
        from kernels import ops

        blocks, indexes = [block for block, _ in pairs], [index for _, index in pairs]
        used = [transfer.num_used(index) for index in indexes]
        sums = ops.sums_to_bytes(self._view.move(layer, blocks, used, link.staging, range(len(pairs))))
        self._view.synchronize()  # packed; the communicator has a stream of its own
        link.send_frame(transfer, layer, indexes, link.staging[: len(pairs)])
        transfer.carried(layer, indexes)
        transfer.put_digests(layer, indexes, sums)

    def fence(self, transfer: Transfer) -> None:
        if self._fallback is not None:
            self._fallback.fence(transfer)
            return
        self._connected().fence(transfer)

    def interrupt(self) -> None:
        link, fallback = self._link, self._fallback
        if link is not None:
            link.interrupt()
        if fallback is not None:
            fallback.interrupt()

    def close(self) -> None:
        self._drop_link()
        if self._fallback is not None:
            self._fallback.close()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connected(self) -> _Link:
        if self._link is None:
            self._link = self._connect()
        if self._link.is_broken:
            raise LinkBroken(self._link.reason)
        return self._link

    def _connect(self) -> _Link:
        where = f"{self.endpoint.host}:{self.endpoint.port}"
        deadline = time.monotonic() + self._connect_timeout_s
        try:
            raw = socket.create_connection((self.endpoint.host, self.endpoint.port), self._connect_timeout_s)
        except OSError as error:
            raise LinkBroken(f"no connection from {socket.gethostname()} to {where} (KV, tcp): {why(error)}") from error
        sock = DeadlineSocket(raw, self._timeout_s)
        try:
            reader, writer, unique_id = self._shake_hands(sock, deadline)
            device = self._view.device
            pipe = Pipe(lambda: self._make(unique_id, SENDER, device), self._timeout_s, where)
            pipe.ready()
        except (HandshakeRefused, LinkBroken):
            sock.close()
            raise
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            sock.close()
            hint = " (is the cluster secret the same on every worker?)" if isinstance(error, Closed) else ""
            raise LinkBroken(f"hand-shake with {where}: {error}{hint}") from error
        return _Link(sock, reader, writer, pipe, staging(self._view), self._timeout_s)

    def _shake_hands(self, sock: DeadlineSocket, deadline: float) -> tuple[FrameReader, FrameWriter, bytes]:
        def read(nbytes: int) -> bytes:
            return bytes(sock.read_exactly(nbytes, deadline - time.monotonic()))

        magic, version, nonce_s = frames.GREETING.unpack(read(frames.GREETING.size))
        if magic != frames.MAGIC or version != frames.VERSION:
            raise HandshakeRefused(f"KV over nccl: version {frames.VERSION} here, {magic!r} version {version} there")
        nonce_c = os.urandom(frames.NONCE_NBYTES)
        sock.write([frames.pack_hello(self._secret, nonce_s, nonce_c, self._hello)])
        data = read(frames.preamble_length(read(frames.PREAMBLE.size)))
        expected = frames.proof(self._secret, "server", nonce_s, nonce_c, self._hello, data)
        if not frames.compare(read(frames.PROOF_NBYTES), expected):
            raise FrameError("the other end does not know the cluster secret")
        welcome = msgspec.msgpack.decode(data, type=Welcome)
        if welcome.refusal:
            raise HandshakeRefused(f"decode worker {welcome.incarnation} refuses: {welcome.refusal}")
        if difference := self._source.whole.difference(welcome.layout):
            raise HandshakeRefused(f"KV layouts differ: {difference}")
        return *frames.session(self._secret, nonce_s, nonce_c, is_server=False), welcome.unique_id


class _Link:
    """One connection, its communicator and the staging buffer. Used by the outbox's thread only; replaced, never repaired."""

    def __init__(
        self,
        sock: DeadlineSocket,
        reader: FrameReader,
        writer: FrameWriter,
        pipe: Pipe,
        staging: torch.Tensor,
        timeout_s: float,
    ) -> None:
        self.staging = staging
        self._sock = sock
        self._reader = reader
        self._writer = writer
        self._pipe = pipe
        self._timeout_s = timeout_s

    @property
    def is_broken(self) -> bool:
        return self._pipe.is_broken

    @property
    def reason(self) -> str:
        return self._pipe.reason

    def send_frame(self, transfer: Transfer, layer: int, indexes: Sequence[int], packed: torch.Tensor) -> None:
        key, table = frames.grant_key(transfer.grant.grant_id), frames.pack_indexes(indexes)
        nbytes = packed.numel() * packed.element_size()
        with self._breaking():
            header = self._writer.header(Kind.DATA, key, layer, len(indexes), nbytes, frames.table_digest(table))
            self._sock.write([header, table])
        self._pipe.send(packed)

    def fence(self, transfer: Transfer) -> None:
        """Ask, and wait for the answer; refusals of frames come before it."""
        key = frames.grant_key(transfer.grant.grant_id)
        with self._breaking():
            self._sock.write([self._writer.header(Kind.FENCE, key)])
            deadline = time.monotonic() + self._timeout_s
            while True:
                header = self._reader.header(self._sock.read_exactly(frames.HEADER_NBYTES, max(0.0, deadline - time.monotonic())))
                if header.kind is Kind.LANDED and header.key == key:
                    break
                if header.kind is Kind.NACK and header.key == key:
                    is_known = header.layer in frozenset(Reason)
                    why = frames.REASONS[Reason(header.layer)] if is_known else f"reason {header.layer}"
                    transfer.fail(TransferFailed(f"the decode worker refuses grant {transfer.grant.grant_id}: {why}"))
                elif header.kind not in (Kind.NACK, Kind.LANDED):
                    raise FrameError(f"a {header.kind.name} frame from a reader")
        transfer.landed(header.count)

    def interrupt(self) -> None:
        """From any thread. What the communicator does has a deadline of its own."""
        self._sock.shutdown()

    def close(self) -> None:
        self._pipe.abort("closed here")
        self._sock.close()

    @contextlib.contextmanager
    def _breaking(self) -> Any:
        try:
            yield
        except (OSError, FrameError) as error:
            self._pipe.abort(str(error))
            raise LinkBroken(self._pipe.reason) from error
