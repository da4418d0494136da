"""The prefill side of the TCP transport: one connection to one decode worker, a lane of outbox.py.

The outbox's thread connects and sends, straight from the pool; a second thread reads the answers (LANDED, NACK), so a
fence of one transfer holds up no other. Made by link.py.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from kvtransfer import tcp_frames as frames
from kvtransfer.layout import Route, plan_routes
from kvtransfer.listening import why
from kvtransfer.outgoing import LinkBroken, Piece, Transfer
from kvtransfer.tcp_frames import FrameError, Kind, Reason
from kvtransfer.tcp_socket import Closed, DeadlineSocket
from protocol.errors import HandshakeRefused, TransferFailed
from protocol.kv import XXH3, KVLayout, TcpEndpoint
from protocol.parallel import ALONE, Parallel

log = logging.getLogger(__name__)


class TcpLane:
    """See outgoing.Lane. layout: the whole model's. peer_incarnation: which life of the decode worker is meant; another one at that
    address refuses.

    connect_timeout_s: for connection and hand-shake. stall_timeout_s: how long sending may stand still.
    answer_timeout_s: how long a fence may stay unanswered before the connection is given up.
    """

    num_blocks = None

    def __init__(
        self,
        endpoint: TcpEndpoint,
        layout: KVLayout,
        secret: bytes,
        incarnation: str,
        peer_incarnation: str,
        *,
        route: Route | None = None,
        source: Parallel = ALONE,
        target: Parallel = ALONE,
        digest: str = XXH3,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = 5.0,
        answer_timeout_s: float = 10.0,
    ) -> None:
        route = route or plan_routes(layout, source, target)[0]
        self.endpoint = endpoint
        self._whole = layout
        self._run_nbytes = route.layout(layout).run_nbytes
        self._secret = secret
        hello = frames.Hello(incarnation, peer_incarnation, layout, source, route.source, target, route.target, digest)
        self._hello = msgspec.msgpack.encode(hello)
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._on_broken: Callable[[], None] = lambda: None
        self._sock: DeadlineSocket | None = None  # of the link, or of the one that is being made
        self._link: _Link | None = None

    def attach(self, on_broken: Callable[[], None]) -> None:
        self._on_broken = on_broken

    def warm(self) -> None:
        self._connected()

    def is_broken(self) -> bool:
        return self._link is not None and self._link.is_broken

    def reset(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def interrupt(self) -> None:
        sock = self._sock
        if sock is not None:
            sock.shutdown()

    def close(self) -> None:
        self.reset()

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        link = self._connected()
        key = link.key_of(transfer)
        for indexes, runs in self._frames(pieces):
            table = frames.pack_indexes(indexes)
            nbytes = sum(run.nbytes for run in runs)
            link.send(
                Kind.DATA,
                key,
                [table, *runs],
                layer=layer,
                count=len(indexes),
                payload_nbytes=nbytes,
                table=frames.table_digest(table),
            )

    def fence(self, transfer: Transfer) -> None:
        link = self._connected()
        link.expect_landed(transfer)
        link.send(Kind.FENCE, link.key_of(transfer), [])

    def _frames(self, pieces: Iterable[Piece]) -> Iterator[tuple[list[int], list[memoryview]]]:
        """Cut pieces into frames as they come: (indexes, their bytes)."""
        most = max(1, min(frames.MAX_RUNS, frames.MAX_PAYLOAD_NBYTES // self._run_nbytes))
        indexes: list[int] = []
        runs: list[memoryview] = []
        for first, data in pieces:
            done = 0
            while done < len(data):
                count = min(most - len(indexes), len(data) - done)
                indexes.extend(range(first + done, first + done + count))
                runs.append(_flat(data[done : done + count]))
                done += count
                if len(indexes) == most:
                    yield indexes, runs
                    indexes, runs = [], []
        if indexes:
            yield indexes, runs

    def _connected(self) -> _Link:
        if self._link is None:
            self._link = _Link(self._connect(), self._answer_timeout_s, self._on_broken)
        if self._link.is_broken:
            raise LinkBroken(self._link.reason)
        return self._link

    def _connect(self) -> tuple[DeadlineSocket, frames.FrameReader, frames.FrameWriter]:
        where = f"{self.endpoint.host}:{self.endpoint.port}"
        deadline = time.monotonic() + self._connect_timeout_s
        try:
            raw = socket.create_connection((self.endpoint.host, self.endpoint.port), self._connect_timeout_s)
        except OSError as error:
            raise LinkBroken(f"no connection from {socket.gethostname()} to {where} (KV, tcp): {why(error)}") from error
        sock = self._sock = DeadlineSocket(raw, self._stall_timeout_s)
        try:
            reader, writer = self._shake_hands(sock, deadline)
        except HandshakeRefused:
            sock.close()
            raise
        except (OSError, FrameError, msgspec.MsgspecError) as error:
            sock.close()
            hint = " (is the cluster secret the same on every worker?)" if isinstance(error, Closed) else ""
            raise LinkBroken(f"hand-shake with {where}: {error}{hint}") from error
        return sock, reader, writer

    def _shake_hands(self, sock: DeadlineSocket, deadline: float) -> tuple[frames.FrameReader, frames.FrameWriter]:
        def read(nbytes: int) -> bytes:
            return bytes(sock.read_exactly(nbytes, deadline - time.monotonic()))

        magic, version, nonce_s = frames.GREETING.unpack(read(frames.GREETING.size))
        if magic != frames.MAGIC or version != frames.VERSION:
            raise HandshakeRefused(
                f"KV over tcp: {frames.MAGIC!r} version {frames.VERSION} here, {magic!r} version {version} at {self.endpoint}"
            )
        nonce_c = os.urandom(frames.NONCE_NBYTES)
        sock.write([frames.pack_hello(self._secret, nonce_s, nonce_c, self._hello)])
        data = read(frames.preamble_length(read(frames.PREAMBLE.size)))
        expected = frames.proof(self._secret, "server", nonce_s, nonce_c, self._hello, data)
        if not frames.compare(read(frames.PROOF_NBYTES), expected):
            raise FrameError("the other end does not know the cluster secret")
        welcome = msgspec.msgpack.decode(data, type=frames.Welcome)
        if welcome.refusal:
            raise HandshakeRefused(f"decode worker {welcome.incarnation} refuses: {welcome.refusal}")
        if difference := self._whole.difference(welcome.layout):
            raise HandshakeRefused(f"KV layouts differ: {difference}")
        return frames.session(self._secret, nonce_s, nonce_c, is_server=False)


class _Link:
    """One connection and the thread that reads its answers. Replaced, never repaired."""

    def __init__(
        self,
        connected: tuple[DeadlineSocket, frames.FrameReader, frames.FrameWriter],
        answer_timeout_s: float,
        on_broken: Callable[[], None],
    ) -> None:
        self.is_broken = False
        self.reason = ""
        self._sock, self._reader, self._writer = connected
        self._answer_timeout_s = answer_timeout_s
        self._on_broken = on_broken
        self._transfers: weakref.WeakValueDictionary[bytes, Transfer] = weakref.WeakValueDictionary()
        self._fences: dict[bytes, tuple[Transfer, float]] = {}  # key -> whom to tell, and until when
        self._is_closing = False
        self._thread = threading.Thread(target=self._read_answers, name="kv-answers", daemon=True)
        self._thread.start()

    def key_of(self, transfer: Transfer) -> bytes:
        key = frames.grant_key(transfer.grant.grant_id)
        self._transfers[key] = transfer
        return key

    def expect_landed(self, transfer: Transfer) -> None:
        key = frames.grant_key(transfer.grant.grant_id)
        self._fences[key] = (transfer, time.monotonic() + self._answer_timeout_s)

    def send(self, kind: Kind, key: bytes, parts: Sequence[bytes | memoryview], **fields: int) -> None:
        try:
            self._sock.write([self._writer.header(kind, key, **fields), *parts])
        except OSError as error:
            self._broke(str(error))
            raise LinkBroken(self.reason) from error

    def close(self) -> None:
        """By the outbox's thread, which alone sends."""
        self._is_closing = True
        self._sock.shutdown()
        self._thread.join()
        self._sock.close()

    def _broke(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.is_broken = True
        self._sock.shutdown()

    def _read_answers(self) -> None:
        try:
            while True:
                if self._sock.wait(select.POLLIN, 0.5):
                    self._answer(self._reader.header(self._sock.read_exactly(frames.HEADER_NBYTES)))
                self._check_deadlines()
        except (OSError, FrameError) as error:
            self._broke(str(error))
        except Exception:
            log.exception("reading the answers of a KV connection failed")
            self._broke("reading answers failed; the worker's log has the details")
        if not self._is_closing:
            self._on_broken()

    def _answer(self, header: frames.Header) -> None:
        if header.kind is Kind.LANDED:
            transfer, _ = self._fences.pop(header.key, (None, 0.0))
            if transfer is not None:
                transfer.landed(header.count)
        elif header.kind is Kind.NACK:
            refused = self._transfers.get(header.key)
            if refused is not None:
                refused.fail(TransferFailed(f"the decode worker refuses grant {refused.grant.grant_id}: {_why(header.layer)}"))
        else:
            raise FrameError(f"a {header.kind.name} frame from a reader")

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if any(until < now for _, until in list(self._fences.values())):
            raise FrameError(f"a fence was not answered for {self._answer_timeout_s:g} s")


def _why(reason: int) -> str:
    try:
        return frames.REASONS[Reason(reason)]
    except ValueError:
        return f"reason {reason}"


def _flat(data: np.ndarray) -> memoryview:
    return data.reshape(-1).data
