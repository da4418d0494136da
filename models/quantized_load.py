"""Checkpoint tensors on their way into quantised matrices: rounded here, or unpacked from what GPTQ and AWQ store.

A `GrowingMatrix` stands in a layer's place until all its rows have come; then it is packed at once and the rows are let go, so a
load needs little more memory than the quantised model. Its parts are `Target`s of models/weights.py. Called by models/llama.py.

GPTQ (AutoGPTQ, GPTQModel): qweight int32 [in * bits / 32, out], neighbouring inputs from the lowest bits up; qzeros int32
[groups, out * bits / 32], neighbouring outputs likewise, in the first format less one; scales [groups, out]; g_idx int32 [in], the
group of each input. AWQ (AutoAWQ, "gemm"): qweight int32 [in, out / 8] and qzeros [groups, out / 8], of eight outputs in a row in
the order 0 2 4 6 1 3 5 7; scales [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import ops
from kernels.panels import PanelMatrix, StackedMatrix
from kernels.quantized import Codes, pack, quantize
from models.quantization import StoredQuantization
from protocol.errors import ModelError

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where outputs 0..7 of eight lie
Arrange = Callable[[Tensor], Tensor]


class GrowingMatrix:
    """[out_width, in_width] of one layer, row by row from any number of tensors. device meta: only names and shapes are wanted."""

    def __init__(self, out_width: int, in_width: int, device: torch.device) -> None:
        self.out_width, self.in_width, self.device = out_width, in_width, device
        self.finished: ops.Matrix | None = None
        self._parts: dict[int, Codes | Tensor] = {}
        self._num_rows = 0

    def add(self, start: int, part: Codes | Tensor) -> None:
        """Rows [start, ...) of it; packs when they were the last ones."""
        assert start not in self._parts, start
        self._parts[start] = part
        self._num_rows += len(part) if isinstance(part, Tensor) else len(part.codes)
        if self._num_rows == self.out_width:
            self.finished = _join([self._parts[at] for at in sorted(self._parts)])
            self._parts.clear()


def _join(parts: list[Codes | Tensor]) -> ops.Matrix:
    """Neighbours that fit each other become one matrix."""
    runs: list[list[Codes | Tensor]] = []
    for part in parts:
        last = runs[-1][-1] if runs else None
        both_floats = isinstance(part, Tensor) and isinstance(last, Tensor)
        if both_floats or (isinstance(part, Codes) and isinstance(last, Codes) and last.fits(part)):
            runs[-1].append(part)
        else:
            runs.append([part])
    packed: list[PanelMatrix | Tensor] = []
    for run in runs:
        codes = [part for part in run if isinstance(part, Codes)]
        packed.append(pack(codes) if codes else ops.pack(torch.cat([part for part in run if isinstance(part, Tensor)])))  # type: ignore[arg-type]
    if len(packed) == 1:
        return packed[0]
    widths = tuple(sum(len(p) if isinstance(p, Tensor) else len(p.codes) for p in run) for run in runs)
    return StackedMatrix(tuple(packed), widths)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where the output rows of one checkpoint tensor go: rows [at, at + count) of a matrix.

    They are, of the tensor [out, in], rows [start, start + count) (axis 0), or all rows of columns [start, start + in_width)
    (axis 1); total: the tensor's size on that axis.
    """

    matrix: GrowingMatrix
    at: int
    count: int
    arrange: Arrange | None = None
    axis: int = 0
    start: int = 0
    total: int | None = None

    @property
    def whole_shape(self) -> tuple[int, int]:
        """Of the checkpoint's tensor."""
        shape = [self.count, self.matrix.in_width]
        if self.total is not None:
            shape[self.axis] = self.total
        return shape[0], shape[1]

    def arranged(self, rows: Tensor) -> Tensor:
        return rows if self.arrange is None else self.arrange(rows)


@dataclass(frozen=True, slots=True, eq=False)
class RoundedRows:
    """A float tensor, rounded as it comes (bits), or kept as floats of a type beside quantised neighbours (bits 0).

    Columns of a rank are cut out of whole rounded rows, so that ranks hold what one worker alone would.
    """

    into: Rows
    bits: int
    dtype: torch.dtype
    is_optional: bool = False
    is_float: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.into.whole_shape

    @property
    def rows(self) -> range:
        into = self.into
        return range(into.start, into.start + into.count) if into.axis == 0 else range(into.count)

    @property
    def num_taken(self) -> int:
        return len(self.rows) * self.shape[1]

    def take(self, source: Tensor) -> None:
        into = self.into
        rows = into.arranged(source)
        columns = (into.start, into.start + into.matrix.in_width) if into.axis == 1 else (0, into.matrix.in_width)
        if not self.bits:
            part = rows[:, slice(*columns)].to(into.matrix.device, self.dtype, copy=True)
            into.matrix.add(into.at, part)
            return
        codes = quantize(rows.to(into.matrix.device), self.bits)
        into.matrix.add(into.at, codes.columns(*columns) if into.axis == 1 else codes)


class StoredRows:
    """The tensors of one module of a GPTQ or AWQ checkpoint; the last of them to come makes the rows."""

    def __init__(self, module: str, into: Rows, stored: StoredQuantization) -> None:
        self.module, self.into, self.stored = module, into, stored
        self._waiting: set[str] = set()
        self._tensors: dict[str, Tensor] = {}

    def targets(self) -> dict[str, StoredPart]:
        """By the checkpoint's names. Raises ModelError where the format cannot hold such a shape."""
        out_width, in_width = self.into.whole_shape
        per_int = 32 // self.stored.bits
        num_groups = -(-in_width // (self.stored.group_len or in_width))
        packed = in_width if self.stored.method == "gptq" else out_width
        if out_width % per_int or packed % per_int:
            raise ModelError(
                f"{self.module} of {out_width} x {in_width} cannot be packed in groups of {per_int} (quantization_config)"
            )
        shapes = {
            "qweight": (in_width // per_int, out_width) if self.stored.method == "gptq" else (in_width, out_width // per_int),
            "qzeros": (num_groups, out_width // per_int),
            "scales": (num_groups, out_width),
        }
        if self.stored.method == "gptq":
            shapes["g_idx"] = (in_width,)
        self._waiting = set(shapes)
        return {f"{self.module}.{kind}": StoredPart(self, kind, shape) for kind, shape in shapes.items()}

    def take(self, kind: str, source: Tensor | None) -> None:
        if source is not None:
            self._tensors[kind] = source.clone()
        self._waiting.discard(kind)
        if self._waiting:
            return
        codes = unpack(self._tensors, self.stored, self.module)
        self._tensors.clear()
        into = self.into
        if into.axis == 1:
            if into.matrix.in_width < codes.codes.shape[1]:
                codes = codes.columns(into.start, into.start + into.matrix.in_width)
            rows = slice(None)
        else:
            rows = slice(into.start, into.start + into.count)

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else into.arranged(tensor[rows]).to(into.matrix.device)

        order = None if codes.order is None else codes.order.to(into.matrix.device)
        kept, scales = own(codes.codes), own(codes.scales)
        assert kept is not None
        assert scales is not None
        into.matrix.add(into.at, Codes(codes.bits, codes.group_len, kept, scales, own(codes.zeros), order))


@dataclass(frozen=True, slots=True, eq=False)
class StoredPart:
    """One of those tensors, read whole by every rank."""

    owner: StoredRows
    kind: str
    shape: tuple[int, ...]
    arrange: Arrange | None = field(default=None, init=False)

    @property
    def is_optional(self) -> bool:
        """g_idx may be missing where groups are of neighbours anyway."""
        return self.kind == "g_idx" and not self.owner.stored.is_act_order

    @property
    def is_float(self) -> bool:
        return self.kind == "scales"

    @property
    def rows(self) -> range:
        return range(self.shape[0])

    @property
    def num_taken(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def take(self, source: Tensor | None) -> None:
        self.owner.take(self.kind, source)


def unpack(tensors: dict[str, Tensor], stored: StoredQuantization, module: str) -> Codes:
    """A module's tensors as codes of the whole matrix, outputs as rows. Raises ModelError."""
    is_gptq, bits = stored.method == "gptq", stored.bits
    places = None if is_gptq else AWQ_PLACES
    if is_gptq:
        codes = _unpacked(tensors["qweight"].t(), bits, None)  # along the inputs
    else:
        codes = _unpacked(tensors["qweight"], bits, places).t()
    zeros = _unpacked(tensors["qzeros"], bits, places).t().to(torch.int16) + stored.zero_offset
    in_width = codes.shape[1]
    middle = 2 ** (bits - 1)
    if stored.is_symmetric and bool(((zeros == middle) | (zeros == middle + stored.zero_offset)).all()):
        # Symmetric rounding has its zero point in the middle. Some tools store it as the second format does, and say the first.
        zeros = torch.full_like(zeros, middle)
    if int(zeros.max()) > 255:
        raise ModelError(f"{module}.qzeros holds zero points above 255, which 8 bits cannot have; the checkpoint is damaged")
    group_len = stored.group_len or in_width
    order = None
    if "g_idx" in tensors:
        group_of = tensors["g_idx"].long()
        order = _order(group_of, group_len, module)
        if order is not None:
            codes = codes.index_select(1, order)
    scales = tensors["scales"].t().float()
    if not bool(torch.isfinite(scales.half()).all()):
        raise ModelError(f"{module}.scales holds numbers that float16 cannot hold; the checkpoint is damaged")
    return Codes(
        bits, min(group_len, in_width), codes.contiguous(), scales.half().contiguous(), zeros.to(torch.uint8).contiguous(), order
    )


def _unpacked(packed: Tensor, bits: int, places: tuple[int, ...] | None) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits]; places[i]: which of an integer's fields number i is."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    if places is not None:
        shifts = shifts[torch.tensor(places)]
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


def _order(group_of: Tensor, group_len: int, module: str) -> Tensor | None:
    """The inputs sorted by group; None where they are. Raises ModelError unless each group has group_len inputs."""
    in_width = len(group_of)
    wanted = torch.arange(in_width) // group_len
    if torch.equal(group_of, wanted):
        return None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], wanted):
        raise ModelError(f"{module}.g_idx does not deal {in_width} inputs to groups of {group_len}; the checkpoint is damaged")
    return order
