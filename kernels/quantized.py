"""Weights as integers of 8 or 4 bits: how they are rounded from floats, and how they are packed for kernels/panels.py.

`Codes` is what a checkpoint's tensor or its rounding yields, row by row, whatever format it came in; `pack` makes the matrix that
ops.linear multiplies by. Sums are float32 and activations stay floats, so nothing is lost but by the rounding of the weights.
Called by models/quantization.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda_matrix import CudaMatrix, for_gpu
from kernels.ops import on_gpu
from kernels.panels import INT4, INT8, INT8_ZEROS, MIDDLE_OF_INT4, PANEL, PanelMatrix, to_panels, warm_up

INT4_GROUP_LEN = 32
SMALLEST_SCALE = 2.0**-24  # float16's smallest
# Divisors of a group's largest weight that int4 rounding tries; 8 lets it have the code that only negative numbers have.
INT4_DIVISORS = (-8.6, -8.0, -7.4, 7.4, 8.0, 8.6)
ROUNDED_NUMEL = 1 << 16  # weights rounded at a time: what a second-level cache holds with all that is tried


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A weight is (codes - zeros) * scales, for rows of a matrix [out, in] whose inputs are taken in `order`.

    codes uint8 [out, in], below 2 ** bits. scales float16 [out, num_groups]. zeros uint8 [out, num_groups]; None: 2 ** (bits - 1).
    order: int64 [in]: groups are of neighbours in this order; None: as they lie.
    """

    bits: int
    group_len: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def columns(self, start: int, stop: int) -> Codes:
        """Some of the inputs. A cut lies between two groups, and order is None."""
        assert self.order is None, "columns of codes in another order"
        in_width = self.codes.shape[1]
        first, last = start // self.group_len, -(-stop // self.group_len)
        assert start % self.group_len == 0 or self.scales.shape[1] == 1, (start, self.group_len)
        assert stop % self.group_len == 0 or stop == in_width or self.scales.shape[1] == 1, (stop, self.group_len)
        if self.scales.shape[1] == 1:
            first, last = 0, 1
        zeros = None if self.zeros is None else self.zeros[:, first:last]
        group_len = min(self.group_len, stop - start) if self.scales.shape[1] == 1 else self.group_len
        return Codes(self.bits, group_len, self.codes[:, start:stop], self.scales[:, first:last], zeros)

    def fits(self, other: Codes) -> bool:
        """Whether the two can be rows of one matrix."""
        if (self.order is None) != (other.order is None):
            return False
        same_order = self.order is None or other.order is None or torch.equal(self.order, other.order)
        return same_order and (self.bits, self.group_len) == (other.bits, other.group_len)

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        zeros = torch.full_like(self.scales, 2 ** (self.bits - 1)) if self.zeros is None else self.zeros
        in_width = self.codes.shape[1]
        wide = [t.float().repeat_interleave(self.group_len, 1)[:, :in_width] for t in (zeros, self.scales)]
        rows = (self.codes.float() - wide[0]) * wide[1]
        if self.order is None:
            return rows
        found = torch.empty_like(rows)
        found[:, self.order] = rows
        return found


def pack(parts: Sequence[Codes]) -> PanelMatrix | CudaMatrix:
    """One matrix of all their rows; they fit each other. Compiles what multiplies by it, where that is not done yet."""
    first = parts[0]
    assert all(first.fits(part) for part in parts[1:])
    codes = torch.cat([part.codes for part in parts])
    out_width, in_width = codes.shape
    middle = 2 ** (first.bits - 1)
    zeros: Tensor | None = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat(
            [torch.full_like(part.scales, middle, dtype=torch.uint8) if part.zeros is None else part.zeros for part in parts]
        )
        if bool((zeros == middle).all()):
            zeros = None
    if on_gpu(codes.device):
        matrix = for_gpu(first.bits, codes, torch.cat([part.scales for part in parts]), zeros, first.order)
        if matrix is not None:
            return matrix
    kind = INT4 if first.bits == 4 else INT8 if zeros is None else INT8_ZEROS
    if kind == INT4:
        panels = to_panels(codes)
        weights = panels[..., : PANEL // 2] | (panels[..., PANEL // 2 :] << 4)
    else:
        weights = to_panels((codes ^ 128).view(torch.int8))  # minus 128, in two's complement
        zeros = None if zeros is None else (zeros ^ 128).view(torch.int8)
    if kind == INT4 and zeros is None:
        packed_zeros: Tensor | None = torch.full((PANEL,), MIDDLE_OF_INT4, dtype=torch.int8, device=codes.device)
    else:
        packed_zeros = None if zeros is None else to_panels(zeros.view(torch.int8))
    if weights.device.type == "cpu":
        warm_up(kind)
    scales = to_panels(torch.cat([part.scales for part in parts]))
    return PanelMatrix(kind, in_width, out_width, first.group_len, weights, scales, packed_zeros, first.order)


# ---- rounding --------------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, bits: int, group_len: int | None = None) -> Codes:
    """Round rows [out, in] of any float type. group_len: inputs that share a scale; None: 32 for int4, the whole row for int8."""
    out_width, in_width = weight.shape
    group_len = group_len or (INT4_GROUP_LEN if bits == 4 else in_width)
    group_len = min(group_len, in_width)
    num_groups = -(-in_width // group_len)
    codes = torch.empty(out_width, in_width, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_width, num_groups, dtype=torch.float16, device=weight.device)
    count = max(1, ROUNDED_NUMEL // in_width)
    for row in range(0, out_width, count):
        rows = weight[row : row + count].float()
        groups = torch.nn.functional.pad(rows, (0, num_groups * group_len - in_width)).unflatten(1, (num_groups, group_len))
        rounded, scale = _round_int8(groups) if bits == 8 else _round_int4(groups)
        codes[row : row + count] = rounded.flatten(1)[:, :in_width]
        scales[row : row + count] = scale
    return Codes(bits, group_len, codes, scales)


def _as_scale(scale: Tensor) -> Tensor:
    """As float16 keeps it, never zero."""
    kept = scale.half().float()
    return torch.where(kept == 0, torch.full_like(kept, SMALLEST_SCALE), kept)


def _round_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weight becomes 127. groups [rows, num_groups, group_len] -> uint8 codes, float16 scales [rows, num_groups]."""
    scale = _as_scale(groups.abs().amax(-1, keepdim=True) / 127)
    return (torch.round(groups / scale).clamp_(-127, 127) + 128).to(torch.uint8), scale.squeeze(-1).half()


def _round_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of some scales, each then made the best for the codes it yields (least squares), the one of the least squared error.

    As llama.cpp chooses its scales (make_qx_quants in ggml-quants.c), here with equal importance for all weights. A scale may be
    negative: then the one code that has no opposite is the largest weight's, whatever its sign.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    energy = groups.square().sum(-1, keepdim=True)
    best_gain = torch.full_like(energy, -1.0)
    best_scale, best_codes = torch.ones_like(energy), torch.zeros_like(groups)
    for divisor in INT4_DIVISORS:
        inverse = torch.where(largest == 0, 0.0, divisor / largest)
        codes = torch.round(groups * inverse).clamp_(-8, 7)
        dot, square = (groups * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True).clamp_min_(1)
        scale = _as_scale(dot / square)
        gain = scale * (2 * dot - scale * square)  # by how much the squared error is less than with zeros
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale, best_codes = torch.where(better, scale, best_scale), torch.where(better, codes, best_codes)
    return (best_codes + 8).to(torch.uint8), best_scale.squeeze(-1).half()
