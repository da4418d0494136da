"""The CPU kernels of kernels/ops.py in numba, float32: attention on the paged pool as it lies, norms, rotation with KV write.

Compiled functions take one address: of a row of int64, whose places `A_...`, `N_...` name. Each takes pieces of the work by a ticket
until none is left, so any number of threads may run the same call; `kernels/cpu.py` starts them, and is the only caller. No
bounds are checked here.

Attention is that of FlashAttention (Dao et al. 2022): an online softmax over tiles of keys. A piece is a few queries of one
sequence for one KV head, with all query heads of that head: rows. Rows lie along the lanes of vectors, keys and values are
read where they are in their blocks and broadcast, so nothing is gathered, and softmax goes lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from kernels.simd import (
    LANES,
    VECTOR_NBYTES,
    add,
    dots_1,
    dots_2,
    dots_3,
    dots_4,
    exp_of_negative,
    keep_between,
    larger,
    largest_of,
    load,
    load_float,
    load_int,
    minus_absolute,
    multiply,
    multiply_add,
    splat,
    store,
    store_float,
    subtract,
    sum_of,
    swap_neighbours,
    take_ticket,
    tile_1x1,
    tile_1x4,
    tile_2x4,
    tile_3x4,
    tile_4x4,
    tile_8x1,
    tile_8x2,
    times_sigmoid,
)

MAX_ROWS = 96  # of a piece: queries times heads of a group, in steps of 32 (or 16, when there are no more)
MAX_KEYS = 64  # of a tile
FEW_ROWS = 8
MIN_SCORE = -1e30  # where nothing may be seen
FLOAT = 4
INT = 8
TICKET, SCRATCH_TICKET, NUM_PIECES, SCRATCH, SCRATCH_NBYTES, FIRST_FREE = range(6)  # of every argument row


def _cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in can be written: compiled anew by every process
            return numba.njit(**options)(function)

    return decorate


def _entry(function: Callable[..., Any]) -> Any:
    """A C function of one address."""
    signature = numba.types.void(numba.types.int64)
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:
        return numba.cfunc(signature)(function)


# ---- attention -------------------------------------------------------------------------------------------------------

(
    A_Q, A_Q_STEP, A_KV, A_OUT, A_OUT_STEP, A_HEAD_DIM, A_NUM_KV_HEADS, A_GROUP, A_BLOCK_SIZE, A_PIECES, A_WINDOW, A_SCALE, A_SIZE,
) = range(FIRST_FREE, FIRST_FREE + 13)  # fmt: skip
P_ROW, P_COUNT, P_HEAD, P_POSITION, P_TABLE, P_SIZE = range(6)  # of a piece; P_TABLE: address of its sequence's block ids, int64


def attention_scratch_nbytes(head_dim: int) -> int:
    """Of one thread."""
    return (2 * head_dim + MAX_KEYS + 4) * MAX_ROWS * FLOAT


@_cached()
def _at(args, place):
    return load_int(args + place * INT)


@_cached()
def _take_rows(args, piece, rows, lanes, turned, most, total, last, before):
    """The piece's queries times scale, turned so that rows lie along the lanes; and of each row: nothing seen yet, the position of
    the last key that it sees, and of the last one before its window."""
    dim, group, window = _at(args, A_HEAD_DIM), _at(args, A_GROUP), _at(args, A_WINDOW)
    scale = load_float(_at(args, A_SCALE))
    stride = lanes * FLOAT
    first = load_int(piece + P_ROW * INT)
    position = load_int(piece + P_POSITION * INT)
    head = load_int(piece + P_HEAD * INT) * group
    for row in range(lanes):
        used = min(row, rows - 1)  # a lane without a row does the last one's work again
        token = used // group
        source = _at(args, A_Q) + (first + token) * _at(args, A_Q_STEP) + (head + used % group) * dim * FLOAT
        for d in range(dim):
            store_float(turned + d * stride + row * FLOAT, load_float(source + d * FLOAT) * scale)
        store_float(last + row * FLOAT, numba.float32(position + token))
        store_float(before + row * FLOAT, numba.float32(position + token - window if window else -1))
        store_float(most + row * FLOAT, numba.float32(MIN_SCORE))
        store_float(total + row * FLOAT, numba.float32(0))


@_cached()
def _multiply(a, a_row, a_step, num_rows, b, lanes, c, depth, is_fresh):
    """c[row, lane] (+)= sum of a[row, k] * b[k, lane]; b and c have rows of `lanes` floats."""
    stride = lanes * FLOAT
    whole = num_rows - num_rows % 8
    if lanes % 32 == 0:
        for row in range(0, whole, 8):
            for lane in range(0, stride, 2 * VECTOR_NBYTES):
                tile_8x2(a + row * a_row, a_row, a_step, b + lane, stride, c + row * stride + lane, stride, depth, is_fresh)
    else:
        for row in range(0, whole, 8):
            for lane in range(0, stride, VECTOR_NBYTES):
                tile_8x1(a + row * a_row, a_row, a_step, b + lane, stride, c + row * stride + lane, stride, depth, is_fresh)
    for row in range(whole, num_rows):
        for lane in range(0, stride, VECTOR_NBYTES):
            tile_1x1(a + row * a_row, a_row, a_step, b + lane, stride, c + row * stride + lane, stride, depth, is_fresh)


@_cached()
def _soften(scores, num_keys, first_key, is_masked, lanes, most, total, last, before, out, dim, is_first):
    """One tile's step of the online softmax: scores become weights, sums go on, and what was summed under a smaller maximum
    shrinks."""
    stride = lanes * FLOAT
    for lane in range(0, stride, VECTOR_NBYTES):
        old = load(most + lane)
        new = old
        if is_masked:
            high, low, nothing = load(last + lane), load(before + lane), splat(numba.float32(MIN_SCORE))
            for key in range(num_keys):
                place = scores + key * stride + lane
                score = keep_between(load(place), low, splat(numba.float32(first_key + key)), high, nothing)
                store(place, score)
                new = larger(new, score)
        else:
            for key in range(num_keys):
                new = larger(new, load(scores + key * stride + lane))
        shrunk = exp_of_negative(subtract(old, new))
        summed = multiply(load(total + lane), shrunk)
        for key in range(num_keys):
            place = scores + key * stride + lane
            weight = exp_of_negative(subtract(load(place), new))
            store(place, weight)
            summed = add(summed, weight)
        store(most + lane, new)
        store(total + lane, summed)
        if not is_first:
            for d in range(dim):
                place = out + d * stride + lane
                store(place, multiply(load(place), shrunk))


@_cached()
def _give_rows(args, piece, rows, lanes, total, out):
    dim, group = _at(args, A_HEAD_DIM), _at(args, A_GROUP)
    first, head = load_int(piece + P_ROW * INT), load_int(piece + P_HEAD * INT) * group
    for row in range(rows):
        share = numba.float32(1) / load_float(total + row * FLOAT)
        target = _at(args, A_OUT) + (first + row // group) * _at(args, A_OUT_STEP) + (head + row % group) * dim * FLOAT
        for d in range(dim):
            store_float(target + d * FLOAT, load_float(out + (d * lanes + row) * FLOAT) * share)


@_cached()
def _attend_piece(args, piece, scratch):
    dim, group, block_size, window = _at(args, A_HEAD_DIM), _at(args, A_GROUP), _at(args, A_BLOCK_SIZE), _at(args, A_WINDOW)
    position, count = load_int(piece + P_POSITION * INT), load_int(piece + P_COUNT * INT)
    table = load_int(piece + P_TABLE * INT)
    rows = count * group
    lanes = LANES if rows <= LANES else (rows + 31) // 32 * 32
    stride = lanes * FLOAT
    turned = scratch
    out = turned + dim * stride
    scores = out + dim * stride
    most = scores + MAX_KEYS * stride
    total, last, before = most + stride, most + 2 * stride, most + 3 * stride
    _take_rows(args, piece, rows, lanes, turned, most, total, last, before)
    row_nbytes = dim * FLOAT
    head_nbytes = block_size * row_nbytes
    to_values = _at(args, A_NUM_KV_HEADS) * head_nbytes
    pool = _at(args, A_KV) + load_int(piece + P_HEAD * INT) * head_nbytes
    begin = max(0, position - window + 1) if window else 0
    end = position + count
    for first in range(begin, end, MAX_KEYS):
        num_keys = min(MAX_KEYS, end - first)
        for values in range(2):  # scores of all the tile's keys, then the softmax, then their values, each block after block
            if values:
                is_masked = first + num_keys - 1 > position or (window > 0 and first <= end - 1 - window)
                _soften(scores, num_keys, first, is_masked, lanes, most, total, last, before, out, dim, first == begin)
            key = 0
            while key < num_keys:
                slot = (first + key) % block_size
                length = min(num_keys - key, block_size - slot)
                block = load_int(table + (first + key) // block_size * INT)
                place = pool + block * 2 * to_values + slot * row_nbytes
                part = scores + key * stride
                if values:
                    is_fresh = 1 if first == begin and key == 0 else 0
                    _multiply(place + to_values, FLOAT, row_nbytes, dim, part, lanes, out, length, is_fresh)
                else:
                    _multiply(place, row_nbytes, FLOAT, length, turned, lanes, part, dim, 1)
                key += length
    _give_rows(args, piece, rows, lanes, total, out)


@_cached()
def _weights_of_row(scores, num_keys, most, total, row):
    """The online softmax of one row whose keys lie along the lanes, num_keys padded to whole vectors. -> what was summed before
    shrinks by this."""
    old = load_float(most + row * FLOAT)
    new = splat(old)
    for at in range(0, num_keys * FLOAT, VECTOR_NBYTES):
        new = larger(new, load(scores + at))
    biggest = largest_of(new)
    new = splat(biggest)
    summed = splat(numba.float32(0))
    for at in range(0, num_keys * FLOAT, VECTOR_NBYTES):
        weight = exp_of_negative(subtract(load(scores + at), new))
        store(scores + at, weight)
        summed = add(summed, weight)
    shrunk = exp_of_negative(subtract(splat(old), new))
    store_float(most + row * FLOAT, biggest)
    store_float(
        total + row * FLOAT,
        load_float(total + row * FLOAT) * sum_of(multiply(shrunk, splat(numba.float32(0.0625)))) + sum_of(summed),
    )
    return shrunk


@_cached()
def _score_few(keys, length, following, queries, num_rows, dim, scores, row_nbytes, scale):
    for row in range(0, num_rows, 4):
        left = num_rows - row
        query, out = queries + row * dim * FLOAT, scores + row * row_nbytes
        if left >= 4:
            dots_4(keys, length, following, query, dim, out, row_nbytes, scale)
        elif left == 3:
            dots_3(keys, length, following, query, dim, out, row_nbytes, scale)
        elif left == 2:
            dots_2(keys, length, following, query, dim, out, row_nbytes, scale)
        else:
            dots_1(keys, length, following, query, dim, out, row_nbytes, scale)


@_cached()
def _sum_few(values, length, following, weights, num_rows, dim, row_nbytes, out, is_fresh):
    """out[row, d] (+)= sum of weights[row, key] * values[key, d], for dim in whole or quarter tiles."""
    nbytes = dim * FLOAT
    for row in range(0, num_rows, 4):
        left = num_rows - row
        weight, target = weights + row * row_nbytes, out + row * nbytes
        for at in range(0, nbytes - 3 * VECTOR_NBYTES, 4 * VECTOR_NBYTES):
            if left >= 4:
                tile_4x4(weight, row_nbytes, FLOAT, values + at, nbytes, target + at, nbytes, length, is_fresh, following + at)
            elif left == 3:
                tile_3x4(weight, row_nbytes, FLOAT, values + at, nbytes, target + at, nbytes, length, is_fresh, following + at)
            elif left == 2:
                tile_2x4(weight, row_nbytes, FLOAT, values + at, nbytes, target + at, nbytes, length, is_fresh, following + at)
            else:
                tile_1x4(weight, row_nbytes, FLOAT, values + at, nbytes, target + at, nbytes, length, is_fresh, following + at)
        for at in range(nbytes - nbytes % (4 * VECTOR_NBYTES), nbytes, VECTOR_NBYTES):
            for one in range(min(4, left)):
                tile_1x1(
                    weight + one * row_nbytes,
                    row_nbytes,
                    FLOAT,
                    values + at,
                    nbytes,
                    target + one * nbytes + at,
                    nbytes,
                    length,
                    is_fresh,
                )


@_cached()
def _place(pool, table, token, block_size, row_nbytes, to_values):
    """The key of one token, for the head that `pool` begins with."""
    block = load_int(table + token // block_size * INT)
    return pool + block * 2 * to_values + token % block_size * row_nbytes


@_cached()
def _attend_few(args, piece, scratch):
    """One query of a sequence: its context comes from memory once and there is little to compute, so here the numbers of a key lie
    along the lanes, as they do in memory."""
    dim, rows, block_size, window = _at(args, A_HEAD_DIM), _at(args, A_GROUP), _at(args, A_BLOCK_SIZE), _at(args, A_WINDOW)
    position, table = load_int(piece + P_POSITION * INT), load_int(piece + P_TABLE * INT)
    head = load_int(piece + P_HEAD * INT)
    first_row = load_int(piece + P_ROW * INT)
    row_nbytes, scores_nbytes = dim * FLOAT, MAX_KEYS * FLOAT
    queries = _at(args, A_Q) + first_row * _at(args, A_Q_STEP) + head * rows * row_nbytes
    target = _at(args, A_OUT) + first_row * _at(args, A_OUT_STEP) + head * rows * row_nbytes
    scale = load_float(_at(args, A_SCALE))
    scores = scratch
    most = scores + FEW_ROWS * scores_nbytes
    total = most + FEW_ROWS * FLOAT
    for row in range(rows):
        store_float(most + row * FLOAT, numba.float32(MIN_SCORE))
        store_float(total + row * FLOAT, numba.float32(0))
    head_nbytes = block_size * row_nbytes
    to_values = _at(args, A_NUM_KV_HEADS) * head_nbytes
    pool = _at(args, A_KV) + head * head_nbytes
    begin, end = max(0, position - window + 1) if window else 0, position + 1
    for first in range(begin, end, MAX_KEYS):
        num_keys = min(MAX_KEYS, end - first)
        key = 0
        while key < num_keys:
            length = min(num_keys - key, block_size - (first + key) % block_size)
            place = _place(pool, table, first + key, block_size, row_nbytes, to_values)
            following = _place(pool, table, first, block_size, row_nbytes, to_values) + to_values
            if key + length < num_keys:
                following = _place(pool, table, first + key + length, block_size, row_nbytes, to_values)
            _score_few(place, length, following, queries, rows, dim, scores + key * FLOAT, scores_nbytes, scale)
            key += length
        padded = (num_keys + LANES - 1) // LANES * LANES
        for row in range(rows):
            line = scores + row * scores_nbytes
            for key in range(num_keys, padded):
                store_float(line + key * FLOAT, numba.float32(MIN_SCORE))
            shrunk = _weights_of_row(line, padded, most, total, row)
            if first != begin:
                for at in range(0, row_nbytes, VECTOR_NBYTES):
                    place = target + row * row_nbytes + at
                    store(place, multiply(load(place), shrunk))
        key = 0
        while key < num_keys:
            length = min(num_keys - key, block_size - (first + key) % block_size)
            place = _place(pool, table, first + key, block_size, row_nbytes, to_values) + to_values
            following = _place(pool, table, min(first + key + length, end - 1), block_size, row_nbytes, to_values)
            if key + length < num_keys:
                following += to_values
            is_fresh = 1 if first == begin and key == 0 else 0
            _sum_few(place, length, following, scores + key * FLOAT, rows, dim, scores_nbytes, target, is_fresh)
            key += length
    for row in range(rows):
        share = splat(numba.float32(1) / load_float(total + row * FLOAT))
        for at in range(row * row_nbytes, (row + 1) * row_nbytes, VECTOR_NBYTES):
            store(target + at, multiply(load(target + at), share))


@_entry
def attend(args):
    scratch = _at(args, SCRATCH) + take_ticket(args + SCRATCH_TICKET * INT) * _at(args, SCRATCH_NBYTES)
    while True:
        number = take_ticket(args + TICKET * INT)
        if number >= _at(args, NUM_PIECES):
            return
        piece = _at(args, A_PIECES) + number * P_SIZE * INT
        if load_int(piece + P_COUNT * INT) == 1 and _at(args, A_GROUP) <= FEW_ROWS:
            _attend_few(args, piece, scratch)
        else:
            _attend_piece(args, piece, scratch)


# ---- what a layer does row by row --------------------------------------------------------------------------------------

N_X, N_X_STEP, N_OUT, N_WIDTH, N_WEIGHT, N_EPS, N_PIECE, N_NUM_ROWS, N_SIZE = range(FIRST_FREE, FIRST_FREE + 9)


@_cached()
def _norm_row(x, out, width, weight, eps):
    """width floats, of which there are at least 16, in whole vectors."""
    squares = splat(numba.float32(0))
    more = splat(numba.float32(0))
    nbytes = width * FLOAT
    for at in range(0, nbytes - VECTOR_NBYTES, 2 * VECTOR_NBYTES):
        first, second = load(x + at), load(x + at + VECTOR_NBYTES)
        squares = multiply_add(first, first, squares)
        more = multiply_add(second, second, more)
    if nbytes % (2 * VECTOR_NBYTES):
        first = load(x + nbytes - VECTOR_NBYTES)
        squares = multiply_add(first, first, squares)
    mean = sum_of(add(squares, more)) / numba.float32(width)
    share = splat(numba.float32(1) / numba.float32(numba.float32(mean + eps) ** numba.float32(0.5)))
    for at in range(0, nbytes, VECTOR_NBYTES):
        store(out + at, multiply(multiply(load(x + at), share), load(weight + at)))


@_entry
def norm(args):
    """rms_norm of rows that lie anywhere into rows that touch."""
    width, weight, eps = _at(args, N_WIDTH), _at(args, N_WEIGHT), load_float(_at(args, N_EPS))
    piece, num_rows = _at(args, N_PIECE), _at(args, N_NUM_ROWS)
    while True:
        first = take_ticket(args + TICKET * INT) * piece
        if first >= num_rows:
            return
        for row in range(first, min(first + piece, num_rows)):
            _norm_row(_at(args, N_X) + row * _at(args, N_X_STEP), _at(args, N_OUT) + row * width * FLOAT, width, weight, eps)


S_X, S_OUT, S_WIDTH, S_PIECE, S_NUM_ROWS, S_SIZE = range(FIRST_FREE, FIRST_FREE + 6)


@_entry
def silu_mul(args):
    """Rows [gate | up] of 2 * width floats -> rows silu(gate) * up of width floats."""
    nbytes, piece, num_rows = _at(args, S_WIDTH) * FLOAT, _at(args, S_PIECE), _at(args, S_NUM_ROWS)
    while True:
        first = take_ticket(args + TICKET * INT) * piece
        if first >= num_rows:
            return
        for row in range(first, min(first + piece, num_rows)):
            gate, out = _at(args, S_X) + row * 2 * nbytes, _at(args, S_OUT) + row * nbytes
            for at in range(0, nbytes, VECTOR_NBYTES):
                x = load(gate + at)
                gated = times_sigmoid(x, exp_of_negative(minus_absolute(x)))
                store(out + at, multiply(gated, load(gate + nbytes + at)))


(
    R_X, R_X_STEP, R_TURN, R_SLOTS, R_KV, R_HEAD_DIM, R_NUM_HEADS, R_NUM_KV_HEADS, R_Q_NORM, R_K_NORM, R_EPS, R_PIECE, R_NUM_ROWS,
    R_SIZE,
) = range(FIRST_FREE, FIRST_FREE + 14)  # fmt: skip


@_cached()
def _rotate_row(args, row):
    dim, num_heads, num_kv_heads = _at(args, R_HEAD_DIM), _at(args, R_NUM_HEADS), _at(args, R_NUM_KV_HEADS)
    q_norm, k_norm, eps = _at(args, R_Q_NORM), _at(args, R_K_NORM), load_float(_at(args, R_EPS))
    nbytes = dim * FLOAT
    x = _at(args, R_X) + row * _at(args, R_X_STEP)
    turn = _at(args, R_TURN) + row * 2 * nbytes
    slots = _at(args, R_SLOTS) + row * 2 * num_kv_heads * INT
    for head in range(num_heads + num_kv_heads):
        source = x + head * nbytes
        weight = q_norm if head < num_heads else k_norm
        if weight:
            _norm_row(source, source, dim, weight, eps)
        for at in range(0, nbytes, VECTOR_NBYTES):
            value = load(source + at)
            value = multiply_add(value, load(turn + at), multiply(swap_neighbours(value), load(turn + nbytes + at)))
            store(source + at, value)
    for row_of_kv in range(2 * num_kv_heads):
        source = x + (num_heads + row_of_kv) * nbytes
        target = _at(args, R_KV) + load_int(slots + row_of_kv * INT) * nbytes
        for at in range(0, nbytes, VECTOR_NBYTES):
            store(target + at, load(source + at))


@_entry
def rotate_and_write(args):
    """q and k of each token normed if they have weights for it, and turned, in place; then k and v into the pool."""
    piece, num_rows = _at(args, R_PIECE), _at(args, R_NUM_ROWS)
    while True:
        first = take_ticket(args + TICKET * INT) * piece
        if first >= num_rows:
            return
        for row in range(first, min(first + piece, num_rows)):
            _rotate_row(args, row)
