"""BlockPool against a model of it, and its promises one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.blocks import BlockPool, BlockState, OutOfBlocks


def names(count: int) -> list[bytes]:
    return [bytes([i]) for i in range(count)]


def sealed(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.seal(block, block_hash)
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_blocks_are_neighbours_and_leave_room_to_grow() -> None:
    pool = BlockPool(64, 16)
    sequences = [pool.allocate(4) for _ in range(4)]
    for _ in range(4):  # all of them grow, in turns, and stay in one piece
        for blocks in sequences:
            blocks += pool.allocate(1, after=blocks[-1])
    for blocks in sequences:
        assert blocks == list(range(blocks[0], blocks[0] + 8))


def test_after_takes_what_is_free_there_and_the_rest_elsewhere() -> None:
    pool = BlockPool(8, 16)
    everything = pool.allocate(8)
    pool.release([everything[3], everything[4], everything[7]])
    assert pool.allocate(3, after=everything[2]) == [3, 4, 7]


def test_a_cached_prefix_is_found_and_referenced() -> None:
    pool = BlockPool(8, 16)
    hashes = names(3)
    blocks = sealed(pool, hashes)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (8, 3, 0)
    assert pool.peek([*hashes, b"other"]) == 3
    assert pool.match([hashes[0], hashes[1], b"other", hashes[2]]) == blocks[:2]
    assert [pool.ref_count(block) for block in blocks] == [1, 1, 0]
    assert (pool.num_free, pool.num_cached) == (6, 1)
    assert pool.match([b"other"]) == []


def test_the_end_of_the_oldest_sequence_is_evicted_first() -> None:
    pool = BlockPool(6, 16)
    old, new = sealed(pool, names(6)[:3]), sealed(pool, names(6)[3:])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[2]]
    assert pool.peek(names(3)) == 2
    assert pool.match(names(2)) == old[:2]  # used again, so no longer the oldest
    pool.release(old[:2])
    assert pool.allocate(3) == sorted(new)


def test_events_are_net() -> None:
    pool = BlockPool(2, 16)
    pool.release(sealed(pool, names(2)))
    assert pool.take_events() == (names(2), [])
    held = pool.allocate(2)
    assert pool.take_events() == ([], [bytes([1]), bytes([0])])
    pool.seal(held[0], b"x")
    pool.release(held)
    taken = pool.allocate(2)
    assert pool.take_events() == ([], [])  # x came and went in between
    pool.release(taken)


def test_the_same_hash_twice_keeps_the_first_block() -> None:
    pool = BlockPool(4, 16)
    first, second = sealed(pool, [b"x"]), sealed(pool, [b"x"])
    pool.release(second)
    assert pool.state(second[0]) is BlockState.FREE
    assert pool.match([b"x"]) == first


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = BlockPool(4, 16, enable_prefix_caching=False)
    pool.release(sealed(pool, names(2)))
    assert (pool.match(names(2)), pool.num_cached, pool.num_free) == ([], 0, 4)


def test_quarantined_blocks_come_back_only_when_lifted() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.reserve(3)
    pool.filling(blocks[0])
    with pytest.raises(AssertionError, match="filling, not reserved"):
        pool.quarantine(blocks[:1])
    pool.quarantine(blocks[1:])
    assert (pool.num_quarantined, pool.num_free, pool.num_used) == (2, 1, 3)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    pool.release(blocks[:1])
    pool.lift(blocks[1:])
    assert (pool.num_quarantined, pool.num_free) == (0, 4)
    pool.check_integrity()


@pytest.mark.parametrize("misuse", ["release twice", "seal twice", "seal reserved", "share free", "lift free"])
def test_misuse_is_caught(misuse: str) -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    free = 0 if block else 1
    deeds = {
        "release twice": lambda: pool.release([block, block]),
        "seal twice": lambda: (pool.seal(block), pool.seal(block)),
        "seal reserved": lambda: pool.seal(pool.reserve(1)[0]),
        "share free": lambda: pool.share([free]),
        "lift free": lambda: pool.lift([free]),
    }
    with pytest.raises(AssertionError, match="block"):
        deeds[misuse]()


def test_copy_on_write_is_asked_by_is_writable() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    assert pool.is_writable(block)
    pool.share([block])
    assert not pool.is_writable(block)
    pool.release([block])
    pool.seal(block)
    assert not pool.is_writable(block)


def test_check_integrity_tells_the_story() -> None:
    pool = BlockPool(4, 16)
    (block,) = pool.allocate(1)
    pool._refs[block] = 0
    with pytest.raises(AssertionError, match=f"block {block} is filling with 0 references"):
        pool.check_integrity()


def test_drop_cache() -> None:
    pool = BlockPool(4, 16)
    pool.release(sealed(pool, names(3)))
    assert pool.drop_cache() == 3
    assert pool.match(names(3)) == []
    pool.check_integrity()


class Sequences(RuleBasedStateMachine):
    """Many sequences live and die in one pool; a set of live references is kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.live: list[list[int]] = []
        self.reserved: list[list[int]] = []
        self.quarantined: list[list[int]] = []
        self.next_hash = 0
        self.known: set[bytes] = set()

    @rule(n=st.integers(1, 5), remote=st.booleans())
    def take(self, n: int, remote: bool) -> None:
        free = self.pool.num_free
        try:
            blocks = self.pool.reserve(n) if remote else self.pool.allocate(n)
        except OutOfBlocks:
            assert n > free
            return
        assert len(set(blocks)) == n
        assert not {b for held in (*self.live, *self.reserved, *self.quarantined) for b in held} & set(blocks)
        (self.reserved if remote else self.live).append(blocks)

    @rule(pick=st.integers(0, 99), remembered=st.booleans())
    def seal(self, pick: int, remembered: bool) -> None:
        for blocks in self.live[pick % len(self.live) :][:1] if self.live else []:
            for block in blocks:
                if self.pool.is_writable(block):
                    self.next_hash += 1
                    self.pool.seal(block, str(self.next_hash % 20).encode() if remembered else None)
                    break

    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        if self.live:
            self.pool.release(self.live.pop(pick % len(self.live)))

    @rule(pick=st.integers(0, 99))
    def share(self, pick: int) -> None:
        if self.live:
            blocks = self.live[pick % len(self.live)]
            self.pool.share(blocks)
            self.live.append(list(blocks))

    @rule(start=st.integers(0, 19))
    def match(self, start: int) -> None:
        hashes = [str((start + i) % 20).encode() for i in range(3)]
        expected = self.pool.peek(hashes)
        blocks = self.pool.match(hashes)
        assert len(blocks) == expected
        if blocks:
            self.live.append(blocks)

    @rule(pick=st.integers(0, 99), what=st.sampled_from(["fill", "release", "quarantine", "lift"]))
    def remote(self, pick: int, what: str) -> None:
        pile = self.quarantined if what == "lift" else self.reserved
        if not pile:
            return
        blocks = pile.pop(pick % len(pile))
        match what:
            case "fill":
                for block in blocks:
                    self.pool.filling(block)
                self.live.append(blocks)
            case "release":
                self.pool.release(blocks)
            case "quarantine":
                self.pool.quarantine(blocks)
                self.quarantined.append(blocks)
            case "lift":
                self.pool.lift(blocks)

    @invariant()
    def sums_agree(self) -> None:
        self.pool.check_integrity()
        held = {block for blocks in (*self.live, *self.reserved, *self.quarantined) for block in blocks}
        assert self.pool.num_used == len(held)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
        for block in range(self.pool.num_blocks):
            references = sum(blocks.count(block) for blocks in (*self.live, *self.reserved))
            assert self.pool.ref_count(block) == references
        added, evicted = self.pool.take_events()
        assert not set(added) & self.known
        assert set(evicted) <= self.known
        self.known = (self.known | set(added)) - set(evicted)
        assert self.known == set(self.pool.cached_hashes())


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_what_is_forgotten_is_found_by_nobody_and_kept_by_its_holders() -> None:
    pool = BlockPool(8, 4)
    held, loose = sealed(pool, names(4)), names(4)[2:]
    pool.release(held[2:])  # cached
    pool.take_events()
    pool.forget([*names(4)[1:], b"never there"])
    assert pool.peek(names(4)) == 1
    assert pool.num_cached == 0
    assert sorted(pool.take_events()[1]) == sorted([names(4)[1], *loose])
    pool.check_integrity()
    pool.release(held[:2])
    assert pool.num_cached == 1
    assert pool.num_free == 8
    pool.check_integrity()
