"""Twins of fused.py: slow, obvious, in plain torch and float64. Tests compare with them; nothing else calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import rms_norm


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else (x.double() + residual.double()).to(x.dtype)
    return hidden, rms_norm(hidden, weight, eps)


def rotate_and_write(
    qkv: Tensor,
    turn: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    kv_layer: Tensor,
    slots: list[int],
    num_heads: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """What qkv becomes; K and V go into kv_layer, token by token. slots: block * block_size + place, negative for nowhere."""
    num_kv_heads, block_size, head_dim = kv_layer.shape[2:]
    q, k, v = qkv.double().view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    q, k = _turned(q, turn), _turned(k, turn)
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        both = torch.stack((k[token], v[token]))  # [2, num_kv_heads, head_dim]
        if kv_scales is not None:
            both = (both / kv_scales.double()[:, :, None]).clamp(-448.0, 448.0)
        kv_layer[slot // block_size, :, :, slot % block_size] = both.float().to(kv_layer.dtype)
    return torch.cat((q, k, v), 1).flatten(1).to(qkv.dtype)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn.to(torch.complex128)
    return torch.view_as_real(pairs).flatten(-2)
