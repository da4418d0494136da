"""Products where each row picks its own matrix, in Triton: mixtures of experts (Mixtral, Qwen3-MoE) and LoRA adapters.

Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton); twins in reference_grouped.py. A *pair* is a row and a
matrix it goes through: top_k of them for a token of a mixture, one for a row with an adapter.

    route          the router's logits -> top_k experts of each token, and their shares
    group_pairs    pairs in order of their matrix, in tiles of one matrix each
    grouped_linear every pair's row times its matrix, gathered by that order; SiLU(gate) * up, shares and sums on the way
    mixture, lora  the layers made of them

No number leaves the device: the grid is an upper bound that shapes give, and tiles that nobody needs return at once, so a graph
can hold it. Ranks come from prefix sums and a token's parts are added in the order of its experts, not by atomics: the same
bits every time, whatever else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE_PAIRS = 1024  # looked at by a counting program at a time
TILE_SUM = 1024  # columns of combine, per program


class Groups(NamedTuple):
    """order int32 [num_tiles * tile_rows]: pairs, num_pairs for padding; matrix int32 [num_tiles]: of each tile, -1 for none."""

    order: torch.Tensor
    matrix: torch.Tensor
    num_pairs: int
    tile_rows: int


def tile_rows_for(num_pairs: int, num_matrices: int) -> int:
    """So that a tile is mostly full if the pairs are spread evenly."""
    share = num_pairs // max(1, num_matrices)
    return 16 if share <= 16 else 32 if share <= 32 else 64 if share <= 128 else 128


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts int32, shares float32), [rows, top_k] each, best first, of equals the first; softmax over all experts of logits
    [rows, num_experts], over the chosen ones if renormalised. A row of NaN has experts all the same."""
    rows, num_experts = logits.shape
    assert 0 < top_k <= num_experts, f"top_k {top_k} of {num_experts} experts"
    assert logits.is_contiguous(), "logits must be contiguous"
    experts = torch.empty(rows, top_k, dtype=torch.int32, device=logits.device)
    shares = torch.empty(rows, top_k, dtype=torch.float32, device=logits.device)
    if rows:
        _route[(rows,)](
            logits, experts, shares, NUM=num_experts, TOP_K=top_k, RENORMALISE=renormalise,
            TILE=triton.next_power_of_2(num_experts), TILE_K=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return experts, shares


def group_pairs(matrices: torch.Tensor, num_matrices: int, tile_rows: int) -> Groups:
    """matrices int32 [num_pairs], contiguous: the matrix of each pair, negative for none."""
    (num_pairs,) = matrices.shape
    assert matrices.dtype == torch.int32, f"matrices must be int32, not {matrices.dtype}"
    assert matrices.is_contiguous(), "matrices must be contiguous"
    num_tiles = num_pairs // tile_rows + min(num_matrices, num_pairs)
    order = torch.empty(num_tiles * tile_rows, dtype=torch.int32, device=matrices.device)
    matrix = torch.empty(num_tiles, dtype=torch.int32, device=matrices.device)
    if num_pairs:
        counts = torch.empty(num_matrices, dtype=torch.int32, device=matrices.device)
        _count[(num_matrices,)](matrices, counts, num_pairs, TILE=TILE_PAIRS, num_warps=4)
        _place[(num_matrices,)](
            matrices, counts, order, matrix, num_pairs, num_tiles, num_matrices, TILE_ROWS=tile_rows, TILE=TILE_PAIRS,
            TILE_MATRICES=triton.next_power_of_2(num_matrices), num_warps=4,
        )  # fmt: skip
    return Groups(order, matrix, num_pairs, tile_rows)


def grouped_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    *,
    pairs_per_row: int = 1,
    gated: bool = False,
    scales: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row pair // pairs_per_row of x [rows, in] times its matrix of weights [num_matrices, out, in] -> [num_pairs, out].

    gated: the matrices are [gate | up] and the result, half as wide, is silu(gate) * up. scales float32 [num_pairs]: by what each
    row of the result is multiplied. add_to [num_pairs, out]: added to that in place instead. Rows of pairs without a matrix are
    not written.
    """
    (rows, in_width), (_, out_width, weight_in) = x.shape, weights.shape
    out_width = out_width // 2 if gated else out_width
    assert weight_in == in_width, f"matrices take {weight_in} columns, x has {in_width}"
    assert x.is_contiguous(), "x must be contiguous"
    assert weights.is_contiguous(), "weights must be contiguous"
    assert x.dtype == weights.dtype, f"x is {x.dtype}, weights {weights.dtype}"
    assert groups.num_pairs == rows * pairs_per_row, f"{groups.num_pairs} pairs are not {pairs_per_row} for each of {rows} rows"
    assert add_to is None or (add_to.shape == (groups.num_pairs, out_width) and add_to.is_contiguous()), (
        "add_to must be like the result"
    )
    out = torch.empty(groups.num_pairs, out_width, dtype=x.dtype, device=x.device) if add_to is None else add_to
    if groups.num_pairs == 0:
        return out
    tile_out = 128 if groups.tile_rows >= 64 and not gated else 64
    tile_in = min(64 if groups.tile_rows >= 64 else 128, max(16, triton.next_power_of_2(in_width)))
    _grouped_linear[(len(groups.matrix), triton.cdiv(out_width, tile_out))](
        x,
        weights,
        groups.order,
        groups.matrix,
        out if scales is None else scales,
        out,
        groups.num_pairs,
        IN=in_width,
        OUT=out_width,
        PAIRS_PER_ROW=pairs_per_row,
        GATED=gated,
        SCALED=scales is not None,
        ADDS=add_to is not None,
        TILE_ROWS=groups.tile_rows,
        TILE_OUT=tile_out,
        TILE_IN=tile_in,
        num_warps=8 if groups.tile_rows >= 128 else 4,
        num_stages=4 if x.element_size() <= 2 else 2,
    )
    return out


def mixture(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, renormalise: bool = True
) -> torch.Tensor:
    """A mixture-of-experts layer: x [rows, hidden], router's logits [rows, num_experts], gate_up [num_experts, 2 * width, hidden],
    down [num_experts, hidden, width] -> [rows, hidden]."""
    rows, hidden = x.shape
    experts, shares = route(logits, top_k, renormalise)
    num_experts = len(gate_up)
    groups = group_pairs(experts.view(-1), num_experts, tile_rows_for(rows * top_k, num_experts))
    inner = grouped_linear(x, gate_up, groups, pairs_per_row=top_k, gated=True)
    parts = grouped_linear(inner, down, groups, scales=shares.view(-1))
    out = torch.empty_like(x)
    if rows:
        _combine[(rows, triton.cdiv(hidden, TILE_SUM))](parts, out, WIDTH=hidden, TOP_K=top_k, TILE=TILE_SUM, num_warps=4)
    return out


def lora(
    x: torch.Tensor, out: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scales: torch.Tensor, adapters: torch.Tensor
) -> torch.Tensor:
    """out += scale * (x @ down.T) @ up.T, in place, with each row's own adapter.

    x [rows, in], out [rows, out]; down [num_adapters, rank, in], up [num_adapters, out, rank], scales float32 [num_adapters];
    adapters int32 [rows], negative for a row that has none and is left as it is.
    """
    groups = group_pairs(adapters, len(down), tile_rows_for(len(x), len(down)))
    inner = grouped_linear(x, down, groups)
    per_row = scales[adapters.clamp(min=0)]
    return grouped_linear(inner, up, groups, scales=per_row, add_to=out)


@triton.jit
def _route(logits_ptr, experts_ptr, shares_ptr, NUM: tl.constexpr, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr,
           TILE: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """grid (rows,)"""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * NUM + expert, mask=expert < NUM, other=float("-inf")).to(tl.float32)
    weight = tl.exp(x - tl.max(x, 0))
    left = tl.where(expert < NUM, weight, -1.0)
    total = tl.sum(weight, 0)
    place = tl.arange(0, TILE_K)
    experts, shares = tl.zeros([TILE_K], tl.int32), tl.zeros([TILE_K], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        chosen = tl.min(tl.where(left == best, expert, NUM - 1), 0)
        experts = tl.where(place == k, chosen, experts)
        shares = tl.where(place == k, best, shares)
        left = tl.where(expert == chosen, -1.0, left)
    if RENORMALISE:
        total = tl.sum(shares, 0)
    tl.store(experts_ptr + row * TOP_K + place, experts, mask=place < TOP_K)
    tl.store(shares_ptr + row * TOP_K + place, shares / total, mask=place < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def _count(matrices_ptr, counts_ptr, num_pairs, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid (num_matrices,)"""
    matrix = tl.program_id(0)
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, num_pairs, TILE):
        pair = start + tl.arange(0, TILE)
        total += (tl.load(matrices_ptr + pair, mask=pair < num_pairs, other=-1) == matrix).to(tl.int32)
    tl.store(counts_ptr + matrix, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "num_matrices"])
def _place(  # type: ignore[no-untyped-def]
    matrices_ptr,  # [num_pairs] int32
    counts_ptr,  # [num_matrices] int32
    order_ptr,  # [num_tiles * TILE_ROWS] int32
    matrix_ptr,  # [num_tiles] int32
    num_pairs,
    num_tiles,
    num_matrices,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_MATRICES: tl.constexpr,
):
    """grid (num_matrices,)"""
    matrix = tl.program_id(0)
    other = tl.arange(0, TILE_MATRICES)
    tiles = tl.cdiv(tl.load(counts_ptr + other, mask=other < num_matrices, other=0), TILE_ROWS)
    first = tl.sum(tl.where(other < matrix, tiles, 0), 0)
    own = tl.sum(tl.where(other == matrix, tiles, 0), 0)
    lane = tl.arange(0, TILE)
    for start in range(0, own, TILE):
        tl.store(matrix_ptr + first + start + lane, matrix, mask=start + lane < own)
    if matrix == num_matrices - 1:
        for start in range(first + own, num_tiles, TILE):
            tl.store(matrix_ptr + start + lane, -1, mask=start + lane < num_tiles)
    num_found = 0
    for start in range(0, num_pairs, TILE):
        pair = start + lane
        is_own = tl.load(matrices_ptr + pair, mask=pair < num_pairs, other=-1) == matrix
        rank = num_found + tl.cumsum(is_own.to(tl.int32), 0) - 1
        tl.store(order_ptr + first * TILE_ROWS + rank, pair, mask=is_own)
        num_found += tl.sum(is_own.to(tl.int32), 0)
    row = tl.arange(0, TILE_ROWS)  # what is left of the last tile
    tl.store(order_ptr + first * TILE_ROWS + num_found + row, num_pairs, mask=num_found + row < own * TILE_ROWS)


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_linear(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, IN]
    weights_ptr,  # [num_matrices, OUT or 2 * OUT, IN]
    order_ptr,
    matrix_ptr,
    scales_ptr,  # [num_pairs] float32 where SCALED
    out_ptr,  # [num_pairs, OUT]
    num_pairs,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    ADDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
):
    """grid (num_tiles, cdiv(OUT, TILE_OUT)); the matrix is the left operand, as in skinny_linear.py"""
    tile = tl.program_id(0)
    matrix = tl.load(matrix_ptr + tile)
    if matrix < 0:
        return
    pair = tl.load(order_ptr + tile * TILE_ROWS + tl.arange(0, TILE_ROWS))
    is_pair = pair < num_pairs
    out = tl.program_id(1) * TILE_OUT + tl.arange(0, TILE_OUT)
    is_out = out < OUT
    column = tl.arange(0, TILE_IN)
    x_at = x_ptr + (pair // PAIRS_PER_ROW)[None, :].to(tl.int64) * IN
    HEIGHT: tl.constexpr = 2 * OUT if GATED else OUT
    weight_at = weights_ptr + (matrix.to(tl.int64) * HEIGHT + out[:, None]) * IN
    total = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    if GATED:
        upper = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    for start in range(0, IN, TILE_IN):
        is_column = start + column < IN
        x = tl.load(x_at + start + column[:, None], mask=is_pair[None, :] & is_column[:, None], other=0.0)
        mask = is_out[:, None] & is_column[None, :]
        weight = tl.load(weight_at + start + column[None, :], mask=mask, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
        if GATED:
            weight = tl.load(weight_at + OUT * IN + start + column[None, :], mask=mask, other=0.0)
            upper = tl.dot(weight, x, upper, input_precision="ieee")
    if GATED:
        total = total * tl.sigmoid(total) * upper
    if SCALED:
        total *= tl.load(scales_ptr + pair, mask=is_pair, other=0.0)[None, :]
    place = pair[None, :].to(tl.int64) * OUT + out[:, None]
    mask = is_out[:, None] & is_pair[None, :]
    if ADDS:
        total += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine(parts_ptr, out_ptr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid (rows, cdiv(WIDTH, TILE))"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = column < WIDTH
    total = tl.zeros([TILE], tl.float32)
    for k in tl.static_range(TOP_K):  # the order of the additions is part of the result
        total += tl.load(parts_ptr + (row * TOP_K + k) * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=is_column)
