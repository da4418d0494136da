"""Transport between GPUs of two hosts: payload over a communicator for each pair of ranks, everything else over a socket.

    prefill: nccl_lane.py                                      decode: nccl_receiver.py
      socket   Hello, proof  ──────────────────────────────────>  who is it, which route, which GPU
               Welcome, proof, unique id  <─────────────────────  (proofs and frames: tcp_frames.py)
      per frame (runs of one layer, at most FRAME_NBYTES):
               pack kernel (zeroes ends, sums lanes) into staging
      socket   DATA header + index table  ─────────────────────>  checked against the grant
      nccl     staging  ═══════════════════════════════════════>  staging; scattered into the granted blocks, if the grant is live
      socket   FENCE  ─>  LANDED(count);  NACK(reason)

Each end has a thread and a stream of its own for the communicator (`Pipe`). NCCL's send and receive wait for ever when the other
side does not come, and its watchdog does not watch them: here every operation has a deadline, then the communicator is
aborted and never used again. The lane says so with LinkBroken, and everything begun goes once more over the fallback, a tcp lane to
the same rank; so does all that follows. A receiver scatters under the grant's lock and for live grants only, so `forget` says True.

Two ranks on one GPU cannot have a communicator: the hand-shake refuses, and the workers agree on another transport. Made by
link.py. This file has what both ends share; called `Communicator` here is what CuPy's NcclCommunicator can do, and tests bring
their own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from kvtransfer import tcp_frames as frames
from kvtransfer.outgoing import LinkBroken
from protocol.kv import KVLayout

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FRAME_NBYTES = 16 << 20  # of payload, unless one run is larger: long enough for a link, short enough for two staging buffers
SENDER, RECEIVER = 0, 1  # ranks in the communicator


class Hello(msgspec.Struct, frozen=True):
    """tcp_frames.Hello, and on which GPU the writer is."""

    hello: frames.Hello
    device_uuid: str


class Welcome(msgspec.Struct, frozen=True):
    incarnation: str
    layout: KVLayout  # the whole model's
    unique_id: bytes  # of the communicator that both now make
    refusal: str = ""  # not empty: the connection ends here, and this says why


class Communicator(Protocol):
    """Two ranks, one GPU each. Both calls return when the bytes have been sent, or are there."""

    def send(self, data: torch.Tensor) -> None: ...

    def receive(self, data: torch.Tensor) -> None: ...

    def abort(self) -> None:
        """From any thread: what is under way fails, at this end. Idempotent."""
        ...


MakeCommunicator = Callable[[bytes, int, "torch.device"], Communicator]  # (unique id, rank, GPU)


class CupyCommunicator:
    """NCCL by CuPy, on a stream of its own. Blocks until the other rank has come, or for ever."""

    def __init__(self, unique_id: bytes, rank: int, device: torch.device) -> None:
        import cupy
        import torch
        from cupy.cuda import nccl

        assert device.index is not None
        self._nccl = nccl
        self._device = device
        self._lock = threading.Lock()
        self._is_aborted = False
        with cupy.cuda.Device(device.index):
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)
            # CuPy takes the unique id as the tuple of signed bytes that its get_unique_id gives.
            self._comm = nccl.NcclCommunicator(2, tuple(b - 256 if b > 127 else b for b in unique_id), rank)

    def send(self, data: torch.Tensor) -> None:
        self._run(self._comm.send, data, RECEIVER)

    def receive(self, data: torch.Tensor) -> None:
        self._run(self._comm.recv, data, SENDER)

    def _run(self, operation: Callable[..., Any], data: torch.Tensor, peer: int) -> None:
        import cupy
        import torch

        with cupy.cuda.Device(self._device.index):
            operation(data.data_ptr(), data.numel() * data.element_size(), self._nccl.NCCL_UINT8, peer, self._stream.cuda_stream)
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()
        self._comm.check_async_error()

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        self._comm.abort()


def new_unique_id() -> bytes:
    from cupy.cuda import nccl

    return bytes(b % 256 for b in nccl.get_unique_id())


class Pipe:
    """A communicator and the one thread that uses it. Each operation, the making included, has timeout_s; then `abort`, and this
    pipe is broken for good. A making that never returns cannot be aborted: its thread stays behind, and nobody waits for it."""

    def __init__(self, make: Callable[[], Communicator], timeout_s: float, name: str) -> None:
        self.is_broken = False
        self.reason = ""
        self._timeout_s = timeout_s
        self._communicator: Communicator | None = None
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"kv-nccl:{name}", daemon=True).start()

        def begin() -> None:
            made = make()
            with self._lock:
                self._communicator = made
                is_late = self.is_broken
            if is_late:
                made.abort()

        self._made = self._post(begin)

    def ready(self) -> None:
        """Wait for the communicator. Raises LinkBroken."""
        self._wait(self._made, "making the communicator")

    def send(self, data: torch.Tensor) -> None:
        """Raises LinkBroken, also when it takes longer than timeout_s."""
        self._do("sending", lambda communicator: communicator.send(data))

    def receive(self, data: torch.Tensor) -> None:
        self._do("receiving", lambda communicator: communicator.receive(data))

    def abort(self, reason: str) -> None:
        """From any thread; idempotent."""
        with self._lock:
            if self.is_broken:
                return
            self.is_broken = True
            self.reason = reason
            communicator = self._communicator
        self._work.put(None)
        if communicator is not None:
            try:
                communicator.abort()
            except Exception as error:  # it is over, whatever it says
                log.info("aborting a communicator: %s", error)

    def _do(self, what: str, operation: Callable[[Communicator], None]) -> None:
        self.ready()
        communicator = self._communicator
        assert communicator is not None
        self._wait(self._post(lambda: operation(communicator)), what)

    def _post(self, function: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        if self.is_broken:
            future.set_exception(LinkBroken(self.reason))
        else:
            self._work.put((function, future))
        return future

    def _wait(self, future: Future[None], what: str) -> None:
        try:
            future.result(self._timeout_s)
        except TimeoutError:
            self.abort(f"nccl: {what} took longer than {self._timeout_s:g} s")
        except LinkBroken as error:
            self.abort(str(error))
        except Exception as error:
            self.abort(f"nccl: {what}: {error}")
        if self.is_broken:
            raise LinkBroken(self.reason)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            try:
                function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)


def max_runs(run_nbytes: int) -> int:
    """In one frame."""
    return max(1, min(frames.MAX_RUNS, FRAME_NBYTES // run_nbytes))


def staging(view: Any) -> torch.Tensor:
    """[max_runs, 2, num_heads, block_size, head_dim] on the view's device."""
    import torch

    count = max_runs(view.layout.run_nbytes)
    return torch.empty((count, *view.tensor.shape[2:]), dtype=view.tensor.dtype, device=view.device)
