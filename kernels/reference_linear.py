"""Twin of skinny_linear.py's quantised weights: what numbers they stand for, in float64. Only tests and benches call it."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantized(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """[out, in] float64, from int8 or float8_e4m3fn with a scale per row, or from packed int4 with one per group."""
    if weight.dtype is not torch.uint8:
        return weight.double() * scale.double()[:, None]
    numbers = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).double()  # [out, in]
    group = numbers.shape[1] // scale.shape[1]
    centre = torch.full_like(scale, 8.0) if zero is None else zero
    return (numbers - centre.double().repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)
