"""What lies between the matrix products of a decoder layer, in few passes over memory, in Triton.

    add_rms_norm      residual + x, and its RMSNorm, one read of each, two writes
    silu_mul          silu(gate) * up
    rotate_and_write  norm of q and k heads, rotary embedding, and K and V into their blocks, after the qkv product

Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton); twins in reference.py and reference_fused.py. Every row
is computed by itself, in float32, so no result depends on the batch. Nothing here waits for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_WIDTH = 1024  # of silu_mul, per program
TILE_HEADS = 8  # of rotate_and_write, per program


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, normed): hidden = x + residual, rounded once, and hidden / rms(hidden) * weight.

    x and residual [rows, width] contiguous; hidden is written over the residual. Without one, hidden is x itself.
    """
    rows, width = x.shape
    assert x.is_contiguous(), "x must be contiguous"
    assert weight.shape == (width,), f"weight is {tuple(weight.shape)}, rows have {width}"
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous()), "residual must be like x"
    assert residual is None or residual.dtype == x.dtype, "residual must be like x"
    normed = torch.empty_like(x)
    hidden = x if residual is None else residual
    if rows:
        tile = triton.next_power_of_2(width)
        _add_rms_norm[(rows,)](
            x, hidden, weight, normed, eps, WIDTH=width, TILE=tile, ADDS=residual is not None, num_warps=_warps(tile)
        )
    return hidden, normed


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 * width] = [gate | up], contiguous -> silu(gate) * up, [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous(), "gate_up must be contiguous"
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul[(rows, triton.cdiv(width, TILE_WIDTH))](gate_up, out, WIDTH=width, TILE=TILE_WIDTH, num_warps=4)
    return out


def rotate_and_write(
    qkv: torch.Tensor,
    turn: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """What lies between a layer's first product and its attention: q and k in place, K and V into the pool.

    qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; turn complex64 [num_tokens, 1,
    head_dim / 2] (`ops.rotation`), by which neighbouring pairs of q and k are turned; q_norm, k_norm [head_dim] or None: RMSNorm
    of each head before that. kv_layer [num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous. slots [num_tokens] int64:
    block * block_size + place in the block; a negative one is a row of padding, whose K and V go nowhere. kv_scales float32 [2,
    num_kv_heads] with a float8_e4m3fn pool: what its numbers are to be multiplied by; larger values saturate.
    """
    num_tokens = qkv.shape[0]
    num_kv_heads, block_size, head_dim = kv_layer.shape[2:]
    num_all = num_heads + 2 * num_kv_heads
    assert qkv.shape[1] == num_all * head_dim, f"qkv has rows of {qkv.shape[1]}, heads ask for {num_all * head_dim}"
    assert qkv.is_contiguous(), "qkv must be contiguous"
    assert kv_layer.is_contiguous(), "kv_layer must be contiguous"
    assert turn.dtype == torch.complex64, f"turn must be complex64, not {turn.dtype}"
    assert turn.shape == (num_tokens, 1, head_dim // 2), f"turn is {tuple(turn.shape)}"
    assert slots.shape == (num_tokens,), f"slots is {tuple(slots.shape)}"
    assert slots.dtype == torch.int64, f"slots must be int64, not {slots.dtype}"
    assert (q_norm is None) == (k_norm is None), "q and k are normalised both or neither"
    assert (kv_scales is not None) == (kv_layer.dtype == torch.float8_e4m3fn), "kv_scales belong to a float8_e4m3fn pool"
    if num_tokens == 0:
        return
    angles = torch.view_as_real(turn)
    _rotate_and_write[(num_tokens, triton.cdiv(num_all, TILE_HEADS))](
        qkv,
        angles,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        angles if kv_scales is None else kv_scales,
        slots,
        kv_layer,
        eps,
        slots.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        TILE_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        NORMS=q_norm is not None,
        SCALED=kv_scales is not None,
        TILE_HEADS=TILE_HEADS,
        num_warps=4,
    )


def _warps(tile: int) -> int:
    return min(16, max(1, tile // 256))


@triton.jit
def _add_rms_norm(x_ptr, hidden_ptr, weight_ptr, normed_ptr, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, ADDS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """grid (rows,)"""
    at = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, TILE)
    is_column = column < WIDTH
    x = tl.load(x_ptr + at + column, mask=is_column, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(hidden_ptr + at + column, mask=is_column, other=0.0).to(tl.float32)
        rounded = x.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + at + column, rounded, mask=is_column)
        x = rounded.to(tl.float32)  # what a norm of the stored hidden state gives: fused or not, the same bits
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at + column, (x * scale * weight).to(normed_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid (rows, cdiv(WIDTH, TILE))"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = column < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate_and_write(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF_DIM]
    turn_ptr,  # [num_tokens, HALF_DIM, 2] float32: cosine and sine
    q_norm_ptr,  # [2 * HALF_DIM]
    k_norm_ptr,
    scales_ptr,  # [2, NUM_KV_HEADS] float32 where SCALED
    slots_ptr,  # [num_tokens] int64
    kv_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, 2 * HALF_DIM]
    eps,
    slots_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    TILE_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMS: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    """grid (num_tokens, cdiv(NUM_HEADS + 2 * NUM_KV_HEADS, TILE_HEADS)); heads are q's, then k's, then v's"""
    HEAD_DIM: tl.constexpr = 2 * HALF_DIM
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    pair = tl.arange(0, TILE_HALF)
    is_pair = pair < HALF_DIM
    dim = tl.arange(0, 2 * TILE_HALF)
    inside = (head < ALL_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    at = qkv_ptr + (token * ALL_HEADS + head[:, None]) * HEAD_DIM + dim[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    if NORMS:
        q_weight = tl.load(q_norm_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm_ptr + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        weight = tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])
        x = tl.where(is_value[:, None], x, x * scale[:, None] * weight)
    even, odd = tl.split(tl.reshape(x, [TILE_HEADS, TILE_HALF, 2]))
    turn_at = turn_ptr + (token * HALF_DIM + pair) * 2
    cos = tl.load(turn_at, mask=is_pair, other=0.0)[None, :]
    sin = tl.load(turn_at + 1, mask=is_pair, other=0.0)[None, :]
    turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [TILE_HEADS, 2 * TILE_HALF])
    x = tl.where(is_value[:, None], x, turned)
    tl.store(at, x.to(qkv_ptr.dtype.element_ty), mask=inside & (~is_value)[:, None])

    slot = tl.load(slots_ptr + token * slots_stride)
    if slot < 0:
        return
    kv_head = head - NUM_HEADS  # K's heads, then V's: as they lie in a block
    is_kv = (kv_head >= 0) & (head < ALL_HEADS)
    if SCALED:
        x = x / tl.load(scales_ptr + kv_head, mask=is_kv, other=1.0)[:, None]
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # the largest of e4m3fn; beyond it a conversion gives NaN
    run = (slot // BLOCK_SIZE) * (2 * NUM_KV_HEADS) + kv_head[:, None]
    kv_at = kv_ptr + (run * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dim[None, :]
    tl.store(kv_at, x.to(kv_ptr.dtype.element_ty), mask=is_kv[:, None] & (dim < HEAD_DIM)[None, :])
