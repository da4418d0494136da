"""A second home for cached KV: blocks that the pool evicts stay in host memory, bounded, and come back when a prompt wants them.

    BlockPool evicts  ──store──>  host slots (LRU by hash, each with a digest)  ──restore──>  a fresh block, sealed again

The digest is taken of the block as it lies in the pool when it leaves, and compared with the pool's bytes once they are back:
whatever happens to them in between (a flipped bit, a copy gone wrong) is counted and is a miss, so that the block is computed
again; bytes that differ are never sealed and never read (truth rule R4). In host memory the digest is xxh3-128, on a GPU the lane
sum of `kernels/kv_pack.py`, computed on the device.

Every copy is over when `store` or `restore` returns, so a block may be overwritten at once, by its next sequence or by a
remote writer through mapped memory. Not here: which block is evicted and which prompt matches (blocks.py). One process's pool
only: the ranks of a group are not told. Owned by the engine's event loop, like the pool it stands behind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from kvtransfer.pool import KVPool
from protocol.errors import ConfigError

MAX_CALL_NBYTES = 256 << 20  # copied by one store or restore: bounds how long an allocation can take


class _Copier(Protocol):
    """Moves blocks between the pool and numbered host slots; -> the digest of what lies in the pool."""

    def save(self, block: int, slot: int) -> bytes: ...

    def load(self, slot: int, block: int) -> bytes: ...

    def spoil(self, slot: int, place: int) -> None: ...


class TierStats:
    """Cumulative, in blocks."""

    def __init__(self) -> None:
        self.stored = 0
        self.restored = 0
        self.evicted = 0  # fell out of the tier as well
        self.digest_failures = 0


class HostTier:
    """A `blocks.Tier` of at most max_bytes. The memory is taken from the kernel as it is first used (at once when it is pinned
    for a GPU), and never more.

    Raises ConfigError when not even one block fits.
    """

    def __init__(self, kv: KVPool, max_bytes: int) -> None:
        self.num_slots = max_bytes // kv.layout.block_nbytes
        if self.num_slots < 1:
            raise ConfigError(
                f"model.host_cache_bytes = {max_bytes} holds no KV block; one takes {kv.layout.block_nbytes} bytes (0 switches the "
                "host tier off)",
                param="model.host_cache_bytes",
            )
        self.stats = TierStats()
        self._block_nbytes = kv.layout.block_nbytes
        self._max_blocks = max(1, MAX_CALL_NBYTES // self._block_nbytes)
        self._copier: _Copier = _DeviceCopier(kv, self.num_slots) if kv.is_on_gpu else _HostCopier(kv, self.num_slots)
        self._slots: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # hash -> (slot, digest), least recently used first
        self._free = list(range(self.num_slots - 1, -1, -1))  # popped from the end, so that low slots are used first

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    @property
    def nbytes(self) -> int:
        return len(self._slots) * self._block_nbytes

    def store(self, evicted: Sequence[tuple[int, bytes]]) -> None:
        """Take in (block, hash) of blocks that are about to be overwritten, in the order of their eviction.

        Of more than one call may copy the first ones are let go: they are the ends of sequences, which need their
        beginnings to be of use.
        """
        copied = 0
        for block, block_hash in evicted[-self._max_blocks :]:
            if block_hash in self._slots:  # equal tokens: what is here is as good
                self._slots.move_to_end(block_hash)
                continue
            slot = self._take_slot()
            self._slots[block_hash] = (slot, self._copier.save(block, slot))
            copied += 1
        self.stats.stored += copied

    def num_leading(self, hashes: Sequence[bytes]) -> int:
        """How many of the first hashes are here, and no more than one call restores. They are the last to be forgotten now."""
        count = 0
        for block_hash in hashes[: self._max_blocks]:
            if block_hash not in self._slots:
                break
            count += 1
        for block_hash in reversed(hashes[:count]):  # the end of a prompt goes before its beginning
            self._slots.move_to_end(block_hash)
        return count

    def restore(self, block_hash: bytes, block: int) -> bool:
        """Copy it into a block of the pool. False: it is not here, or no longer what it was; then the block holds rubbish."""
        found = self._slots.get(block_hash)
        if found is None:
            return False
        slot, digest = found
        if self._copier.load(slot, block) != digest:
            self.stats.digest_failures += 1
            del self._slots[block_hash]
            self._free.append(slot)
            return False
        self.stats.restored += 1
        return True

    def forget(self, block_hash: bytes) -> None:
        found = self._slots.pop(block_hash, None)
        if found is not None:
            self._free.append(found[0])

    def clear(self) -> None:
        """Forget everything; the memory stays ours."""
        self._slots.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def numbers(self) -> dict[str, int]:
        stats = self.stats
        return {
            "host_tier_bytes": self.nbytes,
            "host_tier_stored": stats.stored,
            "host_tier_restored": stats.restored,
            "host_tier_evicted": stats.evicted,
            "host_tier_digest_failures": stats.digest_failures,
        }

    def spoil(self, block_hash: bytes, place: int = 0) -> None:
        """Flip a bit of what is kept; for tests of the digest."""
        self._copier.spoil(self._slots[block_hash][0], place)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self.stats.evicted += 1
        return self._slots.popitem(last=False)[1][0]

    def check_integrity(self) -> None:
        used = [slot for slot, _ in self._slots.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_slots)), f"slots {sorted(used)} used, {sorted(self._free)} free"


class _HostCopier:
    """Between two places of host memory. Each run is hashed while it is in the core's cache."""

    def __init__(self, kv: KVPool, num_slots: int) -> None:
        self._kv = kv
        self._slots = np.empty((num_slots, kv.layout.num_layers, kv.layout.run_nbytes), np.uint8)  # untouched pages cost nothing

    def save(self, block: int, slot: int) -> bytes:
        digest = xxhash.xxh3_128()
        for ours, theirs in zip(self._slots[slot], self._kv.runs[:, block], strict=True):
            np.copyto(ours, theirs)
            digest.update(theirs.data)
        return digest.digest()

    def load(self, slot: int, block: int) -> bytes:
        digest = xxhash.xxh3_128()
        for ours, theirs in zip(self._slots[slot], self._kv.runs[:, block], strict=True):
            np.copyto(theirs, ours)
            digest.update(theirs.data)
        return digest.digest()

    def spoil(self, slot: int, place: int) -> None:
        self._slots[slot].reshape(-1)[place] ^= 1


class _DeviceCopier:
    """Between a GPU and pinned host memory, each copy waited for; the lane sums never leave the device before they are done."""

    def __init__(self, kv: KVPool, num_slots: int) -> None:
        import torch

        layout = kv.layout
        self._pool = kv.tensor
        self._num_used = layout.block_size
        shape = (num_slots, layout.num_layers, *self._pool.shape[2:])
        try:
            self._slots = torch.empty(shape, dtype=self._pool.dtype, pin_memory=True)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot pin {num_slots * layout.block_nbytes / 2**30:.2f} GiB of host memory for evicted KV ({error}); lower "
                "model.host_cache_bytes",
                param="model.host_cache_bytes",
            ) from error

    def save(self, block: int, slot: int) -> bytes:
        self._slots[slot].copy_(self._pool[:, block], non_blocking=True)
        return self._sums(block)

    def load(self, slot: int, block: int) -> bytes:
        self._pool[:, block].copy_(self._slots[slot], non_blocking=True)
        return self._sums(block)

    def _sums(self, block: int) -> bytes:
        """Waits for the device, and so for the copy before it on the same stream."""
        from kernels import ops

        table = ops.run_table([block], [block], [self._num_used], self._pool.device)
        sums: Any = ops.move_runs(self._pool, None, table)
        return ops.sums_to_bytes(sums)

    def spoil(self, slot: int, place: int) -> None:
        import torch

        self._slots[slot].view(torch.uint8).reshape(-1)[place] ^= 1
