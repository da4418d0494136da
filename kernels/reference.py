"""Every operation of ops.py again: slow, obvious, in plain torch. Twins that tests compare with; nothing else calls them."""

from __future__ import annotations

import torch
from torch import Tensor


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


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Neighbouring pairs (x[2i], x[2i+1]) turned by positions * inv_freq[i]. x [num_tokens, heads, head_dim]."""
    angles = (positions[:, None].float() * inv_freq.float()).double()  # [num_tokens, head_dim / 2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """The last len(q) tokens of one sequence attend to all of it, causally; float64 with the whole score matrix.

    q [num_queries, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q.
    window: a token sees itself and the window - 1 tokens before it.
    """
    num_queries, num_heads, _ = q.shape
    num_tokens, num_kv_heads, _ = k.shape
    k = k.double().repeat_interleave(num_heads // num_kv_heads, dim=1)
    v = v.double().repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
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
