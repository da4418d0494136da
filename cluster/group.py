"""A worker as a group of rank processes, seen from its leader: started, gathered, watched, and ended as one.

One rank's death is the group's death: nothing can be computed without it, and what it held of each block is gone. So nobody
tries to mend a group. Whoever notices first ends, the others notice that, Serve starts the whole replica again, and it comes back
with a new incarnation. What ranks compute is not known here (`rank.py`, engine/); how their processes come about is a `Spawn`
(`ray_ranks.py` under Serve, `subprocess_ranks.py` without Ray).

    leader                                          rank
      Spawn(order)  ──────────────────────────────>   imports torch
                     <────────  RankHello
      RankSetup      ────────>                         joins the group, loads its slice
                     <────────  RankLoaded
      RankPool, when all have loaded  ────────>        pool of the size that fits everywhere, transports, engine loop
                     <────────  RankReady
      ... RankOpen, RankFinish, RankExpect, ... ──>    KV of one grant, rank by rank
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from cluster.wire import Codec, Pulse, SocketNetwork
from configs.schema import Config
from kvtransfer.listening import Bind
from kvtransfer.process import Process, observe
from protocol import rank as rank_messages
from protocol.errors import ModelError, TandemError, WorkerLost, from_failure
from protocol.kv import KVEndpoint, ProcessRef
from protocol.messages import Ok
from protocol.network import Peer
from protocol.parallel import Parallel
from protocol.rank import (
    RankFailed,
    RankHello,
    RankLanded,
    RankLeave,
    RankLoaded,
    RankMessage,
    RankPool,
    RankReady,
    RankSetup,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")
RANKS = Codec(rank_messages.encode, rank_messages.decode)
# While it starts, importing torch may hold a process up for seconds; a death is noticed all the same.
SLOW_PULSE = Pulse(1.0, 120)
PULSE = Pulse(0.4, 6)  # a silent rank is noticed within 3 s
START_TIMEOUT_S = 600.0  # from one step of the start to the next; reading weights may take minutes
STOP_TIMEOUT_S = 3.0
LOST_RANK = 70  # exit status of a process that ended because another of its group did


class RankOrder(msgspec.Struct, frozen=True):
    """What a rank is told by whoever starts it. The cluster secret goes beside it, never in arguments that `ps` shows."""

    name: str  # "decode:0/1"
    rank: int
    group_id: str
    leader: str  # address of the leader's rank network


class Started(Protocol):
    """A rank's process as whoever started it sees it."""

    async def ended(self) -> str:
        """Returns when it is no more, with the reason in words."""

    def kill(self) -> None:
        """At once; also when it is stopped. Idempotent."""


class Spawn(Protocol):
    """Starts one rank's process near the leader: ranks of one stage on one node."""

    async def __call__(self, order: RankOrder) -> Started: ...


class PeerCaller:
    """kvtransfer's way to one other rank, over the connection that the rank made."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer

    async def call(self, message: RankMessage, timeout: float) -> RankMessage:
        answer: RankMessage = await self._peer.call(message, timeout)
        return answer

    def send(self, message: RankMessage) -> None:
        self._peer.send(message)


class _Member:
    """One rank but the leader's own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.started: Started | None = None
        self.peer: Peer | None = None
        self.process: Process | None = None
        self.ref: ProcessRef | None = None
        self.loaded: RankLoaded | None = None
        self.endpoints: dict[str, KVEndpoint] | None = None


class Leader:
    """Rank 0's hold on the others. on_broken(sentence) is called once, when a rank is lost after the start; on_leave() when a rank
    was asked to end and the group should drain.
    """

    def __init__(
        self,
        name: str,
        parallel: Parallel,
        secret: bytes,
        bind: Bind,
        spawn: Spawn,
        on_broken: Callable[[str], None],
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.parallel = parallel
        self.group_id = secrets.token_hex(16)
        self._spawn = spawn
        self._on_broken = on_broken
        self._on_leave = on_leave
        self._network = SocketNetwork(f"{name}/0", secret, bind.host, codec=RANKS, pulse=SLOW_PULSE, ports=bind.ports)
        self._members = {rank: _Member(rank) for rank in range(1, parallel.num_ranks)}
        self._watching: list[asyncio.Task[None]] = []
        self._setup: asyncio.Future[RankSetup] = asyncio.get_running_loop().create_future()
        self._pool: asyncio.Future[RankPool] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._failure: TandemError | None = None
        self.on_landed: Callable[[RankLanded], None] = lambda message: None  # prefill: the worker's ear
        self.is_serving = False
        self._is_closing = False

    # ---- the start, in its order ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Have the ranks' processes started. They will wait for `set_up`. Raises TandemError."""
        await self._network.serve(self._handle, self._on_lost)
        for member in self._members.values():
            name = f"{self.name}/{member.rank}"
            order = RankOrder(name, member.rank, self.group_id, self._network.address)
            member.started = await self._spawn(order)
            self._watching.append(asyncio.create_task(self._watch(member, member.started)))

    def set_up(self, setup: RankSetup) -> None:
        """The store is open: whoever says hello gets this."""
        self._setup.set_result(setup)

    async def agree(self, mine: RankLoaded) -> int:
        """How many KV blocks every rank has room for, once all have loaded. Raises WorkerLost, ModelError, what a rank raised."""
        await self._until(lambda member: member.loaded is not None, "load its part of the model")
        loaded = [mine, *(member.loaded for member in self._members.values() if member.loaded is not None)]
        for other in loaded:
            if other.model_hash != mine.model_hash:
                raise ModelError(
                    f"rank {other.rank} of {self.name} has loaded another model than rank 0 ({other.model_hash} instead of "
                    f"{mine.model_hash}); every node needs the same files"
                )
        num_blocks = min(each.num_blocks for each in loaded)
        self._pool.set_result(RankPool(num_blocks))
        return num_blocks

    async def ready(self) -> dict[int, dict[str, KVEndpoint]]:
        """Endpoints by transport name of every other rank, once all of them step. From now on a loss is the end."""
        await self._until(lambda member: member.endpoints is not None, "get ready")
        self.is_serving = True
        for member in self._members.values():
            quicken(member.peer)
        return {member.rank: member.endpoints or {} for member in self._members.values()}

    def callers(self) -> dict[int, PeerCaller]:
        """By rank; after `agree`."""
        return {member.rank: PeerCaller(member.peer) for member in self._members.values()}

    @property
    def processes(self) -> tuple[ProcessRef, ...]:
        """Of the other ranks, in their order; after `agree`."""
        return tuple(member.ref for member in self._members.values() if member.ref is not None)

    async def unless_lost(self, work: Awaitable[_T]) -> _T:
        """Wait for it, or raise what a rank that was lost meanwhile died of: it may be what the work waits for."""
        task = asyncio.ensure_future(work)
        lost = asyncio.ensure_future(self._lost.wait())
        await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if self._failure is not None:
            task.cancel()
            raise self._failure
        return await task

    async def _until(self, condition: Callable[[_Member], bool], what: str) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while self._failure is None and not all(map(condition, self._members.values())):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            late = ", ".join(str(member.rank) for member in self._members.values() if not condition(member))
            raise WorkerLost(f"rank {late} of {self.name} did not {what} within {START_TIMEOUT_S:.0f} s") from None
        if self._failure is not None:
            raise self._failure

    # ---- what ranks say ----------------------------------------------------------------------------------------------

    async def _handle(self, peer: Peer, message: Any) -> Any:
        if isinstance(message, RankHello):
            return await self._hello(peer, message)
        member = next((m for m in self._members.values() if m.peer is peer), None)
        if member is None:
            raise TandemError("say hello first")
        if isinstance(message, RankLoaded):
            member.loaded = message
            self._changed.set()
            return await asyncio.shield(self._pool)
        if isinstance(message, RankReady):
            member.endpoints = message.endpoints
            self._changed.set()
            return Ok()
        if isinstance(message, RankLanded):
            self.on_landed(message)
            return None
        if isinstance(message, RankFailed):
            self._lose(member, from_failure(message.failure))
            return None
        if isinstance(message, RankLeave):
            self._on_leave()
            return None
        raise TandemError(f"a leader does not take {type(message).__name__}")

    async def _hello(self, peer: Peer, message: RankHello) -> RankSetup:
        member = self._members.get(message.rank)
        if message.group_id != self.group_id or member is None or member.peer is not None:
            raise TandemError(f"rank {message.rank} of {message.group_id[:8]} does not belong to {self.name} as it is now")
        member.peer, member.ref = peer, message.process
        member.process = observe(message.process.boot_id, message.process.pid, message.process.start_ticks)
        return await asyncio.shield(self._setup)

    # ---- loss --------------------------------------------------------------------------------------------------------

    def _on_lost(self, peer: Peer) -> None:
        for member in self._members.values():
            if member.peer is peer:
                how = getattr(peer, "closed_because", "")
                self._lose(member, WorkerLost(f"its connection: {how}"))

    async def _watch(self, member: _Member, started: Started) -> None:
        reason = await started.ended()
        self._lose(member, WorkerLost(f"its process: {reason}"))

    def _lose(self, member: _Member, error: TandemError) -> None:
        """Noticed in one of several ways, acted upon once."""
        if self._is_closing or self._failure is not None:
            return
        lost = f"{self.name} lost rank {member.rank} (pid {member.ref.pid if member.ref else 'unknown'})"
        self._failure = WorkerLost(f"{lost}; {error.message}") if isinstance(error, WorkerLost) else error
        self._changed.set()
        self._lost.set()
        self._end_ranks()
        if self.is_serving:
            self._on_broken(self._failure.message)

    def _end_ranks(self, but: Callable[[_Member], bool] | None = None) -> None:
        """A stopped process hears nothing but SIGKILL, and would go on as a ghost when it is continued."""
        for member in self._members.values():
            if but is not None and but(member):
                continue
            if member.process is not None:
                end_process(member.process)
            if member.started is not None:
                member.started.kill()

    async def close(self, stop: Awaitable[Any] | None = None) -> None:
        """stop: tells the ranks to go. Who has not gone a moment later is killed; only then our side of the connections closes,
        or a rank would take it for our death and see to that."""
        self._is_closing, self.is_serving = True, False
        if stop is not None:
            with contextlib.suppress(TandemError, TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await stop
                    while not all(map(_has_gone, self._members.values())):
                        await asyncio.sleep(0.01)
        self._end_ranks(but=_has_gone if stop is not None else None)
        for task in self._watching:
            task.cancel()
        for future in (self._setup, self._pool):
            future.cancel()
        await self._network.close()


def _has_gone(member: _Member) -> bool:
    return member.peer is not None and member.peer.is_closed


def quicken(peer: Any) -> None:
    """The start is over: from now on silence means death."""
    peer.pulse = PULSE


def config_here(config_json: bytes) -> Config:
    """The cluster's configuration as this process sees it: which address its sockets bind may differ from node to node."""
    config = msgspec.json.decode(config_json, type=Config)
    here = os.environ.get("TANDEM_TRANSFER_BIND_HOST")
    if here is None:
        return config
    return msgspec.structs.replace(config, transfer=msgspec.structs.replace(config.transfer, bind_host=here))


def end_process(process: Process) -> None:
    """SIGKILL to this very process, which a pidfd names for ever; nothing when it is over."""
    try:
        signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
    except (OSError, ValueError):
        log.debug("process %d is gone already", process.pid)
