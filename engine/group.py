"""One rank's membership in the group of one worker: the step's broadcast, sums over tensor ranks, hand-over between stages.

Raw process groups of torch, never its global default one: several groups live in one process, and ranks can be threads. Every
wait has a deadline; whatever fails raises GroupBroken, and the group is over then. Not here: how ranks find each other (the
store is given) and what a step is (engine/step.py). Called by engine/runner.py, engine/follower.py and, as TensorRanks, models/.

On the host everything is made of gloo's point-to-point calls. Its own collectives go through threads of their own: on two cores
an all-reduce of 64 numbers among 2 processes takes 0.8 ms, and 0.08 ms when the two send each other theirs and both add.
Tensors on a GPU go through NCCL; the step itself is small and always goes through the host.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.step import Message, decode, encode
from protocol.errors import ConfigError, GroupBroken
from protocol.parallel import Parallel

STEP_NBYTES = 8192  # of the first buffer: a step that is longer takes a second one
_LENGTH = struct.Struct("<Q")
_STEP, _REST, _TENSOR, _STAGE = range(4)  # gloo's tags
_T = TypeVar("_T")


class Group:
    """Collective: every rank of `parallel` makes one, over the same store, within join_timeout_s. Raises GroupBroken.

    store: of this group's life alone; names are not used twice. timeout_s: the longest that a rank waits for another one,
    be it in a step or for the next step, so the leader sends an idle one before it passes. hostname: this rank's own address,
    a name or a number, which the others can reach (or `interface`, like eth0). device: where the model is.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        parallel: Parallel,
        *,
        timeout_s: float = 60.0,
        join_timeout_s: float | None = None,
        hostname: str = "127.0.0.1",
        interface: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank = rank
        self.parallel = parallel
        self.timeout_s = timeout_s
        self.is_broken = False
        self._tp_rank, self._pp_rank = parallel.tp_rank(rank), parallel.pp_rank(rank)
        self._wait = timedelta(seconds=timeout_s)
        self._sends: list[Any] = []  # of the last step, with its buffers
        self._buffers: list[Tensor] = []
        join = timedelta(seconds=join_timeout_s or timeout_s)
        self._host: Any = None
        self._tensor: Any = None  # NCCL, between the tensor ranks of this stage
        self._pipe: Any = None  # NCCL, between the stages of this tensor rank
        self._host = self._do("join", lambda: _gloo(store, rank, parallel.num_ranks, join, hostname, interface))
        if torch.device(device).type == "cuda":
            tensor, pipe = f"tensor/{self._pp_rank}", f"stages/{self._tp_rank}"
            self._tensor = self._do("join", lambda: _nccl(store, tensor, self._tp_rank, parallel.tp_size, self._wait))
            self._pipe = self._do("join", lambda: _nccl(store, pipe, self._pp_rank, parallel.pp_size, self._wait))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave. The others' next wait for this rank fails at once. Idempotent; call it in the thread that steps."""
        self.is_broken = True
        self._sends.clear()
        for communicator in (self._tensor, self._pipe):
            if communicator is not None:
                communicator.abort()  # NCCL: whatever waits on the device ends
        self._host = self._tensor = self._pipe = None

    # ---- steps -----------------------------------------------------------------------------------------------------

    def broadcast(self, message: Message, *, flush: bool = False) -> None:
        """Leader: to every other rank. One buffer of a fixed size, and a second one only for what does not fit. Returns before the
        others have taken it, unless they are to be waited for (flush); but they have taken the step before."""
        assert self.is_leader, "the leader alone decides what a step is"
        data = encode(message)
        first = torch.zeros(STEP_NBYTES, dtype=torch.uint8)
        _LENGTH.pack_into(first.numpy().data, 0, len(data))
        head = data[: STEP_NBYTES - _LENGTH.size]
        first.numpy()[_LENGTH.size : _LENGTH.size + len(head)] = memoryview(head)
        self._do("step", lambda: self._wait_all(self._sends))
        self._buffers = [first]
        if len(head) < len(data):
            self._buffers.append(torch.frombuffer(bytearray(data[len(head) :]), dtype=torch.uint8))
        self._do("step", self._send_step)
        if flush:
            self._do("step", lambda: self._wait_all(self._sends))

    def _send_step(self) -> None:
        for tag, buffer in zip((_STEP, _REST), self._buffers, strict=False):
            self._sends += [self._host.send([buffer], other, tag) for other in range(1, self.parallel.num_ranks)]

    def receive(self) -> Message:
        """Another rank: the leader's next step."""
        first = torch.empty(STEP_NBYTES, dtype=torch.uint8)
        self._do("step", lambda: self._host.recv([first], 0, _STEP).wait(self._wait))
        (length,) = _LENGTH.unpack_from(first.numpy().data)
        data = first.numpy()[_LENGTH.size : _LENGTH.size + length].tobytes()
        if len(data) < length:
            rest = torch.empty(length - len(data), dtype=torch.uint8)
            self._do("step", lambda: self._host.recv([rest], 0, _REST).wait(self._wait))
            data += rest.numpy().tobytes()
        return decode(data)

    # ---- tensor ranks: models.interface.TensorRanks ------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the stage's tensor ranks; x is used up. On the host it is added in the order of ranks, so that each rank
        has the same bits."""
        if self.parallel.tp_size == 1:
            return x
        assert x.is_contiguous(), x.stride()
        if self._tensor is not None:
            self._do("all-reduce", lambda: self._tensor.allreduce([x]).wait())
            return x
        parts = [x if t == self._tp_rank else torch.empty_like(x) for t in range(self.parallel.tp_size)]
        self._do("all-reduce", lambda: self._exchange(parts))
        for part in parts[1:]:
            parts[0].add_(part)
        return parts[0]

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        if self.parallel.tp_size == 1:
            return x
        assert x.shape[1] == widths[self._tp_rank], (x.shape, widths)
        if self._tp_rank:
            self._do("gather", lambda: self._to_tensor_rank(x.contiguous(), 0))
            return None
        parts = [x, *(x.new_empty(x.shape[0], width) for width in widths[1:])]
        self._do("gather", lambda: self._from_tensor_ranks(parts))
        return torch.cat(parts, dim=1)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def send_on(self, x: Tensor) -> None:
        """To the same tensor rank of the next stage; after the last stage comes the first."""
        x = x.contiguous()
        stage = (self._pp_rank + 1) % self.parallel.pp_size
        if self._pipe is not None:
            self._do("hand-over", lambda: self._pipe.send([x], stage, _STAGE).wait())
        else:
            rank = self.parallel.rank(self._tp_rank, stage)
            self._do("hand-over", lambda: self._host.send([x], rank, _STAGE).wait(self._wait))

    def take_over(self, x: Tensor) -> Tensor:
        """Into x, from the same tensor rank of the stage before; before the first stage is the last."""
        stage = (self._pp_rank - 1) % self.parallel.pp_size
        if self._pipe is not None:
            self._do("hand-over", lambda: self._pipe.recv([x], stage, _STAGE).wait())
        else:
            rank = self.parallel.rank(self._tp_rank, stage)
            self._do("hand-over", lambda: self._host.recv([x], rank, _STAGE).wait(self._wait))
        return x

    # ---- below -------------------------------------------------------------------------------------------------------

    def _rank_of(self, tp_rank: int) -> int:
        return self.parallel.rank(tp_rank, self._pp_rank)

    def _exchange(self, parts: list[Tensor]) -> None:
        """Everybody's part to everybody. Receives are posted first: gloo sends nothing before its place is known."""
        mine = parts[self._tp_rank]
        others = [t for t in range(self.parallel.tp_size) if t != self._tp_rank]
        works = [self._host.recv([parts[t]], self._rank_of(t), _TENSOR) for t in others]
        works += [self._host.send([mine], self._rank_of(t), _TENSOR) for t in others]
        self._wait_all(works)

    def _to_tensor_rank(self, x: Tensor, tp_rank: int) -> None:
        if self._tensor is not None:
            self._tensor.send([x], tp_rank, _TENSOR).wait()
        else:
            self._host.send([x], self._rank_of(tp_rank), _TENSOR).wait(self._wait)

    def _from_tensor_ranks(self, parts: list[Tensor]) -> None:
        if self._tensor is not None:
            for t, part in enumerate(parts[1:], 1):
                self._tensor.recv([part], t, _TENSOR).wait()
        else:
            self._wait_all([self._host.recv([part], self._rank_of(t), _TENSOR) for t, part in enumerate(parts[1:], 1)])

    def _wait_all(self, works: list[Any]) -> None:
        try:
            while works:
                works[0].wait(self._wait)
                del works[0]
        finally:
            works.clear()  # one that is left, in the frame of a kept traceback too, would keep our connections open

    def _do(self, what: str, act: Callable[[], _T]) -> _T:
        if self.is_broken:
            raise GroupBroken(f"rank {self.rank}: its group is over; the worker has to start again")
        try:
            return act()
        except RuntimeError as error:  # whatever gloo, NCCL and the store raise: a peer's death, a deadline
            self.close()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". This is typically")[0]
            raise GroupBroken(
                f"rank {self.rank} of {self.parallel} lost its group in its {what} (deadline {self.timeout_s:g} s): {reason}"
            ) from error


def _gloo(store: dist.Store, rank: int, size: int, join: timedelta, hostname: str, interface: str) -> Any:
    """hostname or interface chooses the address that the others are told. Left to itself, gloo takes that of the host's name,
    which on a host of several networks, or with a name that resolves to loopback, is the wrong one."""
    options = dist.ProcessGroupGloo._Options()
    try:
        device = {"interface": interface} if interface else {"hostname": hostname}
        options._devices = [dist.ProcessGroupGloo.create_device(**device)]
    except RuntimeError as error:
        raise ConfigError(f"this host has no address {interface or hostname} to join a group with ({error})") from error
    options._timeout = join
    options._threads = 1
    return dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, options)


def _nccl(store: dist.Store, name: str, rank: int, size: int, timeout: timedelta) -> Any:
    """None for a group of one. NCCL's own watchdog ends the process when a call of it passes the deadline."""
    if size == 1:
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options)
