"""The one door to every operation a model needs: here a device chooses its implementation.

On the CPU these are the compiled kernels of native.py (float32, once `cpu.load()` was called), or torch operations arranged for few
copies and few calls; on a GPU everything goes on to cuda_ops.py and its Triton kernels. Each has a twin in reference.py. Called
by models/; engine/batch.py builds the AttentionPlan.

KV of one layer: [num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, panels
from kernels.cuda_matrix import CudaMatrix
from kernels.panels import PanelMatrix, StackedMatrix

PIECE_LEN = 4096  # tokens of context that are copied out of the pool at a time: bounds memory for long contexts
WINDOW_QUERIES = 256  # queries per explicit mask under sliding-window attention

Matrix = Tensor | PanelMatrix | StackedMatrix | CudaMatrix  # what linear() multiplies by

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_packed_linear = torch.ops.mkldnn._linear_pointwise


class Span(NamedTuple):  # of all frozen things the quickest to make, and every step makes one for each sequence
    """Rows [start, start + length) of a batch are the tokens of one sequence that follow its context_len computed ones.

    blocks: the sequence's blocks, at least as many as context_len + length tokens need; index: the same as a tensor.
    """

    start: int
    length: int
    context_len: int
    blocks: Sequence[int]
    index: Tensor  # int64 [len(blocks)], on the pool's device


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What every layer of one batch shares. The first num_single spans have one token each, so row i is span i.

    slots: rows of a layer seen as [num_blocks * 2 * num_kv_heads * block_size, head_dim], [num_tokens, 2, num_kv_heads].
    cache: what an implementation works out once for all layers.
    The rest is for a GPU only (`on_gpu`), where spans may be empty and slots anything. query_starts: the row where each span
    begins, and the end of the last. token_slots: block * block_size + place, negative for rows of padding. short_len: what every
    span behind the singles has as its length, if they all have the same few; 0 otherwise.
    """

    spans: tuple[Span, ...]
    num_single: int
    slots: Tensor
    block_tables: Tensor | None = None  # int32 [num_spans, max_blocks]
    seq_lens: Tensor | None = None  # int32 [num_spans], tokens with the span's own
    query_starts: Tensor | None = None  # int32 [num_spans + 1]
    token_slots: Tensor | None = None  # int64 [num_tokens]
    short_len: int = 0
    cache: dict[Any, Any] = field(default_factory=dict)


def on_gpu(device: torch.device) -> bool:
    """Whether cuda_ops.py is in charge. Tests pretend so, and then the kernels run in Triton's interpreter."""
    return device.type == "cuda"


# ---- pieces of a layer -----------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last axis."""
    if on_gpu(x.device) and x.dim() == 2:
        from kernels import cuda_ops

        return cuda_ops.rms_norm(x, weight, eps)
    if x.dim() == 2 and cpu.takes(x):
        return cpu.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def pack(weight: Tensor) -> Tensor | PanelMatrix:
    """The same matrix in the layout that linear() likes best, for good. It can be given to linear() and to nothing else.

    float32 on a CPU: panels with AVX-512 (kernels/cpu_linear.py), else oneDNN's blocked layout. Chosen by a table over rows and
    shapes (docs/quantization.md): against oneDNN panels take 0.6 to 0.9 of the time at 1 to 16 rows and the same from 64 on, and
    both are 2 to 4 times as fast as F.linear. Two layouts, one for few rows and one for many, would hold every weight twice.
    """
    if weight.device.type == "cpu" and weight.dtype is torch.float32 and panels.is_best_for_float32():
        return panels.pack_float32(weight)
    if weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]
    return weight


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [rows, in] @ weight [out, in].T + bias + residual [rows, out] -> contiguous [rows, out]. weight may be packed.

    May overwrite the residual.
    """
    if not isinstance(weight, Tensor):
        return weight.linear(x, bias, residual)
    if on_gpu(x.device):
        from kernels import cuda_ops

        return cuda_ops.linear(x, weight, bias, residual)
    if weight.is_mkldnn:
        if residual is None:
            return _packed_linear(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
        return _packed_linear.binary(x, residual, weight, bias, "add")  # type: ignore[no-any-return]
    if x.device.type == "cpu" and x.dtype is torch.float32 and x.shape[0] <= 4:
        out = _linear_few_rows(x, weight, bias)
    else:
        out = F.linear(x, weight, bias)
    return out if residual is None else out.add_(residual)


def _linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ x.T: a BLAS reads a tall matrix times few columns at up to twice the speed of the other order, and times two
    columns faster than times one."""
    rows = x.shape[0]
    if rows == 1:
        x = F.pad(x, (0, 0, 0, 1))
    out = torch.mm(weight, x.t()).t()[:rows].contiguous()
    return out if bias is None else out.add_(bias)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [rows, 2 * width] = [gate | up] -> [rows, width]. May overwrite its argument."""
    if on_gpu(gate_up.device):
        from kernels import cuda_ops

        return cuda_ops.silu_mul(gate_up)
    width = gate_up.shape[-1] // 2
    if width % 16 == 0 and cpu.takes(gate_up) and gate_up.is_contiguous():
        return cpu.silu_mul(gate_up)
    return F.silu(gate_up[:, :width], inplace=True).mul_(gate_up[:, width:])


def rotation(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """What rotate() turns by, once per batch: complex64 [num_tokens, 1, head_dim / 2]."""
    angles = positions[:, None].float() * inv_freq
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding in place on neighbouring pairs of the last axis; x [num_tokens, heads, head_dim].

    Checkpoints keep the two of a pair half a head apart; models/llama.py moves them together once, when it loads.
    """
    if x.dtype is torch.float32:
        torch.view_as_complex(torch.unflatten(x, -1, (-1, 2))).mul_(turn)
        return x
    wide = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2))).mul_(turn)
    return x.copy_(torch.view_as_real(wide).flatten(-2))


def write_kv(kv_layer: Tensor, rows: Tensor, plan: AttentionPlan) -> None:
    """Store the K and V rows [num_tokens, 2, num_kv_heads, head_dim] of a batch in their blocks."""
    kv_layer.view(-1, kv_layer.shape[-1])[plan.slots] = rows


def rotate_and_write(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    turn: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    kv_layer: Tensor,
    plan: AttentionPlan,
) -> None:
    """What lies between a layer's first product and its attention: rms_norm each head of q and k where there are norms for them,
    rotate both in place, and write_kv(). qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]."""
    if on_gpu(qkv.device):
        from kernels import cuda_ops

        cuda_ops.rotate_and_write(qkv, num_heads, turn, norms, eps, kv_layer, plan)
        return
    head_dim = kv_layer.shape[-1]
    if head_dim % 16 == 0 and cpu.takes(qkv) and kv_layer.is_contiguous():
        table = plan.cache.get("turn")
        if table is None:
            table = plan.cache["turn"] = cpu.turn_table(turn)
        cpu.rotate_and_write(qkv, num_heads, num_kv_heads, table, norms, eps, kv_layer, plan.slots)
        return
    heads = qkv.view(len(qkv), -1, head_dim)
    q_and_k = heads[:, : num_heads + num_kv_heads]
    if norms is not None:
        for part, weight in zip(torch.split(q_and_k, [num_heads, num_kv_heads], dim=1), norms, strict=True):
            part.copy_(rms_norm(part, weight, eps))
    rotate(q_and_k, turn)
    write_kv(kv_layer, heads[:, num_heads:].unflatten(1, (2, num_kv_heads)), plan)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(q: Tensor, rows: Tensor, kv_layer: Tensor, plan: AttentionPlan, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of a batch over its sequences' contexts, after write_kv() of the same rows.

    q [num_tokens, num_heads, head_dim], rows [num_tokens, 2, num_kv_heads, head_dim] -> [num_tokens, num_heads * head_dim].
    window: a token sees itself and the window - 1 tokens before it.
    """
    num_tokens, num_heads, head_dim = q.shape
    if on_gpu(q.device):
        from kernels import cuda_ops

        return cuda_ops.attention(q, kv_layer, plan, scale, window)
    if cpu.takes_attention(q, kv_layer):
        return cpu.attention(q, kv_layer, plan, scale, window)
    out = q.new_empty(num_tokens, num_heads, head_dim)
    if plan.num_single:
        out[: plan.num_single] = _attend_singles(q[: plan.num_single], kv_layer, plan.spans[: plan.num_single], scale, window)
    for span in plan.spans[plan.num_single :]:
        if window is not None and span.context_len + span.length > window:
            _attend_windowed(out, q, kv_layer, span, scale, window)
        else:
            _attend_span(out, q, rows, kv_layer, span, scale)
    return out.view(num_tokens, num_heads * head_dim)


def _partial(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output, logsumexp of the scores); q, k, v [batch, heads, tokens, head_dim], head_dim contiguous."""
    if q.device.type == "cpu":
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)  # type: ignore[no-any-return]
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if causal:
        scores += torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ v.float()).to(q.dtype), lse


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each (as in flash decoding)."""
    lse = torch.logaddexp(first[1], second[1])
    share = torch.exp(second[1] - lse).unsqueeze(-1).to(first[0].dtype)
    return torch.lerp(first[0], second[0], share), lse


def _gather(kv_layer: Tensor, index: Tensor, start: int, end: int) -> Tensor:
    """Tokens [start, end) of a sequence, copied together: [2, num_kv_heads, end - start, head_dim].

    One index_select writes them in this order at once; where the blocks lie makes no difference to it, and it is faster than
    reading a slice of the pool in another order.
    """
    _, two, num_kv_heads, block_size, head_dim = kv_layer.shape
    first, last = start // block_size, -(-end // block_size)
    if first or last != len(index):
        index = index[first:last]
    together = kv_layer.permute(1, 2, 0, 3, 4).index_select(2, index).view(two, num_kv_heads, -1, head_dim)
    return together[:, :, start - first * block_size : end - first * block_size]


def _attend_context(q: Tensor, kv_layer: Tensor, index: Tensor, start: int, end: int, scale: float) -> tuple[Tensor, Tensor]:
    """q [1, num_kv_heads, queries, head_dim], every query sees tokens [start, end), in pieces of bounded size."""
    result: tuple[Tensor, Tensor] | None = None
    for begin in range(start, end, PIECE_LEN):
        k, v = _gather(kv_layer, index, begin, min(end, begin + PIECE_LEN)).unsqueeze(1)
        piece = _partial(q, k, v, scale)
        result = piece if result is None else _merge(result, piece)
    assert result is not None, (start, end)
    return result


def _attend_singles(q: Tensor, kv_layer: Tensor, spans: Sequence[Span], scale: float, window: int | None) -> Tensor:
    """One query per sequence, q [num_single, num_heads, head_dim]. The query heads of one KV head lie on the query axis, so
    K and V are not repeated."""
    queries = torch.unflatten(q, 1, (kv_layer.shape[2], -1)).unsqueeze(1).unbind()  # each [1, num_kv_heads, group, head_dim]
    results = []
    for query, span in zip(queries, spans, strict=True):
        end = span.context_len + 1
        start = 0 if window is None else max(0, end - window)
        results.append(_attend_context(query, kv_layer, span.index, start, end, scale)[0])
    return torch.cat(results).flatten(1, 2)


def _attend_span(out: Tensor, q: Tensor, rows: Tensor, kv_layer: Tensor, span: Span, scale: float) -> None:
    """A chunk: causal among its own rows, plus the whole context before it, joined by their logsumexps."""
    num_kv_heads, head_dim = rows.shape[2:]
    own = slice(span.start, span.start + span.length)
    queries = torch.unflatten(q[own], 1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, length, head_dim]
    group = queries.shape[1]
    k, v = rows[own].permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, group, -1, -1)  # no copy: the group has stride 0
    result = _partial(queries, k, v, scale, causal=True)
    if span.context_len:
        flat = queries.reshape(1, num_kv_heads, group * span.length, head_dim)
        before, lse = _attend_context(flat, kv_layer, span.index, 0, span.context_len, scale)
        result = _merge(result, (before.view_as(result[0]), lse.view_as(result[1])))
    out[own] = result[0].permute(2, 0, 1, 3).flatten(1, 2)


def _attend_windowed(out: Tensor, q: Tensor, kv_layer: Tensor, span: Span, scale: float, window: int) -> None:
    """A chunk whose oldest tokens fall out of the window: explicit masks, a few queries at a time."""
    num_kv_heads = kv_layer.shape[2]
    for first in range(0, span.length, WINDOW_QUERIES):
        count = min(WINDOW_QUERIES, span.length - first)
        begin = span.context_len + first  # position of the first query
        start, end = max(0, begin - window + 1), begin + count
        k, v = _gather(kv_layer, span.index, start, end)
        query_at = torch.arange(begin, end, device=q.device)[:, None]
        key_at = torch.arange(start, end, device=q.device)[None, :]
        mask = torch.zeros(count, end - start, device=q.device, dtype=q.dtype)
        mask.masked_fill_((key_at > query_at) | (key_at <= query_at - window), -math.inf)
        own = slice(span.start + first, span.start + first + count)
        queries = torch.unflatten(q[own], 1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        k, v = (x.unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for x in (k, v))
        result, _ = _partial(queries, k, v, scale, mask=mask)
        out[own] = result.permute(2, 0, 1, 3).flatten(1, 2)


# ---- KV on the move --------------------------------------------------------------------------------------------------

SUM_NBYTES = 16


def lane_dtype(head_dim: int, itemsize: int) -> torch.dtype:
    """The widest integer that a row (the head_dim values of one token and head) is a whole number of."""
    row_nbytes = head_dim * itemsize
    return next(d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if row_nbytes % d.itemsize == 0)


def as_lanes(pool: Tensor) -> Tensor:
    """[..., head_dim] of any dtype -> the same memory as lanes, [..., row_lanes]."""
    return pool.view(lane_dtype(pool.shape[-1], pool.element_size()))


def run_table(source_blocks: Sequence[int], target_blocks: Sequence[int], num_used: Sequence[int], device: torch.device) -> Tensor:
    """What move_runs goes by: int32 [3, num_runs]. To a GPU it goes through pinned memory, so that nothing waits."""
    table = torch.tensor([source_blocks, target_blocks, num_used], dtype=torch.int32)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def move_runs(source: Tensor, target: Tensor | None, table: Tensor, *, with_sums: bool = True) -> Tensor | None:
    """Copy runs from one pool to another, zeroing what lies behind the used slots, and sum their lanes on the way.

    source, target: [num_layers, num_blocks, 2, num_heads, block_size, head_dim], of one dtype and shape but for num_blocks; a
    range of layers or heads of a wider pool is just a slice of it. table: `run_table`; no target block comes twice, and every
    number is inside its pool: nothing here looks. target None: only sum. -> int64 [num_layers, num_runs, 2], the 128-bit lane
    sums (kernels/kv_pack.py says what they find), on the device; None without sums.
    """
    source, target = as_lanes(source), None if target is None else as_lanes(target)
    if source.device.type == "cpu":
        return _move_runs_on_cpu(source, target, table, with_sums)
    from kernels.kv_pack import move_runs as move

    sums = torch.zeros(source.shape[0], table.shape[1], 2, dtype=torch.int64, device=source.device) if with_sums else None
    move(source, target, table, sums)
    return sums


def sums_to_bytes(sums: Tensor) -> bytes:
    """16 bytes for each run, in order, little-endian. Waits for the device."""
    return sums.contiguous().cpu().numpy().astype("<i8", copy=False).tobytes()


def _move_runs_on_cpu(source: Tensor, target: Tensor | None, table: Tensor, with_sums: bool) -> Tensor | None:
    source_blocks, target_blocks, num_used = table.long()
    runs = source[:, source_blocks]  # [num_layers, num_runs, 2, num_heads, block_size, row_lanes], a copy
    for run, used in enumerate(num_used.tolist()):
        runs[:, run, :, :, used:] = 0
    if target is not None:
        target[:, target_blocks] = runs
    return _lane_sums(runs.flatten(2)) if with_sums else None


def _lane_sums(lanes: Tensor) -> Tensor:
    """[..., num_lanes] -> int64 [..., 2]. Two's complement wraps as unsigned integers do; only the shifts must be told apart."""
    from kernels.reference import FIRST, PLACE, SECOND, THIRD

    first, place, second, third = (c - 2**64 if c >= 2**63 else c for c in (FIRST, PLACE, SECOND, THIRD))
    key = torch.arange(1, lanes.shape[-1] + 1, dtype=torch.int64) * place
    z = lanes.long()
    if lanes.dtype is not torch.int64:
        z &= 2 ** (8 * lanes.element_size()) - 1
    z = z ^ key
    z = (z ^ _shifted(z, 32)) * first
    z = (z ^ _shifted(z, 29)) * second
    w = (z ^ _shifted(z, 32) ^ key) * third
    w = w ^ _shifted(w, 29)
    return torch.stack((z.sum(-1), w.sum(-1)), -1)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> by) & (2 ** (64 - by) - 1)
