"""Matrices of float32, int8 and int4 times few or many rows of float32 on a CPU, every sum in float32. Needs numba.

A matrix [out, in] lies in panels of 64 outputs: [num_panels, in, 64]. So one vector register holds 16 outputs, an input is
broadcast to them, and no sum runs across a register. The innermost tile, up to ROWS rows of x by 64 outputs, keeps its sums in
registers and turns a weight into a float on the way from memory to them: a weight is read once for ROWS rows, as one byte or half
of one. The tile is written as LLVM vectors (numba's own loops keep no array in registers); LLVM makes AVX-512 or AVX2 of it.
The scheme is that of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), with weights packed once.

Called by kernels/panels.py, which says how a matrix lies in memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, literally, njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic
from torch import Tensor

from kernels.panels import FLOAT32, INT4, INT8, INT8_ZEROS, PANEL, PANEL_ROW_NBYTES, PanelMatrix
from kernels.threads import run_on_all

LINE_NBYTES = 64
BLOCK_NBYTES = 256 << 10  # of a panel, used for all rows before the next: what a second-level cache keeps beside x


def _features() -> set[str]:
    from llvmlite import binding

    if config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES: what the code is made for
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


FEATURES = _features()
IS_WIDE = "avx512f" in FEATURES  # 32 registers of 16 floats; else 16 of 8
ROWS = 6 if IS_WIDE else 3
TILES = ((0, 1, 2, 3),) if IS_WIDE else ((0, 2), (1, 3))  # which of a panel's four vectors a tile computes
NEEDED = frozenset({"avx2", "fma", "f16c"})


# ---- the tile, in LLVM's words ---------------------------------------------------------------------------------------

_INT, _BYTE, _FLOAT = ir.IntType(64), ir.IntType(8), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, 16)
_HALVES = ir.VectorType(ir.HalfType(), 16)
_BYTES = ir.VectorType(_BYTE, 16)
_WIDE = ir.VectorType(ir.IntType(32), 16)


def _splat(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * 16)


class _Tile(NamedTuple):
    """The operands of one tile, as LLVM values: addresses, and strides in bytes."""

    weights: Any  # of the panel's first input of this group
    x: Any
    x_stride: Any
    length: Any  # inputs
    out: Any
    out_stride: Any
    scales: Any
    zeros: Any
    ahead: Any  # a cache line from there for each input is fetched on the way

    def load(self, b: Any, base: Any, kind: Any, align: int) -> Any:
        return b.load(b.inttoptr(base, kind.as_pointer()), align=align)


def _at(b: Any, base: Any, offset: int) -> Any:
    return b.add(base, ir.Constant(_INT, offset)) if offset else base


def _fetch(b: Any, address: Any) -> None:
    """Have the line there on its way to the second-level cache."""
    byte, word = _BYTE.as_pointer(), ir.IntType(32)
    fetch = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0")
    b.call(fetch, [b.inttoptr(address, byte), *(ir.Constant(word, n) for n in (0, 2, 1))])


def _weights(b: Any, tile: _Tile, kind: int, vectors: tuple[int, ...], row: Any, zeros: dict[int, Any]) -> list[Any]:
    """The floats (code - zero point) of one input's outputs, a vector of 16 for each of `vectors`."""
    if kind == FLOAT32:
        return [tile.load(b, _at(b, row, 64 * v), _FLOATS, 4) for v in vectors]
    if kind == INT4:
        pairs = {v % 2: tile.load(b, _at(b, row, 16 * (v % 2)), _BYTES, 1) for v in vectors}
        codes = {
            v: b.lshr(pairs[v % 2], _splat(_BYTES, 4)) if v >= 2 else b.and_(pairs[v % 2], _splat(_BYTES, 15)) for v in vectors
        }
        return [b.sitofp(b.sext(b.sub(codes[v], zeros[v]), _WIDE), _FLOATS) for v in vectors]
    wide = [b.sext(tile.load(b, _at(b, row, 16 * v), _BYTES, 1), _WIDE) for v in vectors]
    if kind == INT8_ZEROS:
        wide = [b.sub(code, zeros[v]) for code, v in zip(wide, vectors, strict=True)]
    return [b.sitofp(code, _FLOATS) for code in wide]


def _emit(b: Any, tile: _Tile, kind: int, rows: int, vectors: tuple[int, ...]) -> None:
    """out[r, v] += scale[v] * sum over inputs of x[r] * weight[v], for a few rows and 16 outputs in each v."""
    zeros: dict[int, Any] = {}
    if kind in (INT8_ZEROS, INT4):
        zeros = {v: tile.load(b, _at(b, tile.zeros, 16 * v), _BYTES, 1) for v in vectors}
    if kind == INT8_ZEROS:
        zeros = {v: b.sext(zero, _WIDE) for v, zero in zeros.items()}
    sums = [[cgutils.alloca_once_value(b, _splat(_FLOATS, 0.0)) for _ in vectors] for _ in range(rows)]
    with cgutils.for_range(b, tile.length) as loop:
        row = b.add(tile.weights, b.mul(loop.index, ir.Constant(_INT, PANEL_ROW_NBYTES[kind])))
        if vectors == TILES[0]:
            _fetch(b, b.add(tile.ahead, b.mul(loop.index, ir.Constant(_INT, LINE_NBYTES))))
        weights = _weights(b, tile, kind, vectors, row, zeros)
        for r in range(rows):
            at = b.add(b.add(tile.x, b.mul(loop.index, ir.Constant(_INT, 4))), b.mul(tile.x_stride, ir.Constant(_INT, r)))
            one = b.load(b.inttoptr(at, _FLOAT.as_pointer()), align=4)
            first = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
            x = b.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), _splat(_WIDE, 0))
            for total, weight in zip(sums[r], weights, strict=True):
                b.store(b.fadd(b.load(total), b.fmul(x, weight, flags=["contract"]), flags=["contract"]), total)
    for i, v in enumerate(vectors):
        scale = None
        if kind != FLOAT32:
            scale = b.fpext(tile.load(b, _at(b, tile.scales, 32 * v), _HALVES, 2), _FLOATS)
        for r in range(rows):
            to = b.inttoptr(_at(b, b.add(tile.out, b.mul(tile.out_stride, ir.Constant(_INT, r))), 64 * v), _FLOATS.as_pointer())
            total = b.load(sums[r][i])
            if scale is not None:
                total = b.fmul(total, scale, flags=["contract"])
            b.store(b.fadd(b.load(to, align=4), total, flags=["contract"]), to, align=4)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _typing: Any, kind: Any, rows: Any, weights: Any, x: Any, x_stride: Any, length: Any, out: Any, out_stride: Any, scales: Any,
    zeros: Any, ahead: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """One tile for each number of rows, and a switch that chooses. kind is known when this is compiled."""
    if not isinstance(kind, types.IntegerLiteral):
        return None
    number = int(kind.literal_value)

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        end = b.append_basic_block("tile.end")
        choice = b.switch(args[1], end)
        for count in range(1, ROWS + 1):
            block = b.append_basic_block(f"tile.{count}")
            choice.add_case(ir.Constant(_INT, count), block)
            b.position_at_end(block)
            for vectors in TILES:
                _emit(b, _Tile(*args[2:]), number, count, vectors)
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _next(_typing: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Take the counter at this address and leave one more: threads share a loop by it."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _INT.as_pointer()), ir.Constant(_INT, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _floats(_typing: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """The address as a pointer to float32."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


# ---- the loops around it, in numba -----------------------------------------------------------------------------------

# One job, 64-bit integers; addresses of memory that the caller keeps alive. 0 for a bias or residual: none.
(
    _NEXT, _SELF, _NUM_PANELS, _ROW_NBYTES, _ROWS, _IN, _OUT, _GROUP, _WEIGHTS, _SCALES, _ZEROS, _ZEROS_STEP, _X, _TO,
    _BIAS, _RESIDUAL, _NUM_FIELDS,
) = range(17)  # fmt: skip


def _cached(decorate: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Any], Any]:
    """With the compiled code kept in a file, unless no folder can be written to."""

    def apply(function: Any) -> Any:
        try:
            return decorate(*signature, cache=True, **options)(function)
        except (RuntimeError, OSError):
            return decorate(*signature, **options)(function)

    return apply


@_cached(njit, nogil=True, inline="never")
def _begin(job: Any, row: int, count: int, first: int, width: int) -> None:
    """Residual and bias, or zeros, for the tiles to add to: columns [first, first + width) of some rows."""
    rows, out_width = job[_ROWS], job[_OUT]
    out = carray(_floats(job[_TO]), (rows, out_width))
    if job[_RESIDUAL] == 0:
        for r in range(row, row + count):
            for i in range(first, first + width):
                out[r, i] = 0.0
    elif job[_RESIDUAL] != job[_TO]:
        residual = carray(_floats(job[_RESIDUAL]), (rows, out_width))
        for r in range(row, row + count):
            for i in range(first, first + width):
                out[r, i] = residual[r, i]
    if job[_BIAS] != 0:
        bias = carray(_floats(job[_BIAS]), (out_width,))
        for r in range(row, row + count):
            for i in range(first, first + width):
                out[r, i] += bias[i]


@_cached(njit, nogil=True, inline="never")
def _run_panel(kind: int, job: Any, panel: int) -> None:
    """x times one panel, a block of inputs at a time for all rows."""
    literally(kind)
    rows, in_width, out_width, group, row_nbytes = job[_ROWS], job[_IN], job[_OUT], job[_GROUP], job[_ROW_NBYTES]
    first = panel * PANEL
    width = min(PANEL, out_width - first)
    out, out_stride = job[_TO] + first * 4, out_width * 4
    spare = np.zeros((0 if width == PANEL else rows, PANEL), np.float32)
    if width < PANEL:  # the last panel is wider than what is left of a row
        out, out_stride = spare.ctypes.data, PANEL * 4
    num_groups = (in_width + group - 1) // group
    num_parts = (rows + ROWS - 1) // ROWS  # of nearly equal size: each part reads the block once
    block = max(1, BLOCK_NBYTES // row_nbytes)
    if group < in_width:
        block = max(group, block // group * group)
    weights = job[_WEIGHTS] + panel * in_width * row_nbytes
    for start in range(0, in_width, block):
        stop = min(in_width, start + block)
        for part in range(num_parts):
            row = part * rows // num_parts
            count = (part + 1) * rows // num_parts - row
            if start == 0:
                _begin(job, row, count, first, width)
            x, to = job[_X] + row * in_width * 4, out + row * out_stride
            # The first part reads the block from memory, in order, which the CPU foresees. The others fetch the next one meanwhile.
            ahead = weights + stop * row_nbytes + (part - 1) * (stop - start) * LINE_NBYTES
            if part == 0 or part * LINE_NBYTES > row_nbytes:
                ahead = weights + start * row_nbytes
            at = start
            while at < stop:
                length = min(group - at % group, stop - at)
                of_group = panel * num_groups + at // group
                zeros = job[_ZEROS] + of_group * job[_ZEROS_STEP]
                scales = job[_SCALES] + of_group * (2 * PANEL)
                _tile(
                    kind,
                    count,
                    weights + at * row_nbytes,
                    x + at * 4,
                    in_width * 4,
                    length,
                    to,
                    out_stride,
                    scales,
                    zeros,
                    ahead + (at - start) * LINE_NBYTES,
                )
                at += length
    if width < PANEL:
        whole = carray(_floats(job[_TO]), (rows, out_width))
        for row in range(rows):
            for i in range(width):
                whole[row, first + i] += spare[row, i]


# What each thread does, by kind: panels, until there are none left.


def _run_float32(pointer: Any) -> None:
    job = carray(pointer, (_NUM_FIELDS,))
    panel = _next(job[_SELF])
    while panel < job[_NUM_PANELS]:
        _run_panel(FLOAT32, job, panel)
        panel = _next(job[_SELF])


def _run_int8(pointer: Any) -> None:
    job = carray(pointer, (_NUM_FIELDS,))
    panel = _next(job[_SELF])
    while panel < job[_NUM_PANELS]:
        _run_panel(INT8, job, panel)
        panel = _next(job[_SELF])


def _run_int8_zeros(pointer: Any) -> None:
    job = carray(pointer, (_NUM_FIELDS,))
    panel = _next(job[_SELF])
    while panel < job[_NUM_PANELS]:
        _run_panel(INT8_ZEROS, job, panel)
        panel = _next(job[_SELF])


def _run_int4(pointer: Any) -> None:
    job = carray(pointer, (_NUM_FIELDS,))
    panel = _next(job[_SELF])
    while panel < job[_NUM_PANELS]:
        _run_panel(INT4, job, panel)
        panel = _next(job[_SELF])


# ---- what Python calls -----------------------------------------------------------------------------------------------


@functools.cache
def is_usable() -> bool:
    """Whether this CPU has what the tiles are made of."""
    return NEEDED <= FEATURES


@functools.cache
def compiled(kind: int) -> int:
    """The address of the loop for matrices of this kind. The first time on a machine takes seconds, later ones read a file."""
    loop = (_run_float32, _run_int8, _run_int8_zeros, _run_int4)[kind]
    return int(_cached(cfunc, types.void(types.CPointer(types.int64)))(loop).address)


def multiply(x: Tensor, matrix: PanelMatrix, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """out [rows, out_width] = x @ matrix.T + bias + residual; all contiguous float32, out may be residual."""
    scales, zeros = matrix.scales, matrix.zeros
    zeros_step = 0 if zeros is None or zeros.dim() == 1 else PANEL
    job = (ctypes.c_int64 * _NUM_FIELDS)(
        0, 0, -(-matrix.out_width // PANEL), PANEL_ROW_NBYTES[matrix.kind], x.shape[0], matrix.in_width,
        matrix.out_width, matrix.group_len, matrix.weights.data_ptr(), 0 if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), zeros_step, x.data_ptr(), out.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(),
    )  # fmt: skip
    job[_SELF] = address = ctypes.addressof(job)
    run_on_all(compiled(matrix.kind), address)
