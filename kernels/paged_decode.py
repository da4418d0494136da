"""Decode attention over a paged KV pool, in Triton: one query token per sequence, grouped heads, split contexts.

Called by `kernels/ops.py` for tensors on a GPU, which imports this file only then (it needs triton); the slow obvious
twin is `reference.attend` over `reference.read_kv`. Not for prefill, and it writes no KV.

Two launches. The first gives each (sequence, KV head, split) a program that walks its part of the context with an
online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) and leaves an unnormalised sum, a maximum
and a normaliser; a long context thereby fills the GPU even at batch 1 (Flash-Decoding, Dao et al. 2023). The second
adds the splits up in ascending order, so the result does not depend on which program ended first nor, as long as the
length of a split is fixed, on what else is in the batch. All query heads of one KV head share its loads through
`tl.dot`, whose smallest tile has 16 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT_LEN = 512  # tokens per program when num_splits is not given: a constant, so that no batch changes the order
TILE_LEN = 32  # tokens per step of the walk; any block_size, a tile may span several blocks
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is the hardware's own


def paged_decode_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    num_splits: int | None = None,
) -> torch.Tensor:
    """softmax(scale * q K^T) V for the newest token of each sequence, whose own K and V are already in the pool.

    q: [batch, num_heads, head_dim]; kv_layer: [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim], one layer of
    the pool; block_tables: [batch, max_blocks] int32, token t of a sequence is in block table[t // block_size];
    seq_lens: [batch] int32, tokens to attend to. num_heads is a multiple of num_kv_heads; q and kv_layer have one dtype
    (float16, bfloat16, float32) and a last dimension with stride 1.

    Entries of a table beyond a sequence's blocks are not read, nor are the slots of its last block behind its length. A
    row with seq_len 0 (padding of a captured graph) is zero. num_splits: how many programs share one context of the
    table's full width; None: one for every SPLIT_LEN tokens. Returns [batch, num_heads, head_dim] in q's dtype. Nothing
    here waits for the GPU.
    """
    batch, num_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch == 0:
        return out
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    assert kv_layer.shape[1] == 2, f"kv_layer must be [num_blocks, 2, ...], got {tuple(kv_layer.shape)}"
    assert kv_layer.shape[4] == head_dim, f"head_dim is {head_dim} in q and {kv_layer.shape[4]} in the pool"
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads do not divide into {num_kv_heads} KV heads"
    assert q.dtype == kv_layer.dtype, f"q is {q.dtype}, the pool {kv_layer.dtype}"
    assert block_tables.dtype == seq_lens.dtype == torch.int32, "block_tables and seq_lens must be int32"
    assert block_tables.shape[0] == seq_lens.shape[0] == batch, "q, block_tables and seq_lens differ in batch"
    assert q.stride(2) == kv_layer.stride(4) == block_tables.stride(1) == 1, "the last dimension must be contiguous"
    assert num_splits is None or num_splits > 0, f"num_splits must be positive, got {num_splits}"

    max_len = block_tables.shape[1] * block_size
    split_len = SPLIT_LEN if num_splits is None else _round_up(-(-max_len // num_splits), TILE_LEN)
    num_splits = max(1, -(-max_len // split_len))
    sums = torch.empty(batch, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(batch, num_heads, num_splits, 2, dtype=torch.float32, device=q.device)  # maximum, normaliser
    heads_per_kv = num_heads // num_kv_heads
    tile_dim = max(16, triton.next_power_of_2(head_dim))
    _attend_split[(batch, num_kv_heads, num_splits)](
        q,
        kv_layer,
        block_tables,
        seq_lens,
        sums,
        stats,
        scale * LOG2_E,
        block_size,
        split_len,
        q.stride(0),
        q.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        block_tables.stride(0),
        NUM_SPLITS=num_splits,
        HEAD_DIM=head_dim,
        HEADS_PER_KV=heads_per_kv,
        TILE_HEADS=max(16, triton.next_power_of_2(heads_per_kv)),
        TILE_DIM=tile_dim,
        TILE_LEN=TILE_LEN,
        num_warps=4,
    )
    _combine_splits[(batch, num_heads)](
        sums, stats, seq_lens, out, split_len, NUM_SPLITS=num_splits, HEAD_DIM=head_dim, TILE_DIM=tile_dim, num_warps=1
    )
    return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    q_ptr,  # [batch, num_heads, HEAD_DIM]
    kv_ptr,  # [num_blocks, 2, num_kv_heads, block_size, HEAD_DIM]
    tables_ptr,  # [batch, max_blocks] int32
    seq_lens_ptr,  # [batch] int32
    sums_ptr,  # [batch, num_heads, NUM_SPLITS, HEAD_DIM] float32, contiguous
    stats_ptr,  # [batch, num_heads, NUM_SPLITS, 2] float32, contiguous
    scale_log2,
    block_size,
    split_len,
    q_stride_row,
    q_stride_head,
    kv_stride_block,
    kv_stride_half,
    kv_stride_head,
    kv_stride_token,
    tables_stride_row,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    """grid (batch, num_kv_heads, NUM_SPLITS)"""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + row)
    first = split * split_len
    last = tl.minimum(first + split_len, seq_len)
    if first >= last:
        return  # nothing of this sequence lies in this split, and the second launch does not look at it

    group = tl.arange(0, TILE_HEADS)
    dim = tl.arange(0, TILE_DIM)
    head = kv_head * HEADS_PER_KV + group
    is_head = (group < HEADS_PER_KV)[:, None]
    is_dim = (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + row.to(tl.int64) * q_stride_row + head[:, None] * q_stride_head + dim[None, :]
    q = tl.load(q_at, mask=is_head & is_dim, other=0.0)  # [TILE_HEADS, TILE_DIM]

    maximum = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    normaliser = tl.zeros([TILE_HEADS], tl.float32)
    total = tl.zeros([TILE_HEADS, TILE_DIM], tl.float32)
    table_ptr = tables_ptr + row.to(tl.int64) * tables_stride_row
    for start in range(first, last, TILE_LEN):
        token = start + tl.arange(0, TILE_LEN)
        is_token = token < last
        block = tl.load(table_ptr + token // block_size, mask=is_token, other=0).to(tl.int64)  # [TILE_LEN]
        k_at = kv_ptr + block * kv_stride_block + kv_head * kv_stride_head + (token % block_size) * kv_stride_token
        kv_mask = is_token[:, None] & is_dim  # what is not ours may hold NaN: it is never loaded, not multiplied by 0
        k = tl.load(k_at[:, None] + dim[None, :], mask=kv_mask, other=0.0)  # [TILE_LEN, TILE_DIM]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [TILE_HEADS, TILE_LEN] float32
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        v = tl.load(k_at[:, None] + kv_stride_half + dim[None, :], mask=kv_mask, other=0.0)
        normaliser = normaliser * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    slot = (row.to(tl.int64) * tl.num_programs(1) * HEADS_PER_KV + head) * NUM_SPLITS + split  # [TILE_HEADS]
    tl.store(sums_ptr + slot[:, None] * HEAD_DIM + dim[None, :], total, mask=is_head & is_dim)
    tl.store(stats_ptr + slot * 2, maximum, mask=group < HEADS_PER_KV)
    tl.store(stats_ptr + slot * 2 + 1, normaliser, mask=group < HEADS_PER_KV)


@triton.jit
def _combine_splits(  # type: ignore[no-untyped-def]
    sums_ptr,  # [batch, num_heads, NUM_SPLITS, HEAD_DIM] float32
    stats_ptr,  # [batch, num_heads, NUM_SPLITS, 2] float32
    seq_lens_ptr,  # [batch] int32
    out_ptr,  # [batch, num_heads, HEAD_DIM], contiguous
    split_len,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """grid (batch, num_heads)"""
    row, head = tl.program_id(0), tl.program_id(1)
    used = tl.cdiv(tl.load(seq_lens_ptr + row), split_len)  # splits that the first launch wrote; the others are poison
    dim = tl.arange(0, TILE_DIM)
    is_dim = dim < HEAD_DIM
    place = row.to(tl.int64) * tl.num_programs(1) + head
    maximum = tl.full([], float("-inf"), tl.float32)
    normaliser = tl.zeros([], tl.float32)
    total = tl.zeros([TILE_DIM], tl.float32)
    for split in range(0, used):  # ascending: the order of the additions is part of the result
        slot = place * NUM_SPLITS + split
        split_maximum = tl.load(stats_ptr + slot * 2)
        new_maximum = tl.maximum(maximum, split_maximum)
        shrink, weight = tl.exp2(maximum - new_maximum), tl.exp2(split_maximum - new_maximum)
        normaliser = normaliser * shrink + tl.load(stats_ptr + slot * 2 + 1) * weight
        total = total * shrink + tl.load(sums_ptr + slot * HEAD_DIM + dim, mask=is_dim, other=0.0) * weight
        maximum = new_maximum
    result = tl.where(used > 0, total / tl.where(used > 0, normaliser, 1.0), 0.0)
    tl.store(out_ptr + place * HEAD_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=is_dim)
