"""The KV memory of one worker: one tensor, and behind it memory that a peer on the same host can map (memfd, CUDA IPC).

Not here: which block belongs to whom (engine/blocks.py). Made once per worker by prefill/ and decode/; read and written
by models/ through `.tensor`, by the transports through `.run` and `.runs`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer import gpu
from kvtransfer.process import boot_id
from protocol.errors import ConfigError, Unsupported
from protocol.kv import KVLayout, ShmEndpoint

if TYPE_CHECKING:
    import torch


class KVPool:
    """KV of `num_blocks` blocks: `.tensor` is [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim], C order.

    device "cpu": a sealed memfd, mapped; pages are taken from the kernel when first written, and go back when the last
    process that maps it is gone, however it died. A GPU: cudaMalloc, which a peer can map too (gpu.py). Another device: a plain
    tensor there. Off the CPU the host-memory doors (`run`, `runs`, `shm_endpoint`) raise Unsupported.

    Raises ConfigError (naming the keys) when the memory cannot be had.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: str = "cpu") -> None:
        assert num_blocks > 0, f"a pool needs at least one block, got {num_blocks}"
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.nbytes = num_blocks * layout.block_nbytes
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._runs: np.ndarray | None = None
        shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self._tensor: torch.Tensor | None = self._on_host(shape) if device == "cpu" else self._on_device(shape)

    def _on_host(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        self._fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.nbytes)
            # A peer opens this read-write: without the seals it could shrink the file, and our next read would be a
            # SIGBUS.
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self._fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, OverflowError) as error:
            os.close(self._fd)
            self._fd = -1
            raise ConfigError(
                f"cannot set aside {self.nbytes / 2**30:.2f} GiB of KV for {self.num_blocks} blocks ({error}); "
                "lower model.kv_cache_bytes or --num-gpu-blocks-override",
                param="model.kv_cache_bytes",
            ) from error
        layout = self.layout
        self._runs = np.frombuffer(self._map, np.uint8).reshape(layout.num_layers, self.num_blocks, layout.run_nbytes)
        return torch.frombuffer(self._map, dtype=torch.uint8).view(getattr(torch, layout.dtype)).view(shape)

    def _on_device(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        dtype = getattr(torch, self.layout.dtype)
        if not self.is_on_gpu:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return gpu.allocate(self.nbytes, self.device).view(dtype).view(shape)

    @property
    def is_on_gpu(self) -> bool:
        return self.device.split(":")[0] == "cuda"

    @property
    def tensor(self) -> torch.Tensor:
        assert self._tensor is not None, "this pool is closed"
        return self._tensor

    @property
    def runs(self) -> np.ndarray:
        """Writable bytes, no copy: [num_layers, num_blocks, run_nbytes] uint8."""
        if self._runs is None:
            assert self._tensor is not None, "this pool is closed"
            raise Unsupported(
                f"KV on {self.device} is not in host memory; between GPUs it moves by cuda_ipc, nccl or tcp (--kv-transport)",
                param="transfer.transport",
            )
        return self._runs

    def run(self, layer: int, block: int) -> memoryview:
        """The contiguous bytes of one (layer, block), writable, no copy."""
        return memoryview(self.runs[layer, block])

    def shm_endpoint(self) -> ShmEndpoint:
        """Where a process on this host finds this memory. It names identity too (inode, size, boot), so that a stale
        one is refused.
        """
        assert self.runs is not None
        return ShmEndpoint(boot_id(), os.getpid(), self._fd, os.fstat(self._fd).st_ino, self.nbytes)

    def close(self) -> None:
        """Give the memory back. Views that callers still hold keep their pages until they are dropped. Idempotent."""
        self._tensor = None
        self._runs = None
        # Never mmap.close(): torch.frombuffer keeps the mapping alive but does not pin it, and a tensor that a caller
        # still holds would point into nothing. Dropping our reference unmaps it when the last view goes.
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
