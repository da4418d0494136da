"""Which worker holds how much of a prompt's prefix: a bounded map from chained hashes to sets of workers.

A hash stands for a whole prefix (it is chained), so the sets of workers only shrink along a prompt. A set is one integer
with a bit per worker, so a walk over a prompt's hashes is a few ANDs whatever the number of workers. Fed by optimistic
inserts when a request is placed: the worker will have that prefix when it has prefilled. A wrong entry costs a
misprediction, never a wrong answer: workers look into their own caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

SWEEP_AFTER = 64  # forgotten workers, whose bits may be given away again after one pass over the map


class PrefixIndex:
    """At most `max_hashes` hashes; the least recently used go first."""

    def __init__(self, max_hashes: int = 200_000) -> None:
        assert max_hashes >= 1, "an index holds something"
        self.max_hashes = max_hashes
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # hash -> bits of the workers that hold it
        self._bit_of: dict[str, int] = {}
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._forgotten = 0  # bits whose workers are gone, still in the map

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, worker: str, hashes: Sequence[bytes]) -> None:
        """`worker` holds, or soon will, the prefix that ends with each of `hashes`."""
        if not hashes:
            return
        mask = 1 << self._bit(worker)
        holders = self._holders
        # Backwards, so that a prompt's first blocks are the most recently used and outlive its last ones: without its
        # beginning a prefix cannot be found at all.
        for block_hash in reversed(hashes[: self.max_hashes]):
            holders[block_hash] = holders.get(block_hash, 0) | mask
            holders.move_to_end(block_hash)
        while len(holders) > self.max_hashes:
            holders.popitem(last=False)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """worker -> how many of the leading `hashes` it holds. Workers that hold none are left out."""
        alive = ~self._forgotten
        lengths: list[tuple[int, int]] = []  # (bits of those whose match ends here, its length)
        current = -1
        for i, block_hash in enumerate(hashes):
            held = self._holders.get(block_hash, 0) & alive & current
            if i and held != current:
                lengths.append((current & ~held, i))
            current = held
            if not held:
                break
        else:
            if hashes:
                lengths.append((current, len(hashes)))
        if not lengths:
            return {}
        return {worker: length for worker, bit in self._bit_of.items() for mask, length in lengths if mask >> bit & 1}

    def forget(self, worker: str) -> None:
        """The worker is gone, and its cache with it."""
        bit = self._bit_of.pop(worker, None)
        if bit is None:
            return
        self._forgotten |= 1 << bit
        if self._forgotten.bit_count() >= SWEEP_AFTER:
            self._sweep()

    def _bit(self, worker: str) -> int:
        bit = self._bit_of.get(worker)
        if bit is None:
            if self._free_bits:
                bit = self._free_bits.pop()
            else:
                bit, self._num_bits = self._num_bits, self._num_bits + 1
            self._bit_of[worker] = bit
        return bit

    def _sweep(self) -> None:
        kept = ~self._forgotten
        for block_hash in [h for h, holders in self._holders.items() if not holders & kept]:
            del self._holders[block_hash]
        for block_hash in self._holders:
            self._holders[block_hash] &= kept
        self._free_bits += [bit for bit in range(self._num_bits) if self._forgotten >> bit & 1]
        self._forgotten = 0
