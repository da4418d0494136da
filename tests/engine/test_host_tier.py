"""Evicted blocks in host memory: what comes back is what its hash says, or nothing comes back."""

from __future__ import annotations

import contextlib
import hashlib
import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine import host_tier
from engine.blocks import BlockPool, OutOfBlocks
from engine.host_tier import HostTier
from kvtransfer.pool import KVPool
from protocol.errors import ConfigError
from protocol.kv import KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")


def names(count: int, first: int = 0) -> list[bytes]:
    return [bytes([first + i]) for i in range(count)]


def content(block_hash: bytes) -> np.ndarray:
    """The KV that a block of this hash holds: [num_layers, run_nbytes]."""
    data = hashlib.shake_128(block_hash).digest(LAYOUT.block_nbytes)
    return np.frombuffer(data, np.uint8).reshape(LAYOUT.num_layers, LAYOUT.run_nbytes)


class Store:
    """A pool of a few blocks, its bytes, and a tier behind it."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.kv = KVPool(LAYOUT, num_blocks)
        self.tier = HostTier(self.kv, num_slots * LAYOUT.block_nbytes + 7)
        self.pool = BlockPool(num_blocks, LAYOUT.block_size, tier=self.tier)
        self.num_writes = 0

    def scribble(self, blocks: list[int]) -> None:
        """Their new owner writes at once."""
        for block in blocks:
            self.num_writes += 1
            self.kv.runs[:, block] = self.num_writes % 251

    def compute(self, hashes: list[bytes]) -> list[int]:
        """A sequence: what is cached, and the rest computed and sealed."""
        blocks = self.pool.match(hashes)
        self.check(blocks, hashes)
        try:
            fresh = self.pool.allocate(len(hashes) - len(blocks))
        except OutOfBlocks:
            self.pool.release(blocks)
            raise
        self.scribble(fresh)
        for block, block_hash in zip(fresh, hashes[len(blocks) :], strict=True):
            self.kv.runs[:, block] = content(block_hash)
            self.pool.seal(block, block_hash)
        return [*blocks, *fresh]

    def check(self, blocks: list[int], hashes: list[bytes]) -> None:
        for block, block_hash in zip(blocks, hashes, strict=False):
            assert np.array_equal(self.kv.runs[:, block], content(block_hash)), f"block {block} is not {block_hash.hex()}"

    def push_out(self) -> None:
        """Others need the whole pool for a moment."""
        taken = self.pool.allocate(self.pool.num_free)
        self.scribble(taken)
        self.pool.release(taken)


def test_an_evicted_prefix_comes_back() -> None:
    store = Store(6, 8)
    store.pool.release(store.compute(names(4)))
    store.push_out()
    assert store.pool.peek(names(4)) == 0
    assert len(store.tier) == 4
    blocks = store.pool.match([*names(4), b"other"])
    assert len(blocks) == 4
    store.check(blocks, names(4))
    assert store.pool.peek(names(4)) == 4, "sealed again, and findable"
    assert store.tier.numbers() == {
        "host_tier_bytes": 4 * LAYOUT.block_nbytes,
        "host_tier_stored": 4,
        "host_tier_restored": 4,
        "host_tier_evicted": 0,
        "host_tier_digest_failures": 0,
    }
    store.pool.release(blocks)
    store.push_out()
    assert store.tier.stats.stored == 4, "what is still there is not copied twice"


def test_the_pool_comes_first_and_the_tier_goes_on() -> None:
    store = Store(6, 8)
    store.pool.release(store.compute(names(5)))
    taken = store.pool.allocate(3)  # two ends of the sequence fall out
    assert store.pool.peek(names(5)) == 3
    store.scribble(taken)
    store.pool.release(taken)
    blocks = store.pool.match(names(5))
    assert len(blocks) == 5
    assert store.tier.stats.restored == 2
    store.check(blocks, names(5))


@pytest.mark.parametrize("place", [0, 5, LAYOUT.block_nbytes - 1])
def test_a_flipped_byte_is_never_served(place: int) -> None:
    store = Store(6, 8)
    store.pool.release(store.compute(names(4)))
    store.push_out()
    store.tier.spoil(names(4)[2], place)
    blocks = store.pool.match(names(4))
    assert len(blocks) == 2, "a miss from the spoilt block on"
    store.check(blocks, names(4))
    assert store.tier.stats.digest_failures == 1
    assert names(4)[2] not in store.tier
    store.pool.release(blocks)
    blocks = store.compute(names(4))  # computed again
    store.check(blocks, names(4))
    assert store.pool.num_used == 4


def test_bytes_that_change_on_the_way_back_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is of the pool's own bytes, so a copy that goes wrong shows as well as memory that does."""
    store = Store(6, 8)
    store.pool.release(store.compute(names(1)))
    store.push_out()
    copy = np.copyto

    def torn(target: np.ndarray, source: np.ndarray) -> None:
        copy(target, source)
        target[-1] ^= 4

    monkeypatch.setattr(host_tier.np, "copyto", torn)
    assert store.pool.match(names(1)) == []
    assert store.tier.stats.digest_failures == 1


def test_the_tier_forgets_the_oldest_and_the_ends_of_sequences_first() -> None:
    store = Store(8, 3)
    store.pool.release(store.compute(names(4)))
    store.push_out()
    assert [name in store.tier for name in names(4)] == [True, True, True, False]
    assert store.tier.stats.evicted == 1
    store.pool.release(store.compute(names(2, first=9)))
    store.push_out()
    assert [name in store.tier for name in names(4)] == [True, False, False, False]
    assert store.tier.nbytes == 3 * LAYOUT.block_nbytes


def test_one_call_copies_a_bounded_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tier, "MAX_CALL_NBYTES", 2 * LAYOUT.block_nbytes + 1)
    store = Store(6, 8)
    store.pool.release(store.compute(names(4)))
    store.push_out()
    assert [name in store.tier for name in names(4)] == [True, True, False, False], "the beginning is what is of use"
    store.pool.release(store.compute(names(4)))
    for _ in range(2):
        taken = store.pool.allocate(store.pool.num_free - 4)
        store.pool.release([*taken, *store.pool.allocate(2)])
    assert len(store.tier) == 4
    store.push_out()
    assert len(store.pool.match(names(4))) == 2


def test_no_room_no_restore() -> None:
    store = Store(4, 8)
    store.pool.release(store.compute(names(3)))
    store.push_out()
    held = store.pool.allocate(3)
    blocks = store.pool.match(names(3))
    assert len(blocks) == 1
    store.check(blocks, names(3))
    store.pool.release([*held, *blocks])
    store.pool.check_integrity()


def test_drop_cache_drops_the_tier_as_well() -> None:
    store = Store(4, 8)
    store.pool.release(store.compute(names(3)))
    store.push_out()
    store.pool.drop_cache()
    assert store.pool.match(names(3)) == []
    assert len(store.tier) == 0
    store.tier.check_integrity()


def test_too_small_for_a_block() -> None:
    kv = KVPool(LAYOUT, 2)
    with pytest.raises(ConfigError, match=r"model\.host_cache_bytes = 5 holds no KV block; one takes 768 bytes"):
        HostTier(kv, 5)


def test_without_prefix_caching_there_is_no_tier() -> None:
    kv = KVPool(LAYOUT, 2)
    pool = BlockPool(2, 4, enable_prefix_caching=False, tier=HostTier(kv, 10 * LAYOUT.block_nbytes))
    assert pool.tier is None
    assert "host_tier_bytes" not in pool.numbers


class Traffic(RuleBasedStateMachine):
    """Sequences with shared prefixes in a pool and a tier that are both too small; every byte is checked at every match."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(7, 5)
        self.live: list[tuple[list[int], list[bytes]]] = []
        self.num_spoilt = 0

    @rule(branch=st.integers(0, 3), length=st.integers(1, 5))
    def start(self, branch: int, length: int) -> None:
        hashes = [bytes([i]) if i < 2 else bytes([i, branch]) for i in range(length)]
        with contextlib.suppress(OutOfBlocks):
            self.live.append((self.store.compute(hashes), hashes))

    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        if self.live:
            self.store.pool.release(self.live.pop(pick % len(self.live))[0])

    @rule(n=st.integers(1, 5), remote=st.booleans())
    def others(self, n: int, remote: bool) -> None:
        """Blocks that somebody takes, writes at once and gives back unsealed; a remote writer over mapped memory among them."""
        try:
            taken = self.store.pool.reserve(n) if remote else self.store.pool.allocate(n)
        except OutOfBlocks:
            return
        self.store.scribble(taken)
        self.store.pool.release(taken)

    @rule(pick=st.integers(0, 99), place=st.integers(0, LAYOUT.block_nbytes - 1))
    def flip(self, pick: int, place: int) -> None:
        kept = list(self.store.tier._slots)
        if kept:
            self.store.tier.spoil(kept[pick % len(kept)], place)
            self.num_spoilt += 1

    @invariant()
    def everything_is_what_its_hash_says(self) -> None:
        for blocks, hashes in self.live:
            self.store.check(blocks, hashes)
        pool = self.store.pool
        for block_hash in pool.cached_hashes():
            self.store.check([pool._block_of[block_hash]], [block_hash])
        pool.check_integrity()
        self.store.tier.check_integrity()
        assert len(self.store.tier) <= 5
        assert self.store.tier.stats.digest_failures <= self.num_spoilt


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_random_traffic_with_real_hits() -> None:
    """The same by plain random numbers, long enough that blocks surely come back."""
    rng = random.Random(5)
    store = Store(8, 10)
    for _ in range(600):
        branch, length = rng.randrange(4), rng.randrange(1, 6)
        hashes = [bytes([i]) if i < 2 else bytes([i, branch]) for i in range(length)]
        store.pool.release(store.compute(hashes))
        if rng.random() < 0.3:
            store.push_out()
    assert store.tier.stats.restored > 200
    assert store.tier.stats.digest_failures == 0


def test_what_is_forgotten_does_not_come_back_from_the_tier() -> None:
    store = Store(6, 8)
    store.pool.release(store.compute(names(4)))
    store.push_out()
    store.pool.forget([names(4)[1], b"never there"])
    blocks = store.pool.match(names(4))
    assert len(blocks) == 1
    store.pool.release(blocks)
    store.tier.check_integrity()
    store.pool.check_integrity()
