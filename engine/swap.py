"""`--preemption-mode swap`: what a preempted sequence had computed goes to the host tier and comes back.

Full blocks that the prefix cache can find need no help: their sequence lets them go, the pool evicts them into the tier when it
needs the room, and `attach_prefix` finds them again wherever they are. Only the rest is copied here, under keys of its own: the
last block, which is not full, and every block where there is no prefix cache. The tier is bounded and forgets whoever was used
least recently, and each block carries a digest: whatever is missing or differs is computed again, from there on.
Called by decode/sequences.py, between steps.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from engine.blocks import BlockPool
from engine.host_tier import HostTier
from engine.sequence import Sequence


class _Kept(NamedTuple):
    num_computed: int
    keys: dict[int, bytes]  # by the block's place in the sequence


class Swap:
    """num_out, num_in: blocks copied here and back, since the beginning."""

    def __init__(self, tier: HostTier, pool: BlockPool) -> None:
        self.num_out = self.num_in = 0
        self._tier = tier
        self._pool = pool
        self._kept: dict[int, _Kept] = {}  # by id(sequence)
        self._numbers = itertools.count()

    def take_out(self, sequence: Sequence) -> None:
        """Before its blocks are released. More than the tier holds is not begun with."""
        block_size, computed = self._pool.block_size, sequence.num_computed
        first = computed // block_size if self._pool.enable_prefix_caching else 0
        last = -(-computed // block_size)
        if first == last or last - first > self._tier.num_slots:
            return
        keys = {place: b"swap/%d" % next(self._numbers) for place in range(first, last)}
        # The end goes first, as where blocks are evicted: a beginning is of use without its end.
        self._tier.store([(sequence.blocks[place], keys[place]) for place in reversed(keys)])
        self._kept[id(sequence)] = _Kept(computed, keys)
        self.num_out += len(keys)

    def bring_back(self, sequence: Sequence) -> None:
        """Once it has blocks again and num_computed says what the prefix cache had. Goes on from there as far as it can."""
        kept = self._kept.pop(id(sequence), None)
        if kept is None:
            return
        block_size = self._pool.block_size
        while sequence.num_computed < kept.num_computed:
            place = sequence.num_computed // block_size
            key = kept.keys.get(place)
            if key is None or sequence.num_computed % block_size or not self._tier.restore(key, sequence.blocks[place]):
                break
            sequence.num_computed = min((place + 1) * block_size, kept.num_computed)
            self.num_in += 1
        self._forget(kept)

    def forget(self, sequence: Sequence) -> None:
        kept = self._kept.pop(id(sequence), None)
        if kept is not None:
            self._forget(kept)

    def numbers(self) -> dict[str, int]:
        """By the names of `WorkerStats`; the tier's too, where the pool does not tell of it."""
        own = {} if self._pool.tier is self._tier else self._tier.numbers()
        return {"swapped_out": self.num_out, "swapped_in": self.num_in, **own}

    def _forget(self, kept: _Kept) -> None:
        for key in kept.keys.values():
            self._tier.forget(key)

    def __len__(self) -> int:
        return len(self._kept)
