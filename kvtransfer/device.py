"""A rectangle of layers and heads of a pool on a GPU, seen as the pool of a smaller model: what view.py is for host memory.

Everything runs on a stream of its own, beside the engine's. What is to be read is ordered behind the engine's work by marks
(`mark` in the engine's thread, `wait` in the sender's); what was written is complete when a method returns. Host memory on the
way is pinned. Digests are "lanesum-128", computed on the device (kernels/kv_pack.py), or "xxh3-128", over bytes that were read back
from the pool. Made by view.view_of, so that torch is imported only where there is a GPU; tests make one over a CPU tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from kernels import ops
from kvtransfer.layout import Area
from kvtransfer.view import run_digest
from protocol.errors import TransferFailed
from protocol.kv import LANESUM, XXH3, KVLayout

STAGING_NBYTES = 8 << 20  # pinned, per view: several times what a lane holds of it before it has sent it


class DeviceView:
    """tensor: [num_layers, num_blocks, 2, num_heads, block_size, head_dim], a pool of `layout`. area None: all of it.

    One thread at a time, except `mark`. What `read` and `buffers` return is ours again after so many further bytes have been
    read that STAGING_NBYTES are full: it must have been sent, copied or committed by then.
    """

    is_staged = True  # buffers() is not the pool: commit() stores what was received into them

    def __init__(self, tensor: Tensor, layout: KVLayout, area: Area | None = None, digest: str = XXH3) -> None:
        if digest not in (LANESUM, XXH3):
            raise TransferFailed(f"KV digests of kind {digest!r} are not known here; there are {LANESUM} and {XXH3}")
        area = area or Area(0, layout.num_layers, 0, layout.num_kv_heads)
        assert area.layer + area.num_layers <= layout.num_layers, f"{area} is outside of {layout}"
        assert area.head + area.num_heads <= layout.num_kv_heads, f"{area} is outside of {layout}"
        self.layout = msgspec.structs.replace(layout, num_layers=area.num_layers, num_kv_heads=area.num_heads)
        self.num_blocks = tensor.shape[1]
        self.is_contiguous = area.num_heads == layout.num_kv_heads
        self.digest = digest
        self.tensor = tensor[area.layer : area.layer + area.num_layers, :, :, area.head : area.head + area.num_heads]
        self.device = tensor.device
        self._is_gpu = tensor.device.type == "cuda"
        self._stream = torch.cuda.Stream(tensor.device) if self._is_gpu else None
        self._staging: Tensor | None = None
        self._staged = 0  # bytes of it in use, from its start
        self._received: Tensor | None = None
        self._last_key: object = None
        self._last_table: Tensor | None = None
        self._ahead: tuple[tuple[int, ...], bytes] = ((), b"")  # blocks, their digests of all layers

    def host_digest(self) -> Callable[[memoryview], bytes]:
        """The same kind of digest of a run's bytes in host memory; slow for lane sums."""
        return run_digest if self.digest == XXH3 else lane_sum_digest(self.layout)

    # ---- order -----------------------------------------------------------------------------------------------------

    def mark(self) -> Any:
        """In the engine's thread: what has been launched there so far."""
        if not self._is_gpu:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        """What follows on our stream comes after the mark. Does not wait itself."""
        if mark is not None and self._stream is not None:
            self._stream.wait_event(mark)

    @contextlib.contextmanager
    def on_stream(self) -> Any:
        if self._stream is None:
            yield
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                yield

    def recorded(self) -> Any:
        """An event at the present end of our stream, for a thread that waits for it without spinning; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    # ---- through host memory ---------------------------------------------------------------------------------------

    def read(self, layer: int, block: int, count: int) -> np.ndarray:
        """`count` runs from `block` on, [count, run_nbytes] in pinned memory."""
        staged = self._stage(count)
        with self.on_stream():
            staged.copy_(self.tensor[layer, block : block + count], non_blocking=True)
        self.synchronize()
        return _as_bytes(staged, count)

    def write(self, layer: int, blocks: Sequence[int], data: np.ndarray) -> None:
        """data [len(blocks), run_nbytes], in host memory, into these blocks."""
        most = max(1, STAGING_NBYTES // self.layout.run_nbytes)
        for start in range(0, len(blocks), most):
            some = blocks[start : start + most]
            staged = self._stage(len(some))
            np.copyto(_as_bytes(staged, len(some)), data[start : start + most])
            self._scatter(layer, some, staged)

    def buffers(self, layer: int, blocks: Sequence[int]) -> list[memoryview]:
        """Pinned memory to receive these runs into; `commit` stores them."""
        self._received = self._stage(len(blocks))
        return [_as_bytes(self._received, len(blocks)).reshape(-1).data]

    def commit(self, layer: int, blocks: Sequence[int]) -> None:
        """Store what was received into `buffers` of the same blocks. It is in the pool when this returns."""
        assert self._received is not None, "commit without buffers"
        self._scatter(layer, blocks, self._received)
        self._received = None

    def unpack(self, layer: int, blocks: Sequence[int], packed: Tensor) -> None:
        """packed [len(blocks), 2, num_heads, block_size, head_dim], on the device and complete, into these blocks."""
        self._scatter(layer, blocks, packed)

    def _scatter(self, layer: int, blocks: Sequence[int], staged: Tensor) -> None:
        count = len(blocks)
        with self.on_stream():
            packed = staged.to(self.device, non_blocking=True)
            table = ops.run_table(range(count), blocks, [self.layout.block_size] * count, self.device)
            ops.move_runs(packed.unsqueeze(0), self.tensor[layer : layer + 1], table, with_sums=False)
        self.synchronize()

    def _stage(self, count: int) -> Tensor:
        """[count, 2, num_heads, block_size, head_dim] of pinned memory."""
        nbytes = count * self.layout.run_nbytes
        if self._staging is None or self._staging.numel() < nbytes:
            self._staging = torch.empty(max(STAGING_NBYTES, 4 * nbytes), dtype=torch.uint8, pin_memory=self._is_gpu)
            self._staged = 0
        if self._staged + nbytes > self._staging.numel():
            self._staged = 0
        start = self._staged
        self._staged += -(-nbytes // 64) * 64  # every piece begins where its dtype may
        return self._staging[start : start + nbytes].view(self.tensor.dtype).view(count, *self.tensor.shape[2:])

    # ---- on the device ---------------------------------------------------------------------------------------------

    def move(self, layer: int, blocks: Sequence[int], num_used: Sequence[int], target: Tensor, into: Sequence[int]) -> Tensor:
        """Launch, and do not wait for: these runs of one layer into the blocks `into` of target [num_blocks, 2, num_heads,
        block_size, head_dim], zeros behind the used slots. -> their lane sums [num_runs, 2].
        """
        key = (tuple(blocks), tuple(into), tuple(num_used))
        with self.on_stream():
            if key != self._last_key:  # every layer of a chunk has the same
                self._last_key, self._last_table = key, ops.run_table(blocks, into, num_used, self.device)
            table = self._last_table
            assert table is not None
            sums = ops.move_runs(self.tensor[layer : layer + 1], target.unsqueeze(0), table)
        assert sums is not None
        return sums[0]

    def rehearse(self) -> None:
        """A small move into memory of our own, and a sum: the first launch of a kernel compiles it, which takes seconds."""
        with self.on_stream():
            scratch = self.tensor[0, :1].clone()
        self.move(0, [0], [1], scratch, [0])
        self.lane_sums([0], 0, 1)

    def prefetch(self, blocks: Sequence[int]) -> None:
        """All layers of these blocks will be asked of `digests`, and nobody stores there meanwhile: one launch instead of many."""
        if self.digest == LANESUM:
            self._ahead = (tuple(blocks), self.lane_sums(blocks))

    def digests(self, layer: int, blocks: Sequence[int]) -> bytes:
        """16 bytes for each of these runs, as they are now."""
        ahead, sums = self._ahead
        if blocks and ahead == tuple(blocks):
            width = len(blocks) * ops.SUM_NBYTES
            return sums[layer * width : (layer + 1) * width]
        if self.digest == LANESUM:
            return self.lane_sums(blocks, layer, 1)
        parts = []
        most = max(1, STAGING_NBYTES // self.layout.run_nbytes)
        for start in range(0, len(blocks), most):
            some = blocks[start : start + most]
            packed = self._stage(len(some))
            with self.on_stream():
                for i, block in enumerate(some):
                    packed[i].copy_(self.tensor[layer, block], non_blocking=True)
            self.synchronize()
            parts += [run_digest(row.data) for row in _as_bytes(packed, len(some))]
        return b"".join(parts)

    def lane_sums(self, blocks: Sequence[int], layer: int = 0, num_layers: int | None = None) -> bytes:
        """Of several layers in one launch, layer by layer."""
        num_layers = self.layout.num_layers - layer if num_layers is None else num_layers
        if not blocks or not num_layers:
            return b""
        with self.on_stream():
            table = ops.run_table(blocks, blocks, [self.layout.block_size] * len(blocks), self.device)
            sums = ops.move_runs(self.tensor[layer : layer + num_layers], None, table)
            assert sums is not None
            return ops.sums_to_bytes(sums)


def _as_bytes(staged: Tensor, count: int) -> np.ndarray:
    rows: np.ndarray = staged.view(torch.uint8).view(count, -1).numpy()
    return rows


def lane_sum_digest(layout: KVLayout) -> Callable[[memoryview], bytes]:
    """A function of the bytes of one run in host memory -> its lane sum, as on the device. Slow; for fallbacks and tests."""
    dtype = getattr(torch, layout.dtype)
    shape = (1, 1, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    table = ops.run_table([0], [0], [layout.block_size], torch.device("cpu"))

    def digest(data: memoryview) -> bytes:
        run = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)
        sums = ops.move_runs(run, None, table)
        assert sums is not None
        return ops.sums_to_bytes(sums)

    return digest
