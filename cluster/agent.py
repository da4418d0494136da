"""What keeps a worker part of the cluster: registration, heartbeats, ticks of its leases, the canary. One agent per worker.

The worker itself never hears of the scheduler. Called by `deployments.py` and `local.py`; torch-free, Ray-free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import psutil

from cluster.gpu import GpuReader
from protocol.errors import NotFound, TandemError
from protocol.messages import WorkerBeat, WorkerInfo, WorkerPhase, WorkerStats
from protocol.network import Network

log = logging.getLogger(__name__)

TICK_S = 0.25
CALL_TIMEOUT_S = 2.0
REGISTER_S = 60.0
CANARY_AFTER_S = 10.0  # an idle worker proves every so often that it can still produce a token (R10)


class Worker(Protocol):
    """What the agent needs of a prefill or decode worker."""

    is_draining: bool

    @property
    def is_idle(self) -> bool: ...

    def stats(self) -> WorkerStats: ...

    def in_flight(self) -> tuple[tuple[str, int], ...]: ...

    def tick(self) -> None: ...


class Agent:
    def __init__(
        self,
        worker: Worker,
        info: WorkerInfo,
        network: Network,
        find_scheduler: Callable[[], Awaitable[str]],
        heartbeat_s: float = 1.0,
        canary: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.worker = worker
        self.info = info
        self._network = network
        self._find_scheduler = find_scheduler
        self._heartbeat_s = heartbeat_s
        self._canary = canary
        self._process = psutil.Process()
        self._gpu = GpuReader(info.device)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_due = asyncio.Event()

    async def start(self) -> None:
        """Returns when the scheduler knows this worker. One that is just being restarted is waited for, REGISTER_S at most: what
        was loaded in minutes is not thrown away for its seconds. Raises what the last attempt did."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + REGISTER_S
        while True:
            try:
                await self._register()
                break
            except (TandemError, OSError) as error:
                if clock() >= deadline:
                    raise
                log.warning("%s is not registered yet: %s", self.info.name, error)
            await asyncio.sleep(TICK_S)
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._tick())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def beat_now(self) -> None:
        """Something changed that nobody should learn a period later: that this worker drains, say."""
        self._is_due.set()

    async def _register(self) -> None:
        peer = await self._network.connect(await self._find_scheduler())
        await peer.call(self.info, CALL_TIMEOUT_S)

    async def _beat(self) -> None:
        """One heartbeat per period, whatever happens; an unknown incarnation (a new scheduler) registers again."""
        while True:
            self._is_due.clear()
            try:
                await self._say_so()
            except (TandemError, OSError) as error:
                log.info("heartbeat: %s", error)
            except Exception:  # a worker that stops beating would leave the cluster for good
                log.exception("a heartbeat of %s failed", self.info.name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._is_due.wait()

    async def _say_so(self) -> None:
        peer = await self._network.connect(await self._find_scheduler())
        try:
            await peer.call(self._message(), CALL_TIMEOUT_S)
        except NotFound:
            await peer.call(self.info, CALL_TIMEOUT_S)
            await peer.call(self._message(), CALL_TIMEOUT_S)  # what runs here counts at once, and no draining worker gets work

    def _message(self) -> WorkerBeat:
        stats = msgspec.structs.replace(self.worker.stats(), rss_bytes=self._process.memory_info().rss, gpu=self._gpu.read())
        state = "draining" if self.worker.is_draining else "ready"
        return WorkerBeat(self.info.incarnation, state, stats, self.worker.in_flight())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.worker.tick()
                age = self.worker.stats().last_token_age_s
                if self._canary is not None and self.worker.is_idle and not 0 <= age < CANARY_AFTER_S:
                    await self._canary()
            except Exception:
                log.exception("a tick of %s failed", self.info.name)


def new_incarnation(role: str, index: int, prefix: str = "") -> str:
    """The name of one life of a worker; its identity, which no successor at the same address ever has. prefix: "MODEL/" where there
    are several."""
    return f"{prefix}{role}-{index}-{secrets.token_hex(6)}"


def new_gateway_id(index: int) -> str:
    """Two lives of one gateway may overlap during an update, and the scheduler keeps what each of them holds apart."""
    return f"gateway:{index}:{secrets.token_hex(4)}"


async def tell_phase(network: Network, scheduler: str, phase: WorkerPhase) -> None:
    """Best effort: how far a start-up is."""
    try:
        (await network.connect(scheduler)).send(phase)
    except (TandemError, OSError) as error:
        log.debug("phase not told: %s", error)
