"""The product's own parts, each on a node of its own: scheduler service, gateways, prefill and decode workers, their agents.

Only what a process gets from outside is replaced: the loop's time, the network, the KV path, the model, and what the
operating system says about other processes. Crash, restart, stop and continue are methods here; scenario.py decides when.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec

import cluster.agent
import cluster.gateway
import decode.worker
import kvtransfer.group
import kvtransfer.link
import prefill.worker
from cluster.agent import Agent
from cluster.assembly import Engine, canary
from cluster.gateway import Gateway, Limits
from cluster.scheduler_service import SchedulerService
from configs.schema import SchedulerConfig
from decode.worker import DecodeWorker
from engine.blocks import BlockPool
from kvtransfer.group import Connector, RankTransfers
from kvtransfer.handoff import written_blocks
from kvtransfer.outgoing import Source
from kvtransfer.pool import KVPool
from kvtransfer.receiving import GroupReceivers, RankReceivers
from kvtransfer.transport import OnStored
from kvtransfer.view import View
from prefill.worker import PrefillWorker
from protocol.errors import TandemError
from protocol.kv import KVEndpoint, ProcessRef
from protocol.messages import Outcome, WorkerInfo
from protocol.parallel import ALONE, Parallel
from protocol.request import Request
from protocol.ticket import Landed
from scheduler.scheduler import Scheduler
from tests.faults.model import LAYOUT, Chains, LightRunner
from tests.faults.ranks import RankWire, part, place
from tests.faults.stores import Memory
from tests.faults.virtual_loop import CURRENT, Node, VirtualLoop
from tests.faults.wire import VirtualNetwork, Wires

MODEL = "light"
SECRET = b"fault tests" * 3
HASH_BLOCK_LEN = 8  # tokens; the prompts here are short
MAX_MODEL_LEN = 96


class Shape:
    """What a cluster of one run looks like. Sizes in blocks, times in seconds."""

    num_prefill = 1
    num_decode = 1
    num_gateways = 1
    num_hosts = 1
    prefill_blocks = 32
    decode_blocks = 40
    prefill_step_s = 0.02
    decode_step_s = 0.02
    prefill_batched_tokens = 16
    decode_batched_tokens = 24
    max_num_seqs = 8
    threshold = 6
    transfer_timeout_s = 3.0
    limits = Limits(queue_timeout_s=60.0, prefill_timeout_s=8.0, token_timeout_s=5.0, request_timeout_s=150.0, lease_s=4.0)
    caching = True
    prefill_parallel = ALONE
    decode_parallel = ALONE
    mean_output = 128.0  # tokens of an answer, as the scheduler believes; too few, and decode workers have to preempt

    def parallel(self, role: str) -> Parallel:
        return self.prefill_parallel if role == "prefill" else self.decode_parallel


class Outcomes:
    """Stands for the metrics of the scheduler's process: what it was told of ended requests."""

    def __init__(self) -> None:
        self.told: list[Outcome] = []

    def observe(self, outcome: Outcome) -> None:
        self.told.append(outcome)

    def refused(self, tenant: str, slo_class: str, reason: str) -> None:
        """Counted by others."""


class Machine:
    """One life of one process."""

    def __init__(self, node: Node, role: str, index: int, pid: int) -> None:
        self.node = node
        self.role = role
        self.index = index
        self.pid = pid
        self.network: VirtualNetwork
        self.gateway: Gateway | None = None
        self.service: SchedulerService | None = None
        self.worker: Any = None
        self.kv: KVPool | None = None
        self.agent: Agent | None = None
        self.push_of_other_ranks: Callable[[str, int, Any], bool]
        self.watched: list[int] = []  # descriptors that tell others of its death
        self.drains: asyncio.Task[None] | None = None
        self.num_stops = 0
        self.slowness = 1.0  # how many times longer than usual its steps take

    @property
    def is_worker(self) -> bool:
        return self.worker is not None

    def __repr__(self) -> str:
        return self.node.name


class Machines:
    """report(story): something is wrong. detokenizer: as of Gateway."""

    def __init__(
        self,
        loop: VirtualLoop,
        wires: Wires,
        memory: Memory,
        rng: random.Random,
        shape: Shape,
        chains: Chains,
        detokenizer: Callable[[Request], Any],
        report: Callable[[str], None],
    ) -> None:
        self.loop = loop
        self.wires = wires
        self.memory = memory
        self.shape = shape
        self.rng = rng
        self.chains = chains
        self.outcomes = Outcomes()
        self.on_gone: Callable[[Machine], object] = lambda machine: None  # it has drained and ended
        self.on_step: Callable[[str], None] = lambda request_id: None  # a step computes for this request
        self.now: dict[tuple[str, int], Machine] = {}  # (role, index) -> its present or last life
        self.all: list[Machine] = []
        self._detokenizer = detokenizer
        self._report = report
        self._hosts = [f"host-{i}" for i in range(shape.num_hosts)]
        self._places: dict[tuple[str, int], str] = {}
        self.num_drained = 0
        self._descriptors = itertools.count(1000)

    def start(self) -> None:
        self.boot("scheduler", 0)
        shape = self.shape
        for role, count in (("decode", shape.num_decode), ("prefill", shape.num_prefill), ("gateway", shape.num_gateways)):
            for index in range(count):
                self.boot(role, index)

    def boot(self, role: str, index: int) -> Machine:
        """A new life, at the address of the last one."""
        number = len(self.all)
        host = self._places.setdefault((role, index), self.rng.choice(self._hosts))
        node = Node(self.loop, f"{role}-{index}-life{number}", host, offset=self.rng.uniform(0.0, 1e5))
        machine = Machine(node, role, index, pid=1000 + number)
        former = self.now.get((role, index))
        self.now[role, index] = machine
        self.all.append(machine)
        machine.network = VirtualNetwork(self.wires, node, f"{role}-{index}:1", self._caught)
        if former is not None:
            self.wires.reborn(former.node)
        node.task(getattr(self, f"_{role}")(machine), name=node.name)
        return machine

    def crash(self, machine: Machine, *, is_told: bool) -> None:
        machine.node.kill()
        self.wires.die(machine.node, is_told=is_told)
        for fd in machine.watched:
            self.loop.call_later(self.rng.uniform(0.0, 0.005), self.loop.readable, fd)

    def drain(self, machine: Machine, deadline_s: float) -> None:
        """What cluster/life.py does when a worker is asked to go. It ends as a process that says goodbye."""

        async def leave() -> None:
            assert machine.agent is not None
            machine.worker.is_draining = True
            machine.agent.beat_now()
            num_stops = machine.num_stops
            await machine.worker.drain(deadline_s)
            jobs = machine.worker.in_flight()
            if jobs and machine.num_stops == num_stops:  # else it had no time at all
                self._report(f"{machine.node.name} has drained and still holds {jobs}")
            await machine.agent.close()
            await machine.network.close()
            self.num_drained += 1
            self.wires.later(0.0, self._gone, machine)

        if machine.agent is not None and machine.drains is None:
            machine.drains = machine.node.task(leave())

    def _gone(self, machine: Machine) -> None:
        self.crash(machine, is_told=True)
        self.on_gone(machine)

    def stop(self, machine: Machine) -> None:
        machine.node.stop()
        machine.num_stops += 1
        self.wires.review()

    def resume(self, machine: Machine) -> None:
        machine.node.resume(io_first=self.rng.random() < 0.5)
        self.wires.review()

    def of(self, *roles: str) -> list[Machine]:
        """Those that live, stopped ones included."""
        return [m for m in self.now.values() if m.role in roles and not m.node.is_dead]

    def close(self) -> None:
        for machine in self.all:
            if machine.kv is not None:
                machine.kv.close()

    # ---- lives -----------------------------------------------------------------------------------------------------

    async def _scheduler(self, machine: Machine) -> None:
        config = SchedulerConfig(disaggregation_threshold=self.shape.threshold)
        rng = random.Random(machine.pid)
        scheduler = Scheduler(config, enable_prefix_caching=self.shape.caching, hash_block_len=HASH_BLOCK_LEN, draw=rng.random)
        scheduler.costs.output(MODEL).mean = self.shape.mean_output
        machine.service = SchedulerService(scheduler, machine.network, machine.node.clock, self.outcomes)  # type: ignore[arg-type]
        await machine.service.start()

    async def _gateway(self, machine: Machine) -> None:
        node = machine.node
        machine.gateway = Gateway(
            node.name, machine.network, self._find_scheduler, self._detokenizer, node.clock, self.shape.limits, seed=machine.pid
        )
        await machine.gateway.start()

    async def _decode(self, machine: Machine) -> None:
        shape, node = self.shape, machine.node
        engine = self._engine(machine, shape.decode_blocks)
        settings = decode.worker.Settings(
            incarnation=node.name,
            layout=LAYOUT,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.decode_batched_tokens,
        )
        compute, verify = self._compute(machine, shape.decode_step_s), self._compute(machine, shape.decode_step_s / 2)
        own, *others = (self._rank_receivers(machine, rank, verify) for rank in range(shape.decode_parallel.num_ranks))
        wires = {rank: self._rank_wire(machine, other.handle) for rank, other in enumerate(others, 1)}
        callers = {rank: (wire, others[rank - 1].endpoints()) for rank, wire in wires.items()}
        worker = DecodeWorker(
            settings,
            engine.runner,
            engine.pool,
            GroupReceivers(own, callers),
            machine.network,
            node.clock,
            compute,
            SECRET,
        )
        await self._work(machine, worker, engine, compute)

    def _rank_receivers(self, machine: Machine, rank: int, verify: Any) -> RankReceivers:
        assert machine.kv is not None
        pool = part(machine.kv, self.shape.decode_parallel, rank)
        receivers = {
            "shm": self.memory.receiver(machine, pool, can_refuse=False),
            "tcp": self.memory.receiver(machine, pool, can_refuse=True),
        }
        return RankReceivers(pool, receivers, verify, place(self.shape.decode_parallel, rank))

    def _rank_wire(self, machine: Machine, handle: Any) -> RankWire:
        wire = RankWire(self.wires, machine.node, self.rng, lambda: machine.slowness > 1.0, self._report)
        wire.handle = handle
        return wire

    def _ranks(self, machine: Machine) -> tuple[Connector, list[RankWire]]:
        """What a prefill worker's leader has of KV, and the connections to its other ranks, which push as well."""
        parallel, node = self.shape.prefill_parallel, machine.node
        wires = []
        for rank in range(1, parallel.num_ranks):
            pool = part(machine.kv, parallel, rank)
            connector = Connector(pool, SECRET, node.name, place(parallel, rank), node=node)
            wire = self._rank_wire(machine, None)
            transfers = RankTransfers(connector, None, wire.tell)
            wire.handle = transfers.handle
            wires.append(wire)
            machine.push_of_other_ranks = transfers.push
        pool = part(machine.kv, parallel, 0)
        others = dict(enumerate(wires, 1))
        return Connector(pool, SECRET, node.name, place(parallel, 0), others, node=node), wires

    async def _prefill(self, machine: Machine) -> None:
        shape, node = self.shape, machine.node
        engine = self._engine(machine, shape.prefill_blocks)
        settings = prefill.worker.Settings(
            incarnation=node.name,
            layout=LAYOUT,
            max_model_len=MAX_MODEL_LEN,
            transports=("shm", "tcp"),
            boot_id=node.host,
            pid=machine.pid,
            start_ticks=0,
            parallel=shape.prefill_parallel,
            ranks=(ProcessRef(node.host, machine.pid, 0),) * shape.prefill_parallel.num_ranks,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.prefill_batched_tokens,
            transfer_timeout_s=shape.transfer_timeout_s,
        )

        connector, wires = self._ranks(machine)
        compute = self._compute(machine, shape.prefill_step_s)
        worker = PrefillWorker(settings, engine.runner, engine.pool, connector, machine.network, node.clock, compute, SECRET)
        for wire in wires:
            wire.on_told = worker.on_rank_landed
        await self._work(machine, worker, engine, compute)

    def _engine(self, machine: Machine, num_blocks: int) -> Engine:
        machine.kv = kv = KVPool(LAYOUT, num_blocks)
        pool = BlockPool(num_blocks, LAYOUT.block_size, self.shape.caching)
        parallel = self.shape.parallel(machine.role)
        runner = LightRunner(
            kv,
            self.chains,
            lambda story: self._report(f"{machine.node.name}: {story}"),
            self.on_step,
            LAYOUT.num_layers // parallel.num_ranks,
            lambda grant_id, pairs: machine.push_of_other_ranks(grant_id, 0, pairs),
        )
        return Engine(None, LAYOUT, kv, pool, runner, MAX_MODEL_LEN)  # type: ignore[arg-type]

    async def _work(self, machine: Machine, worker: Any, engine: Engine, compute: Any) -> None:
        machine.worker = worker
        node = machine.node
        await worker.start()
        info = WorkerInfo(
            incarnation=node.name,
            role=machine.role,
            name=f"{machine.role}:{machine.index}",
            address=machine.network.address,
            model=MODEL,
            layout=LAYOUT,
            num_blocks=engine.pool.num_blocks,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self.shape.max_num_seqs,
            pid=machine.pid,
            host=node.host,
            device="cpu",
            parallel=self.shape.parallel(machine.role),
        )
        proof = canary(engine, worker, compute, node.clock)
        agent = machine.agent = Agent(worker, info, machine.network, self._find_scheduler, 1.0, proof)
        steps = asyncio.ensure_future(worker.run())
        while True:  # Serve starts a replica again whose constructor failed
            try:
                await agent.start()
                break
            except TandemError:
                await asyncio.sleep(0.3)
        try:
            await steps
        except Exception as error:
            self._caught(f"the engine loop of {node.name} ended: {error!r}", error)

    def _compute(self, machine: Machine, seconds: float) -> Any:
        """One thread beside the event loop: a step takes time, and its effects happen somewhere within it."""
        busy, rng = asyncio.Lock(), self.rng

        async def compute(function: Callable[[], Any]) -> Any:
            async with busy:
                before = rng.choice((0.0, 0.5, 1.0))
                duration = seconds * machine.slowness * rng.uniform(0.5, 1.5)
                await asyncio.sleep(duration * before)
                result = function()
                await asyncio.sleep(duration * (1.0 - before))
                return result

        return compute

    async def _find_scheduler(self) -> str:
        return self.now["scheduler", 0].network.address

    def _caught(self, story: str, error: BaseException) -> None:
        self._report(story)

    def forged(self, landed: Landed) -> Landed | None:
        """Somebody without the cluster's secret claims that all of this grant has landed, and even knows what the memory holds."""
        machine = next((m for m in self.all if m.node.name == landed.decode_incarnation and not m.node.is_dead), None)
        grant = machine.worker.handover._inbound.grant(landed.grant_id) if machine is not None else None
        if machine is None or machine.kv is None or grant is None:
            return None
        view = View(machine.kv.runs, LAYOUT)
        digests = b"".join(view.digests(layer, written_blocks(grant)) for layer in range(LAYOUT.num_layers))
        first = grant.num_cached_blocks
        return msgspec.structs.replace(
            landed, row=0, num_rows=LAYOUT.num_layers, first=first, count=len(grant.block_ids) - first, digests=digests
        )

    # ---- what the operating system says ----------------------------------------------------------------------------

    def observe(self, boot: str, pid: int, ticks: int = 0) -> Any:
        """`kvtransfer.process.observe`, asked by the node that runs now."""
        found = next((m for m in self.all if m.pid == pid), None)
        if found is None or boot != self._boot_id() or found.node.is_dead:
            return None
        fd = next(self._descriptors)
        found.watched.append(fd)
        return SimpleNamespace(pid=pid, fileno=lambda: fd, is_dead=lambda: found.node.is_dead, close=lambda: None)

    def _boot_id(self) -> str:
        asking = CURRENT.get()
        assert asking is not None
        return asking.host

    def _make_sender(
        self, endpoint: KVEndpoint, pool: KVPool, secret: bytes, *, node: Node, source: Source, on_stored: OnStored, **ends: str
    ) -> Any:
        """`kvtransfer.link.make_sender`."""
        return self.memory.sender(node, source, endpoint, on_stored)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put this world in the place of the real one, where the product asks for it by name."""

        process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
        patches: list[tuple[Any, str, Any]] = [
            (kvtransfer.link, "observe", self.observe),
            (kvtransfer.link, "boot_id", self._boot_id),
            (kvtransfer.group, "make_sender", self._make_sender),
            (cluster.agent, "psutil", SimpleNamespace(Process=lambda: process)),
            (cluster.gateway, "HASH_BLOCK_LEN", HASH_BLOCK_LEN),
        ]
        before = [getattr(owner, name) for owner, name, _ in patches]
        for owner, name, value in patches:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for (owner, name, _), value in zip(patches, before, strict=True):
                setattr(owner, name, value)
