"""Faults on purpose, for tests and drills: a lane that spoils what it carries, and a TCP proxy that spoils a stream.

Nothing in production imports this. The lane goes in through `make_sender(tamper=...)`, after hashing, as a broken
network or memory would; the proxy stands between a sender and a receiver's port.
"""

from __future__ import annotations

import contextlib
import enum
import random
import socket
import threading
from collections.abc import Callable, Iterable

import numpy as np

from kvtransfer.outgoing import Lane, Piece, Transfer
from protocol.kv import KVEndpoint, TcpEndpoint


class Fault(enum.Enum):
    FLIP = "flip"  # one bit of one run
    TRUNCATE = "truncate"  # the second half of the last run does not arrive
    DROP = "drop"  # the whole push does not arrive
    DUPLICATE = "duplicate"  # it arrives twice
    MISDIRECT = "misdirect"  # two runs change places, or the only one is replaced by another of the pool's bytes


class FaultyLane:
    """A lane (outgoing.Lane) around another. choose() is asked before each store: a fault, or None for a good one.

    `applied` counts faults; rng makes a run repeatable.
    """

    def __init__(self, inner: Lane, choose: Callable[[], Fault | None], rng: random.Random) -> None:
        self.applied = 0
        self._inner = inner
        self._choose = choose
        self._rng = rng

    @property
    def endpoint(self) -> KVEndpoint:
        return self._inner.endpoint

    @property
    def num_blocks(self) -> int | None:
        return self._inner.num_blocks

    def attach(self, on_broken: Callable[[], None]) -> None:
        self._inner.attach(on_broken)

    def warm(self) -> None:
        self._inner.warm()

    def is_broken(self) -> bool:
        return self._inner.is_broken()

    def reset(self) -> None:
        self._inner.reset()

    def fence(self, transfer: Transfer) -> None:
        self._inner.fence(transfer)

    def close(self) -> None:
        self._inner.close()

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        fault = self._choose()
        if fault is None:
            self._inner.store(transfer, layer, pieces)
            return
        self.applied += 1
        copies = [(index, data.copy()) for index, data in pieces]  # hashes them, also those that are dropped
        if fault is Fault.DROP:
            return
        if fault is Fault.FLIP:
            data = self._rng.choice(copies)[1].reshape(-1)
            data[self._rng.randrange(data.size)] ^= 1 << self._rng.randrange(8)
        elif fault is Fault.TRUNCATE:
            run = copies[-1][1][-1]
            run[run.size // 2 :] ^= 0xA5
        elif fault is Fault.MISDIRECT:
            _misdirect(copies[0][1])
        self._inner.store(transfer, layer, copies)
        if fault is Fault.DUPLICATE:
            self._inner.store(transfer, layer, copies)


def _misdirect(data: np.ndarray) -> None:
    if len(data) > 1:
        data[[0, 1]] = data[[1, 0]]
    else:
        data[:] = np.roll(data, 1, axis=1)


class Cut(bytes):
    """From an edit: pass these bytes on, then end the connection."""


class FaultProxy:
    """A TCP proxy on loopback. edit(connection, is_to_target, offset, data) -> what is passed on (see Cut).

    `connection` counts from 0; `offset` is the place of data[0] in that direction of that connection.
    """

    def __init__(self, target: TcpEndpoint, edit: Callable[[int, bool, int, bytes], bytes]) -> None:
        self._target = target
        self._edit = edit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self.endpoint = TcpEndpoint("127.0.0.1", self._listener.getsockname()[1])
        self._start(self._accept)

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(1.0)
        for sock in [self._listener, *self._sockets]:
            sock.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name="fault-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        connection = 0
        while not self._is_closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._target.host, self._target.port), 2.0)
            except OSError:
                return
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(None)
            self._sockets += [near, far]
            self._start(self._pump, connection, True, near, far)
            self._start(self._pump, connection, False, far, near)
            connection += 1

    def _pump(self, connection: int, is_to_target: bool, source: socket.socket, sink: socket.socket) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                edited = self._edit(connection, is_to_target, offset, data)
                offset += len(data)
                sink.sendall(edited)
                if isinstance(edited, Cut):
                    break
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def flip_at(place: int, bit: int = 0, *, is_to_target: bool = True) -> Callable[[int, bool, int, bytes], bytes]:
    """An edit that flips one bit of byte `place` of the first connection, in one direction."""

    def edit(connection: int, direction: bool, offset: int, data: bytes) -> bytes:
        if connection == 0 and direction is is_to_target and offset <= place < offset + len(data):
            spoilt = bytearray(data)
            spoilt[place - offset] ^= 1 << bit
            return bytes(spoilt)
        return data

    return edit


def cut_at(place: int, *, every_connection: bool = False) -> Callable[[int, bool, int, bytes], bytes]:
    """An edit that passes `place` bytes to the target and then cuts the connection."""

    def edit(connection: int, direction: bool, offset: int, data: bytes) -> bytes:
        if direction and (every_connection or connection == 0) and offset + len(data) >= place:
            return Cut(data[: max(0, place - offset)])
        return data

    return edit
