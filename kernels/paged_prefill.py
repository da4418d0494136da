"""Prefill attention over a paged KV pool, in Triton: chunks of many sequences at once, each behind its own context.

Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton); the slow obvious twin is `reference.attend` over
`reference.read_kv`. It reads the chunk's own K and V from the pool, where they were just written, and writes none.

One launch. A program holds the queries of one KV head's whole group for a few neighbouring tokens, so each tile of K and V is
loaded once for all of them. Tiles of keys lie at multiples of TILE_LEN from the sequence's first token and every row walks
them in the same order, with hidden keys at -inf: a token's bits do not depend on how its prompt was cut into chunks, nor
on the rest of the batch. Tiles that nobody may see are skipped, and only those on an edge are masked (as in FlashAttention-2,
Dao 2023). The grid is an upper bound from shapes alone: a program finds its sequence by bisection (as vLLM's unified kernel
does), so a captured graph serves other lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.paged_decode import check_pool
from kernels.softmax_walk import absorb, capped, factors

TILE_ROWS = 128  # queries * heads of the group in a program


def tile_len(head_dim: int, itemsize: int) -> int:
    """Keys per step, a function of the pool alone."""
    return 64 if head_dim * itemsize <= 256 else 32


def paged_prefill_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    tile_rows: int = TILE_ROWS,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax(scale * q K^T) V of chunks, whose own K and V are already in the pool.

    q [num_tokens, num_heads, head_dim]: rows query_starts[i] to query_starts[i + 1] (int32 [num_spans + 1], ascending, the
    first 0, the last at most num_tokens) are the newest tokens of sequence i, which has seq_lens[i] (int32) tokens with
    them. Pool, tables, window, soft_cap, kv_scales, out and what is not read: as in paged_decode.py. Rows behind the last
    start are left as they are in `out`. Nothing here waits for the GPU.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_spans = seq_lens.shape[0]
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    if out is None:
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_tokens == 0 or num_spans == 0:
        return out
    check_pool(q, kv_layer, block_tables, seq_lens, kv_scales, out, window, soft_cap)
    assert query_starts.shape == (num_spans + 1,), f"query_starts has {len(query_starts)} entries for {num_spans} sequences"
    assert query_starts.dtype == torch.int32, f"query_starts must be int32, not {query_starts.dtype}"
    assert block_tables.shape[0] == num_spans, "block_tables and seq_lens differ in sequences"
    group = num_heads // num_kv_heads
    if q.dtype == torch.float32:
        tile_rows = min(tile_rows, 32)  # no tensor cores: more would not fit into registers
    tile_rows = max(16, triton.next_power_of_2(group), tile_rows)
    tile_queries = tile_rows // group
    inner, outer = factors(scale, soft_cap)
    num_tiles = num_tokens // tile_queries + num_spans
    _attend_chunk[(num_tiles * num_kv_heads,)](
        q,
        kv_layer,
        block_tables,
        query_starts,
        seq_lens,
        seq_lens if kv_scales is None else kv_scales,
        out,
        inner,
        outer,
        num_spans,
        num_tiles,
        q.stride(0),
        q.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        WINDOW=window or 0,
        CAPPED=soft_cap is not None,
        SCALED=kv_scales is not None,
        TILE_QUERIES=tile_queries,
        TILE_ROWS=tile_rows,
        TILE_LEN=tile_len(head_dim, kv_layer.element_size()),
        TILE_DIM=max(16, triton.next_power_of_2(head_dim)),
        num_warps=8 if tile_rows >= 128 else 4,
        num_stages=3 if q.element_size() <= 2 else 2,
    )
    return out


@triton.jit(do_not_specialize=["num_spans", "num_tiles"])
def _attend_chunk(  # type: ignore[no-untyped-def]
    q_ptr,  # [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM]
    kv_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    tables_ptr,  # [num_spans, max_blocks] int32
    starts_ptr,  # [num_spans + 1] int32
    seq_lens_ptr,  # [num_spans] int32
    scales_ptr,  # [2, NUM_KV_HEADS] float32 where SCALED
    out_ptr,  # like q, contiguous
    inner, outer, num_spans, num_tiles,
    q_stride_row, q_stride_head, kv_stride_block, kv_stride_half, kv_stride_head, tables_stride_row,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_LEN: tl.constexpr, TILE_DIM: tl.constexpr,
):  # fmt: skip
    """grid (num_tiles * NUM_KV_HEADS,); later tiles of a chunk see more keys and start first, so that no long one comes last"""
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = num_tiles - 1 - tl.program_id(0) // NUM_KV_HEADS
    # Sequence i has the tiles from starts[i] // TILE_QUERIES + i on, which is at least as many as it needs.
    low, high = tl.full([], 0, tl.int32), num_spans
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TILE_QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    span, start = low, tl.load(starts_ptr + low)
    length = tl.load(starts_ptr + span + 1) - start
    offset = (tile - (start // TILE_QUERIES + span)) * TILE_QUERIES  # of the tile's first query in its chunk
    if offset >= length:
        return
    seq_len = tl.load(seq_lens_ptr + span)
    first = seq_len - length + offset  # its position
    last = tl.minimum(first + TILE_QUERIES, seq_len) - 1  # position of the tile's last query

    tile_row = tl.arange(0, TILE_ROWS)
    query = tile_row // GROUP
    is_row, position = (query < TILE_QUERIES) & (offset + query < length), first + query
    row = (start + offset + query).to(tl.int64)
    head = kv_head * GROUP + tile_row % GROUP
    dim = tl.arange(0, TILE_DIM)
    is_dim = dim < HEAD_DIM
    q_at = q_ptr + row[:, None] * q_stride_row + head[:, None] * q_stride_head + dim[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & is_dim[None, :], other=0.0)  # [TILE_ROWS, TILE_DIM]
    if SCALED:
        scale = tl.load(scales_ptr + kv_head)
        if CAPPED:
            inner *= scale
        else:
            outer *= scale

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    normaliser = tl.zeros([TILE_ROWS], tl.float32)
    total = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    table_ptr = tables_ptr + span.to(tl.int64) * tables_stride_row
    at = kv_ptr + kv_head * kv_stride_head
    begin, open_begin, oldest = 0, 0, 0
    if WINDOW > 0:
        oldest = tl.maximum(first - WINDOW + 1, 0)
        begin = oldest // TILE_LEN * TILE_LEN
        open_begin = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), TILE_LEN) * TILE_LEN  # from here on the window hides nothing
    open_end = tl.maximum((first + 1) // TILE_LEN * TILE_LEN, begin)  # up to here every query sees every key
    if WINDOW > 0:
        open_begin = tl.minimum(tl.maximum(open_begin, begin), open_end)
        maximum, normaliser, total = _walk(
            q, at, table_ptr, position, begin, open_begin, oldest, last, kv_stride_block, kv_stride_half, dim, is_dim, inner, outer,
            maximum, normaliser, total, True, BLOCK_SIZE, HEAD_DIM, WINDOW, CAPPED, TILE_LEN,
        )  # fmt: skip
    maximum, normaliser, total = _walk(
        q, at, table_ptr, position, open_begin, open_end, oldest, last, kv_stride_block, kv_stride_half, dim, is_dim, inner, outer,
        maximum, normaliser, total, False, BLOCK_SIZE, HEAD_DIM, WINDOW, CAPPED, TILE_LEN,
    )  # fmt: skip
    maximum, normaliser, total = _walk(
        q, at, table_ptr, position, open_end, last + 1, oldest, last, kv_stride_block, kv_stride_half, dim, is_dim, inner, outer,
        maximum, normaliser, total, True, BLOCK_SIZE, HEAD_DIM, WINDOW, CAPPED, TILE_LEN,
    )  # fmt: skip
    if SCALED:
        total *= tl.load(scales_ptr + NUM_KV_HEADS + kv_head)
    result = total / tl.where(normaliser > 0, normaliser, 1.0)[:, None]
    out_at = out_ptr + (row * (NUM_KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q,  # [TILE_ROWS, TILE_DIM]
    at,  # the pool at its KV head
    table_ptr,
    position,  # [TILE_ROWS]
    begin,  # a multiple of TILE_LEN
    end,
    oldest,  # the first token that may be loaded in a masked tile
    last,  # the last one
    kv_stride_block,
    kv_stride_half,
    dim,
    is_dim,
    inner,
    outer,
    maximum,
    normaliser,
    total,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    """Keys [begin, end) in tiles; unmasked ones are whole tiles that every query of the program sees."""
    for start in range(begin, end, TILE_LEN):
        token = start + tl.arange(0, TILE_LEN)
        if MASKED:
            is_token = token <= last
            if WINDOW > 0:
                is_token = is_token & (token >= oldest)
            block = tl.load(table_ptr + token // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
            mask = is_token[:, None] & is_dim[None, :]  # what is not ours may hold NaN: it is never loaded
        else:
            block = tl.load(table_ptr + token // BLOCK_SIZE).to(tl.int64)
            mask = is_dim[None, :]
        k_at = (at + block * kv_stride_block + (token % BLOCK_SIZE) * HEAD_DIM)[:, None] + dim[None, :]
        k = tl.load(k_at, mask=mask, other=0.0).to(q.dtype)  # [TILE_LEN, TILE_DIM]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [TILE_ROWS, TILE_LEN] float32
        if CAPPED:
            products = capped(products, inner)
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            products = tl.where(seen & is_token[None, :], products, float("-inf"))
        weights, shrink, maximum, normaliser = absorb(products, outer, maximum, normaliser)
        v = tl.load(k_at + kv_stride_half, mask=mask, other=0.0).to(q.dtype)
        total = total * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return maximum, normaliser, total
