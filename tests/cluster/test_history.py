"""The history at the scheduler service: what becomes of every request, which events there are, and what it all costs in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from cluster.history import MAX_EVENTS, MAX_REQUESTS, History
from cluster.loopback import Hub
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from configs.schema import SchedulerConfig
from protocol.errors import NotFound, Overloaded, TandemError
from protocol.kv import KVLayout
from protocol.messages import Admit, AskHistory, Outcome, PairStats, Progress, Status, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from protocol.timeline import Mark, Trace
from scheduler.scheduler import Scheduler
from scheduler.series import NAMES
from tests.system.local import cluster, events_of, request


def info(name: str) -> WorkerInfo:
    role, index = name.split(":")
    return WorkerInfo(
        incarnation=f"{role}-{index}-abc",
        role=role,
        name=name,
        address=f"{name}:1",
        model="m",
        layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
        num_blocks=100,
        max_model_len=4096,
        max_num_seqs=4,
        pid=1,
        host="h",
        device="cpu",
    )


def admit(request_id: str, **values: Any) -> Admit:
    given = {"model": "m", "tenant": "default", "slo_class": "standard", "priority": 0, "prompt_len": 64, "max_tokens": 10}
    return Admit(request_id=request_id, **{**given, **values})


def outcome(request_id: str, **values: Any) -> Outcome:
    given = {
        "epoch": 1, "kind": "finished", "tenant": "default", "slo_class": "standard", "prompt_tokens": 64, "cached_tokens": 16,
        "output_tokens": 5, "queue_s": 0.1, "ttft_s": 0.5, "tpot_s": 0.05, "e2e_s": 1.0,
        "trace": Trace(client_id=f"mine-{request_id}", marks=(Mark(0.0, "received"), Mark(1.0, "end"))),
    }  # fmt: skip
    return Outcome(request_id=request_id, **{**given, **values})


class Staged:
    """A service without a network, driven by hand."""

    def __init__(self, *workers: str, **config: Any) -> None:
        self.now = 10.0
        self.wall = 1e9
        scheduler = Scheduler(SchedulerConfig(**config), draw=lambda: 0.5)
        self.service = SchedulerService(scheduler, Hub().network("scheduler"), lambda: self.now, ClusterMetrics("m"))
        self.history = self.service.history = History(scheduler, lambda: self.wall)
        for name in workers:
            self.register(name)

    def register(self, name: str) -> None:
        self.service._register(object(), info(name), self.now)  # type: ignore[arg-type]

    def beat(self, name: str, **stats: Any) -> None:
        beat = WorkerBeat(info(name).incarnation, stats.pop("state", "ready"), WorkerStats(**stats))
        self.service._worker_beat(object(), beat, self.now)  # type: ignore[arg-type]

    async def admit(self, request_id: str, **values: Any) -> Ticket:
        async with asyncio.timeout(5):
            return await self.service._admit(admit(request_id, **values))

    def end(self, request_id: str, **values: Any) -> None:
        self.service._outcome(object(), outcome(request_id, **values), self.now)  # type: ignore[arg-type]

    def row(self, request_id: str) -> dict[str, Any]:
        return self.history.request(request_id)["request"]

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in self.history.snapshot(300, False, self.now)["events"] if not kind or e["kind"] == kind]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds
        self.history.tick(self.now)


@pytest.fixture
def staged() -> Staged:
    return Staged("prefill:0", "decode:0")


# ---- requests --------------------------------------------------------------------------------------------------------


async def test_the_life_of_a_request(staged: Staged) -> None:
    await staged.admit("r", client_id="mine-r")
    row = staged.row("r")
    assert (row["state"], row["client_id"], row["prompt_tokens"], row["ttft_ms"]) == ("prefill", "mine-r", 64, None)
    assert (row["prefill_worker"], row["decode_worker"]) == ("prefill:0", "decode:0")
    staged.pass_time(0.5)
    staged.service._progress(object(), Progress("r", 1, 0.4), staged.now)  # type: ignore[arg-type]
    assert staged.row("r")["state"] == "decode"
    running = staged.history.request("r")["timeline"]
    assert [mark["name"] for mark in running] == ["received", "admitted", "first_token"]
    staged.end("r")
    row = staged.row("mine-r")
    assert (row["state"], row["ttft_ms"], row["tpot_ms"], row["cached_tokens"]) == ("finished", 500.0, 50.0, 16)
    found = staged.history.request("mine-r")
    assert [mark["name"] for mark in found["timeline"]] == ["received", "end"], "the gateway's marks are the better ones"
    why = found["why"]
    assert why["predicted_ttft_ms"] > 0
    assert {c["worker"] for c in why["candidates"] if c["chosen"]} == {"prefill:0", "decode:0"}
    msgspec.json.encode(found)


async def test_refusals_name_their_reason_once(staged: Staged) -> None:
    staged = Staged(max_queue_requests=1)  # nobody serves, so the first one waits
    waiting = asyncio.create_task(staged.admit("waits"))
    await asyncio.sleep(0)
    for i in range(5):
        with pytest.raises(Overloaded):
            await staged.admit(f"r{i}")
        staged.end(f"r{i}", kind="failed", epoch=0, failure_kind="Overloaded", output_tokens=0)
    waiting.cancel()
    row = staged.row("r0")
    assert row["state"] == "refused"
    assert "queue is full" in row["failure"]
    assert [(e["count"], e["kind"]) for e in staged.events("refused")] == [(5, "refused")], "repeated ones are merged"
    found = staged.history.sla.rows(300, staged.now)[0]
    assert found["refused"] == {"queue_requests": 5}
    assert found["failed"] == 0


async def test_a_resumption_is_an_event_and_not_another_request(staged: Staged) -> None:
    await staged.admit("r")
    staged.service._progress(object(), Progress("r", 1, 0.4), staged.now)  # type: ignore[arg-type]
    staged.pass_time(6)
    await staged.admit("r", resumption=True, last_epoch=1)
    await staged.admit("r", resumption=True, last_epoch=1)  # asked again, because the answer was lost
    assert staged.row("r")["resumptions"] == 1
    assert staged.events("resumed")[0]["count"] == 1
    event = staged.events("resumed")[0]
    assert (event["worker"], event["request_id"]) == ("decode:0", "r")
    staged.end("r", epoch=2, kind="failed")
    assert staged.row("r")["state"] == "failed"
    assert len(staged.history.requests("", "", 10)) == 1


async def test_one_that_ran_and_cannot_go_on_has_failed_and_was_not_refused(staged: Staged) -> None:
    await staged.admit("r")
    with pytest.raises(TandemError):
        await staged.admit("r", resumption=True, last_epoch=1, prompt_len=10_000)
    staged.end("r", epoch=1, kind="failed", failure_kind="PromptTooLong")
    assert staged.row("r")["state"] == "failed"
    found = staged.history.sla.rows(300, staged.now)[0]
    assert (found["failed"], found["refused"]) == (1, {})


async def test_the_list_is_newest_first_and_filtered(staged: Staged) -> None:
    for i in range(5):
        await staged.admit(f"r{i}", tenant="a" if i % 2 else "b")
        staged.end(f"r{i}", tenant="a" if i % 2 else "b", kind="finished" if i < 3 else "cancelled")
    listed = [row["id"] for row in staged.history.requests("", "", 3)]
    assert listed == ["r4", "r3", "r2"]
    assert [row["id"] for row in staged.history.requests("a", "finished", 100)] == ["r1"]
    with pytest.raises(NotFound):
        staged.history.request("nobody")


def test_memory_is_bounded(staged: Staged) -> None:
    for i in range(3 * MAX_REQUESTS):
        staged.history.admitted(admit(f"r{i}", client_id=f"c{i}"), staged.now)
        for j in range(3):
            staged.history.event("refused", "x" * 50, key=f"{i}{j}")
    assert len(staged.history._rows) == MAX_REQUESTS
    assert len(staged.history._by_client) == MAX_REQUESTS
    assert len(staged.events()) == MAX_EVENTS
    assert len(msgspec.json.encode(staged.history.snapshot(300, True, staged.now))) < 1_000_000


# ---- events and pools ------------------------------------------------------------------------------------------------


async def test_workers_come_drain_and_go(staged: Staged) -> None:
    assert [e["text"] for e in staged.events("worker_up")] == ["prefill:0 is serving", "decode:0 is serving"]
    await staged.admit("r")
    staged.beat("decode:0", state="draining")
    staged.pass_time(1)
    assert [e["worker"] for e in staged.events("worker_draining")] == ["decode:0"]
    staged.service.scheduler.worker_lost("decode-0-abc", staged.now)
    staged.pass_time(1)
    assert [e["text"] for e in staged.events("worker_lost")] == ["decode:0 is gone; 1 requests that it held go on elsewhere"]
    states = {w["name"]: w["state"] for w in staged.history.snapshot(300, False, staged.now)["pools"]["workers"]}
    assert states == {"prefill:0": "ready", "decode:0": "lost"}


def test_a_wrong_digest_is_an_event(staged: Staged) -> None:
    staged.beat("decode:0", digest_failures=0)
    assert staged.events("digest_failure") == []
    staged.beat("decode:0", digest_failures=2)
    assert [(e["worker"], e["count"]) for e in staged.events("digest_failure")] == [("decode:0", 2)]


def test_a_successor_says_that_it_begins_anew() -> None:
    staged = Staged()
    for _ in range(3):
        with pytest.raises(NotFound):
            staged.beat("decode:0")
    staged.register("decode:0")
    staged.register("decode:1")
    assert [(e["kind"], e["text"].split(" ", 1)[1]) for e in staged.events()] == [
        ("scheduler_restarted", "scheduler was restarted; its history and its curves begin here"),
        ("worker_up", "registered again"),
        ("worker_up", "is serving"),
    ]
    fresh = Staged("decode:0")
    fresh.service.scheduler.worker_lost("decode-0-abc", fresh.now)
    with pytest.raises(NotFound):
        fresh.beat("decode:0")
    assert fresh.events("scheduler_restarted") == [], "it was only lost"


def test_pools_show_rates_and_links(staged: Staged) -> None:
    for i in range(4):
        sent = PairStats(peer="decode-0-abc", transport="shm", transfers=10 * i, failed=1, nbytes=1_000_000 * i)
        left = PairStats(peer="decode-0-gone", transport="shm", transfers=3, nbytes=77)
        staged.beat("prefill:0", prompt_tokens=100 * i, num_steps=10 * i, pairs=(left, sent), rss_bytes=7)
        staged.beat("decode:0", generation_tokens=50 * i, num_steps=5 * i, num_used_blocks=20, num_running=2)
        staged.pass_time(1)
    pools = staged.history.snapshot(300, False, staged.now)["pools"]
    prefill, decode = pools["workers"]
    assert (prefill["tokens_per_s"], prefill["steps_per_s"], decode["tokens_per_s"]) == (100.0, 10.0, 50.0)
    assert (decode["blocks_used"], decode["blocks_total"], decode["running"], decode["parallel"]) == (20, 100, 2, "1 x 1")
    assert pools["links"] == [
        {"from": "prefill:0", "to": "decode:0", "transport": "shm", "bytes_per_s": 1e6, "transfers": 30, "failures": 1}
    ]


def test_curves_are_kept_while_time_passes(staged: Staged) -> None:
    staged.beat("decode:0", num_used_blocks=50)
    for _ in range(12):
        staged.pass_time(1)
    series = staged.history.snapshot(300, True, staged.now)["series"]
    assert len(series["history"]["t"]) == 2
    assert series["point"]["kv_used_share"] == 0.25
    assert set(NAMES) <= set(series["point"])
    assert "history" not in staged.history.snapshot(300, False, staged.now)["series"]


async def test_a_bug_of_the_history_costs_nobody_an_answer(staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("admitted", "placed", "ended", "beat"):
        monkeypatch.setattr(staged.history, name, lambda *_: 1 / 0)
        getattr(staged.history, name).__name__ = name
    ticket = await staged.admit("r")
    assert isinstance(ticket, Ticket)
    staged.end("r")
    staged.beat("decode:0")


# ---- over a real walk ------------------------------------------------------------------------------------------------


@pytest.fixture
async def made() -> AsyncIterator[Any]:
    async with cluster() as running:
        yield running


async def test_what_the_gateway_reports_arrives(made: Any) -> None:
    asked = request(range(40), max_tokens=20)
    await events_of(made, asked)
    await asyncio.sleep(0.05)
    answer = await made.gateway.ask(AskHistory(what="request", request_id=asked.request_id))
    assert isinstance(answer, Status)
    found = msgspec.json.decode(answer.json)
    assert found["request"]["state"] == "finished"
    names = [mark["name"] for mark in found["timeline"]]
    assert names[:4] == ["received", "tokenized", "admitted", "reserved"]
    assert names[-1] == "end"
    with pytest.raises(NotFound):
        await made.gateway.ask(AskHistory(what="request", request_id="nobody"))
    snapshot = msgspec.json.decode((await made.gateway.ask(AskHistory(what="snapshot"))).json)
    assert snapshot["sla"]["rows"][0]["finished"] == 1
    assert {w["name"] for w in snapshot["pools"]["workers"]} == {"prefill:0", "decode:0"}
