"""The tenants file in a cluster: when it is read, what a bad one changes (nothing), who learns of it, what survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import cluster.scheduler_service
import cluster.tenants_file
from api.backend import InForce
from cluster.gateway import Gateway, Limits
from cluster.loopback import Hub
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from cluster.tenants_file import TenantsFile, check_tenants, packed, unpacked
from cluster.tenants_view import TenantsView
from configs.schema import Config, SchedulerConfig
from configs.tenants import DEFAULT_TENANT, Tenants, TenantsError, hash_key, read_tenants, version_of, without_file
from protocol.errors import Overloaded, TenantOverLimit, TenantsChanged
from protocol.events import Event, Failed, Placed
from protocol.kv import KVLayout
from protocol.messages import Admit, AskTenants, GatewayBeat, OfferTenants, Outcome, TenantsInForce, TenantsVersion, WorkerInfo
from protocol.request import Claim, Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef
from scheduler.scheduler import Scheduler

GOOD = "classes: {standard: {ttft_s: 1, tpot_s: 0.1}}\ntenants: {acme: {api_keys: [%s], weight: %s}}\n"
BAD = "classes: {standard: {ttft_s: 1, tpot_s: 0.1}}\ntenants: {acme: {wieght: 2}}\n"
LAYOUT = KVLayout(2, 2, 16, 16, "float32", "hash")


def good(weight: float = 1, key: str = "sk-acme") -> str:
    return GOOD % (hash_key(key), weight)


class Clock:
    """wall and monotonic in one; files get their times from it."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class Watched:
    """A file that is watched by hand: `write`, `pass_time`, `poll`."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.path = path
        self.taken: list[Tenants] = []
        self.file = self.another_life()

    def another_life(self) -> TenantsFile:
        return TenantsFile(str(self.path), None, self.taken.append, self.clock, self.clock)

    def write(self, text: str) -> None:
        self.path.write_text(text)
        os.utime(self.path, (self.clock.now, self.clock.now))

    async def settle(self, seconds: float = 5.0) -> None:
        for _ in range(int(seconds / 0.5)):
            await self.file.poll()
            self.clock.now += 0.5


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "tenants.yaml")


# ---- the file --------------------------------------------------------------------------------------------------------


async def test_a_file_is_taken_whole_when_nobody_writes_any_more(watched: Watched) -> None:
    watched.write(good(1))
    watched.clock.now += 10
    await watched.file.poll()
    assert watched.file.version == version_of(read_tenants(good(1), "t"))
    pieces = good(2).splitlines(keepends=True)
    watched.write(pieces[0])  # good YAML by itself, and not what is meant
    for _ in range(4):
        await watched.file.poll()
        watched.clock.now += 0.3
        watched.write(watched.path.read_text() + "# more comes\n")
    watched.write(good(2))
    await watched.settle()
    assert [one.tenant("acme").weight for one in watched.taken] == [1.0, 2.0], "never the half of it"
    assert (watched.file.num_taken, watched.file.num_refused, watched.file.problem) == (2, 0, None)


async def test_a_file_that_changes_while_it_is_read_is_read_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.write(good(1))
    watched.clock.now += 10
    read = cluster.tenants_file.text_of

    def slowly(path: str) -> str:
        text = read(path)
        monkeypatch.setattr(cluster.tenants_file, "text_of", read)
        watched.write(good(2))
        return text

    monkeypatch.setattr(cluster.tenants_file, "text_of", slowly)
    await watched.settle()
    assert [one.tenant("acme").weight for one in watched.taken] == [2.0]


async def test_a_bad_file_changes_nothing_and_says_why(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.write(good(1))
    await watched.settle()
    before = watched.file.document()
    for text, line, reason in ((BAD, 2, "did you mean weight?"), ("[", 1, "not YAML"), ("", 1, "empty")):
        watched.write(text)
        with caplog.at_level(logging.ERROR):
            await watched.settle()
        assert watched.file.document() is before
        status = watched.file.status()
        assert (status["problem"]["line"], reason in status["problem"]["reason"]) == (line, True)
        assert status["version"] == before.version
        assert f"{watched.path}:{line}" in caplog.messages[-1]
        assert "stays in force" in caplog.messages[-1]
    watched.path.unlink()
    await watched.settle()
    assert "No such file" in watched.file.status()["problem"]["reason"]
    assert len(watched.taken) == 1
    assert watched.file.num_refused == 4, "each once, not once a poll"
    watched.write(good(1))
    await watched.settle()
    assert watched.file.problem is None
    assert (watched.file.num_taken, len(watched.taken)) == (1, 1), "the same content is no news"


async def test_a_file_replaced_by_renaming_is_seen(watched: Watched) -> None:
    watched.write(good(1))
    await watched.settle()
    beside = watched.path.with_suffix(".new")
    beside.write_text(good(3))
    os.utime(beside, (1e8, 1e8))  # older than what was there, as after `cp -p`
    beside.rename(watched.path)
    await watched.settle()
    assert watched.taken[-1].tenant("acme").weight == 3.0


async def test_a_file_that_loses_all_its_keys_is_refused(watched: Watched) -> None:
    watched.write(good(1))
    await watched.settle()
    watched.write("classes: {standard: {ttft_s: 1, tpot_s: 0.1}}\n")
    await watched.settle()
    assert "would let everybody in" in watched.file.status()["problem"]["reason"]
    assert len(watched.taken) == 1


async def test_a_restarted_scheduler_with_a_bad_file_takes_what_gateways_had(watched: Watched) -> None:
    watched.write(good(1))
    await watched.settle()
    old, older = watched.file.document(), packed(read_tenants(good(9), "t"), 5.0)
    watched.write(BAD)
    watched.file = watched.another_life()
    await watched.settle()
    with pytest.raises(Overloaded, match="did you mean weight"):
        watched.file.document()
    assert watched.file.offer(older)
    assert watched.file.offer(old), "the newer of two that are offered"
    assert not watched.file.offer(older)
    assert watched.file.version == old.version
    assert watched.file.status()["from_gateway"]
    watched.write(good(4))
    await watched.settle()
    assert watched.taken[-1].tenant("acme").weight == 4.0, "the file, as soon as it can be used"
    assert not watched.file.offer(packed(read_tenants(good(9), "t"), 2e9))


async def test_start_reads_it_at_once_or_knows_why_not(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(good(1))
    file = TenantsFile(str(path))
    await asyncio.wait_for(file.start(), 10)
    assert file.version
    missing = TenantsFile(str(tmp_path / "none"))
    await asyncio.wait_for(missing.start(), 10)
    assert missing.problem is not None


def test_before_anything_starts_a_bad_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(BAD)
    config = Config(scheduler=SchedulerConfig(tenants_file=str(path)))
    with pytest.raises(TenantsError, match=r"t\.yaml:2: tenants\.acme has the unknown key 'wieght'; did you mean weight\?"):
        check_tenants(config)
    path.write_text(good(1, "sk-server"))
    check_tenants(config)
    gateway = msgspec.structs.replace(config.gateway, api_key="sk-server")
    with pytest.raises(TenantsError, match="the server's own"):
        check_tenants(msgspec.structs.replace(config, gateway=gateway))
    check_tenants(Config())


def test_what_travels_is_what_was_read() -> None:
    tenants = read_tenants(Path("configs/tenants.example.yaml").read_text(), "t")
    document = packed(tenants, 12.5)
    assert unpacked(document) == tenants
    assert document.version == version_of(unpacked(document))


# ---- scheduler and gateways ------------------------------------------------------------------------------------------


class Peer:
    name = "peer"
    is_closed = False


@contextlib.asynccontextmanager
async def scheduler_with(path: Path, hub: Hub | None = None) -> AsyncIterator[SchedulerService]:
    clock = asyncio.get_running_loop().time
    service = SchedulerService(
        Scheduler(SchedulerConfig()), (hub or Hub()).network("scheduler"), clock, ClusterMetrics("m"), TenantsFile(str(path))
    )
    await service.start()
    try:
        yield service
    finally:
        await service.close()


def admit(request_id: str, version: str, **more: Any) -> Admit:
    given = {"model": "m", "tenant": "acme", "slo_class": "standard", "priority": 0, "prompt_len": 10, "max_tokens": 10}
    return Admit(request_id=request_id, tenants_version=version, **{**given, **more})


INFO = WorkerInfo(
    incarnation="decode-0-a", role="decode", name="decode:0", address="d:0", model="m", layout=LAYOUT, num_blocks=100,
    max_model_len=4096, max_num_seqs=1, pid=1, host="h", device="cpu",
)  # fmt: skip


async def test_a_new_request_is_judged_under_the_file_in_force_or_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(good(1))
    async with scheduler_with(path) as service:
        assert service.tenants_file is not None
        version = service.tenants_file.version
        await service.handle(Peer(), INFO)
        assert isinstance(await service.handle(Peer(), admit("a", version)), Ticket)
        waits = asyncio.create_task(service.handle(Peer(), admit("b", version)))
        await asyncio.sleep(0)
        with pytest.raises(TenantsChanged):
            await service.handle(Peer(), admit("c", "another"))
        changed = read_tenants(good(7), "t")
        service.tenants_file._take(changed)
        assert service.scheduler.tenants is changed
        with pytest.raises(TenantsChanged):
            await service.handle(Peer(), admit("d", version))
        # What was promised stays promised: to one that waits and is asked for again, and to one that ran.
        again = asyncio.create_task(service.handle(Peer(), admit("b", version)))
        await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert [item.admit.request_id for item in service.scheduler.queue.orders["m"]] == ["b"]
        await service.handle(Peer(), outcome("a"))
        assert isinstance(await again, Ticket)
        resumed = asyncio.create_task(service.handle(Peer(), admit("b", version, resumption=True, last_epoch=1)))
        await asyncio.sleep(0.01)
        assert not resumed.done() or resumed.exception() is None, "it waits for room, or has it; nobody judges it again"
        resumed.cancel()
        answer = await service.handle(Peer(), GatewayBeat("g", (("b", 2),)))
        assert isinstance(answer, TenantsVersion)
        assert answer.version == service.tenants_file.version
        assert [row[:2] for row in answer.services] == [(1, "acme")]
        told = await service.handle(Peer(), AskTenants())
        assert isinstance(told, TenantsInForce)
        assert unpacked(told).tenant("acme").weight == 7.0


def outcome(request_id: str, **more: Any) -> Outcome:
    given = {
        "epoch": 1, "kind": "finished", "tenant": "acme", "slo_class": "standard", "prompt_tokens": 10, "cached_tokens": 0,
        "output_tokens": 5, "queue_s": 0.1, "ttft_s": 0.2, "tpot_s": 0.01, "e2e_s": 1.0,
    }  # fmt: skip
    return Outcome(request_id=request_id, **{**given, **more})


async def test_while_the_file_cannot_be_used_nobody_is_served_until_a_gateway_helps(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(BAD)
    async with scheduler_with(path) as service:
        with pytest.raises(Overloaded, match="did you mean weight"):
            await service.handle(Peer(), admit("a", ""))
        assert (await service.handle(Peer(), GatewayBeat("g", (), "v0"))).version == ""  # type: ignore[union-attr]
        offered = packed(read_tenants(good(1), "t"), 5.0)
        await service.handle(Peer(), OfferTenants(offered))
        assert (await service.handle(Peer(), GatewayBeat("g", (), "v0"))).version == offered.version  # type: ignore[union-attr]
        text = (await service.handle(Peer(), msgspec.json.decode(b'{"type":"ask_metrics"}', type=_asked()))).text  # type: ignore[union-attr]
        assert "tandem_tenants_file_valid" in text


def _asked() -> Any:
    from protocol.messages import AskMetrics

    return AskMetrics


class Door:
    """A gateway with a view, and a scheduler that it finds."""

    def __init__(self, hub: Hub, view: TenantsView, name: str = "g", **more: Any) -> None:
        async def find() -> str:
            return "scheduler:0"

        self.view = view
        self.gateway = Gateway(
            name, hub.network(name), find, lambda _: Letters(), asyncio.get_running_loop().time, Limits(), tenants=view, **more
        )


class Letters:
    def feed(self, token_ids: list[int]) -> tuple[str, str | None]:
        return "x" * len(token_ids), None

    def flush(self) -> str:
        return ""


def request(version: str, **more: Any) -> Request:
    given = {"request_id": "r", "model": "m", "prompt_token_ids": (1, 2), "sampling": SamplingParams(max_tokens=9, min_tokens=5)}
    return Request(**{**given, **more}, tenant="acme", claim=Claim(tenants_version=version))


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_gateways_follow_the_file_and_outlive_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gateways, one file; a reload reaches both with their beats; a scheduler that comes back to a damaged file gets it from
    them."""
    monkeypatch.setattr(cluster.gateway, "BEAT_S", 0.05)
    monkeypatch.setattr(cluster.scheduler_service, "SERVICES_S", 0.05)
    monkeypatch.setattr(cluster.tenants_file, "POLL_S", 0.05)
    monkeypatch.setattr(cluster.tenants_file, "SETTLE_S", 0.1)
    path, hub = tmp_path / "t.yaml", Hub(True)
    path.write_text(good(1))
    async with scheduler_with(path, hub) as service:
        service.scheduler.fairness.charge("r", 1, "acme", 1.0, 500, 0.0)
        doors = [Door(hub, TenantsView(None), f"g{i}") for i in range(2)]
        with pytest.raises(Overloaded):
            doors[0].view.in_force()
        for door in doors:
            await door.gateway.start()
        await until(lambda: all(not door.view.is_missing for door in doors))
        first = doors[0].view.version
        path.write_text(good(2))
        await until(lambda: all(door.view.version not in ("", first) for door in doors))
        assert {door.view.in_force().tenants.tenant("acme").weight for door in doors} == {2.0}
        second = doors[0].view.version
        path.write_text(BAD)
        await asyncio.sleep(0.5)
        assert {door.view.version for door in doors} == {second}
    async with scheduler_with(path, hub) as service:
        assert service.tenants_file is not None
        await until(lambda: service.tenants_file.version == second)
        assert service.scheduler.tenants.tenant("acme").weight == 2.0
        await until(lambda: service.scheduler.fairness.service(1, "acme") == 500.0)  # what it had is not forgiven
        path.write_text(good(3))
        await until(lambda: all(door.view.version not in ("", second) for door in doors))
    for door in doors:
        await door.gateway.close()


async def test_a_stale_request_is_not_ended_and_the_gateway_learns_of_the_new_file(tmp_path: Path) -> None:
    path, hub = tmp_path / "t.yaml", Hub(True)
    path.write_text(good(1))
    async with scheduler_with(path, hub) as service:
        door = Door(hub, TenantsView(None))
        await door.gateway.start()
        await until(lambda: not door.view.is_missing)
        stale = door.view.version
        service.tenants_file._take(read_tenants(good(5), "t"))  # type: ignore[union-attr]
        events = [event async for event in door.gateway.generate(request(stale))]
        assert isinstance(events[-1], Failed)
        assert events[-1].failure.kind == "TenantsChanged"
        assert door.view.in_force().tenants.tenant("acme").weight == 5.0, "whoever judges again finds the new one"
        await asyncio.sleep(0.05)
        assert not service.history.requests("", "", 10), "nothing of it is remembered: it comes again under its name"
        await door.gateway.close()


# ---- what a ticket leaves of a request -------------------------------------------------------------------------------


async def placed_by(
    ticket: Ticket | Exception, adapt: Callable[[Request, str], Request | None] = lambda *_: None, **more: Any
) -> Any:
    """(first event, what was reserved, what the scheduler heard) of a request whose scheduler answers with this ticket."""
    hub, heard, reserved = Hub(True), [], []
    scheduler, worker = hub.network("scheduler"), hub.network("d")

    async def schedule(peer: Any, message: Any) -> Any:
        heard.append(message)
        if isinstance(message, Admit):
            return msgspec.structs.replace(ticket, epoch=message.last_epoch + 1)
        return None

    async def decode(peer: Any, message: Any) -> Any:
        reserved.append(message)
        raise TenantOverLimit("enough seen")

    await scheduler.serve(schedule, lambda _: None)
    await worker.serve(decode, lambda _: None)
    classes = "classes: {standard: {ttft_s: 1, tpot_s: 1, degrade_to_model: n}, batch: {ttft_s: 9, tpot_s: 9}}"
    view = TenantsView(read_tenants(classes, "t"))
    door = Door(hub, view, adapt=adapt)
    await door.gateway.start()
    events: list[Event] = [event async for event in door.gateway.generate(request(""), **more)]
    await asyncio.sleep(0.05)
    await door.gateway.close()
    return events, reserved, heard


DECODE = WorkerRef("decode-0-a", "decode", "d:0")


async def test_a_ticket_that_degrades_is_honoured_everywhere() -> None:
    ticket = Ticket("r", 1, DECODE, None, degraded="batch, at most 3 tokens", slo_class="batch", max_tokens=3)
    events, reserved, heard = await placed_by(ticket)
    assert events[0] == Placed("batch, at most 3 tokens")
    seen = reserved[0].request
    assert (seen.sampling.max_tokens, seen.sampling.min_tokens, seen.slo_class) == (3, 3, "batch")
    ended = next(message for message in heard if isinstance(message, Outcome))
    assert (ended.slo_class, ended.asked_class, ended.degraded) == ("batch", "standard", "batch, at most 3 tokens")


async def test_placed_is_told_where_somebody_waits_for_it() -> None:
    plain = Ticket("r", 1, DECODE, None)
    assert not any(isinstance(event, Placed) for event in (await placed_by(plain))[0])
    assert (await placed_by(plain, tells_placed=True))[0][0] == Placed()


async def test_another_model_only_where_it_reads_the_same_tokens() -> None:
    """Else the scheduler is told beforehand, and a ticket that does it all the same is an error and no wrong answer."""

    def same(asked: Request, model: str) -> Request | None:
        return msgspec.structs.replace(asked, model=model, eos_token_ids=(7,))

    ticket = Ticket("r", 1, DECODE, None, degraded="model n", model="n")
    events, reserved, heard = await placed_by(ticket, same)
    assert events[0] == Placed("model n", "n")
    assert (reserved[0].request.model, reserved[0].request.eos_token_ids) == ("n", (7,))
    assert not heard[0].keeps_model
    events, reserved, heard = await placed_by(ticket)
    assert heard[0].keeps_model
    assert reserved == []
    assert events[-1].failure.kind == "InternalError"


def test_a_view_without_a_file_never_asks() -> None:
    async def ask(message: Any) -> Any:
        raise AssertionError("there is nothing to ask for")

    view = TenantsView(without_file(1, 1, 0.9))
    asyncio.run(view.refresh("", ask))
    assert view.in_force() == InForce(without_file(1, 1, 0.9))
    assert view.in_force().tenants.tenant("x") == view.in_force().tenants.tenants[DEFAULT_TENANT]
