"""One life of one prefill or decode worker, from its first import to its last breath: start, serve, drain, end.

Knows no Ray: `deployments.py` runs it in a Serve replica, tests in a plain process. With tp x pp > 1 this process is rank 0 of a
group; the others are started and watched through `group.py`. The worker itself (prefill/, decode/) hears of none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from cluster.agent import Agent, new_incarnation, tell_phase
from cluster.group import LOST_RANK, Leader, Spawn
from cluster.orders import Order, OrderedNetwork
from configs.schema import Config
from kvtransfer.listening import bind_of
from kvtransfer.process import boot_id, start_ticks
from protocol.errors import Draining, GroupBroken, TandemError, TransferFailed, Unsupported
from protocol.kv import ProcessRef
from protocol.messages import Leave, SwitchRole, WorkerPhase
from protocol.network import Network
from protocol.rank import RankLoaded, RankSetup

if TYPE_CHECKING:
    from cluster.assembly import Engine
    from engine.cores import Ledger
    from models.interface import Shard

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
GOING_S = 0.2  # for what was said last to leave before the process does
DRAIN_SHARE = 0.75  # of a notice's seconds; the rest is for goodbyes
SWITCHED = 1000  # a worker that changed its role is called decode:1000 where it was prefill:0
FindScheduler = Callable[[], Awaitable[str]]


class WorkerLife:
    """Make it on an event loop, `await start()`; `drain()` and `close()` end it.

    spawn: how the other ranks' processes come about; needed when the configuration wants a group. renew: another network and how
    the scheduler is found over it, for a life in the other role; without it the role cannot be changed.
    """

    def __init__(
        self,
        role: str,
        index: int,
        config: Config,
        secret: bytes,
        network: Network,
        find: FindScheduler,
        spawn: Spawn | None = None,
        renew: Callable[[], tuple[Network, FindScheduler]] | None = None,
    ) -> None:
        self.name = f"{config.prefix}{role}:{index}"
        self.incarnation = new_incarnation(role, index, config.prefix)
        self._index = index
        self._renew = renew
        self.worker: Any = None
        self._began_at = time.monotonic()
        self._role = role
        self._config = config
        self._secret = secret
        self._network: Network = OrderedNetwork(network, self._take_order)
        self._find = find
        self._parallel = config.parallel(role)
        self._loop = asyncio.get_running_loop()
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._verify_thread = ThreadPoolExecutor(1, "verify")
        self._engine: Engine
        self._ledger: Ledger | None = None
        self._agent: Agent | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._switching: asyncio.Task[None] | None = None
        self._drain_s = config.scheduler.drain_s
        self._leader: Leader | None = None
        if self._parallel.num_ranks > 1:
            assert spawn is not None, f"{self.name} is {self._parallel} and nobody says how ranks are started"
            self._leader = Leader(self.name, self._parallel, secret, bind_of(config.transfer), spawn, end_at_once, self.leave)

    @property
    def is_over(self) -> bool:
        """A loop that must never end has ended."""
        return any(task.done() for task in self._tasks)

    # ---- start -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises what made it impossible, after the scheduler was told."""
        try:
            await self._start()
        except Exception as error:
            if self._leader is not None:
                await self._leader.close()
            await tell_failure(self._network, self._find, self.name, self._role, self.incarnation, error)
            raise

    async def _start(self) -> None:
        config = self._config
        await self._tell("importing", "")
        if self._leader is not None:
            await self._leader.start()
        assembly = await self._loop.run_in_executor(self._engine_thread, import_engine)
        self._ledger = assembly.open_ledger(config, self._secret)
        if self._ledger is not None and config.model.cpu_sharing == "pinned":
            await self._in_engine_thread(lambda: assembly.pin(config, self._role, self._ledger))
        await self._tell("loading", config.model.name)
        others = assembly.NO_OTHERS
        if self._leader is None:
            self._engine = await self._in_engine_thread(lambda: self._load(assembly))
        else:
            self._engine, others = await self._load_as_leader(assembly, self._leader)
        await self._tell("loaded", _describe(self._engine))
        await self._serve(assembly, others)

    async def _serve(self, assembly: Any, others: Any) -> None:
        """Build the worker of this role around the engine, and make it part of the cluster."""
        config = self._config
        speculator = await self._in_engine_thread(lambda: _make_speculator(config, self._role, self._engine))
        computes = (self._in_engine_thread, self._in_verify_thread)
        parts = assembly.Parts(
            config, self._engine, self.incarnation, self._network, time.monotonic, *computes, self._secret, speculator
        )
        self.worker = assembly.build_worker(self._role, parts, others, assembly.transports_of(config))
        if self._leader is not None and self._role == "prefill":
            self._leader.on_landed = self.worker.handover.rank_landed
        self.worker.cores = assembly.cores_of(config, self._role, self._ledger, self._engine.loaded.device.type)
        self.worker.step_log = assembly.open_step_log(config, self.name, self.incarnation)
        await self.worker.start()
        canary = assembly.canary(self._engine, self.worker, self._in_engine_thread, time.monotonic)
        await canary()
        info = assembly.worker_info(self._role, self.name, parts, others)
        self._agent = Agent(self.worker, info, self._network, self._find, config.scheduler.heartbeat_s, canary)
        self._tasks = [asyncio.create_task(self.worker.run())]
        if self._leader is not None:
            self._tasks.append(asyncio.create_task(assembly.idle_steps(self._engine.runner, self._in_engine_thread)))
        await self._agent.start()
        await self._tell("ready", _pool(self._engine))

    def _load(self, assembly: Any) -> Engine:
        """In the engine's thread: all of the model."""
        loaded = assembly.load(self._config, self._progress())
        num_blocks = assembly.num_blocks(self._config, self._role, loaded)
        made: Engine = assembly.build_engine(self._config, loaded, num_blocks, assembly.num_threads(self._config, self._role))
        return made

    async def _load_as_leader(self, assembly: Any, leader: Leader) -> tuple[Engine, Any]:
        """Our part of it, while the others load theirs."""
        config, role, parallel = self._config, self._role, self._parallel
        host, ports = bind_of(config.transfer)
        store, port = await self._in_engine_thread(lambda: assembly.open_store(host, ports))
        config_json = msgspec.json.encode(config)
        transports = assembly.transports_of(config)
        leader.set_up(RankSetup(config_json, role, self.incarnation, parallel, host, port, transports, this_process()))
        shard: Shard = assembly.Shard(parallel, 0)

        def join_and_load() -> Any:
            group = assembly.join_group(config, store, leader.group_id, shard)
            return group, assembly.load(config, self._progress(), shard, group)

        group, loaded = await leader.unless_lost(self._in_engine_thread(join_and_load))
        mine = RankLoaded(0, assembly.num_blocks(config, role, loaded), loaded.model_hash)
        num_blocks = await leader.agree(mine)
        threads = assembly.num_threads(config, role)
        engine = await self._in_engine_thread(lambda: assembly.build_engine(config, loaded, num_blocks, threads, group))
        endpoints = await leader.ready()
        return engine, assembly.Others(leader.callers(), endpoints, leader.processes)

    async def _in_engine_thread(self, function: Callable[[], Any]) -> Any:
        """Everything that computes goes through here, one after the other. A group that broke is the end of this process: whatever
        it would say about its requests, that they failed, is not true, for another worker can go on with them."""

        def guarded() -> Any:
            try:
                return function()
            except GroupBroken as error:
                if self._leader is None or not self._leader.is_serving:
                    raise
                end_at_once(f"{self.name}: {error.message}")

        return await self._loop.run_in_executor(self._engine_thread, guarded)

    async def _in_verify_thread(self, function: Callable[[], Any]) -> Any:
        return await self._loop.run_in_executor(self._verify_thread, function)

    def _progress(self) -> Callable[[Any], None]:
        """Tell how loading goes, at most once in PROGRESS_S; called in the engine's thread."""
        last_told = time.monotonic()

        def tell(progress: Any) -> None:
            nonlocal last_told
            if time.monotonic() - last_told < PROGRESS_S:
                return
            last_told = time.monotonic()
            done, total = progress.bytes_done, progress.bytes_total
            bar = "#" * int(20 * done / max(1, total))
            detail = f"[{bar:<20}] {done / 1e9:.1f} of {total / 1e9:.1f} GB, {progress.gb_per_s:.1f} GB/s"
            asyncio.run_coroutine_threadsafe(self._tell("loading", detail), self._loop)

        return tell

    async def _tell(self, phase: str, detail: str) -> None:
        if self._leader is not None:
            detail = f"{detail} (tp x pp: {self._parallel.tp_size} x {self._parallel.pp_size})".lstrip()
        message = WorkerPhase(self.name, self._role, self.incarnation, phase, detail, time.monotonic() - self._began_at)
        with contextlib.suppress(TandemError):
            await tell_phase(self._network, await self._find(), message)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _take_order(self, order: Order) -> None:
        """The scheduler's; carried out in the background. Raises what makes it impossible."""
        if isinstance(order, Leave):
            self.leave(order.seconds)
        else:
            self._switch(order)

    def leave(self, within_s: float | None = None) -> None:
        """Somebody wants this process, or one of its ranks, gone: drain, then end. Thread-safe. within_s: by then all is over, so
        the drain itself has a little less."""

        def begin() -> None:
            if within_s is not None:
                self._drain_s = max(0.0, min(self._drain_s, within_s * DRAIN_SHARE - GOING_S))
            if self._leaving is None:
                self._leaving = self._loop.create_task(self._leave())

        self._loop.call_soon_threadsafe(begin)

    async def _leave(self) -> None:
        log.info("%s was asked to go", self.name)
        try:
            await self.drain()
            await self.close()
        finally:
            os._exit(0)

    async def drain(self) -> None:
        """No new work from now on, and the scheduler knows; what runs may end until scheduler.drain_s is over, and is then told
        to go on elsewhere. Whoever else calls waits for the same."""
        if self.worker is None:
            return
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        self.worker.is_draining = True
        if self._agent is not None:
            self._agent.beat_now()
        await self.worker.drain(self._drain_s)

    # ---- the other role ----------------------------------------------------------------------------------------------

    def _switch(self, order: SwitchRole) -> None:
        if order.incarnation != self.incarnation:
            raise TransferFailed(f"the order is for {order.incarnation}; here lives {self.incarnation}")
        if self._renew is None or self._leader is not None:
            raise Unsupported(f"{self.name} cannot change its role: only a worker of one rank, under Serve, can")
        if self._draining is not None or self._switching is not None:
            raise Draining(f"{self.name} is on its way already")
        self._switching = self._loop.create_task(self._become(order.role))
        self._switching.add_done_callback(self._switched)

    async def _become(self, role: str) -> None:
        """Drain, end this life for everybody else (its connections break, as if it had died, with nothing left to lose), and begin
        another one around the same engine. The pool keeps its prefixes."""
        assert self._renew is not None
        assert self._agent is not None
        log.info("%s becomes a %s worker", self.name, role)
        await self.drain()
        worker, pool = self.worker, self._engine.pool
        if not worker.is_idle or pool.num_used or worker.handover.num_owed:
            log.warning("%s could not put everything away, so it ends instead of changing its role", self.name)
            self.leave()
            return
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await self._agent.close()
        await asyncio.sleep(GOING_S)
        await self._network.close()
        worker.handover.close()
        await self._in_engine_thread(lambda: None)  # a canary that was cancelled may still compute
        await self._in_verify_thread(lambda: None)
        self._role = role
        self._index += -SWITCHED if self._index >= SWITCHED else SWITCHED  # no name that another worker of that role may have
        self.name = f"{self._config.prefix}{role}:{self._index}"
        self.incarnation = new_incarnation(role, self._index, self._config.prefix)
        network, self._find = self._renew()
        self._network = OrderedNetwork(network, self._take_order)
        self._draining = None
        assembly = import_engine()
        await self._serve(assembly, assembly.NO_OTHERS)

    def _switched(self, task: asyncio.Task[None]) -> None:
        self._switching = None
        if not task.cancelled() and task.exception() is not None:
            log.error("%s could not change its role; another process takes its place", self.name, exc_info=task.exception())
            self.leave()

    async def close(self) -> None:
        for task in (*self._tasks, *((self._switching,) if self._switching is not None else ())):
            task.cancel()
        if self._agent is not None:
            await self._agent.close()
        if self._leader is not None:
            await self._leader.close(stop=self._in_engine_thread(self._engine.runner.stop))
        await self._network.close()
        if self._ledger is not None:
            self._ledger.close()


async def tell_failure(network: Network, find: FindScheduler, name: str, role: str, incarnation: str, error: Exception) -> None:
    """Serve would try again for minutes before it says anything; a person should read it now."""
    detail = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    with contextlib.suppress(TandemError):
        await tell_phase(network, await find(), WorkerPhase(name, role, incarnation, "failed", detail, 0.0))
        await asyncio.sleep(GOING_S)


def this_process() -> ProcessRef:
    return ProcessRef(boot_id(), os.getpid(), start_ticks())


def end_at_once(sentence: str) -> NoReturn:
    """From whichever thread: a collective may hold the others for a minute, and nothing is left that could be put in order."""
    log.error("%s", sentence)
    logging.shutdown()
    os._exit(LOST_RANK)


def import_engine() -> Any:
    """torch is imported here, off the event loop: seconds that a heartbeat must not wait for."""
    # Idle OpenMP threads that spin starve the other role on a shared core; libgomp reads this when torch loads it.
    # But between two products of one step, a few microseconds apart, waking a thread takes longer than the product itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from cluster import assembly

    return assembly


def _make_speculator(config: Config, role: str, engine: Engine) -> Any:
    from cluster.speculation import make_speculator

    return make_speculator(config, role, engine)


def _describe(engine: Engine) -> str:
    loaded = engine.loaded
    read = loaded.progress
    speed = f"; {read.bytes_total / 1e9:.2f} GB at {read.gb_per_s:.1f} GB/s" if read.bytes_total else ""
    weights = f", {loaded.quantization} weights" if loaded.quantization.is_any else ""
    return f"{loaded.config.architecture} on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}{weights}{speed}"


def _pool(engine: Engine) -> str:
    return f"{engine.pool.num_blocks} blocks of {engine.layout.block_size} tokens, {engine.kv.nbytes / 1e9:.2f} GB of KV"
