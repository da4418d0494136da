"""Ray Serve's side: the deployments Gateway, Prefill and Decode, and the actor that holds the scheduler.

Thin on purpose: Ray places, restarts and drains processes; what they do is in `gateway.py`, `prefill/`, `decode/` and
`scheduler_service.py`. torch is imported inside worker replicas only, so the gateway and Serve's controller start without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import ray
from ray import serve

from cluster.agent import Agent, new_incarnation, tell_phase
from cluster.wire import SocketNetwork
from configs.schema import Config
from protocol.errors import TandemError, WorkerLost
from protocol.messages import WorkerPhase

log = logging.getLogger(__name__)

NAMESPACE = "tandem"
SCHEDULER_NAME = "tandem-scheduler"
DRAIN_S = 20.0  # how long a worker that is to go lets its requests end
START_TIMEOUT_S = 30.0
PROGRESS_S = 1.0


def decode_config(config_json: bytes) -> Config:
    """The cluster's configuration as this process sees it: which address its sockets bind may differ from node to node."""
    config = msgspec.json.decode(config_json, type=Config)
    here = os.environ.get("TANDEM_TRANSFER_BIND_HOST")
    if here is None:
        return config
    return msgspec.structs.replace(config, transfer=msgspec.structs.replace(config.transfer, bind_host=here))


# ---- the scheduler ---------------------------------------------------------------------------------------------------


class SchedulerActor:
    """Holds the SchedulerService. Named, detached, restarted for ever; a new life is rebuilt from workers and gateways (R9)."""

    def __init__(self, config_json: bytes, secret: bytes) -> None:
        _title("scheduler")
        self._config = decode_config(config_json)
        self._secret = secret
        self._network: SocketNetwork | None = None
        self._lock = asyncio.Lock()
        self._service: Any = None

    async def address(self) -> str:
        from cluster.history import promises_of
        from cluster.metrics import ClusterMetrics
        from cluster.scheduler_service import SchedulerService
        from scheduler.scheduler import Scheduler

        async with self._lock:
            if self._network is None:
                network = SocketNetwork("scheduler", self._secret, self._config.transfer.bind_host)
                clock = time.monotonic  # uvloop rounds its own clock to milliseconds
                scheduler = Scheduler(self._config.scheduler, enable_prefix_caching=self._config.model.enable_prefix_caching)
                self._service = SchedulerService(
                    scheduler,
                    network,
                    clock,
                    ClusterMetrics(self._config.model.served_name or self._config.model.name, promises_of(self._config.scheduler)),
                )
                await self._service.start()
                self._network = network
        return self._network.address

    async def status(self) -> dict[str, Any]:
        await self.address()
        return self._service.scheduler.status(time.monotonic())


def scheduler_actor(config_json: bytes, secret: bytes) -> Any:
    """The one scheduler of this cluster, made if there is none."""
    options = {
        "name": SCHEDULER_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        "num_cpus": 0,
        "max_concurrency": 1000,
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
    """One prefill or decode worker in a process of its own; the same class builds either role."""

    async def __init__(self, role: str, config_json: bytes, secret: bytes) -> None:
        self._started = time.monotonic()
        self._role = role
        self._config = config = decode_config(config_json)
        index = _replica_index()
        self.name = f"{role}:{index}"
        self._incarnation = new_incarnation(role, index)
        _title(self.name)
        _keep_serve_inside(config.transfer.bind_host)
        self._network = SocketNetwork(self.name, secret, config.transfer.bind_host)
        self._find = SchedulerFinder(config_json, secret, self._network)
        self._compute_pool = ThreadPoolExecutor(1, "engine")
        self._verify_pool = ThreadPoolExecutor(1, "verify")
        await self._phase("importing", "")
        try:
            await self._start(role, index, secret)
        except Exception as error:
            await _tell_failure(self._network, self._find, self.name, role, self._incarnation, error)
            raise

    async def _start(self, role: str, index: int, secret: bytes) -> None:
        config = self._config
        loop = asyncio.get_running_loop()
        assembly, self._torch_threads = await loop.run_in_executor(self._compute_pool, _import_engine, config)
        incarnation = self._incarnation
        await self._phase("loading", config.model.name)
        num_workers = config.prefill.replicas + config.decode.replicas

        def build() -> Any:
            loaded = assembly.load(config, self._progress(loop))
            return assembly.build_engine(config, loaded, self._torch_threads(role), num_workers)

        self.engine = engine = await loop.run_in_executor(self._compute_pool, build)
        await self._phase("loaded", _describe(engine))
        compute, verify = self._executor(self._compute_pool), self._executor(self._verify_pool)
        transports = assembly.transports_of(config)
        common = (config, engine, incarnation, self._network, time.monotonic, compute)
        if role == "decode":
            self.worker = assembly.build_decode(*common, verify, secret, transports)
        else:
            self.worker = assembly.build_prefill(*common, secret, transports)
        await self.worker.start()
        canary = assembly.canary(engine, self.worker, compute, time.monotonic)
        await canary()
        info = assembly.worker_info(role, self.name, incarnation, config, engine, self._network)
        self._agent = Agent(self.worker, info, self._network, self._find, config.scheduler.heartbeat_s, canary)
        self._loop_task = asyncio.create_task(self.worker.run())
        await self._agent.start()
        kv = f"{engine.pool.num_blocks} blocks of {engine.layout.block_size} tokens, {engine.kv.nbytes / 1e9:.2f} GB of KV"
        await self._phase("ready", kv)

    def check_health(self) -> None:
        """Serve calls this; a worker whose loop ended is replaced."""
        if self._loop_task.done():
            raise RuntimeError(f"the engine loop of {self.name} ended: {self._loop_task}")

    async def __del__(self) -> None:
        """Serve sees none of our requests, so the drain happens here: no new work, then a bounded wait, then go."""
        worker = getattr(self, "worker", None)
        if worker is None:
            return
        worker.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while not worker.is_idle:
                    await asyncio.sleep(0.05)
        self._loop_task.cancel()
        await self._agent.close()
        await self._network.close()

    def _progress(self, loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
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
            asyncio.run_coroutine_threadsafe(self._phase("loading", detail), loop)

        return tell

    def _executor(self, pool: ThreadPoolExecutor) -> Any:
        loop = asyncio.get_running_loop()
        return lambda function: loop.run_in_executor(pool, function)

    async def _phase(self, phase: str, detail: str) -> None:
        message = WorkerPhase(self.name, self._role, self._incarnation, phase, detail, time.monotonic() - self._started)
        with contextlib.suppress(TandemError):
            await tell_phase(self._network, await self._find(), message)


async def _tell_failure(
    network: SocketNetwork, find: SchedulerFinder, name: str, role: str, incarnation: str, error: Exception
) -> None:
    """Serve would try again for minutes before it says anything; a person should read it now."""
    detail = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    with contextlib.suppress(TandemError):
        await tell_phase(network, await find(), WorkerPhase(name, role, incarnation, "failed", detail, 0.0))
        await asyncio.sleep(0.2)  # let it leave before the process goes


def _import_engine(config: Config) -> tuple[Any, Any]:
    """torch is imported here, off the event loop: seconds that a heartbeat must not wait for."""
    # Idle OpenMP threads that spin starve the other role on a shared core; libgomp reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cluster import assembly

    def threads(role: str) -> int:
        asked = config.decode.num_threads if role == "decode" else config.prefill.num_threads
        num_workers = config.prefill.replicas + config.decode.replicas
        return asked or max(1, len(os.sched_getaffinity(0)) // num_workers)

    return assembly, threads


def _describe(engine: Any) -> str:
    loaded = engine.loaded
    read = loaded.progress
    speed = f"; {read.bytes_total / 1e9:.2f} GB at {read.gb_per_s:.1f} GB/s" if read.bytes_total else ""
    return f"{loaded.config.architecture} on {loaded.device}, {str(loaded.dtype).removeprefix('torch.')}{speed}"


def _replica_index() -> int:
    rank = serve.get_replica_context().rank
    return int(getattr(rank, "rank", rank) or 0)


def _keep_serve_inside(host: str) -> None:
    """Serve opens a gRPC server in every replica, on all interfaces, unauthenticated, and it unpickles what arrives.

    Nothing of ours uses it: it is bound to the address that our own sockets have, loopback unless somebody asked for more. Called
    from a replica's constructor, which runs before Serve opens it.
    """
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, f"{host}:{address.rsplit(':', 1)[1]}")


def _title(name: str) -> None:
    """`tandem:decode:0` in ps and top. Ray would name the process anew around each task: its way of doing so is taken away."""
    ray._raylet.setproctitle(f"tandem:{name}")
    ray._raylet.setproctitle = lambda title: None
    # Ctrl-C in a terminal reaches the whole process group; only the command itself decides what happens then.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---- the gateway -----------------------------------------------------------------------------------------------------


def _observers(config: Config) -> list[Any]:
    if not config.gateway.ray_metrics:
        return []
    from ray.util import metrics

    from cluster.ray_metrics import RayMetrics

    return [RayMetrics(config.model.served_name or config.model.name, metrics)]


@serve.ingress()
class GatewayReplica:
    """The HTTP door: FastAPI routes of api/ in front of `cluster.gateway.Gateway`. No torch in this process."""

    async def __init__(self, config_json: bytes, secret: bytes, *pools: Any) -> None:
        from cluster.door import Door

        config = decode_config(config_json)
        index = _replica_index()
        _title(f"gateway:{index}")
        _keep_serve_inside(config.transfer.bind_host)
        gateway_id = f"gateway:{index}:{os.urandom(4).hex()}"  # two lives may overlap during an update
        network = SocketNetwork(gateway_id, secret, config.transfer.bind_host)
        find = SchedulerFinder(config_json, secret, network)
        try:
            self._door = Door(config, network, find, gateway_id, secret, _observers(config))
            await self._door.start()
        except Exception as error:
            await _tell_failure(network, find, f"gateway:{index}", "gateway", "", error)
            raise

    async def __serve_build_asgi_app__(self) -> Any:
        return self._door.app

    async def __del__(self) -> None:
        door = getattr(self, "_door", None)
        if door is not None:
            await door.close()
