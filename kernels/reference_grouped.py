"""Twins of grouped.py: row by row, expert by expert, in float64. Tests compare with them; nothing else calls them."""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    shares, experts = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares, experts = shares[:, :top_k], experts[:, :top_k]
    return experts.int(), (shares / shares.sum(-1, keepdim=True) if renormalise else shares).float()


def mixture(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool = True) -> Tensor:
    experts, shares = route(logits, top_k, renormalise)
    out = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for expert, share in zip(experts[row].tolist(), shares[row].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            out[row] += share * (down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    return out


def lora(x: Tensor, out: Tensor, down: Tensor, up: Tensor, scales: Tensor, adapters: Tensor) -> Tensor:
    result = out.double().clone()
    for row, adapter in enumerate(adapters.tolist()):
        if adapter >= 0:
            result[row] += float(scales[adapter]) * (up[adapter].double() @ (down[adapter].double() @ x[row].double()))
    return result
