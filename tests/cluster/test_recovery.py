"""What outlives whom: calls that wait long, beats that nothing stops, schedulers that come and go, workers that drain."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import agent as agents
from cluster import wire
from cluster.agent import Agent, new_gateway_id, new_incarnation
from cluster.gateway import Gateway, Limits
from cluster.loopback import Hub
from cluster.walk import Attempt, Walk
from cluster.wire import SocketNetwork
from configs.schema import SchedulerConfig
from protocol.errors import DeadlineExceeded, Draining, NotFound, ReservationRefused, WorkerLost
from protocol.kv import KVLayout
from protocol.messages import Admit, GatewayBeat, Message, Ok, WorkerBeat, WorkerInfo, WorkerStats
from protocol.request import Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef
from scheduler.scheduler import Scheduler

SECRET = b"s" * 32
DECODE, PREFILL = WorkerRef("d", "decode", "d:0"), WorkerRef("p", "prefill", "p:0")


def info(incarnation: str = "d", role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        incarnation=incarnation,
        role=role,
        name=f"{role}:0",
        address=f"{incarnation}:0",
        model="m",
        layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
        num_blocks=100,
        max_model_len=4096,
        max_num_seqs=8,
        pid=1,
        host="h",
        device="cpu",
    )


def admit(request_id: str = "a", last_epoch: int = 0) -> Admit:
    return Admit(
        request_id=request_id,
        model="m",
        tenant="t",
        slo_class="standard",
        priority=0,
        prompt_len=10,
        max_tokens=10,
        last_epoch=last_epoch,
        resumption=last_epoch > 0,
    )


# ---- the gateway's calls of the scheduler ----------------------------------------------------------------------------


class Service:
    """A scheduler that answers an Admit after `wait_s`."""

    def __init__(self, network: Any, wait_s: float, epoch: int = 1) -> None:
        self.network, self.wait_s, self.epoch = network, wait_s, epoch
        self.asked = 0
        self.beats: list[GatewayBeat] = []

    async def start(self) -> Service:
        await self.network.serve(self.handle, lambda peer: None)
        return self

    async def handle(self, peer: Any, message: Message) -> Message:
        if isinstance(message, GatewayBeat):
            self.beats.append(message)
            return Ok()
        assert isinstance(message, Admit)
        self.asked += 1
        await asyncio.sleep(self.wait_s)
        return Ticket(message.request_id, self.epoch, DECODE, None)


@contextlib.asynccontextmanager
async def gateway(network: Any, find: Callable[[], Any], recovery_s: float) -> AsyncIterator[Gateway]:
    made = Gateway("g", network, find, lambda request: None, time.monotonic, Limits(recovery_timeout_s=recovery_s))
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def at(*addresses: str) -> Callable[[], Any]:
    """A finder that names these, one after the other, and then the last one again."""
    left = list(addresses)

    async def find() -> str:
        return left.pop(0) if len(left) > 1 else left[0]

    return find


async def test_a_long_wait_in_the_queue_is_no_lost_scheduler():
    """The clock of "no scheduler for so long" once began with the call: a wait longer than it ended the request."""
    hub = Hub(encoded=True)
    service = await Service(hub.network("s"), wait_s=0.8).start()
    async with gateway(hub.network("g"), at("s:0"), recovery_s=0.2) as made:
        assert isinstance(await made._ask_scheduler(admit(), 5.0), Ticket)
    assert service.asked == 1


async def test_the_search_for_a_successor_begins_when_the_scheduler_is_lost():
    hub = Hub(encoded=True)
    first = await Service(hub.network("s"), wait_s=60).start()
    async with gateway(hub.network("g"), at("s:0"), recovery_s=1.0) as made:
        asking = asyncio.create_task(made._ask_scheduler(admit(), 60.0))
        await asyncio.sleep(1.2)  # longer than recovery_timeout_s, all of it in the queue
        await first.network.close()
        await asyncio.sleep(0.4)
        second = await Service(hub.network("s"), wait_s=0.0, epoch=7).start()
        ticket = await asyncio.wait_for(asking, 2)
    assert isinstance(ticket, Ticket)
    assert (first.asked, second.asked, ticket.epoch) == (1, 1, 7)


async def test_without_a_successor_it_ends_and_names_the_limit():
    hub = Hub(encoded=True)
    async with gateway(hub.network("g"), at("nobody:0"), recovery_s=0.3) as made:
        started = time.monotonic()
        with pytest.raises(WorkerLost, match=r"no scheduler for 0\.3 s"):
            await made._ask_scheduler(admit(), 5.0)
        assert 0.3 <= time.monotonic() - started < 1.5


async def test_a_stopped_scheduler_is_noticed_by_its_silence_and_its_successor_asked(monkeypatch):
    """Its sockets stay open, so only the pings tell."""
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.1)
    first = await Service(SocketNetwork("s", SECRET), wait_s=60).start()
    second = await Service(SocketNetwork("s", SECRET), wait_s=0.0, epoch=2).start()
    find = at(first.network.address, second.network.address)
    async with gateway(SocketNetwork("g", SECRET), find, recovery_s=5.0) as made:
        asking = asyncio.create_task(made._ask_scheduler(admit(), 60.0))
        while not first.asked:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        for connection in first.network._all:
            for task in connection._tasks:
                task.cancel()
        ticket = await asyncio.wait_for(asking, 5)
        assert time.monotonic() - started < 1.5
    assert isinstance(ticket, Ticket)
    assert ticket.epoch == 2
    await first.network.close()
    await second.network.close()


async def test_a_gateways_death_frees_what_it_had_in_the_queue_at_once():
    from cluster.metrics import ClusterMetrics
    from cluster.scheduler_service import SchedulerService

    service = SchedulerService(Scheduler(), SocketNetwork("s", SECRET), time.monotonic, ClusterMetrics("m"))
    await service.start()
    network = SocketNetwork("g", SECRET)
    async with gateway(network, at(service._network.address), recovery_s=0.1) as made:
        asking = asyncio.create_task(made._ask_scheduler(admit(), 60.0))
        while not len(service.scheduler.queue):
            await asyncio.sleep(0.01)
        asking.cancel()  # nothing is said: a process that is dead says nothing
    assert len(service.scheduler.queue) == 1
    async with asyncio.timeout(1):
        while len(service.scheduler.queue) or service._waiting:
            await asyncio.sleep(0.01)
    await service.close()


# ---- beats -----------------------------------------------------------------------------------------------------------


class FakeWorker:
    def __init__(self) -> None:
        self.is_draining = False
        self.is_idle = True
        self.faults: list[BaseException] = []

    def stats(self) -> WorkerStats:
        if self.faults:
            raise self.faults.pop(0)
        return WorkerStats(last_token_age_s=1.0)

    def in_flight(self) -> tuple[tuple[str, int], ...]:
        return (("a", 3),)

    def tick(self) -> None: ...


class Register:
    """A scheduler that forgets everybody when `forget` is set, and notes what it hears."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.forget = False
        self.faults: list[Exception] = []
        self.heard: list[Message] = []

    async def handle(self, peer: Any, message: Message) -> Message:
        self.heard.append(message)
        if isinstance(message, WorkerInfo):
            if self.faults:
                raise self.faults.pop(0)
            self.forget = False
        elif self.forget:
            raise NotFound("who are you?")
        return Ok()

    @property
    def beats(self) -> list[WorkerBeat]:
        return [message for message in self.heard if isinstance(message, WorkerBeat)]


@contextlib.asynccontextmanager
async def beating(heartbeat_s: float = 0.02) -> AsyncIterator[tuple[Agent, FakeWorker, Register, list[BaseException]]]:
    hub = Hub(encoded=True)
    register = Register(hub.network("s"))
    await register.network.serve(register.handle, lambda peer: None)
    worker, network, faults = FakeWorker(), hub.network("w"), []
    await network.serve(register.handle, lambda peer: None)

    async def find() -> str:
        if faults:
            raise faults.pop(0)
        return "s:0"

    agent = Agent(worker, info(), network, find, heartbeat_s)
    await agent.start()
    try:
        yield agent, worker, register, faults
    finally:
        await agent.close()


async def until(condition: Callable[[], Any], seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [WorkerLost("away"), DeadlineExceeded("no answer"), OSError("no route")])
async def test_a_worker_that_is_ready_waits_for_a_scheduler_that_is_being_restarted(monkeypatch, error):
    """A registration that was not answered once ended the worker's start, and with it minutes of loading a model."""
    monkeypatch.setattr(agents, "TICK_S", 0.01)
    hub = Hub(encoded=True)
    register = Register(hub.network("s"))
    await register.network.serve(register.handle, lambda peer: None)
    worker, network, faults = FakeWorker(), hub.network("w"), [error, error, error]
    await network.serve(register.handle, lambda peer: None)

    async def find() -> str:
        if faults:
            raise faults.pop(0)
        return "s:0"

    agent = Agent(worker, info(), network, find)
    await agent.start()
    assert isinstance(register.heard[0], WorkerInfo)
    await agent.close()
    faults += [error] * 100
    monkeypatch.setattr(agents, "REGISTER_S", 0.05)
    with pytest.raises(type(error)):
        await Agent(worker, info(), network, find).start()


@pytest.mark.parametrize("place", ["find", "stats", "registration"])
async def test_nothing_stops_a_workers_beat(place):
    """A worker that stops beating leaves the cluster for good. An error while it registered again once ended its beat."""
    async with beating() as (_, worker, register, faults):
        errors = [RuntimeError("a bug"), WorkerLost("away"), OSError("no route"), KeyError("x"), TimeoutError()]
        if place == "find":
            faults += errors
        elif place == "stats":
            worker.faults += errors
        else:
            register.faults += errors
            register.forget = True
        await until(lambda: not faults and not worker.faults and not register.faults)
        count = len(register.beats)
        await until(lambda: len(register.beats) >= count + 3 and not register.forget)


async def test_who_was_forgotten_says_what_it_runs_as_soon_as_it_is_known_again():
    async with beating(heartbeat_s=0.3) as (_, _, register, _):
        register.forget = True
        await until(lambda: register.heard and isinstance(register.heard[-1], WorkerBeat) and not register.forget and len(
            [m for m in register.heard if isinstance(m, WorkerInfo)]
        ) == 2)  # fmt: skip
        kinds = [type(message).__name__ for message in register.heard[-3:]]
        assert kinds == ["WorkerBeat", "WorkerInfo", "WorkerBeat"]
        assert register.beats[-1].running == (("a", 3),)


async def test_a_worker_that_drains_says_so_at_once_and_not_at_the_next_beat():
    async with beating(heartbeat_s=30.0) as (agent, worker, register, _):
        await until(lambda: register.beats)
        worker.is_draining = True
        agent.beat_now()
        await until(lambda: register.beats[-1].state == "draining", 0.5)
        assert len(register.beats) == 2


async def test_nothing_stops_a_gateways_beat(monkeypatch):
    monkeypatch.setattr("cluster.gateway.BEAT_S", 0.02)
    hub = Hub(encoded=True)
    service = await Service(hub.network("s"), 0.0).start()
    faults: list[Exception] = [RuntimeError("a bug"), WorkerLost("away"), OSError("no route"), KeyError("x")]

    async def find() -> str:
        if faults:
            raise faults.pop(0)
        return "s:0"

    async with gateway(hub.network("g"), find, 1.0):
        await until(lambda: not faults)
        await until(lambda: len(service.beats) >= 3)


def test_two_lives_never_bear_one_name():
    assert len({new_gateway_id(0) for _ in range(1000)}) == 1000
    assert len({new_incarnation("decode", 0) for _ in range(1000)}) == 1000


# ---- a scheduler that is restarted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_no_epoch_is_given_away_twice_whoever_mints_it(seed):
    """Schedulers die at random, with their queues, ledgers and memories, and sometimes with a ticket on the wire. Gateways and
    workers go on and tell the next one what they know. No gateway ever gets the same epoch of a request again."""
    rng = random.Random(seed)
    now, scheduler = 0.0, Scheduler(SchedulerConfig(), draw=lambda: 0.5)
    scheduler.register(info(), now)
    last: dict[str, int] = {}  # what its gateway knows: the epoch of its last ticket
    waiting: set[str] = set()
    got: set[tuple[str, int]] = set()

    def ask(request_id: str) -> None:
        waiting.add(request_id)
        scheduler.submit(admit(request_id, last.get(request_id, 0)), now)

    for _ in range(300):
        now += rng.random() * 0.2
        event = rng.random()
        if event < 0.3 and len(last) < 6:
            ask(f"r{len(last)}")
            last.setdefault(f"r{len(last)}", 0)
        elif event < 0.6 and last:
            request_id = rng.choice(sorted(last))
            if request_id not in waiting:
                ask(request_id)  # its worker failed it
        elif event < 0.75:
            scheduler = Scheduler(SchedulerConfig(), draw=lambda: 0.5)
            if rng.random() < 0.7:
                scheduler.register(info(), now)
            for request_id in sorted(waiting):
                ask(request_id)  # calls that broke are asked again
        elif info().incarnation not in scheduler.workers:
            scheduler.register(info(), now)
        else:
            running = tuple((r, e) for r, e in last.items() if e and r not in waiting)
            scheduler.heartbeat(WorkerBeat("d", "ready", WorkerStats(num_free_blocks=50), running), now)
        for decision in scheduler.decisions(now):
            assert isinstance(decision, Ticket)
            if rng.random() < 0.2:
                continue  # lost on the way; its gateway asks again when it notices that the scheduler is gone
            key = (decision.request_id, decision.epoch)
            assert key not in got
            assert decision.epoch > last[decision.request_id]
            got.add(key)
            last[decision.request_id] = decision.epoch
            waiting.discard(decision.request_id)
        scheduler.check_integrity()
    assert len(got) > 50


# ---- who is placed elsewhere -----------------------------------------------------------------------------------------


def walk(prefill_was_asked: bool) -> Walk:
    request = Request(request_id="a", model="m", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=2))
    made = Walk(request, lambda request: None, 0.0)
    attempt = Attempt(Ticket("a", 1, DECODE, PREFILL))
    attempt.prefill_was_asked = prefill_was_asked
    attempt.decode = SimpleNamespace(is_closed=False)  # type: ignore[assignment]
    made._attempt = attempt
    return made


@pytest.mark.parametrize(
    ("error", "prefill_was_asked", "blamed"),
    [
        (Draining("d"), False, ["d"]),
        (Draining("p"), True, ["p"]),
        (ReservationRefused("no room at decode"), False, []),
        (ReservationRefused("prefill has too many already"), True, ["p"]),
    ],
)
def test_who_refused_and_will_go_on_refusing_is_not_asked_again(error, prefill_was_asked, blamed):
    made = walk(prefill_was_asked)
    made.blame(error)
    assert made.excluded == blamed


def test_a_refusal_by_a_prefill_worker_says_nothing_of_decodes_room():
    """The scheduler once took a draining prefill worker's refusal for a full decode worker, which then got nothing for a beat."""
    scheduler = Scheduler(SchedulerConfig(disaggregation_threshold=0), draw=lambda: 0.5)
    scheduler.register(info("d"), 0.0)
    scheduler.register(info("p", "prefill"), 0.0)
    scheduler.submit(admit(), 0.0)
    (first,) = scheduler.decisions(0.0)
    assert isinstance(first, Ticket)
    assert first.prefill is not None
    again = Admit(**{**{f: getattr(admit(), f) for f in Admit.__struct_fields__}, "excluded": ("p",), "last_epoch": 1})
    scheduler.submit(again, 0.01)
    (second,) = scheduler.decisions(0.01)
    assert isinstance(second, Ticket)
    assert second.decode.incarnation == "d"
    assert second.prefill is None
    assert not scheduler.workers["d"].is_full
