"""Which worker holds how much of a prompt's prefix: a bounded map from chained hashes to sets of workers.

A hash stands for a whole prefix (it is chained), so the sets of workers only shrink along a prompt. A set is one integer
with a bit per worker, so a walk over a prompt's hashes is a few ANDs whatever the number of workers. Fed by optimistic
inserts when a request is placed: the worker will have that prefix when it has prefilled. A wrong entry costs a
misprediction, never a wrong answer: workers look into their own caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SWEEP_AFTER = 64  # forgotten workers, whose bits may be given away again after one pass over the map


class Matches(Mapping[str, int]):
    """What was found: read as a mapping by worker, or as a column by the workers' bits. Valid until a worker comes or goes."""

    def __init__(self, levels: list[tuple[int, int]], bit_of: dict[str, int], num_bits: int) -> None:
        self._columns: dict[int, tuple[Any, Any]] = {}  # by whose bits they are, which are kept so that nobody else has their id
        self._levels = levels
        self._bit_of = bit_of
        self._num_bits = num_bits
        self._found: dict[str, int] | None = None

    def __bool__(self) -> bool:
        return bool(self._levels)

    def _dict(self) -> dict[str, int]:
        if self._found is None:
            levels = self._levels
            self._found = (
                {worker: n for worker, bit in self._bit_of.items() for mask, n in levels if mask >> bit & 1} if levels else {}
            )
        return self._found

    def __getitem__(self, worker: str) -> int:
        return self._dict()[worker]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def column(self, bits: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Length of the match of each worker whose bit is named, as floats; 0 for none. Not to be written to."""
        known = self._columns.get(id(bits))
        if known is None:
            if len(self._columns) >= 4:
                self._columns.clear()
            known = self._columns[id(bits)] = bits, self._column(bits)
        found: np.ndarray[Any, np.dtype[np.float64]] = known[1]
        return found

    def _column(self, bits: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        lengths = np.zeros(self._num_bits)
        num_bytes = -(-self._num_bits // 8)
        for mask, length in self._levels:
            if mask.bit_count() <= 4:
                while mask:
                    low = mask & -mask
                    lengths[low.bit_length() - 1] = length
                    mask ^= low
                continue
            row = np.frombuffer(mask.to_bytes(num_bytes, "little"), dtype=np.uint8)
            lengths[np.unpackbits(row, count=self._num_bits, bitorder="little").view(bool)] = length
        found: np.ndarray[Any, np.dtype[np.float64]] = lengths[bits]
        return found


class PrefixIndex:
    """At most `max_hashes` hashes; the least recently used go first."""

    def __init__(self, max_hashes: int = 200_000) -> None:
        assert max_hashes >= 1, "an index holds something"
        self.max_hashes = max_hashes
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # hash -> bits of the workers that hold it
        # Of tenants that may not have the whole: theirs, least recently used first.
        self._owned: dict[str, OrderedDict[bytes, None]] = {}
        self._bit_of: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._num_bits = 0
        self.generation = 0  # how often workers came or went
        self._forgotten = 0  # bits whose workers are gone, still in the map

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, workers: Sequence[str], hashes: Sequence[bytes], tenant: str = "", share: float = 1.0) -> None:
        """Each of `workers` holds, or soon will, the prefix that ends with each of `hashes`. share: of the whole index that this
        tenant may fill (hashes are salted by tenant, so each belongs to one); its own least recently used ones go when it has
        more."""
        if not hashes:
            return
        if share < 1.0:
            self._keep_share(tenant, hashes, max(1, int(share * self.max_hashes)))
        mask = 0
        for worker in workers:
            mask |= 1 << self.bit(worker)
        holders = self._holders
        # Backwards, so that a prompt's first blocks are the most recently used and outlive its last ones: without its
        # beginning a prefix cannot be found at all.
        get, move_to_end = holders.get, holders.move_to_end
        most = self.max_hashes if share >= 1.0 else max(1, int(share * self.max_hashes))
        for block_hash in reversed(hashes[:most]):
            holders[block_hash] = get(block_hash, 0) | mask
            move_to_end(block_hash)
        while len(holders) > self.max_hashes:
            holders.popitem(last=False)

    def _keep_share(self, tenant: str, hashes: Sequence[bytes], most: int) -> None:
        own = self._owned.setdefault(tenant, OrderedDict())
        for block_hash in reversed(hashes[:most]):
            own[block_hash] = None
            own.move_to_end(block_hash)
        while len(own) > most:
            self._holders.pop(own.popitem(last=False)[0], None)

    def match(self, hashes: Sequence[bytes]) -> Matches:
        """worker -> how many of the leading `hashes` it holds. Workers that hold none are left out."""
        alive = ~self._forgotten
        levels: list[tuple[int, int]] = []  # (bits of those whose match ends here, its length)
        current = -1
        get = self._holders.get
        for i, block_hash in enumerate(hashes):
            held = get(block_hash, 0) & alive & current
            if i and held != current:
                levels.append((current & ~held, i))
            current = held
            if not held:
                break
        else:
            if hashes:
                levels.append((current, len(hashes)))
        return Matches(levels, self._bit_of, self._num_bits)

    def forget(self, worker: str) -> None:
        """The worker is gone, and its cache with it."""
        bit = self._bit_of.pop(worker, None)
        if bit is None:
            return
        self._forgotten |= 1 << bit
        self.generation += 1
        if self._forgotten.bit_count() >= SWEEP_AFTER:
            self._sweep()

    def bit(self, worker: str) -> int:
        """Its place in the sets, from its first to its last day."""
        bit = self._bit_of.get(worker)
        if bit is None:
            if self._free_bits:
                bit = self._free_bits.pop()
            else:
                bit, self._num_bits = self._num_bits, self._num_bits + 1
            self._bit_of[worker] = bit
            self.generation += 1
        return bit

    def _sweep(self) -> None:
        kept = ~self._forgotten
        for block_hash in [h for h, holders in self._holders.items() if not holders & kept]:
            del self._holders[block_hash]
        for block_hash in self._holders:
            self._holders[block_hash] &= kept
        self._free_bits += [bit for bit in range(self._num_bits) if self._forgotten >> bit & 1]
        self._forgotten = 0
