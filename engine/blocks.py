"""Who owns which KV block. Pure Python; the KV bytes themselves are somewhere else.

    free ──allocate──> filling ──seal──> sealed ──last release──> free, or cached: sealed, no reference, evictable
      │                   ^  │                                       ^  │ match
      └──reserve──> reserved └──last release──> free                 └──┘
                       │  └──last release──> free
                       └──quarantine──> quarantined ──lift──> free
                                             └──readmit──> reserved

A block has one writer (truth rule R2): its sequence while it is *filling*, a remote prefill worker while it is *reserved*,
nobody once it is *sealed*. Only sealed blocks are shared through the prefix cache. Not thread-safe: one engine loop owns it.
"""

from __future__ import annotations

import enum
import re
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol


class BlockState(enum.Enum):
    FREE = "free"
    RESERVED = "reserved"
    FILLING = "filling"
    SEALED = "sealed"
    QUARANTINED = "quarantined"


class OutOfBlocks(Exception):
    """Nothing was taken; the caller preempts somebody, refuses, or waits."""


class Tier(Protocol):
    """Where evicted blocks go and may come back from (engine/host_tier.py)."""

    def store(self, evicted: SequenceOf[tuple[int, bytes]]) -> None:
        """(block, hash) of blocks that somebody may overwrite as soon as this returns, in the order of their eviction."""
        ...

    def num_leading(self, hashes: SequenceOf[bytes]) -> int:
        """How many of the first hashes can be asked for with `restore` now."""
        ...

    def restore(self, block_hash: bytes, block: int) -> bool:
        """Fill a block with what has this hash. False: it is not there (any more), and the block holds rubbish."""
        ...

    def forget(self, block_hash: bytes) -> None:
        """It is not there any more, if it was."""
        ...

    def clear(self) -> None: ...

    def numbers(self) -> dict[str, int]:
        """What it did and has, by the names of `WorkerStats`."""
        ...


_FREE_RUN = re.compile(b"\x01+")


class BlockPool:
    """num_blocks blocks of block_size tokens, with reference counts and an LRU of sealed blocks that nobody references.

    enable_prefix_caching False: sealed blocks are forgotten at their last release and match() finds nothing. tier: takes what is
    evicted to make room, and match() goes on there.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, tier: Tier | None = None) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.tier = tier if enable_prefix_caching else None
        self._states: list[BlockState] = [BlockState.FREE] * num_blocks
        self._refs: list[int] = [0] * num_blocks
        self._free = bytearray(b"\x01" * num_blocks)  # 1: free and not cached; bytes, so that runs are found at C speed
        self._num_clear = num_blocks  # how many ones are in _free
        self._num_quarantined = 0
        self.num_allocated = 0  # these three since the beginning
        self.num_freed = 0  # by their last reference; into the cache or not
        self.num_evicted = 0
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._added: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """What allocate() can hand out: free blocks and cached blocks that nobody references."""
        return self._num_clear + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Referenced or quarantined."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Counted in num_free, but still holding KV that a prompt may match."""
        return len(self._evictable)

    @property
    def num_quarantined(self) -> int:
        return self._num_quarantined

    @property
    def numbers(self) -> dict[str, int]:
        """Of the pool and its tier, by the names of `WorkerStats`."""
        return {
            "num_free_blocks": self.num_free,
            "num_used_blocks": self.num_used,
            "num_cached_blocks": self.num_cached,
            "num_quarantined_blocks": self.num_quarantined,
            **(self.tier.numbers() if self.tier is not None else {}),
        }

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def state(self, block: int) -> BlockState:
        return self._states[block]

    def is_writable(self, block: int) -> bool:
        """Its one sequence may write it; otherwise copy on write."""
        return self._states[block] is BlockState.FILLING and self._refs[block] == 1

    # ---- prefix cache ----------------------------------------------------------------------------------------------

    def peek(self, hashes: Iterable[bytes]) -> int:
        """How many leading blocks match() would return."""
        count = 0
        for block_hash in hashes:
            if block_hash not in self._block_of:
                break
            count += 1
        return count

    def match(self, hashes: SequenceOf[bytes]) -> list[int]:
        """The blocks of the longest cached prefix, with one reference more on each. With a tier it goes on there, into blocks
        that are free or evictable, as far as there are any and as far as one call copies.
        """
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._refs[block] += 1
            self._evictable.pop(block, None)
        if self.tier is not None and len(found) < len(hashes):
            found += self._restore(self.tier, hashes[len(found) :], found[-1] if found else None)
        return found

    def _restore(self, tier: Tier, hashes: SequenceOf[bytes], after: int | None) -> list[int]:
        """Sealed blocks with one reference each, for as many of the first hashes as can be had. To make room others are evicted
        and stored, so one that was there may be gone when its turn comes."""
        count = min(tier.num_leading(hashes), self.num_free)
        count = next((i for i in range(count) if hashes[i] in self._block_of), count)
        blocks = self.allocate(count, after) if count else []
        for i, block in enumerate(blocks):
            if not tier.restore(hashes[i], block):
                self.release(blocks[i:])
                return blocks[:i]
            self.seal(block, hashes[i])
        return blocks

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """(added, evicted) hashes since the last call, net: a hash is in at most one of the two."""
        added, evicted = list(self._added), list(self._evicted)
        self._added.clear()
        self._evicted.clear()
        return added, evicted

    def cached_hashes(self) -> list[bytes]:
        """Everything match() can find, for an index that has lost its place in the events."""
        return list(self._block_of)

    def forget(self, hashes: Iterable[bytes]) -> None:
        """What stands under these hashes is not to be trusted: nobody finds it any more, here or in the tier. Who holds a
        reference keeps it."""
        for block_hash in hashes:
            if self.tier is not None:
                self.tier.forget(block_hash)
            block = self._block_of.pop(block_hash, None)
            if block is None:
                continue
            del self._hash_of[block]
            if block_hash in self._added:
                del self._added[block_hash]
            else:
                self._evicted[block_hash] = None
            if block in self._evictable:
                del self._evictable[block]
                self._clear(block)

    def drop_cache(self) -> int:
        """Forget every cached block that nobody references, and all that the tier keeps. Returns how many of the first."""
        if self.tier is not None:
            self.tier.clear()
        count = len(self._evictable)
        while self._evictable:
            self._clear(self._evict_oldest()[0])
        return count

    # ---- life of a block -------------------------------------------------------------------------------------------

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """n filling blocks with one reference each, or OutOfBlocks and nothing is taken.

        Prefers ascending neighbours, so that transfers and reads run through memory in order. after: the sequence's present
        last block, whose right neighbour is the best choice.
        """
        return self._take(n, after, BlockState.FILLING)

    def reserve(self, n: int, after: int | None = None) -> list[int]:
        """The same for blocks that a remote worker will write."""
        return self._take(n, after, BlockState.RESERVED)

    def filling(self, block: int) -> None:
        """The remote writer is done and verified, or never was: its sequence writes the block from now on."""
        self._expect(block, BlockState.RESERVED)
        self._states[block] = BlockState.FILLING

    def seal(self, block: int, block_hash: bytes | None = None) -> None:
        """Full and immutable. With a hash that the cache lacks, the block becomes findable under it."""
        self._expect(block, BlockState.FILLING)
        self._states[block] = BlockState.SEALED
        if block_hash is not None and self.enable_prefix_caching and block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            if block_hash in self._evicted:
                del self._evicted[block_hash]
            else:
                self._added[block_hash] = None

    def share(self, blocks: Iterable[int]) -> None:
        """One reference more on each."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is {self._states[block].value} and cannot be shared"
            self._refs[block] += 1

    def release(self, blocks: SequenceOf[int]) -> None:
        """One reference less on each; a block without references is cached if it can be found, else free.

        The end of a sequence is evicted before its beginning, which more prompts share.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is released once too often ({self._states[block].value})"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self.num_freed += 1
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._clear(block)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """A late store may still hit these reserved blocks: nobody gets them before lift(). Takes the last reference."""
        for block in blocks:
            self._expect(block, BlockState.RESERVED)
            assert self._refs[block] == 1, f"block {block} has {self._refs[block]} references and cannot be quarantined"
            self._refs[block] = 0
            self._states[block] = BlockState.QUARANTINED
            self._num_quarantined += 1

    def lift(self, blocks: Iterable[int]) -> None:
        """Their writer has acknowledged or is seen to be dead."""
        for block in blocks:
            self._expect(block, BlockState.QUARANTINED)
            self._num_quarantined -= 1
            self._clear(block)

    def readmit(self, blocks: Iterable[int]) -> None:
        """Quarantined blocks whose writer is gone become reserved again, with one reference: what they hold has proved good."""
        for block in blocks:
            self._expect(block, BlockState.QUARANTINED)
            self._num_quarantined -= 1
            self._states[block] = BlockState.RESERVED
            self._refs[block] = 1

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _expect(self, block: int, state: BlockState) -> None:
        assert self._states[block] is state, f"block {block} is {self._states[block].value}, not {state.value}"

    def _clear(self, block: int) -> None:
        self._states[block] = BlockState.FREE
        self._free[block] = 1
        self._num_clear += 1

    def _evict_oldest(self) -> tuple[int, bytes]:
        block, _ = self._evictable.popitem(last=False)
        self.num_evicted += 1
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if block_hash in self._added:
            del self._added[block_hash]
        else:
            self._evicted[block_hash] = None
        return block, block_hash

    def _take(self, n: int, after: int | None, state: BlockState) -> list[int]:
        if n > self.num_free:
            raise OutOfBlocks(f"{n} blocks wanted, {self.num_free} of {self.num_blocks} can be had")
        taken: list[int] = []
        if after is not None:
            self._mark(taken, after + 1, self._run_len(after + 1, n))
        while len(taken) < n and self._num_clear:
            start, length = self._best_run(n - len(taken))
            self._mark(taken, start, length)
        if len(taken) < n:
            evicted = [self._evict_oldest() for _ in range(n - len(taken))]
            if self.tier is not None:
                self.tier.store(evicted)  # before anybody can write into them
            taken += sorted(block for block, _ in evicted)
        for block in taken:
            self._states[block] = state
            self._refs[block] = 1
        self.num_allocated += len(taken)
        return taken

    def _run_len(self, start: int, longest: int) -> int:
        """How many free blocks follow each other from start, at most longest."""
        end = self._free.find(0, start, start + longest)
        return (min(start + longest, self.num_blocks) if end < 0 else end) - start

    def _best_run(self, n: int) -> tuple[int, int]:
        """(start, length <= n) inside the longest free run, in its middle: a neighbour on each side can still grow."""
        start, end = max((m.span() for m in _FREE_RUN.finditer(self._free)), key=lambda span: span[1] - span[0])
        length = min(n, end - start)
        return start + (end - start - length) // 2, length

    def _mark(self, taken: list[int], start: int, length: int) -> None:
        if length <= 0:
            return
        self._free[start : start + length] = bytes(length)
        self._num_clear -= length
        taken.extend(range(start, start + length))

    def check_integrity(self) -> None:
        """Every count agrees with every other. Raises AssertionError with the story."""
        assert sum(self._free) == self._num_clear, f"{sum(self._free)} blocks are marked free, {self._num_clear} counted"
        num_quarantined = self._states.count(BlockState.QUARANTINED)
        assert num_quarantined == self._num_quarantined, f"{num_quarantined} quarantined, {self._num_quarantined} counted"
        for block, (state, refs) in enumerate(zip(self._states, self._refs, strict=True)):
            story = f"block {block} is {state.value} with {refs} references"
            assert refs >= 0, story
            assert bool(self._free[block]) == (state is BlockState.FREE), f"{story}, free mark {self._free[block]}"
            held = state in (BlockState.RESERVED, BlockState.FILLING) or (
                state is BlockState.SEALED and block not in self._evictable
            )
            assert held == (refs > 0), f"{story}, evictable: {block in self._evictable}"
            if block in self._evictable:
                assert state is BlockState.SEALED, f"{story}, but evictable"
                assert block in self._hash_of, f"{story}, evictable and without a hash"
        assert len(self._block_of) == len(self._hash_of), f"{len(self._block_of)} hashes, {len(self._hash_of)} blocks"
        for block, block_hash in self._hash_of.items():
            assert self._block_of.get(block_hash) == block, f"block {block} and the cache disagree on {block_hash.hex()}"
            assert self._states[block] is BlockState.SEALED, f"cached block {block} is {self._states[block].value}"
