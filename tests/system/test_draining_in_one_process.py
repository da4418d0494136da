"""Workers that are to go: nothing new comes to them, nobody waits because of them, and what they run ends or goes on elsewhere."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from cluster.local import LocalCluster
from protocol.events import Finished
from tests.system.local import cluster, events_of, oracle, request, tokens_of


def agent_of(made: LocalCluster, role: str, index: int = 0) -> Any:
    return [agent for agent in made._agents if agent.info.role == role][index]


def counters(made: LocalCluster) -> dict[str, int]:
    return dict(made.service.scheduler.records.counters)


@pytest.mark.parametrize("num_prefill", [1, 3])
async def test_a_prefill_pool_that_drains_costs_a_request_no_time(num_prefill):
    """The scheduler does not know yet: each refusal leads to another placement at once, in the end by the decode worker alone.
    Twelve attempts at the same worker with growing pauses once made that 1.6 s, and then an error."""
    async with cluster(prefill__replicas=num_prefill, scheduler__heartbeat_s=30.0) as made:
        await events_of(made, request(range(40)))
        for index in range(num_prefill):
            agent_of(made, "prefill", index).worker.is_draining = True
        started = time.monotonic()
        events = await events_of(made, request(range(100, 140)))
        took = time.monotonic() - started
        assert tokens_of(events) == oracle(range(100, 140), 8)
        assert events[-1].timing.ttft_s < 0.25, (took, events[-1].timing)
        assert counters(made).get("failed", 0) == 0
        assert counters(made).get("reservations_refused", 0) == 0, "decode had room"


async def test_once_told_the_scheduler_places_nothing_on_a_draining_worker():
    async with cluster(decode__replicas=2, prefill__replicas=2, scheduler__heartbeat_s=30.0) as made:
        going = [agent_of(made, "decode", 1), agent_of(made, "prefill", 0)]
        for agent in going:
            agent.worker.is_draining = True
            agent.beat_now()
        await asyncio.sleep(0.05)
        refused: list[str] = []
        for agent in going:
            handle = agent.worker.handle

            async def watched(peer: Any, message: Any, handle: Any = handle) -> Any:
                refused.append(type(message).__name__)
                return await handle(peer, message)

            agent.worker._network.handler = watched
        results = await asyncio.gather(*(events_of(made, request(range(i, i + 40))) for i in range(8)))
        for i, events in enumerate(results):
            assert tokens_of(events) == oracle(range(i, i + 40), 8)
        assert not {"Reserve", "Prefill"} & set(refused)
        assert counters(made)["placed"] == 8, "each placed once"


@pytest.mark.parametrize("tp", [1, 2])
async def test_a_decode_worker_that_drains_ends_what_it_can_and_hands_over_the_rest(tp):
    async with cluster(decode__replicas=2, decode__tp=tp, prefill__replicas=1, scheduler__heartbeat_s=0.1) as made:
        short = [asyncio.create_task(events_of(made, request([i] * 30, max_tokens=6))) for i in range(3)]
        long = [asyncio.create_task(events_of(made, request([100 + i] * 30, max_tokens=300))) for i in range(3)]
        decoding = lambda: [agent for agent in made._agents if agent.info.role == "decode" and len(agent.worker.in_flight()) >= 3]  # noqa: E731
        async with asyncio.timeout(10):
            while not decoding():
                await asyncio.sleep(0.005)
        going = decoding()[0]
        going.worker.is_draining = True
        going.beat_now()
        await going.worker.drain(0.05)
        assert going.worker.is_idle
        assert going.worker.pool.num_used == 0
        for i, task in enumerate(short):
            assert tokens_of(await task) == oracle([i] * 30, 6)
        moved = 0
        for i, task in enumerate(long):
            events = await task
            assert tokens_of(events) == oracle([100 + i] * 30, 300)
            moved += events[-1].usage.num_resumptions
        assert moved > 0
        assert counters(made).get("failed", 0) == 0


async def test_a_prefill_worker_that_drains_lives_until_its_kv_is_taken():
    async with cluster(prefill__replicas=1, prefill__max_num_batched_tokens=16, scheduler__heartbeat_s=0.1) as made:
        tasks = [asyncio.create_task(events_of(made, request([i] * 120, max_tokens=8))) for i in range(4)]
        going = agent_of(made, "prefill")
        async with asyncio.timeout(10):
            while len(going.worker.in_flight()) < 4:
                await asyncio.sleep(0.002)
        going.beat_now()
        await going.worker.drain(20.0)
        assert going.worker.is_idle
        assert going.worker.stats().transfers == 4
        for i, task in enumerate(tasks):
            events = await task
            assert isinstance(events[-1], Finished)
            assert events[-1].usage.num_resumptions == 0
            assert tokens_of(events) == oracle([i] * 120, 8)
