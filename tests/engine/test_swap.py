"""Preempted sequences and host memory: what comes back, from where it is computed again, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch

from engine.blocks import BlockPool
from engine.host_tier import HostTier
from engine.prefix import attach_prefix, seal_full_blocks
from engine.sequence import Sequence
from engine.swap import Swap
from kvtransfer.pool import KVPool
from protocol.kv import KVLayout
from protocol.request import Request, SamplingParams

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")


class Bench:
    def __init__(self, num_slots: int = 16, caches: bool = True) -> None:
        self.kv = KVPool(LAYOUT, 12, "cpu")
        self.tier = HostTier(self.kv, num_slots * LAYOUT.block_nbytes)
        self.pool = BlockPool(12, 4, caches, self.tier)
        self.swap = Swap(self.tier, self.pool)

    def running(self, name: str, num_computed: int) -> Sequence:
        """One uncomputed token behind num_computed, whose KV is a number that tells the token."""
        tokens = tuple(hash((name, i)) % 1000 for i in range(num_computed + 1))
        sequence = Sequence(Request(request_id=name, model="", prompt_token_ids=tokens, sampling=SamplingParams()))
        attach_prefix(self.pool, sequence, LAYOUT, 0)
        for place in range(num_computed):
            self.kv.tensor[:, sequence.blocks[place // 4], :, :, place % 4] = float(tokens[place])
        sequence.num_computed = num_computed
        seal_full_blocks(self.pool, sequence, LAYOUT)
        return sequence

    def preempt(self, sequence: Sequence) -> None:
        self.swap.take_out(sequence)
        self.pool.release(sequence.forget_blocks())

    def overwrite(self) -> None:
        """Somebody else uses the whole pool."""
        blocks = self.pool.allocate(self.pool.num_free)
        for block in blocks:
            self.kv.tensor[:, block] = -1.0
        self.pool.release(blocks)

    def bring_back(self, sequence: Sequence) -> None:
        attach_prefix(self.pool, sequence, LAYOUT, 0)
        self.swap.bring_back(sequence)
        seal_full_blocks(self.pool, sequence, LAYOUT)

    def is_right(self, sequence: Sequence) -> bool:
        for place in range(sequence.num_computed):
            there = self.kv.tensor[:, sequence.blocks[place // 4], :, :, place % 4]
            if not torch.all(there == float(sequence.token_ids[place])):
                return False
        return True


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("num_computed", [1, 3, 4, 7, 8, 18])
def test_all_that_was_computed_comes_back(caches, num_computed):
    bench = Bench(caches=caches)
    sequence = bench.running("a", num_computed)
    bench.preempt(sequence)
    bench.overwrite()
    bench.bring_back(sequence)
    assert sequence.num_computed == num_computed
    assert bench.is_right(sequence)
    assert bench.swap.num_in == bench.swap.num_out == (num_computed % 4 > 0 if caches else -(-num_computed // 4))
    bench.pool.release(sequence.forget_blocks())
    bench.swap.forget(sequence)
    assert len(bench.swap) == 0
    bench.pool.check_integrity()
    bench.tier.check_integrity()
    assert not any(key.startswith(b"swap/") for key in bench.tier._slots)


@pytest.mark.parametrize(("spoilt", "left"), [(0, 0), (1, 4), (2, 8), (4, 16)])
def test_a_block_that_changed_is_computed_again_and_all_behind_it(spoilt, left):
    bench = Bench(caches=False)
    sequence = bench.running("a", 18)
    bench.preempt(sequence)
    bench.tier.spoil(b"swap/%d" % spoilt, place=7)
    bench.overwrite()
    bench.bring_back(sequence)
    assert sequence.num_computed == left
    assert bench.is_right(sequence)
    assert bench.tier.stats.digest_failures == 1
    assert len(bench.tier) == 0


@pytest.mark.parametrize("caches", [True, False])
def test_a_full_tier_means_computing_again(caches):
    bench = Bench(num_slots=2, caches=caches)
    first, second = bench.running("a", 18), bench.running("b", 6)
    bench.preempt(first)  # without a cache: five blocks, more than the tier can ever hold
    bench.preempt(second)
    assert bench.swap.num_out == (2 if not caches else 2)
    bench.overwrite()
    for sequence in (first, second):
        bench.bring_back(sequence)
        assert bench.is_right(sequence)
        bench.pool.release(sequence.blocks)
    assert first.num_computed < 18
    bench.tier.check_integrity()


def test_whoever_was_kept_longest_gives_way():
    bench = Bench(num_slots=5, caches=False)
    first, second = bench.running("a", 15), bench.running("b", 11)
    bench.preempt(first)  # four blocks
    bench.preempt(second)  # three: two slots of the first are taken, those of its end
    bench.overwrite()
    bench.bring_back(second)
    bench.bring_back(first)
    assert second.num_computed == 11
    assert first.num_computed == 8
    assert bench.is_right(first)
    assert bench.is_right(second)


def test_a_sequence_that_ends_while_it_is_out_leaves_nothing():
    bench = Bench(caches=False)
    sequence = bench.running("a", 10)
    bench.preempt(sequence)
    bench.swap.forget(sequence)
    bench.swap.forget(sequence)
    assert len(bench.swap) == len(bench.tier) == 0
    bench.tier.check_integrity()


def test_what_the_cache_still_has_is_not_copied():
    bench = Bench()
    sequence = bench.running("a", 18)
    bench.preempt(sequence)
    assert bench.swap.num_out == 1
    bench.bring_back(sequence)  # nobody needed the room
    assert sequence.num_computed == 18
    assert bench.tier.stats.stored == bench.tier.stats.restored == 1
