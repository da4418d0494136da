"""Decode attention over a paged KV pool, in Triton: few query tokens per sequence, grouped heads, split contexts.

Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton); the slow obvious twin is `reference.attend` over
`reference.read_kv`. Not for prefill, and it writes no KV.

Two launches. The first gives each (sequence, KV head, split) a program that walks its part of the context with an online
softmax (softmax_walk.py) and leaves an unnormalised sum, a maximum and a normaliser; a long context thereby fills the GPU
even at batch 1 (Flash-Decoding, Dao et al. 2023). The second adds the splits up in ascending order. How a context is split
depends on its own length and on constants, never on the batch, the width of the table or the grid: a row gets the same bits
alone and in any batch. All query heads of one KV head, of all queries of a sequence, share its loads through `tl.dot`, whose
smallest tile has 16 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.softmax_walk import absorb, capped, factors

MAX_SPLITS = 32  # of one sequence: bounds the scratch space and the second launch
MIN_SPLIT_LEN = 64  # tokens; shorter contexts are one program per KV head
NUM_STAGES = 5  # of the walk: block numbers, two tiles on the way, one at work


def tile_len(head_dim: int, itemsize: int) -> int:
    """Keys per step of the walk: 8 to 16 KiB of K, so that a few stages of K and V fit into an SM's shared memory twice."""
    return 64 if head_dim * itemsize <= 256 else 32


def paged_decode_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    num_queries: int = 1,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    max_splits: int = MAX_SPLITS,
    min_split_len: int = MIN_SPLIT_LEN,
    num_stages: int = NUM_STAGES,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q K^T) V for the newest num_queries tokens of each sequence, whose own K and V are already in the pool.

    q: [batch * num_queries, num_heads, head_dim], the queries of a sequence side by side and causal among each other;
    kv_layer: [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim], one layer of the pool; block_tables: [batch,
    max_blocks] int32, token t of a sequence is in block table[t // block_size]; seq_lens: [batch] int32, tokens with the
    queries. num_heads is a multiple of num_kv_heads; q and kv_layer have one dtype (float16, bfloat16, float32), or the
    pool is float8_e4m3fn and kv_scales float32 [2, num_kv_heads] says by what its K and V are to be multiplied. window: a
    token sees itself and the window - 1 tokens before it. soft_cap: scores are soft_cap * tanh(score / soft_cap).

    Entries of a table beyond a sequence's blocks are not read, nor those behind a window, nor the slots of its last block
    behind its length. A row with seq_len 0 (padding of a captured graph) is zero. max_splits and min_split_len (tokens) decide
    the order of the additions, so one set of them belongs to one model. Returns [batch * num_queries, num_heads, head_dim] in
    q's dtype, in `out` if given. Nothing here waits for the GPU.
    """
    num_rows, num_heads, head_dim = q.shape
    batch = num_rows // num_queries
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    if out is None:
        out = torch.empty(num_rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    check_pool(q, kv_layer, block_tables, seq_lens, kv_scales, out, window, soft_cap)
    assert num_rows == batch * num_queries, f"{num_rows} rows are not {num_queries} queries for each of some sequences"
    assert block_tables.shape[0] == seq_lens.shape[0] == batch, "q, block_tables and seq_lens differ in batch"
    assert max_splits > 0, f"max_splits must be positive, got {max_splits}"
    length = tile_len(head_dim, kv_layer.element_size())
    assert min_split_len % length == 0, f"min_split_len {min_split_len} is no multiple of {length}"
    max_len = block_tables.shape[1] * block_size
    if window is not None:
        max_len = min(max_len, window + num_queries - 1)
    num_splits = max(1, min(max_splits, -(-max_len // min_split_len)))  # no sequence of this table has more
    if num_splits > 1:
        sums = torch.empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(num_rows, num_heads, num_splits, 2, dtype=torch.float32, device=q.device)  # maximum, normaliser
    else:
        sums = stats = out  # the first launch writes the result itself
    inner, outer = factors(scale, soft_cap)
    heads_per_kv = num_heads // num_kv_heads
    tile_dim = max(16, triton.next_power_of_2(head_dim))
    split = {"MAX_SPLITS": max_splits, "MIN_SPLIT_LEN": min_split_len, "TILE_LEN": length, "NUM_SPLITS": num_splits}
    shape = {"WINDOW": window or 0, "NUM_QUERIES": num_queries, "HEAD_DIM": head_dim, "TILE_DIM": tile_dim}
    _attend_split[(batch, num_kv_heads, num_splits)](
        q, kv_layer, block_tables, seq_lens, stats if kv_scales is None else kv_scales, sums, stats, inner, outer,
        *q.stride()[:2], *kv_layer.stride()[:3], block_tables.stride(0),
        BLOCK_SIZE=block_size,
        HEADS_PER_KV=heads_per_kv,
        TILE_ROWS=max(16, triton.next_power_of_2(num_queries * heads_per_kv)),
        CAPPED=soft_cap is not None,
        SCALED=kv_scales is not None,
        num_warps=4,
        num_stages=num_stages if q.element_size() <= 2 else 2,
        **split,
        **shape,
    )  # fmt: skip
    if num_splits > 1:
        _combine_splits[(num_rows, num_heads)](sums, stats, seq_lens, out, num_warps=1, **split, **shape)
    return out


def check_pool(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_scales: torch.Tensor | None,
    out: torch.Tensor,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """What both attention kernels ask of their arguments."""
    num_kv_heads, block_size, head_dim = kv_layer.shape[2:]
    assert kv_layer.shape[1] == 2, f"kv_layer must be [num_blocks, 2, ...], got {tuple(kv_layer.shape)}"
    assert head_dim == q.shape[2], f"head_dim is {q.shape[2]} in q and {head_dim} in the pool"
    assert q.shape[1] % num_kv_heads == 0, f"{q.shape[1]} query heads do not divide into {num_kv_heads} KV heads"
    if kv_scales is None:
        assert q.dtype == kv_layer.dtype, f"q is {q.dtype}, the pool {kv_layer.dtype}"
    else:
        assert kv_layer.dtype == torch.float8_e4m3fn, f"kv_scales belong to a float8_e4m3fn pool, not {kv_layer.dtype}"
        assert kv_scales.shape == (2, num_kv_heads), f"kv_scales must be [2, {num_kv_heads}], got {tuple(kv_scales.shape)}"
        assert kv_scales.dtype == torch.float32, "kv_scales must be float32"
        assert kv_scales.is_contiguous(), "kv_scales must be contiguous"
    assert kv_layer.stride()[3:] == (head_dim, 1), f"a block's slots must be contiguous, strides are {kv_layer.stride()}"
    assert block_tables.dtype == seq_lens.dtype == torch.int32, "block_tables and seq_lens must be int32"
    assert q.stride(2) == block_tables.stride(1) == seq_lens.stride(0) == 1, "the last dimension must be contiguous"
    assert out.shape == q.shape, f"out is {tuple(out.shape)}, q {tuple(q.shape)}"
    assert out.dtype == q.dtype, f"out is {out.dtype}, q {q.dtype}"
    assert out.is_contiguous(), "out must be contiguous"
    assert window is None or window > 0, f"window must be positive, got {window}"
    assert soft_cap is None or soft_cap > 0, f"soft_cap must be positive, got {soft_cap}"


@triton.jit
def _visible(seq_len, NUM_QUERIES: tl.constexpr, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr,
             TILE_LEN: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """(first token that any of the queries sees, tokens per split, splits) of a sequence: functions of its length alone."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - NUM_QUERIES + 1 - WINDOW, 0)
    length = seq_len - begin
    split_len = tl.maximum(tl.cdiv(tl.cdiv(length, MAX_SPLITS), TILE_LEN) * TILE_LEN, MIN_SPLIT_LEN)
    return begin, split_len, tl.cdiv(length, split_len)


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    q_ptr,  # [batch * NUM_QUERIES, num_heads, HEAD_DIM]
    kv_ptr,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM]
    tables_ptr,  # [batch, max_blocks] int32
    seq_lens_ptr,  # [batch] int32
    scales_ptr,  # [2, num_kv_heads] float32 where SCALED
    sums_ptr,  # [batch * NUM_QUERIES, num_heads, NUM_SPLITS, HEAD_DIM] float32, contiguous; with one split the result
    stats_ptr,  # [batch * NUM_QUERIES, num_heads, NUM_SPLITS, 2] float32, contiguous
    inner, outer, q_stride_row, q_stride_head, kv_stride_block, kv_stride_half, kv_stride_head, tables_stride_row,
    BLOCK_SIZE: tl.constexpr, HEADS_PER_KV: tl.constexpr, TILE_ROWS: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr, TILE_LEN: tl.constexpr, NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr,
):  # fmt: skip
    """grid (batch, num_kv_heads, NUM_SPLITS)"""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    begin, split_len, _ = _visible(seq_len, NUM_QUERIES, WINDOW, MAX_SPLITS, MIN_SPLIT_LEN, TILE_LEN)
    first = begin + split * split_len
    last = tl.minimum(first + split_len, seq_len)
    if (first >= last) & (NUM_SPLITS > 1):
        return  # nothing of this sequence lies in this split, and the second launch does not look at it

    tile_row = tl.arange(0, TILE_ROWS)
    query = tile_row // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + tile_row % HEADS_PER_KV
    row = sequence.to(tl.int64) * NUM_QUERIES + query
    is_row = query < NUM_QUERIES
    dim = tl.arange(0, TILE_DIM)
    is_dim = (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + row[:, None] * q_stride_row + head[:, None] * q_stride_head + dim[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & is_dim, other=0.0)  # [TILE_ROWS, TILE_DIM]
    position = seq_len - NUM_QUERIES + query  # of the query; what it may see last
    if SCALED:
        scale = tl.load(scales_ptr + kv_head)
        if CAPPED:
            inner *= scale
        else:
            outer *= scale

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    normaliser = tl.zeros([TILE_ROWS], tl.float32)
    total = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    table_ptr = tables_ptr + sequence.to(tl.int64) * tables_stride_row
    for start in range(first, last, TILE_LEN):
        token = start + tl.arange(0, TILE_LEN)
        is_token = token < last
        block = tl.load(table_ptr + token // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)  # [TILE_LEN]
        k_at = kv_ptr + block * kv_stride_block + kv_head * kv_stride_head + (token % BLOCK_SIZE) * HEAD_DIM
        kv_mask = is_token[:, None] & is_dim  # what is not ours may hold NaN: it is never loaded, not multiplied by 0
        k = tl.load(k_at[:, None] + dim[None, :], mask=kv_mask, other=0.0).to(q.dtype)  # [TILE_LEN, TILE_DIM]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [TILE_ROWS, TILE_LEN] float32
        if CAPPED:
            products = capped(products, inner)
        if NUM_QUERIES == 1:
            seen = is_token[None, :]
        else:
            seen = is_token[None, :] & (token[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
        products = tl.where(seen, products, float("-inf"))
        weights, shrink, maximum, normaliser = absorb(products, outer, maximum, normaliser)
        v = tl.load(k_at[:, None] + kv_stride_half + dim[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        total = total * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")

    if SCALED:
        total *= tl.load(scales_ptr + tl.num_programs(1) + kv_head)
    place = row * tl.num_programs(1) * HEADS_PER_KV + head  # [TILE_ROWS]
    if NUM_SPLITS == 1:
        result = total / tl.where(normaliser > 0, normaliser, 1.0)[:, None]  # of an empty sequence: zeros
        at = sums_ptr + place[:, None] * HEAD_DIM + dim[None, :]
        tl.store(at, result.to(sums_ptr.dtype.element_ty), mask=is_row[:, None] & is_dim)
    else:
        slot = place * NUM_SPLITS + split
        tl.store(sums_ptr + slot[:, None] * HEAD_DIM + dim[None, :], total, mask=is_row[:, None] & is_dim)
        tl.store(stats_ptr + slot * 2, maximum, mask=is_row)
        tl.store(stats_ptr + slot * 2 + 1, normaliser, mask=is_row)


@triton.jit
def _combine_splits(  # type: ignore[no-untyped-def]
    sums_ptr,  # [num_rows, num_heads, NUM_SPLITS, HEAD_DIM] float32
    stats_ptr,  # [num_rows, num_heads, NUM_SPLITS, 2] float32
    seq_lens_ptr,  # [batch] int32
    out_ptr,  # [num_rows, num_heads, HEAD_DIM], contiguous
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT_LEN: tl.constexpr,
    TILE_LEN: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """grid (num_rows, num_heads)"""
    row, head = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + row // NUM_QUERIES)
    # Splits that the first launch wrote; the others are poison.
    _, _, used = _visible(seq_len, NUM_QUERIES, WINDOW, MAX_SPLITS, MIN_SPLIT_LEN, TILE_LEN)
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
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a split that this query sees nothing of
        shrink, weight = tl.exp2(maximum - base), tl.exp2(split_maximum - base)
        normaliser = normaliser * shrink + tl.load(stats_ptr + slot * 2 + 1) * weight
        total = total * shrink + tl.load(sums_ptr + slot * HEAD_DIM + dim, mask=is_dim, other=0.0) * weight
        maximum = new_maximum
    result = total / tl.where(normaliser > 0, normaliser, 1.0)
    tl.store(out_ptr + place * HEAD_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=is_dim)
