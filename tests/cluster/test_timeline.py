"""A walk's marks: in order, bounded, dated by what workers measured; and those of real walks in one process."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from cluster.timeline import MAX_MARKS, MAX_TOKEN_MARKS, Timeline
from protocol.errors import WorkerLost
from protocol.events import Finished
from protocol.messages import Outcome, TokenUpdate
from protocol.ticket import Ticket, WorkerRef
from protocol.timeline import GAP_BUCKETS, MARKS, Origin, Spent, phases
from tests.system.local import cluster, events_of, request

DECODE, PREFILL = WorkerRef("decode-0-aa", "decode", "d:1"), WorkerRef("prefill-1-bb", "prefill", "p:1")


def frame(from_prefill: bool, spent: Spent | None) -> TokenUpdate:
    return TokenUpdate("r", 1, 0, 0, (7,), from_prefill=from_prefill, spent=spent)


def at(timeline: Timeline) -> dict[str, float]:
    return {mark.name: mark.at_s for mark in timeline.marks()}


def test_durations_of_workers_date_what_they_did() -> None:
    timeline = Timeline(100.0, 0.5)
    timeline.admitted(Ticket("r", 1, DECODE, PREFILL), 101.0)
    timeline.reserved(0, 101.5)
    timeline.frame(frame(True, Spent(0.25, 2.0)), 104.0)
    timeline.first_token(104.0)
    timeline.frame(frame(False, Spent(0.5, 0.0, 0.125)), 105.0)
    timeline.ended("finished", 110.0)
    assert at(timeline) == {
        "received": 0.0, "tokenized": 0.5, "admitted": 1.0, "reserved": 1.5, "prefill_start": 2.0, "prefill_end": 4.0,
        "first_token": 4.0, "transfer_end": 4.5, "end": 10.0,
    }  # fmt: skip
    workers = {mark.name: mark.worker for mark in timeline.marks()}
    assert (workers["prefill_end"], workers["transfer_end"]) == ("prefill:1", "decode:0")


def test_a_worker_that_exaggerates_dates_nothing_before_what_the_gateway_saw() -> None:
    timeline = Timeline(0.0, 0.0)
    timeline.admitted(Ticket("r", 1, DECODE, PREFILL), 1.0)
    timeline.reserved(0, 1.5)
    timeline.frame(frame(True, Spent(0.0, 1e9)), 4.0)
    timeline.frame(frame(False, Spent(1e9, 0.0, 1e9)), 5.0)
    assert at(timeline)["prefill_start"] == 1.5
    assert at(timeline)["transfer_end"] == 4.0


def test_decodes_frame_may_overtake_prefills() -> None:
    timeline = Timeline(0.0, 0.0)
    timeline.admitted(Ticket("r", 1, DECODE, PREFILL), 1.0)
    timeline.frame(frame(False, Spent(0.25, 0.0, 0.5)), 4.0)
    assert (at(timeline)["prefill_end"], at(timeline)["transfer_end"]) == (3.25, 3.75)


def test_marks_are_bounded_whatever_comes() -> None:
    timeline = Timeline(0.0, 0.0)
    for i in range(1000):
        timeline.resumed("x" * 10_000, float(i))
    for i in range(100_000):
        timeline.tokens(1, float(i), float(i + 1))
    marks = timeline.marks()
    assert len(marks) <= MAX_MARKS + MAX_TOKEN_MARKS
    assert len(msgspec.msgpack.encode(marks)) < 64_000
    counts = [int(mark.detail.split()[0]) for mark in marks if mark.name == "token" and mark.detail]
    assert len(counts) >= MAX_TOKEN_MARKS // 2
    assert len({b - a for a, b in zip(counts, counts[1:], strict=False)}) == 1, "token marks are evenly spaced"
    assert timeline.gaps == {GAP_BUCKETS.index(1.0): 100_000}, "every gap was one second"


def test_switched_off_it_keeps_only_what_metrics_need() -> None:
    timeline = Timeline(0.0, 0.0, is_on=False)
    timeline.admitted(Ticket("r", 1, DECODE, PREFILL), 1.0)
    timeline.frame(frame(True, None), 2.0)
    timeline.tokens(100, 1.0, 2.0)
    assert timeline.marks() == ()
    assert sum(timeline.gaps.values()) == 1


# ---- real walks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["intake", "queue", "reserve", "wait", "prefill", "transfer", "decode"]),
        ({"prefill__replicas": 0}, ["intake", "queue", "reserve", "wait", "prefill", "decode"]),
    ],
    ids=["1 + 1", "decode only"],
)
async def test_every_walk_leaves_a_whole_timeline(keys: dict[str, Any], expected: list[str]) -> None:
    seen: list[Outcome] = []
    async with cluster(**keys) as made:
        made.gateway._observers = (lambda _, outcome: seen.append(outcome),)
        asked = msgspec.structs.replace(request(range(40), max_tokens=40), origin=Origin("mine", "", 0.25))
        events = await events_of(made, asked)
        several = await asyncio.gather(*(events_of(made, request(range(i, i + 30), n=2)) for i in range(3)))
    assert all(isinstance(found[-1], Finished) for found in several)
    for outcome in seen:
        trace = outcome.trace
        assert trace is not None
        assert [bar.name for bar in phases(trace.marks, outcome.kind)] == expected
        times = [mark.at_s for mark in trace.marks]
        assert times == sorted(times)
        assert {mark.name for mark in trace.marks} <= set(MARKS)
        assert abs(times[-1] - outcome.e2e_s) < 0.1
        assert sum(count for _, count in trace.gaps) >= 1
    trace, timing = seen[0].trace, events[-1].timing
    assert trace is not None
    assert trace.client_id == "mine"
    assert trace.decode_worker == "decode:0"
    assert timing.queue_s >= 0.25, "tokenizing is part of what the client waited for"
    assert timing.ttft_s <= timing.e2e_s
    assert trace.marks[1].at_s == 0.25
    assert sum(count for _, count in trace.gaps) <= 39


async def test_a_retry_is_in_it_with_its_reason() -> None:
    seen: list[Outcome] = []
    async with cluster(decode__replicas=2) as made:
        made.gateway._observers = (lambda _, outcome: seen.append(outcome),)
        calls = 0
        reserve = made.gateway._reserve

        async def lost_once(walk, ticket):
            nonlocal calls
            calls += 1
            if calls == 1:
                raise WorkerLost("the test took it away")
            return await reserve(walk, ticket)

        made.gateway._reserve = lost_once
        await events_of(made, request(range(20)))
    trace = seen[0].trace
    assert trace is not None
    resumed = [mark for mark in trace.marks if mark.name == "resumed"]
    assert [mark.detail for mark in resumed] == ["the test took it away"]
    assert [bar.is_lost for bar in phases(trace.marks)][2] is True
