"""x @ weight.T for few rows of x, where reading the weight is the whole cost, in Triton.

Weights may be plain, or int8, float8_e4m3fn or int4 and are then turned into numbers in registers: memory is read once, at the
stored width. Called by `kernels/cuda_ops.py` for tensors on a GPU (it needs triton), which also decides between this and the
library; twins: `reference.linear` and `reference_linear.dequantized`.

The weight is the left operand, so 64 or more of its rows fill a warp group's matrix instruction and the few rows of x are its
narrow side; a row of x is a column there, and its sums do not depend on the others. A deep inner dimension is split over
programs whose float32 parts a second launch adds in ascending order (no atomics: the same bits every time, and in every batch
as long as the form's depth and splits do not change).

    plain       weight [out, in] of x's dtype
    int8, fp8   weight [out, in], scale float32 [out]                                     y = (x @ weight.T) * scale
    int4        weight uint8 [out, in / 2]: element 2j in the low half of byte j, 2j + 1 in the high one, unsigned;
                scale [out, in / group], zero [out, in / group] or None for 8             number = (q - zero) * scale
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.linear_forms import Form, default_form

TILE_SUM = 1024  # columns per program of the second launch
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}


def kind_of(weight: torch.Tensor) -> str:
    return KINDS.get(weight.dtype, "plain")


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    form: Form | None = None,
) -> torch.Tensor:
    """x [rows, in] @ weight.T + bias [out] + residual [rows, out] -> [rows, out] in x's dtype; sums are float32.

    x's last dimension is contiguous, everything else wholly. form: None for `linear_forms.default_form`. Any number of rows
    is right; many are better served elsewhere. Waits for nothing.
    """
    rows, in_width = x.shape
    out_width, kind = weight.shape[0], kind_of(weight)
    group = _check(x, weight, bias, residual, scale, zero, kind)
    out = torch.empty(rows, out_width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    form = default_form(kind, rows, out_width, in_width, group) if form is None else form
    tile_in = form.tile_in
    assert kind != "int4" or (tile_in <= group and group % tile_in == 0), f"steps of {tile_in} do not divide groups of {group}"
    split_in = triton.cdiv(triton.cdiv(in_width, form.splits), tile_in) * tile_in
    splits = triton.cdiv(in_width, split_in)
    sums = out if splits == 1 else torch.empty(splits, rows, out_width, dtype=torch.float32, device=x.device)
    common = {
        "OUT": out_width,
        "ROW_SCALED": kind in ("int8", "fp8"),
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
    }
    extras = (x if scale is None else scale, x if bias is None else bias, x if residual is None else residual)
    _linear[(triton.cdiv(out_width, form.tile_out), splits, triton.cdiv(rows, form.tile_rows))](
        x,
        weight,
        x if zero is None else zero,
        *extras,
        sums,
        rows,
        x.stride(0),
        IN=in_width,
        SPLIT_IN=split_in,
        KIND=kind,
        GROUP=group,
        HAS_ZERO=zero is not None,
        TILE_ROWS=form.tile_rows,
        TILE_OUT=form.tile_out,
        TILE_IN=tile_in,
        WHOLE=splits == 1,
        num_warps=form.num_warps,
        num_stages=form.num_stages if x.element_size() <= 2 else 2,
        **common,
    )
    if splits > 1:
        _add_splits[(rows, triton.cdiv(out_width, TILE_SUM))](
            sums, *extras, out, rows, SPLITS=splits, TILE=TILE_SUM, num_warps=4, **common
        )
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    kind: str,
) -> int:
    """Tokens of one scale along the inner dimension; 0 where a row has one."""
    (rows, in_width), out_width = x.shape, weight.shape[0]
    stored = in_width // 2 if kind == "int4" else in_width
    assert weight.shape[1] == stored, f"weight is {tuple(weight.shape)}, x has {in_width} columns"
    assert x.stride(1) == 1, "x must have contiguous rows"
    assert (scale is None) == (kind == "plain"), f"a scale belongs to a quantised weight, and this is {kind}"
    assert zero is None or kind == "int4", f"zero points belong to int4, not {kind}"
    assert kind != "plain" or weight.dtype == x.dtype, f"x is {x.dtype}, weight {weight.dtype}"
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual), ("scale", scale), ("zero", zero)):
        assert tensor is None or tensor.is_contiguous(), f"{name} must be contiguous"
    assert bias is None or bias.shape == (out_width,), "bias must be [out]"
    assert residual is None or residual.shape == (rows, out_width), "residual must be [rows, out]"
    if kind != "int4":
        assert scale is None or scale.shape == (out_width,), f"scale must be [{out_width}], got {tuple(scale.shape)}"
        return 0
    assert scale is not None
    num_groups = scale.shape[1]
    assert scale.shape == (out_width, num_groups), f"scale must be [{out_width}, groups], got {tuple(scale.shape)}"
    assert in_width % num_groups == 0, f"{in_width} columns do not divide into {num_groups} groups"
    assert zero is None or zero.shape == scale.shape, "zero must be like scale"
    assert (in_width // num_groups) % 32 == 0, f"groups of {in_width // num_groups} columns are no multiple of 32"
    return in_width // num_groups


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def _linear(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, IN]
    weight_ptr,  # [OUT, IN], or [OUT, IN / 2] bytes
    zero_ptr,  # [OUT, IN / GROUP] where HAS_ZERO
    scale_ptr,  # [OUT] where ROW_SCALED, [OUT, IN / GROUP] for int4
    bias_ptr,  # [OUT]
    residual_ptr,  # [rows, OUT]
    sums_ptr,  # [splits, rows, OUT] float32; WHOLE: the result
    rows,
    x_stride,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """grid (cdiv(OUT, TILE_OUT), splits, cdiv(rows, TILE_ROWS))"""
    out = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.program_id(2) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_out, is_row = out < OUT, row < rows
    begin = tl.program_id(1) * SPLIT_IN
    end = tl.minimum(begin + SPLIT_IN, IN)
    total = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    x_at = x_ptr + row[None, :].to(tl.int64) * x_stride
    dtype = x_ptr.dtype.element_ty
    if KIND == "int4":
        pair = tl.arange(0, TILE_IN // 2)
        weight_at = weight_ptr + out[:, None].to(tl.int64) * (IN // 2) + pair[None, :]
        for start in range(begin, end, TILE_IN):
            # Steps lie inside groups and groups divide IN, so no column needs a mask.
            packed = tl.load(weight_at + start // 2, mask=is_out[:, None], other=0)
            low, high = (packed & 15).to(dtype), (packed >> 4).to(dtype)  # 0 to 15: exact
            at_group = out * (IN // GROUP) + start // GROUP
            if HAS_ZERO:
                zero = tl.load(zero_ptr + at_group, mask=is_out, other=0.0).to(dtype)[:, None]
                low, high = low - zero, high - zero
            else:
                low, high = low - 8, high - 8
            even_at = x_at + start + 2 * pair[:, None]
            even = tl.load(even_at, mask=is_row[None, :], other=0.0)
            odd = tl.load(even_at + 1, mask=is_row[None, :], other=0.0)
            part = tl.dot(low, even, input_precision="ieee")
            part = tl.dot(high, odd, part, input_precision="ieee")
            scale = tl.load(scale_ptr + at_group, mask=is_out, other=0.0).to(tl.float32)
            total += part * scale[:, None]
    else:
        column = tl.arange(0, TILE_IN)
        weight_at = weight_ptr + out[:, None].to(tl.int64) * IN + column[None, :]
        for start in range(begin, end, TILE_IN):
            if IN % TILE_IN == 0:
                weight = tl.load(weight_at + start, mask=is_out[:, None], other=0.0)
                x = tl.load(x_at + start + column[:, None], mask=is_row[None, :], other=0.0)
            else:
                is_column = start + column < IN
                weight = tl.load(weight_at + start, mask=is_out[:, None] & is_column[None, :], other=0.0)
                x = tl.load(x_at + start + column[:, None], mask=is_row[None, :] & is_column[:, None], other=0.0)
            total = tl.dot(weight.to(dtype), x, total, input_precision="ieee")
    mask = is_out[:, None] & is_row[None, :]
    place = row[None, :].to(tl.int64) * OUT + out[:, None]
    if WHOLE:
        if ROW_SCALED:
            total *= tl.load(scale_ptr + out, mask=is_out, other=0.0).to(tl.float32)[:, None]
        if BIAS:
            total += tl.load(bias_ptr + out, mask=is_out, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:
            total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums_ptr + place, total.to(sums_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * rows * OUT + place, total, mask=mask)


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def _add_splits(  # type: ignore[no-untyped-def]
    sums_ptr,  # [SPLITS, rows, OUT] float32
    scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,  # [rows, OUT]
    rows,
    OUT: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """grid (rows, cdiv(OUT, TILE))"""
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = column < OUT
    place = tl.program_id(0).to(tl.int64) * OUT + column
    total = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):  # ascending: the order of the additions is part of the result
        total += tl.load(sums_ptr + split * (rows.to(tl.int64) * OUT) + place, mask=is_column, other=0.0)
    if ROW_SCALED:
        total *= tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_column)
