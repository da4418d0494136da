"""Memory of a GPU that another process of this host can map, and the names by which two processes know one GPU.

Plain cudaMalloc through CuPy, because a handle of torch's own caching or expandable memory does not open elsewhere (or opens
something larger). Without CuPy a pool is an ordinary torch tensor and `cuda_ipc` is not offered. CuPy is imported when a GPU is
used, never before. Used by pool.py and cuda_ipc.py.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from protocol.errors import ConfigError, HandshakeRefused

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# A handle opens the whole 2 MiB granules around an allocation: what fills its granules shares nothing else with the peer.
GRANULE_NBYTES = 2 << 20


class _Memory:
    """One allocation or mapping, as torch takes it (`__cuda_array_interface__`); given back when its last tensor is gone."""

    def __init__(self, pointer: int, nbytes: int, device: int, give_back: Any) -> None:
        self._pointer = pointer
        self._device = device
        self._give_back = give_back
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }

    def __del__(self) -> None:
        try:
            import cupy

            with cupy.cuda.Device(self._device):
                self._give_back(self._pointer)
        except Exception as error:  # at the end of the process the driver may be gone before us
            log.debug("giving %#x back: %s", self._pointer, error)


def has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def index_of(device: str) -> int:
    """Of "cuda" or "cuda:1"."""
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def allocate(nbytes: int, device: str) -> torch.Tensor:
    """uint8 [nbytes], zeroed. Raises ConfigError when the memory cannot be had."""
    import torch

    index = index_of(device)
    try:
        if not has_cupy():
            return torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{index}")
        return _allocate_with_cupy(nbytes, index)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ConfigError(
            f"cannot set aside {nbytes / 2**30:.2f} GiB of KV on GPU {index} ({error}); lower --gpu-memory-utilization or "
            "--num-gpu-blocks-override",
            param="model.gpu_memory_utilization",
        ) from error


def _allocate_with_cupy(nbytes: int, index: int) -> torch.Tensor:
    import cupy
    import torch

    runtime = cupy.cuda.runtime
    torch.cuda.empty_cache()  # what torch only keeps for later is not free for cudaMalloc
    try:
        with cupy.cuda.Device(index):
            pointer = runtime.malloc(-(-nbytes // GRANULE_NBYTES) * GRANULE_NBYTES)
    except runtime.CUDARuntimeError as error:
        raise MemoryError(str(error)) from error
    memory = torch.as_tensor(_Memory(pointer, nbytes, index, runtime.free), device=f"cuda:{index}")
    assert memory.data_ptr() == pointer, "torch made a copy of the pool"
    return memory.zero_()


def uuid_of(index: int) -> str:
    """Names one GPU of this host, also where CUDA_VISIBLE_DEVICES counts them differently in two processes."""
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def export(memory: torch.Tensor) -> bytes:
    """The handle by which another process of this host opens an allocation of `allocate`."""
    import cupy

    assert memory.device.index is not None
    with cupy.cuda.Device(memory.device.index):
        handle: bytes = cupy.cuda.runtime.ipcGetMemHandle(memory.data_ptr())
    return handle


def find(uuid: str) -> int | None:
    """Which of the GPUs that this process sees it is."""
    import torch

    return next((index for index in range(torch.cuda.device_count()) if uuid_of(index) == uuid), None)


def opened(handle: bytes, nbytes: int, uuid: str, own: int) -> torch.Tensor:
    """Another process's memory as uint8 [nbytes], writable by kernels on GPU `own` of this process. Unmapped with its last tensor.

    Raises HandshakeRefused when the GPU is not visible from here, not reachable from `own`, or the handle is stale.
    """
    import torch

    index = find(uuid)
    if index is None:
        raise HandshakeRefused(f"cuda_ipc: the peer's GPU {uuid} is not among those this process sees (CUDA_VISIBLE_DEVICES)")
    if index != own and not torch.cuda.can_device_access_peer(own, index):
        raise HandshakeRefused(f"cuda_ipc: GPU {own} cannot reach the peer's GPU {index} ({uuid}) directly")
    import cupy

    runtime = cupy.cuda.runtime
    try:
        with cupy.cuda.Device(own):
            pointer = runtime.ipcOpenMemHandle(handle)
    except runtime.CUDARuntimeError as error:
        raise HandshakeRefused(f"cuda_ipc: the peer's memory does not open ({error}); was it restarted?") from error
    return torch.as_tensor(_Memory(pointer, nbytes, own, runtime.ipcCloseMemHandle), device=f"cuda:{index}")
