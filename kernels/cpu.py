"""Starts the compiled kernels of kernels/native.py on torch tensors, on the threads that torch has anyway.

`load()` compiles them, or finds them compiled: seconds the first time on a machine, half a second later. Until it was called,
and for what the kernels do not take (other dtypes, odd sizes), kernels/ops.py does everything with torch.

They run on torch's own threads (kernels/threads.py), as many as torch has in the calling thread.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.threads import run_on_all

if TYPE_CHECKING:
    from kernels.ops import AttentionPlan

log = logging.getLogger(__name__)

MAX_ARGUMENTS = 32
WORTH_THREADS = 200_000  # multiplications, or numbers read, of a call; below it, waking another thread costs more than it saves
_state: Any = None  # kernels.native, once load() was called
_is_off = False


class Entry(Protocol):
    address: int


def load() -> bool:
    """Make the kernels ready; False where that is impossible (no numba, a CPU that LLVM does not know), with the reason logged."""
    global _state
    if _state is None:
        try:
            from kernels import native
        except Exception as error:  # whatever it is, torch can do the same, more slowly
            log.warning("the compiled CPU kernels cannot be used, torch does their work: %s: %s", type(error).__name__, error)
            _state = False
        else:
            _state = native
    return bool(_state)


def is_ready() -> bool:
    return bool(_state) and not _is_off


def switch(on: bool) -> None:
    """For tests and comparisons: off, torch does everything."""
    global _is_off
    _is_off = not on


def takes(x: Tensor) -> bool:
    """float32 rows on the CPU, each of whole vectors, one after the other or with gaps."""
    return (
        bool(_state)
        and not _is_off
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.shape[-1] % 16 == 0
        and x.stride(-1) == 1
    )


# ---- running -----------------------------------------------------------------------------------------------------------


class _Mine(threading.local):
    """What one calling thread keeps between calls."""

    def __init__(self) -> None:
        self.arguments = np.zeros(MAX_ARGUMENTS, dtype=np.int64)
        self.address = self.arguments.ctypes.data
        self.scratch = np.zeros(0, dtype=np.uint8)

    def room(self, nbytes: int) -> int:
        if len(self.scratch) < nbytes:
            self.scratch = np.zeros(nbytes + 64, dtype=np.uint8)
        address: int = self.scratch.ctypes.data
        return -(-address // 64) * 64


_mine = _Mine()


def _call(entry: Entry, num_pieces: int, cost: int, scratch_nbytes: int, *arguments: int) -> None:
    """cost: of the whole call, in what WORTH_THREADS counts."""
    mine = _mine
    num_threads = min(torch.get_num_threads(), num_pieces) if cost >= WORTH_THREADS else 1
    scratch = mine.room(num_threads * scratch_nbytes) if scratch_nbytes else 0
    mine.arguments[: 5 + len(arguments)] = (0, 0, num_pieces, scratch, scratch_nbytes, *arguments)
    run_on_all(entry.address, mine.address, num_threads)


@functools.lru_cache(maxsize=256)
def _float(value: float) -> tuple[int, Any]:
    """(the address of a float32 of this value, what keeps it there)."""
    number = np.array([value], dtype=np.float32)
    return number.ctypes.data, number


def _pieces_of(num_rows: int) -> int:
    """Rows of one piece."""
    return 1 if num_rows < 8 else 8


# ---- the operations ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, width], the rows contiguous."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, width)
    piece = _pieces_of(num_rows)
    _call(
        _state.norm, -(-num_rows // piece), 2 * num_rows * width, 0,
        x.data_ptr(), 4 * x.stride(0), out.data_ptr(), width, weight.data_ptr(), _float(eps)[0], piece, num_rows,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * width], contiguous -> [rows, width]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, width)
    piece = _pieces_of(num_rows)
    _call(
        _state.silu_mul, -(-num_rows // piece), 10 * num_rows * width, 0,
        gate_up.data_ptr(), out.data_ptr(), width, piece, num_rows,
    )  # fmt: skip
    return out


def turn_table(turn: Tensor) -> Tensor:
    """What rotate_and_write() turns by, from ops.rotation(): [num_tokens, 2, head_dim], cosines twice each, then sines with the
    sign that each of a pair needs."""
    real = torch.view_as_real(turn[:, 0])  # [num_tokens, head_dim / 2, 2]
    cos, sin = real[..., 0], real[..., 1]
    pairs = torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1)), 1)
    return pairs.flatten(2).contiguous()


def rotate_and_write(
    qkv: Tensor, num_heads: int, num_kv_heads: int, table: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    kv_layer: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q and k in place, then k and v into the pool."""
    num_rows, head_dim = qkv.shape[0], kv_layer.shape[-1]
    piece = _pieces_of(num_rows)
    weights = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    _call(
        _state.rotate_and_write, -(-num_rows // piece), 4 * qkv.numel(), 0,
        qkv.data_ptr(), 4 * qkv.stride(0), table.data_ptr(), slots.data_ptr(), kv_layer.data_ptr(), head_dim, num_heads,
        num_kv_heads, *weights, _float(eps)[0], piece, num_rows,
    )  # fmt: skip


class _Pieces:
    """A batch's work for one number of query heads per KV head; the same for all its layers."""

    def __init__(self, plan: AttentionPlan, num_kv_heads: int, group: int) -> None:
        per_piece = max(1, _state.MAX_ROWS // group)
        rows: list[tuple[int, int, int, int, int]] = []
        self.num_pairs = 0  # of a query and a token before it or itself
        for span in plan.spans:
            table, end = span.index.data_ptr(), span.start + span.length
            for first in range(span.start, end, per_piece):
                count = min(per_piece, end - first)
                position = span.context_len + first - span.start
                rows += [(first, count, head, position, table) for head in range(num_kv_heads)]
                self.num_pairs += count * (position + count)
        rows.reverse()  # the longest last pieces of a chunk first, so that no thread ends with one
        self.array = np.array(rows, dtype=np.int64)
        self.address: int = self.array.ctypes.data
        self.num = len(rows)


def takes_attention(q: Tensor, kv_layer: Tensor) -> bool:
    """q [num_tokens, num_heads, head_dim] with heads that touch."""
    return (
        takes(q) and q.stride(1) == q.shape[2] and q.shape[1] // kv_layer.shape[2] <= _state.MAX_ROWS and kv_layer.is_contiguous()
    )


def attention(q: Tensor, kv_layer: Tensor, plan: AttentionPlan, scale: float, window: int | None) -> Tensor:
    """As ops.attention(), from the pool alone."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    group = num_heads // num_kv_heads
    key = (num_kv_heads, group)
    pieces = plan.cache.get(key)
    if pieces is None:
        pieces = plan.cache[key] = _Pieces(plan, num_kv_heads, group)
    out = torch.empty(num_tokens, num_heads * head_dim)
    _call(
        _state.attend, pieces.num, 4 * pieces.num_pairs * num_heads * head_dim, _state.attention_scratch_nbytes(head_dim),
        q.data_ptr(), 4 * q.stride(0), kv_layer.data_ptr(), out.data_ptr(), 4 * num_heads * head_dim, head_dim, num_kv_heads, group,
        block_size, pieces.address, window or 0, _float(scale)[0],
    )  # fmt: skip
    return out
