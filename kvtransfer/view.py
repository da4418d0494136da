"""A rectangle of layers and heads of a pool in host memory, seen as the pool of a smaller model: what one route reads or writes.

Where the rectangle has all heads of its rank, a run is contiguous bytes and nothing is copied on the way. Else the heads of K
and those of V lie apart: they are packed through a small copy by whoever reads, and scattered by whoever writes. Not here:
which rectangles there are (layout.py). Used by the sending and the receiving ends alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import xxhash

from kvtransfer.layout import Area, contiguous
from protocol.errors import TransferFailed
from protocol.kv import XXH3, KVLayout

if TYPE_CHECKING:
    from kvtransfer.device import DeviceView
    from kvtransfer.pool import KVPool

AnyView: TypeAlias = "View | DeviceView"
run_digest = xxhash.xxh3_128_digest  # of any contiguous buffer -> 16 bytes; lets the GIL go while it reads a large one


class View:
    """runs: uint8 [num_layers, num_blocks, run_nbytes], a pool of `layout`. area None: all of it.

    `layout` is that of the rectangle alone, and so are `layer` and the runs of every method. device.DeviceView is the same for a
    GPU's memory; what only that needs does nothing here.
    """

    is_staged = False  # buffers() is the pool itself
    digest = XXH3

    def __init__(self, runs: np.ndarray, layout: KVLayout, area: Area | None = None) -> None:
        num_layers, self.num_blocks, run_nbytes = runs.shape
        assert (num_layers, run_nbytes) == (layout.num_layers, layout.run_nbytes), f"{runs.shape} is no pool of {layout}"
        area = area or Area(0, num_layers, 0, layout.num_kv_heads)
        self.layout = msgspec.structs.replace(layout, num_layers=area.num_layers, num_kv_heads=area.num_heads)
        assert area.layer + area.num_layers <= num_layers, f"{area} is outside of {layout}"
        assert area.head + area.num_heads <= layout.num_kv_heads, f"{area} is outside of {layout}"
        layers = runs[area.layer : area.layer + area.num_layers]
        self.is_contiguous = area.num_heads == layout.num_kv_heads
        num_parts = 1 if self.is_contiguous else 2
        parts = layers.reshape(area.num_layers, self.num_blocks, num_parts, run_nbytes // num_parts)
        if not self.is_contiguous:
            head_nbytes = run_nbytes // (2 * layout.num_kv_heads)
            parts = parts[..., area.head * head_nbytes : (area.head + area.num_heads) * head_nbytes]
        self._parts = parts  # [num_layers, num_blocks, 1 (K and V), or K and V, part_nbytes]

    def read(self, layer: int, block: int, count: int) -> np.ndarray:
        """`count` runs from `block` on, [count, run_nbytes]: the memory itself where runs are contiguous, else a packed copy."""
        return self._parts[layer, block : block + count].reshape(count, -1)

    def write(self, layer: int, blocks: Sequence[int], data: np.ndarray) -> None:
        """data [len(blocks), run_nbytes] into these blocks. np.copyto lets the GIL go, which assigning memoryviews does not."""
        rows = self._parts[layer]
        for block, start, count in _stretches(blocks):
            np.copyto(rows[block : block + count], data[start : start + count].reshape(count, *rows.shape[1:]))

    def digests(self, layer: int, blocks: Sequence[int]) -> bytes:
        """16 bytes for each of these runs, as they are now."""
        rows = self._parts[layer]
        if self.is_contiguous:
            flat, width = rows.reshape(-1).data, self.layout.run_nbytes
            return b"".join([run_digest(flat[block * width : (block + 1) * width]) for block in blocks])
        return b"".join([_packed_digest(rows[block]) for block in blocks])

    def buffers(self, layer: int, blocks: Sequence[int]) -> list[memoryview]:
        """The memory of these runs, writable, in the order of their bytes; neighbours joined where they are contiguous."""
        rows = self._parts[layer]
        if not self.is_contiguous:
            return [part.data for block in blocks for part in rows[block]]
        flat, width = rows.reshape(-1).data, self.layout.run_nbytes
        return [flat[block * width : (block + count) * width] for block, _, count in _stretches(blocks)]

    def host_digest(self) -> Callable[[memoryview], bytes]:
        return run_digest

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def commit(self, layer: int, blocks: Sequence[int]) -> None:
        pass

    def prefetch(self, blocks: Sequence[int]) -> None:
        pass

    def rehearse(self) -> None:
        pass


def view_of(pool: KVPool, area: Area | None = None, digest: str = XXH3) -> AnyView:
    """digest: the kind. Raises TransferFailed where this memory cannot have it."""
    if pool.is_on_gpu:
        from kvtransfer.device import DeviceView

        return DeviceView(pool.tensor, pool.layout, area, digest)
    if digest != XXH3:
        raise TransferFailed(f"KV digests of kind {digest!r} are not for host memory, which has {XXH3}")
    return View(pool.runs, pool.layout, area)


def _stretches(blocks: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(block, where it is in `blocks`, count) of neighbours in memory. Nearly always one; that is seen at C speed."""
    count = len(blocks)
    if count and list(blocks) == list(range(blocks[0], blocks[0] + count)):
        return ((blocks[0], 0, count),)
    return contiguous(list(zip(blocks, range(count), strict=True)))


def _packed_digest(parts: np.ndarray) -> bytes:
    """As if K's and V's part lay side by side."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()
