"""The CUDA side of the door: what kernels/ops.py hands over for tensors on a GPU, and which kernel takes it.

Imported only when used, since it needs triton. Nothing here waits for the device or depends on a number that only the device
knows, so a whole step can be captured in a graph. Floating point orders depend on a row's own sequence and on shapes of the
model, never on the batch, except in the library's matrix products: `Choices.deterministic` takes those away too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fused
from kernels.linear_forms import MAX_ROWS, Form, Table, default_form, read_table
from kernels.paged_decode import paged_decode_attention
from kernels.paged_prefill import paged_prefill_attention
from kernels.skinny_linear import kind_of, skinny_linear

if TYPE_CHECKING:
    from kernels.ops import AttentionPlan

TABLES = Path(__file__).with_name("forms")  # one JSON file per card, its name in small letters with hyphens


@dataclass(slots=True)
class Choices:
    """What one process uses. deterministic: the same kernel and form for a row whatever else is in the batch, however its
    prompt was chunked; slower, by what bench/kernels.py measures. table: where skinny_linear beats the library."""

    deterministic: bool = False
    table: Table = field(default_factory=Table)


choices = Choices()


def setup(device: torch.device, deterministic: bool = False) -> None:
    """Once per process, before the first step: the table of this card, if there is one. Raises ValueError for a broken one."""
    choices.deterministic = deterministic
    name = torch.cuda.get_device_name(device)
    path = TABLES / f"{'-'.join(name.lower().split())}.json"
    choices.table = read_table(path) if path.exists() else Table(name)


def backends() -> dict[str, str]:
    """What is used for what, for a log line and for /metrics."""
    return {
        "decode attention": "triton, split KV" if not choices.deterministic else "triton, one program per row and KV head",
        "prefill attention": "triton, paged",
        "linear": f"cuBLASLt, triton for {len(choices.table)} measured shapes"
        if not choices.deterministic
        else "triton, fixed form",
    }


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    kv_layer: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """ops.attention() over what rotate_and_write() has put into the pool: [num_tokens, num_heads * head_dim].

    Rows [0, num_single) are one query each and go through the split-KV kernel, as do chunks that all have plan.short_len
    rows (drafted tokens under verification); other chunks through the prefill kernel, which walks a context in an order that
    no chunking changes. Where bits matter more than speed everything takes the latter.
    """
    assert plan.block_tables is not None, "a plan without tables is not for a GPU"
    assert plan.seq_lens is not None, "a plan without lengths is not for a GPU"
    assert plan.query_starts is not None, "a plan without starts is not for a GPU"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    more = {"window": window, "soft_cap": soft_cap, "kv_scales": kv_scales}
    num_single, tables, lens = plan.num_single, plan.block_tables, plan.seq_lens
    if choices.deterministic:
        paged_prefill_attention(q, kv_layer, tables, plan.query_starts, lens, scale, out=out, **more)
        return out.flatten(1)
    if num_single:
        one = slice(0, num_single)
        paged_decode_attention(q[one], kv_layer, tables[one], lens[one], scale, out=out[one], **more)
    if num_single < len(lens):
        rest = slice(num_single, None)
        if plan.short_len:
            paged_decode_attention(
                q[rest], kv_layer, tables[rest], lens[rest], scale, num_queries=plan.short_len, out=out[rest], **more
            )
        else:
            # Its starts count from the first chunk's row, where q[rest] begins.
            starts = plan.query_starts[rest] - num_single if num_single else plan.query_starts
            paged_prefill_attention(q[rest], kv_layer, tables[rest], starts, lens[rest], scale, out=out[rest], **more)
    return out.flatten(1)


def rotate_and_write(
    qkv: Tensor,
    num_heads: int,
    turn: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    kv_layer: Tensor,
    plan: AttentionPlan,
    kv_scales: Tensor | None = None,
) -> None:
    """ops.rotate_and_write(): q and k in place in qkv, K and V into their blocks."""
    assert plan.token_slots is not None, "a plan without slots of tokens is not for a GPU"
    q_norm, k_norm = norms if norms is not None else (None, None)
    fused.rotate_and_write(qkv, turn, q_norm, k_norm, eps, kv_layer, plan.token_slots, num_heads, kv_scales)


# ---- rows ------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[rows, width]."""
    return fused.add_rms_norm(x.contiguous(), None, weight, eps)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, written over the residual; its norm). For a sum that comes out of a collective: on one rank the residual
    is added by the product itself, which costs neither a launch nor a pass."""
    return fused.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    return fused.silu_mul(gate_up)


# ---- matrix products -------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """ops.linear(). The library, or skinny_linear where the card's table says that it is faster. May overwrite the residual."""
    form = _form(x, weight)
    if form is not None:
        return skinny_linear(x, weight, bias, residual, form=form)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        residual = residual.add_(bias)
    return residual.addmm_(x, weight.t())  # added in the product's epilogue, in float32, before the only rounding


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x @ dequantised weight .T (formats: skinny_linear.py); any number of rows."""
    return skinny_linear(x, weight, bias, residual, scale=scale, zero=zero, form=_form(x, weight))


def _form(x: Tensor, weight: Tensor) -> Form | None:
    kind, rows = kind_of(weight), x.shape[0]
    if choices.deterministic:
        return default_form(kind, MAX_ROWS, weight.shape[0], x.shape[1]) if kind == "plain" else None
    return choices.table.choose(kind, rows, weight.shape[0], x.shape[1])
