"""Vectors of 16 floats for numba: what its own loops cannot be relied on to become.

Each function here is an intrinsic: a few lines of LLVM IR at the place of its call. Addresses are plain int64, in bytes, and
nothing is checked. A CPU with narrower registers gets the same vectors in pieces, from LLVM. Used by kernels/native.py only,
which is imported late: numba takes a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
VECTOR_NBYTES = 4 * LANES
AHEAD = 16  # rows
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_FUSED = ("contract", "nsz")  # a multiplication and an addition may become one instruction; NaN stays NaN


class Vector(types.Type):
    """16 float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


vector = Vector()


def _emits(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba function of one that writes its IR: code(builder, *values)."""

    def decorate(code: Callable[..., Any]) -> Any:
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            made = code(builder, *values)
            return context.get_dummy_value() if result is types.void else made

        def typed(typing: Any, *_: Any) -> Any:
            return result(*arguments), emit

        # numba binds arguments by the signature that it sees, and takes no *args there.
        names = ("typing", *(f"value_{place}" for place in range(len(arguments))))
        typed.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        typed.__name__ = code.__name__
        typed.__doc__ = code.__doc__
        return intrinsic(typed)

    return decorate


def _at(builder: Any, kind: Any, *parts: Any) -> Any:
    """A pointer to the sum of these addresses and offsets."""
    total = parts[0]
    for part in parts[1:]:
        total = builder.add(total, part)
    return builder.inttoptr(total, kind.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _const(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)


# ---- memory ----------------------------------------------------------------------------------------------------------


@_emits(vector, types.int64)
def load(builder: Any, address: Any) -> Any:
    return builder.load(_at(builder, _VECTOR, address), align=4)


@_emits(types.void, types.int64, vector)
def store(builder: Any, address: Any, value: Any) -> Any:
    builder.store(value, _at(builder, _VECTOR, address), align=4)


@_emits(types.float32, types.int64)
def load_float(builder: Any, address: Any) -> Any:
    return builder.load(_at(builder, _F32, address), align=4)


@_emits(types.void, types.int64, types.float32)
def store_float(builder: Any, address: Any, value: Any) -> Any:
    builder.store(value, _at(builder, _F32, address), align=4)


@_emits(types.int64, types.int64)
def load_int(builder: Any, address: Any) -> Any:
    return builder.load(_at(builder, _I64, address), align=8)


@_emits(types.int64, types.int64)
def take_ticket(builder: Any, address: Any) -> Any:
    """The int64 there, which is one more afterwards; no two threads get the same."""
    return builder.atomic_rmw("add", _at(builder, _I64, address), ir.Constant(_I64, 1), "monotonic")


# ---- lane by lane ----------------------------------------------------------------------------------------------------


@_emits(vector, types.float32)
def splat(builder: Any, value: Any) -> Any:
    return _splat(builder, value)


@_emits(vector, vector, vector)
def add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@_emits(vector, vector, vector)
def subtract(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@_emits(vector, vector, vector)
def multiply(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@_emits(vector, vector, vector, vector)
def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""
    return _fma(builder, a, b, c)


@_emits(vector, vector, vector)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """b where it is larger, else a."""
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


@_emits(vector, vector, vector, vector, vector, vector)
def keep_between(builder: Any, value: Any, low: Any, at: Any, high: Any, other: Any) -> Any:
    """value in lanes where low < at <= high, else other."""
    inside = builder.and_(builder.fcmp_ordered("<", low, at), builder.fcmp_ordered("<=", at, high))
    return builder.select(inside, value, other)


@_emits(vector, vector)
def swap_neighbours(builder: Any, a: Any) -> Any:
    """Lanes 1, 0, 3, 2, ..."""
    order = [lane ^ 1 for lane in range(LANES)]
    return builder.shuffle_vector(a, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INTS, order))


def _sum(builder: Any, a: Any) -> Any:
    total, width = a, LANES
    while width > 1:
        width //= 2
        nothing, kind = ir.Constant(total.type, ir.Undefined), ir.VectorType(_I32, width)
        even, odd = (ir.Constant(kind, list(range(first, 2 * width, 2))) for first in (0, 1))
        total = builder.fadd(builder.shuffle_vector(total, nothing, even), builder.shuffle_vector(total, nothing, odd))
    return builder.extract_element(total, ir.Constant(_I32, 0))


@_emits(types.float32, vector)
def sum_of(builder: Any, a: Any) -> Any:
    """All lanes added, neighbours first."""
    return _sum(builder, a)


@_emits(types.float32, vector)
def largest_of(builder: Any, a: Any) -> Any:
    """NaN where a lane is NaN."""
    total, width = a, LANES
    while width > 1:
        width //= 2
        nothing, kind = ir.Constant(total.type, ir.Undefined), ir.VectorType(_I32, width)
        first, second = (
            builder.shuffle_vector(total, nothing, ir.Constant(kind, list(range(start, start + width)))) for start in (0, width)
        )
        total = builder.select(builder.fcmp_unordered(">", second, first), second, first)
    return builder.extract_element(total, ir.Constant(_I32, 0))


@_emits(vector, vector)
def exp_of_negative(builder: Any, a: Any) -> Any:
    """e to the power of lanes that are not above zero, within two units in the last place (the polynomial of Cephes' expf).

    Below -87 it is as at -87, about 1e-38.
    """
    x = builder.select(builder.fcmp_ordered("<", a, _const(-87.0)), _const(-87.0), a)
    nearest = builder.fptosi(_fma(builder, x, _const(1.4426950408889634), _const(-0.5)), _INTS)  # towards zero
    n = builder.sitofp(nearest, _VECTOR)
    r = _fma(builder, n, _const(-0.693359375), x)
    r = _fma(builder, n, _const(2.12194440e-4), r)
    poly = _const(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        poly = _fma(builder, poly, r, _const(term))
    value = builder.fadd(_fma(builder, poly, builder.fmul(r, r), r), _const(1.0))
    bits = builder.shl(builder.add(nearest, ir.Constant(_INTS, [127] * LANES)), ir.Constant(_INTS, [23] * LANES))
    return builder.fmul(value, builder.bitcast(bits, _VECTOR))


@_emits(vector, vector)
def minus_absolute(builder: Any, a: Any) -> Any:
    bits = builder.or_(builder.bitcast(a, _INTS), ir.Constant(_INTS, [-(1 << 31)] * LANES))
    return builder.bitcast(bits, _VECTOR)


@_emits(vector, vector, vector)
def times_sigmoid(builder: Any, x: Any, e: Any) -> Any:
    """x * sigmoid(x), given e = exp(-|x|)."""
    top = builder.select(builder.fcmp_ordered("<", x, _const(0.0)), e, _const(1.0))
    return builder.fdiv(builder.fmul(x, top), builder.fadd(e, _const(1.0)))


# ---- the inner kernel of every product -------------------------------------------------------------------------------


def _fetch(builder: Any, run: Any, step: Any, index: Any, length: Any, following: Any) -> Any:
    """Where to ask memory ahead: AHEAD rows further in a run of `length` rows of `step` bytes, and beyond its end in the run that
    follows. A core by itself looks ahead only inside of a page of 4 KiB, and runs of blocks lie anywhere."""
    there = builder.add(index, ir.Constant(_I64, AHEAD))
    beyond = builder.sub(there, length)
    is_beyond = builder.icmp_signed(">=", beyond, ir.Constant(_I64, 0))
    base, row = builder.select(is_beyond, following, run), builder.select(is_beyond, beyond, there)
    return builder.add(base, builder.mul(step, row))


def _ask(builder: Any, address: Any, offset: Any) -> None:
    """Prefetch one line; harmless wherever that is."""
    pointer = _at(builder, ir.IntType(8), address, offset)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _tile(num_rows: int, num_vectors: int, streams: bool = False) -> Any:
    """c[row, lane] (+)= sum over depth of a[row, depth] * b[depth, lane], num_rows x (16 * num_vectors) sums in registers.

    One load of b and one broadcast of a serve num_rows * num_vectors multiplications. Steps are in bytes; is_fresh 1 starts
    from zero, 0 from what c holds. streams: b comes from memory, once; then one more argument, the run that is read next.
    """
    places = [(row, part) for row in range(num_rows) for part in range(num_vectors)]

    @_emits(types.void, *(types.int64,) * (10 if streams else 9))
    def tile(
        builder: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, c: Any, c_row: Any, depth: Any, is_fresh: Any,
        following: Any = None,
    ) -> None:  # fmt: skip
        def times(step: Any, count: int) -> Any:
            return builder.mul(step, ir.Constant(_I64, count))

        def lanes(part: int) -> Any:
            return ir.Constant(_I64, part * VECTOR_NBYTES)

        sums = {place: cgutils.alloca_once_value(builder, _const(0.0)) for place in places}
        results = {(row, part): _at(builder, _VECTOR, c, times(c_row, row), lanes(part)) for row, part in places}
        with builder.if_else(builder.icmp_signed("==", is_fresh, ir.Constant(_I64, 0))) as (goes_on, begins):
            with goes_on:
                for place in places:
                    builder.store(builder.load(results[place], align=4), sums[place])
            with begins:
                for place in places:
                    builder.store(_const(0.0), sums[place])
        with cgutils.for_range(builder, depth) as loop:
            row_of_b = builder.add(b, builder.mul(b_step, loop.index))
            column_of_a = builder.add(a, builder.mul(a_step, loop.index))
            parts = [builder.load(_at(builder, _VECTOR, row_of_b, lanes(part)), align=4) for part in range(num_vectors)]
            if streams:
                ahead = _fetch(builder, b, b_step, loop.index, depth, following)
                for part in range(num_vectors):
                    _ask(builder, ahead, lanes(part))
            for row in range(num_rows):
                value = _splat(builder, builder.load(_at(builder, _F32, column_of_a, times(a_row, row)), align=4))
                for part in range(num_vectors):
                    total = sums[row, part]
                    builder.store(_fma(builder, value, parts[part], builder.load(total)), total)
        for place in places:
            builder.store(builder.load(sums[place]), results[place], align=4)

    return tile


tile_8x2 = _tile(8, 2)
tile_8x1 = _tile(8, 1)
tile_1x1 = _tile(1, 1)
tile_1x4, tile_2x4, tile_3x4, tile_4x4 = (_tile(num_rows, 4, streams=True) for num_rows in (1, 2, 3, 4))


def _dots(num_queries: int) -> Any:
    """out[query, key] = scale * (key . query), for few queries and keys that come from memory once; out_row in bytes, rows of keys
    and queries touch. following: the run that is read next."""

    @_emits(types.void, *(types.int64,) * 7, types.float32)
    def dots(
        builder: Any, keys: Any, num_keys: Any, following: Any, queries: Any, width: Any, out: Any, out_row: Any, scale: Any
    ) -> None:
        nbytes = builder.mul(width, ir.Constant(_I64, 4))
        sums = [cgutils.alloca_once_value(builder, _const(0.0)) for _ in range(num_queries)]
        with cgutils.for_range(builder, num_keys) as loop:
            key = builder.add(keys, builder.mul(nbytes, loop.index))
            ahead = _fetch(builder, keys, nbytes, loop.index, num_keys, following)
            for total in sums:
                builder.store(_const(0.0), total)
            with cgutils.for_range(builder, builder.sdiv(width, ir.Constant(_I64, LANES))) as inner:
                offset = builder.mul(inner.index, ir.Constant(_I64, VECTOR_NBYTES))
                part = builder.load(_at(builder, _VECTOR, key, offset), align=4)
                _ask(builder, ahead, offset)
                for query, total in enumerate(sums):
                    row = builder.mul(nbytes, ir.Constant(_I64, query))
                    other = builder.load(_at(builder, _VECTOR, queries, row, offset), align=4)
                    builder.store(_fma(builder, part, other, builder.load(total)), total)
            place = builder.add(out, builder.mul(loop.index, ir.Constant(_I64, 4)))
            for query, total in enumerate(sums):
                value = builder.fmul(_sum(builder, builder.load(total)), scale)
                builder.store(value, _at(builder, _F32, place, builder.mul(out_row, ir.Constant(_I64, query))), align=4)

    return dots


dots_1, dots_2, dots_3, dots_4 = (_dots(num_queries) for num_queries in (1, 2, 3, 4))
