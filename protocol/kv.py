"""The geometry of a KV pool, and who is at its other end. Two workers exchange KV only if their `KVLayout`s agree."""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1
XXH3, LANESUM = "xxh3-128", "lanesum-128"  # kinds of digests of a run: in host memory, and on GPUs (kernels/kv_pack.py)
DTYPE_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1}


class KVLayout(msgspec.Struct, frozen=True):
    """One pool: [num_layers, num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim], C order.

    A *run* is the contiguous bytes of one (layer, block). `model_hash` pins weights, so that KV of another checkpoint is refused.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str
    model_hash: str
    version: int = PROTOCOL_VERSION

    @property
    def run_nbytes(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_NBYTES[self.dtype]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.run_nbytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def difference(self, other: KVLayout) -> str | None:
        """None when the two agree, else one sentence with both values of each field that differs."""
        parts = [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(parts) or None


class ProcessRef(msgspec.Struct, frozen=True, array_like=True):
    """One process, so that its death can be observed from the same host (kvtransfer/process.py)."""

    boot_id: str
    pid: int
    start_ticks: int


class ShmEndpoint(msgspec.Struct, frozen=True, tag="shm"):
    """A memfd that a peer on the same host opens through /proc/PID/fd/FD. `boot_id` and `inode` tell which memory it is."""

    boot_id: str
    pid: int
    fd: int
    inode: int
    nbytes: int


class TcpEndpoint(msgspec.Struct, frozen=True, tag="tcp"):
    host: str
    port: int


class MemoryEndpoint(msgspec.Struct, frozen=True, tag="memory"):
    """A pool in this very process (`LLM(prefill=1, decode=1)`, one-process fault tests)."""

    pool_id: int


class CudaIpcEndpoint(msgspec.Struct, frozen=True, tag="cuda_ipc"):
    """Memory of a GPU that a process on the same host opens by its handle. `boot_id`, `pid` and `device_uuid` tell whose it is."""

    boot_id: str
    pid: int
    device_uuid: str
    handle: bytes
    nbytes: int


class NcclEndpoint(msgspec.Struct, frozen=True, tag="nccl"):
    """Where a communicator is agreed on: a socket of ours. fallback: takes over when the communicator fails."""

    host: str
    port: int
    device_uuid: str
    fallback: TcpEndpoint | None = None


KVEndpoint = ShmEndpoint | TcpEndpoint | MemoryEndpoint | CudaIpcEndpoint | NcclEndpoint
