"""Says what has landed: gathers runs that the senders' threads have stored, and signs and tells them from the event loop.

What piles up while the loop is busy goes out together, neighbouring layers of the same blocks as one `Landed`; so there is about
one message per layer and chunk when there is time, and fewer when there is not. Used by ranks.py, one per peer decode worker.
"""

from __future__ import annotations

import asyncio
import threading
from typing import NamedTuple

import msgspec

from kvtransfer.transport import OnLanded
from protocol.kv import XXH3
from protocol.ticket import Grant, Landed, sign


class _Piece(NamedTuple):
    grant: Grant
    row: int
    first: int
    digests: bytes


class Landings:
    """`add` from any thread; everything else, and on_landed, on the event loop that `attach` was called on."""

    def __init__(self, secret: bytes, on_landed: OnLanded, digest: str = XXH3) -> None:
        self._digest = digest
        self._secret = secret
        self._on_landed = on_landed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._pieces: list[_Piece] = []

    def attach(self) -> None:
        self._loop = asyncio.get_running_loop()

    def add(self, grant: Grant, row: int, first: int, digests: bytes) -> None:
        loop = self._loop
        if loop is None:  # nobody listens: sealing finds out by itself
            return
        with self._lock:
            self._pieces.append(_Piece(grant, row, first, digests))
            if len(self._pieces) > 1:
                return  # a flush is on its way
        try:
            loop.call_soon_threadsafe(self.flush)
        except RuntimeError:  # the loop is closed: the worker is going down
            self._loop = None

    def flush(self) -> None:
        """Tell what was added so far. A manifest must not overtake it: call it before one is signed."""
        with self._lock:
            pieces, self._pieces = self._pieces, []
        for grant, landed in _joined(pieces):
            self._on_landed(grant, sign(msgspec.structs.replace(landed, digest=self._digest), self._secret))


def _joined(pieces: list[_Piece]) -> list[tuple[Grant, Landed]]:
    """In the order in which they came, as a run that was stored twice must be told twice."""
    joined: list[tuple[Grant, Landed]] = []
    last: dict[str, int] = {}  # grant_id -> where its newest is
    for grant, row, first, digests in pieces:
        count = len(digests) // 16
        at = last.get(grant.grant_id)
        if at is not None:
            before = joined[at][1]
            if (before.first, before.count) == (first, count) and before.row + before.num_rows == row:
                longer = msgspec.structs.replace(before, num_rows=before.num_rows + 1, digests=before.digests + digests)
                joined[at] = (grant, longer)
                continue
        last[grant.grant_id] = len(joined)
        joined.append((grant, _landed(grant, row, first, count, digests)))
    return joined


def _landed(grant: Grant, row: int, first: int, count: int, digests: bytes) -> Landed:
    return Landed(
        grant_id=grant.grant_id,
        request_id=grant.request_id,
        epoch=grant.epoch,
        decode_incarnation=grant.decode_incarnation,
        prefill_incarnation=grant.prefill_incarnation,
        row=row,
        num_rows=1,
        first=first,
        count=count,
        digests=digests,
    )
