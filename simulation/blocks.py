"""A worker's KV pool as counts: blocks in use, and an LRU of prefixes that nobody uses any more but that may be met again.

What engine/blocks.py does with block ids, without the ids. The unit of sharing is the trace's hash block (512 tokens in
Mooncake's), which weighs several blocks of the pool. Called by `workers.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Holding:
    """What one sequence holds of a pool: references to shared hash blocks, and blocks of its own."""

    __slots__ = ("own", "shared")

    def __init__(self) -> None:
        self.shared: list[int] = []  # hashes, each with a reference of ours
        self.own = 0


class Pool:
    """num_blocks blocks; weight: blocks behind one hash."""

    def __init__(self, num_blocks: int, weight: int, caching: bool = True) -> None:
        assert num_blocks > 0, num_blocks
        assert weight > 0, weight
        self.num_blocks = num_blocks
        self.weight = weight
        self.caching = caching
        self.used = 0
        self._refs: dict[int, int] = {}  # hash -> sequences that hold it
        self._lru: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest first

    @property
    def free(self) -> int:
        """What can be handed out, what is cached included."""
        return self.num_blocks - self.used

    @property
    def cached(self) -> int:
        return len(self._lru) * self.weight

    def match(self, hashes: Sequence[int], holding: Holding) -> int:
        """Take a reference on the longest prefix that is here. -> how many hash blocks of it."""
        refs, lru = self._refs, self._lru
        found = 0
        for block_hash in hashes:
            held = refs.get(block_hash)
            if held is not None:
                refs[block_hash] = held + 1
            elif block_hash in lru:
                del lru[block_hash]
                refs[block_hash] = 1
                self.used += self.weight
            else:
                break
            found += 1
        holding.shared.extend(hashes[:found])
        return found

    def take(self, number: int, holding: Holding) -> bool:
        """Blocks of its own, evicting what is cached for as long as it takes. False: there are not so many; nothing changed."""
        if number > self.num_blocks - self.used:
            return False
        holding.own += number
        self.grow(number)
        return True

    def grow(self, number: int) -> None:
        """`number` blocks more are in use, whosever they are. They must be free."""
        self.used += number
        assert self.used <= self.num_blocks, f"{self.used} of {self.num_blocks} blocks"
        room, weight, lru = self.num_blocks - self.used, self.weight, self._lru
        while lru and len(lru) * weight > room:
            lru.popitem(last=False)

    def seal(self, block_hash: int, holding: Holding) -> None:
        """One whole hash block of its own is computed: others may share it. Its twin, computed elsewhere meanwhile, stays its
        own."""
        if not self.caching or block_hash in self._refs or block_hash in self._lru or holding.own < self.weight:
            return
        holding.own -= self.weight
        holding.shared.append(block_hash)
        self._refs[block_hash] = 1

    def release(self, holding: Holding) -> None:
        """It is over: what it shared stays findable until somebody needs the room. Its end goes before its beginning."""
        self.used -= holding.own
        holding.own = 0
        refs, lru = self._refs, self._lru
        for block_hash in reversed(holding.shared):
            held = refs[block_hash] - 1
            if held:
                refs[block_hash] = held
            else:
                del refs[block_hash]
                self.used -= self.weight
                lru[block_hash] = None
        holding.shared.clear()

    def check_integrity(self) -> None:
        assert 0 <= self.used <= self.num_blocks, f"{self.used} of {self.num_blocks}"
        assert self.used + self.cached <= self.num_blocks, "what is cached lies in free blocks"
        assert not self._refs.keys() & self._lru.keys(), "held or evictable, never both"
        assert all(number > 0 for number in self._refs.values())

    @property
    def is_idle(self) -> bool:
        return self.used == 0 and not self._refs
