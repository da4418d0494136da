"""Every operation of ops.py again: slow, obvious, in plain torch. Twins that tests compare with; nothing else calls them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the lane sum (kernels/kv_pack.py): odd, so that multiplying by them loses nothing. The last three are from the finalizers of
# splitmix64 and of Pelle Evensen's rrmxmx; PLACE is 2**64 over the golden ratio.
PLACE, FIRST, SECOND, THIRD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9FB21C651E98DF25


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float64."""
    wide = x.double()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.double()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    return out.to(x.dtype)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_len: int, order: Tensor | None = None) -> Tensor:
    """float64 [out, in], weight by weight. codes [out, in], scales and zeros [out, num_groups]; order: as in quantized.Codes."""
    out_width, in_width = codes.shape
    weight = torch.empty(out_width, in_width, dtype=torch.float64)
    for place in range(in_width):
        group = place // group_len
        column = (codes[:, place].double() - zeros[:, group].double()) * scales[:, group].double()
        weight[:, place if order is None else int(order[place])] = column
    return weight


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Neighbouring pairs (x[2i], x[2i+1]) turned by positions * inv_freq[i]. x [num_tokens, heads, head_dim]."""
    angles = (positions[:, None].float() * inv_freq.float()).double()  # [num_tokens, head_dim / 2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, soft_cap: float | None = None) -> Tensor:
    """The last len(q) tokens of one sequence attend to all of it, causally; float64 with the whole score matrix.

    q [num_queries, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q.
    window: a token sees itself and the window - 1 tokens before it. soft_cap: scores are soft_cap * tanh(score / soft_cap).
    """
    num_queries, num_heads, _ = q.shape
    num_tokens, num_kv_heads, _ = k.shape
    k = k.double().repeat_interleave(num_heads // num_kv_heads, dim=1)
    v = v.double().repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    query_at = torch.arange(num_tokens - num_queries, num_tokens)[:, None]
    key_at = torch.arange(num_tokens)[None, :]
    hidden = key_at > query_at
    if window is not None:
        hidden = hidden | (key_at <= query_at - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def read_kv(kv_layer: Tensor, blocks: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence, token by token: [num_tokens, num_kv_heads, head_dim] each."""
    block_size = kv_layer.shape[3]
    rows = [kv_layer[blocks[t // block_size], :, :, t % block_size] for t in range(num_tokens)]
    both = torch.stack(rows) if rows else kv_layer.new_empty(0, 2, kv_layer.shape[2], kv_layer.shape[4])
    return both[:, 0], both[:, 1]


def lane_sums(run: Tensor) -> tuple[int, int]:
    """The 128-bit lane sum of one run, [2, num_heads, block_size, row_lanes] of integers; see kernels/kv_pack.py."""
    mask = 2**64 - 1
    width = 8 * run.element_size()
    first = second = 0
    for place, lane in enumerate(run.flatten().tolist()):
        key = (place + 1) * PLACE & mask
        z = (lane & (2**width - 1)) ^ key
        z = (z ^ (z >> 32)) * FIRST & mask
        z = (z ^ (z >> 29)) * SECOND & mask
        w = (z ^ (z >> 32) ^ key) * THIRD & mask
        w ^= w >> 29
        first, second = first + z & mask, second + w & mask
    return first, second


def move_runs(
    source: Tensor, target: Tensor, source_blocks: Sequence[int], target_blocks: Sequence[int], num_used: Sequence[int]
) -> None:
    """Run by run: blocks of `source` into blocks of `target`, with zeros behind the used slots.

    Both [num_layers, num_blocks, 2, num_heads, block_size, head_dim], of one shape but for num_blocks.
    """
    for layer in range(source.shape[0]):
        for block, into, used in zip(source_blocks, target_blocks, num_used, strict=True):
            run = source[layer, block].clone()
            run.view(torch.uint8)[:, :, used:] = 0
            target[layer, into] = run
