"""Moving KV runs and their lane sums: the Triton kernel (in its interpreter where there is no GPU), what the CPU does, the twins.

Bytes that must not be read are random, bytes that must not be written are checked afterwards.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import kv_pack, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (num_layers, num_heads, block_size, head_dim, dtype): rows of whole 8-byte, 4-byte, 2-byte and single-byte lanes
SHAPES = [
    (2, 2, 4, 8, torch.float32),
    (1, 1, 1, 1, torch.uint8),
    (2, 3, 5, 6, torch.float16),
    (1, 2, 3, 7, torch.bfloat16),
    (3, 1, 16, 4, torch.bfloat16),
    (1, 5, 7, 3, torch.uint8),
    (2, 2, 2, 12, torch.float8_e4m3fn),
    (1, 8, 16, 32, torch.float16),
]
IDS = [f"{layers}x{heads}x{slots}x{dim}-{str(dtype)[6:]}" for layers, heads, slots, dim, dtype in SHAPES]


def random_pool(layers: int, blocks: int, heads: int, slots: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (layers, blocks, 2, heads, slots, dim * dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.to(DEVICE).view(dtype)


def raw(pool: torch.Tensor) -> torch.Tensor:
    return pool.contiguous().view(torch.uint8).cpu()


def move_by_kernel(
    source: torch.Tensor, target: torch.Tensor | None, table: torch.Tensor, tile_lanes: int = kv_pack.TILE_LANES
) -> torch.Tensor:
    sums = torch.zeros(source.shape[0], table.shape[1], 2, dtype=torch.int64, device=source.device)
    lanes = None if target is None else ops.as_lanes(target)
    kv_pack.move_runs(ops.as_lanes(source), lanes, table, sums, tile_lanes)
    return sums


def expected_sums(source: torch.Tensor, blocks: list[int], num_used: list[int]) -> list[tuple[int, int]]:
    packed = torch.empty_like(source[:, :1]).repeat(1, len(blocks), 1, 1, 1, 1)
    reference.move_runs(source, packed, blocks, list(range(len(blocks))), num_used)
    lanes = ops.as_lanes(packed.cpu())
    return [reference.lane_sums(lanes[layer, run]) for layer in range(len(lanes)) for run in range(len(blocks))]


def unsigned(sums: torch.Tensor) -> list[tuple[int, int]]:
    return [(a % 2**64, b % 2**64) for a, b in sums.flatten(0, 1).tolist()]


@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "door"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_moves_what_the_twin_moves_and_nothing_else(shape: tuple, by_kernel: bool) -> None:
    layers, heads, slots, dim, dtype = shape
    source = random_pool(layers, 6, heads, slots, dim, dtype, 1)
    target = random_pool(layers, 5, heads, slots, dim, dtype, 2)
    expected = target.clone()
    blocks, into, used = [3, 0, 5], [4, 1, 2], [slots, slots, max(1, slots // 2)]
    table = ops.run_table(blocks, into, used, source.device)
    before = raw(source)
    sums = move_by_kernel(source, target, table) if by_kernel else ops.move_runs(source, target, table)
    assert sums is not None
    reference.move_runs(source, expected, blocks, into, used)
    assert torch.equal(raw(target), raw(expected))
    assert torch.equal(raw(source), before)
    assert unsigned(sums) == expected_sums(source, blocks, used)


@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "door"])
def test_a_range_of_layers_and_heads_of_two_wider_pools(by_kernel: bool) -> None:
    """Re-sharding: heads 1..3 of one pool are heads 4..6 of another with more heads, and the sums do not tell where they lie."""
    source = random_pool(3, 4, 4, 4, 8, torch.float16, 3)
    target = random_pool(5, 7, 9, 4, 8, torch.float16, 4)
    expected = target.clone()
    ours, theirs = source[1:3, :, :, 1:4], target[2:4, :, :, 4:7]
    blocks, into, used = [2, 3], [6, 0], [4, 3]
    table = ops.run_table(blocks, into, used, source.device)
    sums = move_by_kernel(ours, theirs, table) if by_kernel else ops.move_runs(ours, theirs, table)
    reference.move_runs(ours, expected[2:4, :, :, 4:7], blocks, into, used)
    assert torch.equal(raw(target), raw(expected))
    assert sums is not None
    landed = ops.run_table(into, into, used, source.device)
    assert torch.equal(move_by_kernel(theirs, None, landed), sums)
    assert unsigned(sums) == expected_sums(ours, blocks, used)


def test_the_shape_of_the_launch_is_not_part_of_the_sum() -> None:
    source = random_pool(2, 4, 3, 5, 6, torch.float32, 5)
    table = ops.run_table([1, 3, 0], [0, 0, 0], [5, 2, 5], source.device)
    expected = move_by_kernel(source, None, table)
    for tile_lanes in (16, 32, 64, 256, 2048):
        assert torch.equal(move_by_kernel(source, None, table, tile_lanes), expected)
    for run in range(3):
        assert torch.equal(move_by_kernel(source, None, table[:, run : run + 1].contiguous()), expected[:, run : run + 1])
    assert torch.equal(ops.move_runs(source.cpu(), None, table.cpu()), expected.cpu())


def test_what_is_unused_is_not_part_of_the_sum() -> None:
    source = random_pool(1, 2, 2, 4, 8, torch.float32, 6)
    table = ops.run_table([0], [0], [3], source.device)
    expected = move_by_kernel(source, None, table)
    source.view(torch.uint8)[:, :, :, :, 3:] ^= 0xFF
    assert torch.equal(move_by_kernel(source, None, table), expected)
    source.view(torch.uint8)[:, :, :, :, 3:] = 0
    assert torch.equal(move_by_kernel(source, None, ops.run_table([0], [0], [4], source.device)), expected)


def test_nothing_to_move() -> None:
    source = random_pool(1, 2, 1, 1, 8, torch.float32, 6)
    table = ops.run_table([], [], [], source.device)
    assert move_by_kernel(source, source, table).shape == (1, 0, 2)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[5]], ids=[IDS[i] for i in (0, 2, 3, 5)])
def test_every_single_bit_of_a_run_counts(shape: tuple) -> None:
    """All flips of one bit, each in a run of its own: as many different sums as bits, and both halves of each differ."""
    layers, heads, slots, dim, dtype = shape
    run = raw(random_pool(1, 1, heads, slots, dim, dtype, 7))
    num_bits = 8 * run.numel()
    flipped = run.flatten(0, 1).flatten().repeat(num_bits + 1, 1)
    for bit in range(num_bits):
        flipped[bit, bit // 8] ^= 1 << bit % 8
    pool = flipped.view(1, num_bits + 1, *run.shape[2:]).contiguous().to(DEVICE).view(dtype)
    table = ops.run_table(range(num_bits + 1), [0] * (num_bits + 1), [slots] * (num_bits + 1), pool.device)
    sums = ops.move_runs(pool, None, table)
    assert sums is not None
    first, second = sums[0].cpu().unbind(-1)
    assert len(set(first.tolist())) == num_bits + 1
    assert len(set(second.tolist())) == num_bits + 1
    some = table[:, :: max(1, num_bits // 64)].contiguous()  # the interpreter takes a while
    assert torch.equal(move_by_kernel(pool, None, some), sums[:, :: max(1, num_bits // 64)])


def test_two_flipped_bits_count() -> None:
    """Also where a sum of products would lose them: the same bit, the highest ones above all, in two lanes."""
    rng = random.Random(8)
    lanes = torch.tensor([rng.getrandbits(64) - 2**63 for _ in range(128)])
    pool = lanes.view(1, 1, 2, 1, 1, 64)
    whole = unsigned(ops.move_runs(pool, None, ops.run_table([0], [0], [1], pool.device)))[0]
    num_tried = 20_000
    spoilt = lanes.repeat(num_tried, 1)
    for row in range(num_tried):
        one, other = rng.sample(range(128), 2)
        bit = rng.randrange(64) if row % 2 else rng.randrange(60, 64)
        other_bit = rng.randrange(64) if row % 4 == 3 else bit
        for place, number in ((one, bit), (other, other_bit)):
            spoilt[row, place] ^= (1 << number) if number < 63 else -(2**63)
    moved = ops.move_runs(
        spoilt.view(1, num_tried, 2, 1, 1, 64), None, ops.run_table(range(num_tried), [0] * num_tried, [1] * num_tried, pool.device)
    )
    for half in (0, 1):
        assert all(row[half] != whole[half] for row in unsigned(moved)), f"sum {half} alone lost a pair of flips"


def test_order_shift_and_zeros_count() -> None:
    run = torch.arange(1, 129).view(1, 1, 2, 1, 1, 64)
    variants = [run, run.roll(1, -1), run.flip(-1), run.flip(2), torch.zeros_like(run), torch.ones_like(run)]
    swapped, cut = run.clone(), run.clone()
    swapped[..., [3, 4]] = swapped[..., [4, 3]]
    cut[0, 0, 1, 0, 0, 40:] = 0
    one_zero = torch.zeros_like(run)
    one_zero[0, 0, 0, 0, 0, 0] = 1
    pool = torch.cat([*variants, swapped, cut, one_zero], 1)
    count = pool.shape[1]
    sums = ops.move_runs(pool, None, ops.run_table(range(count), [0] * count, [1] * count, pool.device))
    assert len(set(unsigned(sums))) == count


def test_bytes_of_a_sum() -> None:
    assert ops.sums_to_bytes(torch.tensor([[[1, -1]]])) == b"\1" + b"\0" * 7 + b"\xff" * 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32])
def test_a_large_pool_on_the_device_equals_the_cpu(dtype: torch.dtype) -> None:
    source = random_pool(4, 64, 8, 16, 128, dtype, 9)
    target = random_pool(4, 96, 8, 16, 128, dtype, 10)
    rng = random.Random(9)
    blocks, into = rng.sample(range(64), 40), rng.sample(range(96), 40)
    used = [16] * 39 + [5]
    expected = target.cpu()
    host_sums = ops.move_runs(source.cpu(), expected, ops.run_table(blocks, into, used, torch.device("cpu")))
    for _ in range(3):
        sums = ops.move_runs(source, target, ops.run_table(blocks, into, used, source.device))
        assert torch.equal(sums.cpu(), host_sums)
        assert torch.equal(raw(target), raw(expected))
