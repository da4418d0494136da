"""A quantised matrix on a GPU: codes in the layout of skinny_linear.py, unpacked in registers when they are multiplied.

Made by kernels/quantized.pack() where the device and the kernel take the format; other formats stay panels, which torch multiplies
by turning them into numbers first. Not for the CPU, whose layout is panels.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_GROUP_LEN = 32  # of int4: the smallest step of the kernel


@dataclass(frozen=True, slots=True, eq=False)
class CudaMatrix:
    """codes: int8 [out, in] with scales [out], or uint8 [out, in / 2] with scales and zeros [out, groups]; None: 8 everywhere.
    order: inputs are taken in this order, int64 [in]."""

    in_width: int
    out_width: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.order) if t is not None)

    def linear(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [rows, in] @ self.T + bias + residual [rows, out] -> contiguous [rows, out], of x's type."""
        from kernels import cuda_ops

        if self.order is not None:
            x = x.index_select(1, self.order)
        return cuda_ops.quantized_linear(x, self.codes, self.scales, self.zeros, bias, residual)

    def dequantized(self) -> Tensor:
        """float32 [out, in], inputs in their own order."""
        if self.codes.dtype is torch.int8:
            rows = self.codes.float() * self.scales.float()[:, None]
        else:
            numbers = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1).float()
            group_len = self.in_width // self.scales.shape[1]
            zeros = torch.full_like(self.scales, 8.0) if self.zeros is None else self.zeros
            wide = [t.float().repeat_interleave(group_len, 1) for t in (zeros, self.scales)]
            rows = (numbers - wide[0]) * wide[1]
        if self.order is None:
            return rows
        found = torch.empty_like(rows)
        found[:, self.order] = rows
        return found


def for_gpu(bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None) -> CudaMatrix | None:
    """codes uint8 [out, in], below 2 ** bits, standing for (codes - zeros) * scales; scales float16, zeros uint8 or None for the
    middle, [out, groups]. None: no kernel takes this format."""
    out_width, in_width = codes.shape
    num_groups = scales.shape[1]
    if bits == 8 and num_groups == 1 and zeros is None:
        return CudaMatrix(in_width, out_width, (codes ^ 128).view(torch.int8).contiguous(), scales[:, 0].contiguous(), None, order)
    if bits == 4 and in_width % num_groups == 0 and (in_width // num_groups) % MIN_GROUP_LEN == 0:
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        zeros = None if zeros is None else zeros.half().contiguous()
        return CudaMatrix(in_width, out_width, packed.contiguous(), scales.contiguous(), zeros, order)
    return None
