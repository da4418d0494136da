"""Ray Serve's side: the deployments Gateway, Prefill and Decode, and the actor that holds the scheduler.

Thin on purpose: Ray places, restarts and drains processes; what they do is in `gateway.py`, `prefill/`, `decode/` and
`scheduler_service.py`. torch is imported inside worker replicas only, so the gateway and Serve's controller start without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray import serve

from cluster.agent import new_gateway_id
from cluster.group import config_here
from cluster.life import WorkerLife, tell_failure
from cluster.placement import scheduler_options
from cluster.ray_process import begin, keep_serve_inside, on_sigterm
from cluster.ray_ranks import RaySpawn
from cluster.sizes import SCHEDULER
from cluster.wire import SocketNetwork
from configs.schema import Config
from kvtransfer.listening import bind_of
from protocol.errors import WorkerLost

log = logging.getLogger(__name__)

SCHEDULER_NAME, NAMESPACE = SCHEDULER
START_TIMEOUT_S = 30.0


# ---- the scheduler ---------------------------------------------------------------------------------------------------


class SchedulerActor:
    """Holds the SchedulerService. Named, detached, restarted for ever; a new life is rebuilt from workers and gateways (R9)."""

    def __init__(self, config_json: bytes, secret: bytes) -> None:
        begin("scheduler")
        self._config = config_here(config_json)
        self._secret = secret
        self._network: SocketNetwork | None = None
        self._lock = asyncio.Lock()
        self._service: Any = None
        self._sizes: Any = None

    async def address(self) -> str:
        from cluster.history import promises_of
        from cluster.metrics import ClusterMetrics
        from cluster.needs import Sizes
        from cluster.scheduler_service import SchedulerService
        from cluster.tenants_file import TenantsFile, reserved_keys
        from scheduler.scheduler import Scheduler

        async with self._lock:
            if self._network is None:
                self._sizes = Sizes(self._config)
                network = SocketNetwork("scheduler", self._secret, *bind_of(self._config.transfer))
                clock = time.monotonic  # uvloop rounds its own clock to milliseconds
                path = self._config.scheduler.tenants_file
                names = ",".join(one.served_name for one in self._config.each())  # its series are of all models together
                scheduler = Scheduler(
                    self._config.scheduler,
                    enable_prefix_caching=self._config.model.enable_prefix_caching,
                    admission=self._config.scheduler.admission,
                )
                self._service = SchedulerService(
                    scheduler,
                    network,
                    clock,
                    ClusterMetrics(names, promises_of(self._config.scheduler)),
                    TenantsFile(path, reserved_keys(self._config)) if path is not None else None,
                )
                await self._service.start()
                self._network = network
        return self._network.address

    async def status(self) -> dict[str, Any]:
        await self.address()
        return self._service.status(time.monotonic())

    async def sizes(self, present: dict[str, int]) -> dict[str, int]:
        """How many replicas each pool that follows its load should have, by deployment. present: how many it has."""
        await self.address()
        return self._sizes.wanted(self._service.scheduler, time.monotonic(), present)

    async def index_for(self, model: str, role: str, proposed: int) -> int:
        """A number for a new worker that no other one bears. Serve gives the ranks of replicas that went away to others."""
        await self.address()
        return self._sizes.index_for(self._service.scheduler, model, role, proposed, time.monotonic())


def scheduler_actor(config_json: bytes, secret: bytes, **more: Any) -> Any:
    """The one scheduler of this cluster, made if there is none. more: options for Ray, such as where to make it."""
    options = {
        "name": SCHEDULER_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        **scheduler_options(),
        "max_concurrency": 1000,
        **more,
    }
    return ray.remote(SchedulerActor).options(**options).remote(config_json, secret)


class SchedulerFinder:
    """Where the scheduler listens, asked again only when the connection to it is gone."""

    def __init__(self, config_json: bytes, secret: bytes, network: SocketNetwork) -> None:
        self._config_json = config_json
        self._secret = secret
        self._network = network
        self._address: str | None = None
        self._actor: Any = None

    async def __call__(self) -> str:
        if self._address is None or not self._network.is_connected(self._address):
            try:
                if self._actor is None:
                    self._actor = scheduler_actor(self._config_json, self._secret)
                async with asyncio.timeout(START_TIMEOUT_S):
                    self._address = await self._actor.address.remote()
            except (TimeoutError, ray.exceptions.RayError) as error:
                self._actor = None
                raise WorkerLost(f"the scheduler does not answer: {type(error).__name__}") from None
        return self._address


# ---- workers ---------------------------------------------------------------------------------------------------------


class WorkerReplica:
    """One prefill or decode worker; the same class builds either role. What it does is a `life.WorkerLife`."""

    async def __init__(self, role: str, config_json: bytes, secret: bytes, rank_options: dict[str, Any], model: int = 0) -> None:
        config = config_here(config_json).each()[model]
        index = await _worker_index(role, config, config_json, secret)
        name = f"{config.prefix}{role}:{index}"
        begin(name)
        keep_serve_inside()

        def renew() -> tuple[SocketNetwork, SchedulerFinder]:
            network = SocketNetwork(name, secret, *bind_of(config.transfer))
            return network, SchedulerFinder(config_json, secret, network)

        network, find = renew()
        parallel = config.parallel(role)
        spawn = RaySpawn(parallel, secret, rank_options) if parallel.num_ranks > 1 else None
        self._life = WorkerLife(role, index, config, secret, network, find, spawn, renew)
        on_sigterm(self._life.leave)
        await self._life.start()

    def check_health(self) -> None:
        """Serve calls this; a worker whose loop ended is replaced."""
        if self._life.is_over:
            raise RuntimeError(f"the engine loop of {self._life.name} ended")

    async def __del__(self) -> None:
        """Serve sees none of our requests, so the drain happens here: no new work, then a bounded wait, then go."""
        life = getattr(self, "_life", None)
        if life is not None:
            await life.drain()
            await life.close()


class OverflowReplica:
    """The worker in front of another server; see `overflow.py`."""

    async def __init__(self, config_json: bytes, secret: bytes, number: int) -> None:
        from cluster.overflow_life import OverflowLife

        config = config_here(config_json)
        name = f"overflow:{number}"
        begin(name)
        keep_serve_inside()
        network = SocketNetwork(name, secret, *bind_of(config.transfer))
        find = SchedulerFinder(config_json, secret, network)
        try:
            self._life = OverflowLife(config, number, secret, network, find)
            await self._life.start()
        except Exception as error:
            await tell_failure(network, find, name, "decode", "", error)
            raise
        loop = asyncio.get_running_loop()
        on_sigterm(lambda: loop.call_soon_threadsafe(self._life.leave))

    async def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None:
            await life.drain()
            await life.close()


async def _worker_index(role: str, config: Config, config_json: bytes, secret: bytes) -> int:
    """Our rank among the pool's replicas; where pools grow and shrink, a number that the scheduler gives."""
    rank, pool = _replica_index(), config.pool(role)
    if pool.fewest == pool.most:
        return rank
    async with asyncio.timeout(START_TIMEOUT_S):
        return int(await scheduler_actor(config_json, secret).index_for.remote(config.served_name, role, rank))


def _replica_index() -> int:
    rank = serve.get_replica_context().rank
    return int(getattr(rank, "rank", rank) or 0)


# ---- the gateway -----------------------------------------------------------------------------------------------------


def _observers(config: Config) -> list[Any]:
    if not config.gateway.ray_metrics:
        return []
    from ray.util import metrics

    from cluster.ray_metrics import RayMetrics

    return [RayMetrics(config.served_name, metrics)]


@serve.ingress()
class GatewayReplica:
    """The HTTP door: FastAPI routes of api/ in front of `cluster.gateway.Gateway`. No torch in this process."""

    async def __init__(self, config_json: bytes, secret: bytes, *pools: Any) -> None:
        from cluster.door import Door

        config = config_here(config_json)
        index = _replica_index()
        begin(f"gateway:{index}")
        keep_serve_inside()
        gateway_id = new_gateway_id(index)
        network = SocketNetwork(gateway_id, secret, *bind_of(config.transfer))
        find = SchedulerFinder(config_json, secret, network)
        try:
            self._door = Door(config, network, find, gateway_id, secret, _observers(config), proxy_names_requests=True)
            await self._door.start()
        except Exception as error:
            await tell_failure(network, find, f"gateway:{index}", "gateway", "", error)
            raise

    async def __serve_build_asgi_app__(self) -> Any:
        return self._door.app

    async def __del__(self) -> None:
        door = getattr(self, "_door", None)
        if door is not None:
            await door.close()
