"""A matrix in panels of 64 outputs, as float32 or as codes of 8 or 4 bits with scales, times rows of activations.

The one form for quantised matrices, and the float32 one where it is the faster (ops.pack). On a CPU that can, kernels/cpu_linear.py
multiplies, which needs numba; everywhere else, CUDA included, a few panels at a time become matrices of the activations' type, and
torch multiplies: right, but slow, for each step reads the weights and writes and reads them wide.
A weight is (code - zero point) * scale. Twin: reference.linear with `dequantized()`.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64
FLOAT32, INT8, INT8_ZEROS, INT4 = range(4)
PANEL_ROW_NBYTES = (4 * PANEL, PANEL, PANEL, PANEL // 2)  # by kind: of one input
MIDDLE_OF_INT4 = 8
WIDE_NUMEL = 1 << 20  # weights that torch has wide at a time


@dataclass(frozen=True, slots=True, eq=False)
class PanelMatrix:
    """[out_width, in_width]. group_len: inputs in a row that share a scale and a zero point; the last group may be shorter.

    weights [num_panels, in_width, 64]: float32, or int8 (code - 128), or for int4 uint8 [num_panels, in_width, 32], output j in
    the low half and j + 32 in the high half of byte j. scales: float16 [num_panels, num_groups, 64]. zeros: int8, the same shape,
    or [64] for all groups. order: inputs are taken in this order, int64 [in_width].
    """

    kind: int
    in_width: int
    out_width: int
    group_len: int
    weights: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def num_panels(self) -> int:
        return self.weights.shape[0]

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(t.nbytes for t in (self.weights, self.scales, self.zeros, self.order) if t is not None)

    def linear(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [rows, in_width] @ self.T + bias + residual [rows, out_width] -> contiguous [rows, out_width], of x's type."""
        if self.order is not None:
            x = x.index_select(1, self.order)
        if x.device.type != "cpu" or not has_kernel():
            return self._linear_by_torch(x, bias, residual)
        from kernels.cpu_linear import multiply

        out = torch.empty(x.shape[0], self.out_width)
        if x.dtype is not torch.float32:
            bias, residual = (None if t is None else t.float() for t in (bias, residual))
        multiply(x.float().contiguous(), self, out, bias, residual if residual is None else residual.contiguous())
        return out.to(x.dtype)

    def _linear_by_torch(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        pieces = []
        count = max(1, WIDE_NUMEL // (self.in_width * PANEL))
        for first in range(0, self.num_panels, count):
            piece = x @ self._wide(first, min(self.num_panels, first + count), x.dtype)  # [panels, rows, 64]
            pieces.append(piece.transpose(0, 1).flatten(1))
        out = torch.cat(pieces, 1)[:, : self.out_width]
        out = out if bias is None else out + bias
        return (out if residual is None else out + residual).contiguous()

    def _wide(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Panels [first, last) as numbers of this type, [panels, in_width, 64]. Products are rounded once, from float32."""
        codes = self.weights[first:last]
        if self.kind == FLOAT32:
            return codes.to(dtype)
        assert self.scales is not None
        if self.kind == INT4:
            codes = torch.cat((codes & 15, codes >> 4), -1)
        wide = codes.float()
        if self.zeros is not None:
            wide -= self._by_input(self.zeros.float().expand_as(self.scales)[first:last])
        return (wide * self._by_input(self.scales[first:last].float())).to(dtype)

    def _by_input(self, by_group: Tensor) -> Tensor:
        return by_group.repeat_interleave(self.group_len, 1)[:, : self.in_width]

    def dequantized(self) -> Tensor:
        """float32 [out_width, in_width], inputs in their own order."""
        rows = self._wide(0, self.num_panels, torch.float32).transpose(1, 2).flatten(0, 1)[: self.out_width]
        if self.order is None:
            return rows.contiguous()
        found = torch.empty_like(rows)
        found[:, self.order] = rows
        return found


@dataclass(frozen=True, slots=True, eq=False)
class StackedMatrix:
    """Matrices of one width on top of each other that no single one can hold: of several widths of code, or orders of inputs."""

    parts: tuple[PanelMatrix | Tensor, ...]  # a Tensor: packed by ops.pack, or plain
    out_widths: tuple[int, ...]

    @property
    def out_width(self) -> int:
        return sum(self.out_widths)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def linear(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """As PanelMatrix.linear."""
        from kernels.ops import linear

        biases = [None] * len(self.parts) if bias is None else torch.split(bias, self.out_widths)
        out = torch.cat([linear(x, part, own) for part, own in zip(self.parts, biases, strict=True)], 1)
        return out if residual is None else out.add_(residual)


@functools.cache
def has_kernel() -> bool:
    """Whether numba is there and this CPU has what the kernel is made of. Importing numba takes a quarter of a second."""
    if importlib.util.find_spec("numba") is None:
        return False
    from kernels import cpu_linear

    return cpu_linear.is_usable()


def is_best_for_float32() -> bool:
    """With AVX-512. With AVX2 the tiles are right, and only measured for quantised weights, where nothing else competes."""
    if not has_kernel():
        return False
    from kernels import cpu_linear

    return cpu_linear.IS_WIDE


def warm_up(kind: int) -> None:
    """Have the loop for this kind compiled, or read from where it was kept, before a request needs it."""
    if has_kernel():
        from kernels import cpu_linear

        cpu_linear.compiled(kind)


def to_panels(rows: Tensor) -> Tensor:
    """[out, n] -> contiguous [num_panels, n, 64], zeros in outputs that are not there."""
    missing = -rows.shape[0] % PANEL
    if missing:
        rows = F.pad(rows, (0, 0, 0, missing))
    return rows.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pack_float32(weight: Tensor) -> PanelMatrix:
    """weight float32 [out, in]."""
    out_width, in_width = weight.shape
    warm_up(FLOAT32)
    return PanelMatrix(FLOAT32, in_width, out_width, in_width, to_panels(weight))
