"""A whole cluster in one process, without Ray and without sockets: the same walk, workers and scheduler.

A debugger can step through all of it.

`tandem.LLM` runs on this. Every part is the one that Serve runs; only the network (loopback.py), the KV transport (memory) and
`compute` (inline) are the small ones.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from cluster import assembly
from cluster.agent import Agent, new_incarnation
from cluster.door import limits_of
from cluster.gateway import Gateway
from cluster.history import promises_of
from cluster.local_group import LocalGroup
from cluster.loopback import Hub
from cluster.metrics import ClusterMetrics
from cluster.preflight import max_model_len
from cluster.scheduler_service import SchedulerService
from cluster.speculation import make_speculator
from cluster.tenants_file import TenantsFile, reserved_keys
from configs.schema import Config
from decode.worker import DecodeWorker
from models.load import LoadedModel
from models.locate import locate
from prefill.worker import PrefillWorker
from protocol.request import Request
from scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from cluster.overflow_life import OverflowLife


class LocalCluster:
    """Build it, `await start()`, use `gateway`, `await close()`. All on one event loop.

    transports: over which KV travels; None: as transfer.transport says, "auto" being memory.
    """

    def __init__(
        self,
        config: Config,
        loaded: LoadedModel | None = None,
        encoded: bool = False,
        transports: tuple[str, ...] | None = None,
    ) -> None:
        # A step that takes seconds holds up heartbeats too when all is one event loop; nobody can die alone here anyway.
        patient = msgspec.structs.replace(config.scheduler, heartbeat_misses=1000)
        self.config = msgspec.structs.replace(config, scheduler=patient)
        in_memory = config.transfer.transport == "auto"
        self.transports = transports or (("memory",) if in_memory else assembly.transports_of(config))
        self.loaded = loaded if loaded is not None else assembly.load(config)
        self.tokenizer = Tokenizer(locate(config.model.name, config.model.revision or None), config.model.chat_template)
        self.workers: list[DecodeWorker | PrefillWorker] = []
        self.engines: list[assembly.Engine] = []
        self.overflow: list[OverflowLife] = []
        self._hub = Hub(encoded)
        self._secret = secrets.token_bytes(32)
        self._agents: list[Agent] = []
        self.groups: list[LocalGroup] = []  # of workers with several ranks
        self._loops: list[asyncio.Task[None]] = []
        self._idling: list[asyncio.Task[None]] = []
        self.gateway: Gateway
        self.service: SchedulerService

    @property
    def max_model_len(self) -> int:
        return max_model_len(self.config, self.loaded.config)

    def detokenizer(self, request: Request) -> Detokenizer:
        return Detokenizer.for_request(self.tokenizer, request)

    async def start(self) -> None:
        await self._start_scheduler()
        roles = [("decode", i) for i in range(self.config.decode.replicas)]
        roles += [("prefill", i) for i in range(self.config.prefill.replicas)]
        for role, index in roles:
            await self._start_worker(role, index)
        for number in range(len(self.config.overflow)):
            await self._start_overflow(number)
        self.gateway = Gateway(
            "gateway-0",
            self._hub.network("gateway"),
            self._find_scheduler,
            self.detokenizer,
            asyncio.get_running_loop().time,
            limits_of(self.config),
            self.config.model.seed,
        )
        await self.gateway.start()

    async def _start_worker(self, role: str, index: int) -> None:
        clock = asyncio.get_running_loop().time
        compute = assembly.inline()
        network = self._hub.network(f"{role}-{index}")
        incarnation = new_incarnation(role, index)
        others, group = assembly.NO_OTHERS, None
        if self.config.parallel(role).num_ranks > 1:
            group = LocalGroup(role, self.config, incarnation, clock, compute, self._secret, self.transports)
            engine, others = group.engine, group.others
            self.groups.append(group)
            self._idling.append(asyncio.create_task(assembly.idle_steps(engine.runner, compute)))
        else:
            threads = self.config.decode.num_threads if role == "decode" else self.config.prefill.num_threads
            num_blocks = assembly.num_blocks(self.config, role, self.loaded)
            engine = assembly.build_engine(self.config, self.loaded, num_blocks, threads or None)
        speculator = make_speculator(self.config, role, engine)
        parts = assembly.Parts(self.config, engine, incarnation, network, clock, compute, compute, self._secret, speculator)
        worker = assembly.build_worker(role, parts, others, self.transports)
        if group is not None and isinstance(worker, PrefillWorker):
            group.tell = worker.handover.rank_landed
        worker.step_log = assembly.open_step_log(self.config, f"{role}:{index}", incarnation)
        await worker.start()
        info = assembly.worker_info(role, f"{role}:{index}", parts, others)
        agent = Agent(worker, info, network, self._find_scheduler, self.config.scheduler.heartbeat_s)
        await agent.start()
        self.workers.append(worker)
        self.engines.append(engine)
        self._agents.append(agent)
        self._loops.append(asyncio.create_task(worker.run()))

    async def _start_overflow(self, number: int) -> None:
        from cluster.overflow_life import OverflowLife  # and with it an HTTP client, which hardly anybody needs here

        clock = asyncio.get_running_loop().time
        network = self._hub.network(f"overflow-{number}")
        life = OverflowLife(self.config, number, self._secret, network, self._find_scheduler, clock=clock)
        await life.start()
        self.overflow.append(life)

    async def _start_scheduler(self) -> None:
        network = self._hub.network("scheduler")
        metrics = ClusterMetrics(self.config.served_name, promises_of(self.config.scheduler))
        scheduler = Scheduler(
            self.config.scheduler,
            enable_prefix_caching=self.config.model.enable_prefix_caching,
            admission=self.config.scheduler.admission,
        )
        path = self.config.scheduler.tenants_file
        file = TenantsFile(path, reserved_keys(self.config)) if path is not None else None
        self.service = SchedulerService(scheduler, network, asyncio.get_running_loop().time, metrics, file)
        await self.service.start()
        self._scheduler_address = network.address

    async def _find_scheduler(self) -> str:
        return self._scheduler_address

    async def replace_scheduler(self) -> None:
        """As if its process had died and Ray had started another one: nothing of what it knew survives."""
        await self.service.close()
        await self._start_scheduler()

    def status_rows(self) -> list[dict[str, Any]]:
        """What the scheduler knows of each of `workers`, in their order."""
        rows = self.service.scheduler.status(asyncio.get_running_loop().time())["workers"]
        by_incarnation = {row["incarnation"]: row for row in rows}
        return [by_incarnation[worker.settings.incarnation] for worker in self.workers]

    async def settle(self, deadline_s: float = 10.0) -> None:
        """Wait until no worker holds anything, then check every pool."""
        async with asyncio.timeout(deadline_s):
            while not all(worker.is_idle and worker.pool.num_used == 0 for worker in self.workers):
                await asyncio.sleep(0.005)
        for worker in self.workers:
            worker.check_integrity()

    async def close(self) -> None:
        for life in self.overflow:
            await life.close()
        for agent in self._agents:
            await agent.close()
        for task in (*self._loops, *self._idling):
            task.cancel()
        await asyncio.gather(*self._loops, *self._idling, return_exceptions=True)
        await self.gateway.close()
        await self.service.close()
        for group in self.groups:
            group.close()
        for engine in self.engines:
            engine.kv.close()
