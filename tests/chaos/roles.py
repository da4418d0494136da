"""What a forked process of the fleet is: the scheduler, a gateway with its clients, or a worker, put together of the product's own
parts as `cluster/deployments.py` does it, without Ray. Runs in children of `zygote.py`; told what to do by `fleet.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from cluster import assembly
from cluster.agent import Agent, new_incarnation
from cluster.door import limits_of
from cluster.gateway import Gateway
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from cluster.wire import SocketNetwork
from configs.schema import Config
from models.locate import locate
from protocol.errors import WorkerLost
from protocol.kv import TcpEndpoint
from scheduler.scheduler import Scheduler
from tests.chaos import hooks
from tests.chaos.load import Load
from tests.chaos.real_load import RealLoad

log = logging.getLogger(__name__)

Handlers = dict[str, Callable[..., Any]]


def main(spec: dict[str, Any]) -> None:
    level = spec.get("log_level") or os.environ.get("TANDEM_CHAOS_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format=f"%(asctime)s {spec['slot']} %(name)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    if spec.get("max_fds"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["max_fds"], spec["max_fds"]))
    asyncio.run(ROLES[spec["role"]](spec))


class Control:
    """The line to the fleet: JSON lines over a unix socket. Calls come in, answers and one `ready` go out."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    async def serve(self, handlers: Handlers, **ready: Any) -> None:
        reader, writer = await asyncio.open_unix_connection(self._spec["control"], limit=1 << 26)

        async def answer(call: dict[str, Any]) -> None:
            try:
                value = handlers[call.pop("do")](**call.pop("args"))
                answered = {"answer": call["call"], "value": await value if asyncio.iscoroutine(value) else value}
            except Exception as error:
                log.exception("control")
                answered = {"answer": call["call"], "error": f"{type(error).__name__}: {error}"}
            writer.write(json.dumps(answered).encode() + b"\n")

        handlers = {"process": process_numbers, **handlers}
        writer.write(json.dumps({"ticket": self._spec["ticket"], **ready}).encode() + b"\n")
        tasks = set()
        while line := await reader.readline():
            task = asyncio.create_task(answer(json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def process_numbers() -> dict[str, int]:
    """What must not grow."""
    me = psutil.Process()
    memory = me.memory_full_info()
    return {
        "fds": me.num_fds(),
        "threads": me.num_threads(),
        "segments": sum("memfd:tandem-kv" in m.path for m in me.memory_maps(grouped=False)),
        "tasks": len(asyncio.all_tasks()),
        "uss": memory.uss,
    }


def finder(spec: dict[str, Any]) -> Callable[[], Awaitable[str]]:
    """Where the scheduler listens now: in production Ray knows, here a small file."""
    path = Path(spec["folder"]) / "scheduler"

    async def find() -> str:
        if spec.get("scheduler_at"):
            return str(spec["scheduler_at"])
        try:
            return path.read_text()
        except FileNotFoundError:
            raise WorkerLost("no scheduler yet") from None

    return find


def config_of(spec: dict[str, Any]) -> Config:
    return msgspec.convert(spec["config"], Config)


def network_of(spec: dict[str, Any], name: str) -> SocketNetwork:
    return SocketNetwork(name, bytes.fromhex(spec["secret"]), port=spec.get("port", 0))


async def scheduler(spec: dict[str, Any]) -> None:
    config = config_of(spec)
    network = network_of(spec, "scheduler")
    made = Scheduler(config.scheduler, enable_prefix_caching=config.model.enable_prefix_caching)
    service = SchedulerService(made, network, time.monotonic, ClusterMetrics(config.served_name))
    await service.start()
    fresh = Path(spec["folder"]) / f"scheduler.{os.getpid()}"
    fresh.write_text(network.address)
    fresh.rename(Path(spec["folder"]) / "scheduler")

    def status() -> Any:
        return json.loads(msgspec.json.encode(made.status(time.monotonic())))

    await Control(spec).serve({"status": status}, address=network.address)


async def gateway(spec: dict[str, Any]) -> None:
    config = config_of(spec)
    name = f"{spec['slot']}:{os.getpid()}"
    tokenizer = Tokenizer(locate(config.model.name, None), None)
    made = Gateway(
        name,
        network_of(spec, name),
        finder(spec),
        lambda request: Detokenizer.for_request(tokenizer, request),
        time.monotonic,
        limits_of(config),
    )
    await made.start()
    load = Load(made, name) if config.model.name == "toy" else RealLoad(made, name)
    handlers: Handlers = {
        "start": load.start,
        "mark": load.mark,
        "continued": load.continued,
        "waiting": load.waiting,
        "drain": load.drain,
        "report": load.report,
        "in_flight": lambda: made.num_in_flight,
    }
    if isinstance(load, RealLoad):
        handlers |= {"answer": load.answer, "answers": load.answers}
    await Control(spec).serve(handlers, address=made._network.address)


async def worker(spec: dict[str, Any]) -> None:
    """As `cluster.life.WorkerLife` lives, with room for proxies, hooks and slower steps between its parts."""
    config, role = config_of(spec), spec["role"]
    loop = asyncio.get_running_loop()
    incarnation = new_incarnation(role, spec["index"])
    network = network_of(spec, spec["slot"])
    engine_thread, verify_thread = ThreadPoolExecutor(1, "engine"), ThreadPoolExecutor(1, "verify")

    def executor(thread: ThreadPoolExecutor, min_step_s: float = 0.0) -> assembly.Compute:
        def paced(function: Callable[[], Any]) -> Any:
            until = time.monotonic() + min_step_s
            try:
                return function()
            finally:
                time.sleep(max(0.0, until - time.monotonic()))

        async def compute(function: Callable[[], Any]) -> Any:
            return await loop.run_in_executor(thread, paced, function)

        return compute

    loaded = assembly.load(config)
    engine = assembly.build_engine(config, loaded, assembly.num_blocks(config, role, loaded), 1)
    computes = (executor(engine_thread, spec.get("min_step_s", 0.0)), executor(verify_thread))
    known_as = Advertised(network, spec["seen_by_peers_at"]) if spec.get("seen_by_peers_at") else network
    secret = bytes.fromhex(spec["secret"])
    parts = assembly.Parts(config, engine, incarnation, known_as, time.monotonic, *computes, secret)
    transports = tuple(spec.get("transports") or assembly.transports_of(config))
    made: Any = assembly.build_worker(role, parts, assembly.NO_OTHERS, transports)
    await made.start()
    kv_port = _advertise_kv(made, spec.get("kv_seen_at")) if role == "decode" else 0
    hooks.install(spec, made)
    canary = assembly.canary(engine, made, executor(engine_thread), time.monotonic)
    await canary()
    info = assembly.worker_info(role, spec["slot"], parts, assembly.NO_OTHERS)
    info = msgspec.structs.replace(info, address=spec.get("seen_by_gateways_at") or network.address)
    agent = Agent(made, info, network, finder(spec), config.scheduler.heartbeat_s, canary)
    running = asyncio.create_task(made.run())
    await agent.start()

    def check() -> dict[str, Any]:
        assert not running.done(), "the engine loop ended"
        if made.is_idle and made.pool.num_used == made.pool.num_quarantined:  # a step that is under way holds blocks to its end
            made.check_integrity()
        stats = msgspec.to_builtins(made.stats())
        counters = {"refused": getattr(_tcp_receiver(made), "num_refused", 0) if role == "decode" else 0}
        return {**stats, **counters, "used": made.pool.num_used, "is_idle": made.is_idle, "incarnation": incarnation}

    async def drain(seconds: float) -> bool:
        """What a replica does at its end; then the process goes."""
        made.is_draining = True
        agent.beat_now()
        await made.drain(seconds)
        running.cancel()
        await agent.close()
        await network.close()
        loop.call_later(0.05, os._exit, 0)
        return bool(made.is_idle)

    handlers: Handlers = {"check": check, "drain": drain}
    await Control(spec).serve(
        handlers, address=network.address, incarnation=incarnation, kv_port=kv_port, transports=list(transports)
    )


class Advertised:
    """A worker's network that tells peers another address of itself: that of a proxy in front."""

    def __init__(self, inner: SocketNetwork, address: str) -> None:
        self._inner = inner
        self.address = address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _tcp_receiver(made: Any) -> Any:
    return made.handover._receivers._own._receivers.get("tcp")


def _advertise_kv(made: Any, port: int | None) -> int:
    """-> where KV really arrives over TCP, 0 without that transport. Peers are told `port` instead, if there is one."""
    receiver = _tcp_receiver(made)
    if receiver is None:
        return 0
    if port:
        made.handover._receivers.endpoints["tcp"] = (TcpEndpoint("127.0.0.1", port),)
    return int(receiver.endpoint().port)


ROLES: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
    "scheduler": scheduler,
    "gateway": gateway,
    "prefill": worker,
    "decode": worker,
}
