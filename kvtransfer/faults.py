"""Faults on purpose, for tests and drills: a lane that spoils what it carries.

Nothing in production imports this. The lane goes in through `make_sender(tamper=...)`, after hashing, as a broken
network or memory would. A proxy that spoils TCP streams is in tests/faultproxy.py.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable

import numpy as np

from kvtransfer.outgoing import Lane, Piece, Transfer
from protocol.kv import KVEndpoint


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

    def interrupt(self) -> None:
        self._inner.interrupt()

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
