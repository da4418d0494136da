"""Transport between GPUs of one host: the sender's kernel writes straight into the decode worker's mapped pool.

One pass: the kernel that stores the runs into the peer's blocks, whatever the routes between the two groups, also zeroes the unused
end and sums the lanes (kernels/kv_pack.py). It runs on a stream of its own, behind what the engine had launched when it pushed. No
byte of it passes through host memory, and there is no staging.

As with shm the decode side does nothing while bytes arrive and cannot refuse any: `forget` says False, and what is void waits
in quarantine for the writer's word, which it gives when the device has done the last store, never earlier; a device that hangs
keeps the blocks in quarantine until its process is seen to die. Made by link.py.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtransfer import gpu, process
from kvtransfer.arrivals import Arrivals
from kvtransfer.handoff import DIGEST_NBYTES
from kvtransfer.outgoing import Piece, Prepared, Source, Transfer
from kvtransfer.pool import KVPool
from protocol.errors import HandshakeRefused, TransferFailed, Unsupported
from protocol.kv import CudaIpcEndpoint, KVLayout
from protocol.ticket import Grant

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class CudaIpcReceiver:
    """A `Receiver`: its pool's handle is all there is. Raises Unsupported where the pool is not on a GPU, or CuPy is missing."""

    def __init__(self, pool: KVPool) -> None:
        if not pool.is_on_gpu or not gpu.has_cupy():
            why = "CuPy is not installed" if pool.is_on_gpu else f"the KV pool is on {pool.device}"
            raise Unsupported(f"cuda_ipc: {why} (--kv-transport)", param="transfer.transport")
        memory = pool.tensor
        assert memory.device.index is not None
        self._endpoint = CudaIpcEndpoint(
            process.boot_id(), os.getpid(), gpu.uuid_of(memory.device.index), gpu.export(memory), pool.nbytes
        )

    def endpoint(self) -> CudaIpcEndpoint:
        return self._endpoint

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        pass

    def forget(self, grant_id: str) -> bool:
        return False

    def close(self) -> None:
        pass


def open_peer(endpoint: CudaIpcEndpoint, layout: KVLayout, own: torch.device) -> torch.Tensor:
    """The peer's pool, a tensor of this process. Raises HandshakeRefused."""
    import torch

    if endpoint.pid == os.getpid():
        raise HandshakeRefused("cuda_ipc: a handle does not open in the process that it comes from")
    assert own.index is not None
    raw = gpu.opened(endpoint.handle, endpoint.nbytes, endpoint.device_uuid, own.index)
    shape = (layout.num_layers, -1, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return raw.view(getattr(torch, layout.dtype)).view(shape)


class _Fenced(NamedTuple):
    """What was launched for one transfer. sums: in host memory once `event` is reached."""

    transfer: Transfer
    places: list[tuple[int, Sequence[int]]]  # (layer, indexes), in the order of the sums
    sums: torch.Tensor | None
    event: Any


class CudaIpcLane:
    """See outgoing.Lane. The mapping of one peer rank's pool, made once and shared by all grants. layout: of that pool.

    Raises HandshakeRefused, with both values where there are two, when the memory is not reachable or not the one that was meant.
    """

    def __init__(
        self,
        endpoint: CudaIpcEndpoint,
        source: Source,
        layout: KVLayout,
        open_peer: Callable[[CudaIpcEndpoint, KVLayout, torch.device], torch.Tensor] = open_peer,
    ) -> None:
        from kvtransfer.device import DeviceView

        if not isinstance(source.view, DeviceView):
            raise HandshakeRefused("cuda_ipc: our own KV pool is not on a GPU")
        self.endpoint = endpoint
        if endpoint.boot_id != process.boot_id():
            raise HandshakeRefused(f"cuda_ipc: the peer runs on boot {endpoint.boot_id}, this is {process.boot_id()}: another host")
        self.num_blocks, rest = divmod(endpoint.nbytes, layout.block_nbytes)
        if rest:
            raise HandshakeRefused(
                f"cuda_ipc: the peer's pool of {endpoint.nbytes} bytes is not a number of our blocks of {layout.block_nbytes}"
            )
        peer = process.observe(endpoint.boot_id, endpoint.pid)
        if peer is None:
            raise HandshakeRefused(f"cuda_ipc: process {endpoint.pid} is not visible from here (dead, or another pid namespace)")
        self._peer = peer
        self._view = source.view
        try:
            pool = open_peer(endpoint, layout, source.view.device)
        except BaseException:
            peer.close()
            raise
        area = source.route.target_area
        part = pool[area.layer : area.layer + area.num_layers, :, :, area.head : area.head + area.num_heads]
        self._target: torch.Tensor | None = part
        self._launched: dict[int, list[tuple[int, Sequence[int], torch.Tensor]]] = {}  # by id(transfer), until it is fenced
        self._fenced: queue.SimpleQueue[_Fenced | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="kv-landed", daemon=True)
        self._thread.start()

    def attach(self, on_broken: Callable[[], None]) -> None:
        pass

    def warm(self) -> None:
        """Have the kernel compiled before the first transfer waits for it."""
        self._view.rehearse()

    def is_broken(self) -> bool:
        return False

    def reset(self) -> None:
        pass

    def store(self, transfer: Transfer, layer: int, pieces: Iterable[Piece]) -> None:
        assert isinstance(pieces, Prepared), "this lane reads the device itself"
        assert self._target is not None, "store after close"
        blocks = [block for block, _ in pieces.pairs]
        indexes = [index for _, index in pieces.pairs]
        used = [transfer.num_used(index) for index in indexes]
        into = [transfer.grant.block_ids[index] for index in indexes]
        sums = self._view.move(layer, blocks, used, self._target[layer], into)
        self._launched.setdefault(id(transfer), []).append((layer, indexes, sums))
        transfer.carried(layer, indexes)  # the digests come with the fence

    def fence(self, transfer: Transfer) -> None:
        import torch

        launched = self._launched.pop(id(transfer), [])
        sums = None
        with self._view.on_stream():
            if launched:
                together = torch.cat([part for _, _, part in launched])
                sums = torch.empty(together.shape, dtype=together.dtype, pin_memory=together.device.type == "cuda")
                sums.copy_(together, non_blocking=True)
            event = self._view.recorded()
        self._fenced.put(_Fenced(transfer, [(layer, indexes) for layer, indexes, _ in launched], sums, event))

    def interrupt(self) -> None:
        pass  # there is no network in it

    def close(self) -> None:
        """Returns when the device has done what was launched: only then is it true that nothing is stored any more."""
        self._fenced.put(None)
        self._thread.join()
        self._view.synchronize()
        self._target = None  # unmapped with its last view
        self._peer.close()

    # ---- the thread that waits for the device --------------------------------------------------------------------------

    def _watch(self) -> None:
        while (fenced := self._fenced.get()) is not None:
            try:
                self._landed(fenced)
            except Exception as error:  # the CUDA context is lost, and every kernel of ours with it
                log.exception("waiting for the device failed")
                fenced.transfer.fail(TransferFailed(f"the GPU failed during the transfer: {error}"))
                fenced.transfer.stopped()

    def _landed(self, fenced: _Fenced) -> None:
        from kernels import ops

        transfer = fenced.transfer
        if fenced.event is not None:
            fenced.event.synchronize()
        if self._peer.is_dead():  # before a Seal that nobody answers
            transfer.fail(TransferFailed(f"the decode worker (process {self.endpoint.pid}) is dead"))
        digests = ops.sums_to_bytes(fenced.sums) if fenced.sums is not None else b""
        place = 0
        for layer, indexes in fenced.places:
            width = len(indexes) * DIGEST_NBYTES
            transfer.put_digests(layer, indexes, digests[place : place + width])
            place += width
        transfer.landed(transfer.num_runs - transfer.num_missing)
