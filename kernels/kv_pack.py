"""Moves runs of paged KV between two pools and sums their lanes on the way, in Triton: one pass over the bytes.

A *run* is what one block holds of one layer and a range of heads: two stretches, K and V, each contiguous. Called by
`kernels/ops.py` for tensors on a GPU, which imports this file only then (it needs triton); the slow obvious twins are
`reference.move_runs` and `reference.lane_sums`. A staging buffer is a pool of few blocks, so packing, unpacking, writing
into a peer's mapped pool and re-sharding are one kernel; without a target it only sums.

The lane sum (128 bits): a run is a row of lanes, K before V, each lane an unsigned integer of `lane_dtype`, zero-extended to
64 bits. With v the lane's value and k = (its place + 1) * PLACE, all modulo 2**64:

    z = v ^ k;  z ^= z >> 32;  z *= FIRST;  z ^= z >> 29;  z *= SECOND       sums[0] += z
    w = (z ^ (z >> 32) ^ k) * THIRD;  w ^= w >> 29                           sums[1] += w

Every step is a bijection of v, so one wrong lane always shows; several wrong lanes (swapped, shifted, zeroed) cancel in
both sums only by chance, about 2**-128 of it. Integer sums wrap, so neither the order of the additions nor the shape of the
launch is part of the result. It is a checksum against hardware, software and mix-ups; nobody is kept from choosing bytes with
equal sums (kvtransfer/digest.py says where authenticity comes from). The rounds are like those of
Stafford's and Vigna's splitmix64 finalizers, the last constant is from Evensen's rrmxmx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference import FIRST as _FIRST
from kernels.reference import PLACE as _PLACE
from kernels.reference import SECOND as _SECOND
from kernels.reference import THIRD as _THIRD

PLACE, FIRST, SECOND, THIRD = tl.constexpr(_PLACE), tl.constexpr(_FIRST), tl.constexpr(_SECOND), tl.constexpr(_THIRD)
TILE_LANES = 1024  # per program; 8 KiB of 8-byte lanes


def move_runs(
    source: torch.Tensor, target: torch.Tensor | None, table: torch.Tensor, sums: torch.Tensor | None, tile_lanes: int = TILE_LANES
) -> None:
    """Copy runs of `source` to `target` and add their lane sums to `sums`; either may be None. Waits for nothing.

    source, target: lanes, [num_layers, num_blocks, 2, num_heads, block_size, row_lanes], of one shape but for num_blocks;
    heads, slots and lanes contiguous, the outer strides free (so either may be a range of heads of a wider pool). table: int32
    [3, num_runs] on the device: source block, target block, used slots; what lies behind the used slots is written, and
    summed, as zero. sums: int64 [num_layers, num_runs, 2], zeroed by the caller. No target block may come twice.
    """
    num_layers, _, two, num_heads, block_size, row_lanes = source.shape
    num_runs = table.shape[1]
    half_lanes = num_heads * block_size * row_lanes
    num_tiles = triton.cdiv(half_lanes, tile_lanes)
    assert two == 2, f"a pool is [layers, blocks, 2, ...], got {tuple(source.shape)}"
    assert table.dtype == torch.int32, f"table must be int32, not {table.dtype}"
    assert table.is_contiguous(), "table must be contiguous"
    assert 2 * num_tiles <= 65535, f"a run of {2 * half_lanes} lanes is too large for one launch"
    for name, pool in (("source", source), ("target", target)):
        if pool is not None:
            assert (pool.shape[0], *pool.shape[2:]) == (num_layers, *source.shape[2:]), f"{name} is {tuple(pool.shape)}"
            assert pool.stride()[3:] == (block_size * row_lanes, row_lanes, 1), f"{name} has strides {pool.stride()}"
    assert sums is None or (sums.shape == (num_layers, num_runs, 2) and sums.is_contiguous()), "sums must be [layers, runs, 2]"
    if num_layers * num_runs * half_lanes == 0:
        return
    into = source if target is None else target
    _move_runs[(num_layers * num_runs, 2 * num_tiles)](
        source,
        into,
        table,
        table if sums is None else sums,
        num_runs,
        num_tiles,
        half_lanes,
        source.stride(0),
        source.stride(1),
        source.stride(2),
        into.stride(0),
        into.stride(1),
        into.stride(2),
        BLOCK_SIZE=block_size,
        ROW_LANES=row_lanes,
        TILE_LANES=tile_lanes,
        STORES=target is not None,
        SUMS=sums is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_runs", "num_tiles"])  # they differ from push to push and from route to route
def _move_runs(  # type: ignore[no-untyped-def]
    source_ptr,  # lanes
    target_ptr,  # lanes
    table_ptr,  # [3, num_runs] int32
    sums_ptr,  # [num_layers, num_runs, 2] int64
    num_runs,
    num_tiles,
    half_lanes,
    source_stride_layer,
    source_stride_block,
    source_stride_half,
    target_stride_layer,
    target_stride_block,
    target_stride_half,
    BLOCK_SIZE: tl.constexpr,
    ROW_LANES: tl.constexpr,
    TILE_LANES: tl.constexpr,
    STORES: tl.constexpr,
    SUMS: tl.constexpr,
):
    """grid (num_layers * num_runs, 2 * num_tiles)"""
    row = tl.program_id(0)
    half = tl.program_id(1) // num_tiles
    tile = tl.program_id(1) % num_tiles
    layer = (row // num_runs).to(tl.int64)
    run = row % num_runs
    block = tl.load(table_ptr + run).to(tl.int64)
    num_used = tl.load(table_ptr + 2 * num_runs + run)
    lane = tile * TILE_LANES + tl.arange(0, TILE_LANES)
    is_lane = lane < half_lanes
    # What is unused is not even read: it may be another tenant's.
    is_used = is_lane & ((lane // ROW_LANES) % BLOCK_SIZE < num_used)
    source_at = source_ptr + layer * source_stride_layer + block * source_stride_block + half * source_stride_half
    value = tl.load(source_at + lane, mask=is_used, other=0)
    if STORES:
        into = tl.load(table_ptr + num_runs + run).to(tl.int64)
        target_at = target_ptr + layer * target_stride_layer + into * target_stride_block + half * target_stride_half
        tl.store(target_at + lane, value, mask=is_lane)
    if SUMS:
        place = (half * half_lanes + lane).to(tl.uint64)
        key = (place + 1) * PLACE
        z = _zero_extended(value) ^ key
        z = (z ^ (z >> 32)) * FIRST
        z = (z ^ (z >> 29)) * SECOND
        w = (z ^ (z >> 32) ^ key) * THIRD
        w = w ^ (w >> 29)
        none = tl.zeros([TILE_LANES], tl.uint64)
        first = tl.sum(tl.where(is_lane, z, none).to(tl.int64, bitcast=True), 0)
        second = tl.sum(tl.where(is_lane, w, none).to(tl.int64, bitcast=True), 0)
        sums_at = sums_ptr + row.to(tl.int64) * 2
        tl.atomic_add(sums_at, first, sem="relaxed")
        tl.atomic_add(sums_at + 1, second, sem="relaxed")


@triton.jit
def _zero_extended(value):  # type: ignore[no-untyped-def]
    """A lane as an unsigned 64-bit integer."""
    if value.dtype == tl.int64:
        value = value.to(tl.uint64, bitcast=True)
    elif value.dtype == tl.int32:
        value = value.to(tl.uint32, bitcast=True)
    elif value.dtype == tl.int16:
        value = value.to(tl.uint16, bitcast=True)
    return value.to(tl.uint64)
