"""What one rank of a decode worker knows of one grant's runs before they are sealed: their digests, computed while later
layers and chunks are still on their way.

A digest here says what the memory held when it was read, no more: only the manifest, once the writer has stopped, says what
it must hold. Filled by receivers that hash what they receive (tcp.py) and by receiving.py when a run is said to have landed;
compared by digest.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvtransfer.handoff import DIGEST_NBYTES, written_blocks
from kvtransfer.layout import Place, Route, contiguous, rows_of
from protocol.ticket import Grant


class Arrivals:
    """Digests of the runs of one grant that lie on one rank, route by route in the manifest's order.

    Each run is put by one thread at a time; `is_complete` and `digests` are read once nothing is stored any more.
    """

    def __init__(self, grant: Grant, place: Place) -> None:
        self.grant = grant
        self.routes: list[tuple[Route, int, int]] = []  # (route, its first row in manifests, its first row here)
        num_rows = 0
        for route, first in rows_of(grant.layout, grant.source, grant.target):
            if route.target == place.rank:
                self.routes.append((route, first, num_rows))
                num_rows += route.num_layers
        self.num_written = len(written_blocks(grant))
        self.digests = bytearray(num_rows * self.num_written * DIGEST_NBYTES)
        self._is_known = bytearray(num_rows * self.num_written)

    @property
    def num_runs(self) -> int:
        return len(self._is_known)

    @property
    def nbytes(self) -> int:
        return len(self.digests) + len(self._is_known)

    @property
    def is_complete(self) -> bool:
        """Every run has a digest."""
        return 0 not in self._is_known

    def first_row(self, source_rank: int) -> int:
        """Where the route from that rank begins here."""
        return next(own for route, _, own in self.routes if route.source == source_rank)

    def place_of(self, row: int) -> tuple[Route, int] | None:
        """A manifest's row -> (route, layer within it); None: it lies on another rank."""
        for route, first, _ in self.routes:
            if first <= row < first + route.num_layers:
                return route, row - first
        return None

    def put(self, row: int, first: int, digests: bytes) -> None:
        """Own row; the runs from index `first` of the grant's block_ids on."""
        start = row * self.num_written + first - self.grant.num_cached_blocks
        count = len(digests) // DIGEST_NBYTES
        self.digests[start * DIGEST_NBYTES : (start + count) * DIGEST_NBYTES] = digests
        self._is_known[start : start + count] = b"\x01" * count

    def forget(self, row: int, indexes: Sequence[int]) -> None:
        """These runs are about to be stored again."""
        for _, first, count in stretches(indexes):
            start = row * self.num_written + first - self.grant.num_cached_blocks
            self._is_known[start : start + count] = bytes(count)

    def digest(self, row: int, index: int) -> bytes | None:
        """None: not known."""
        at = row * self.num_written + index - self.grant.num_cached_blocks
        return bytes(self.digests[at * DIGEST_NBYTES : (at + 1) * DIGEST_NBYTES]) if self._is_known[at] else None


def stretches(indexes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(where it begins in `indexes`, first index, count) of the longest stretches of neighbours."""
    return contiguous(list(zip(range(len(indexes)), indexes, strict=True)))
