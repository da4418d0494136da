"""Groups of rank processes: one rank's death is the group's, nothing is left of it, it returns as one, and no token is lost.

Real processes and sockets, without Ray; test_groups_served.py has a few of these under Serve. Figures are printed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import psutil
import pytest

from protocol.events import Event, Finished
from tests.system.local import oracle, request, tokens_of
from tests.system.processes import ProcessCluster, is_there, processes

pytestmark = [pytest.mark.timeout(240)]
LONG = 700  # tokens: seconds of decoding


class Stream:
    """One request under way. stall_s: the longest that its client saw nothing."""

    def __init__(self, made: ProcessCluster, prompt: list[int], num_tokens: int) -> None:
        self.prompt = prompt
        self.stall_s = 0.0
        self.num_resumptions = 0
        self.task = asyncio.create_task(self._read(made, num_tokens))

    async def _read(self, made: ProcessCluster, num_tokens: int) -> list[int]:
        events: list[Event] = []
        last = time.monotonic()
        async for event in made.gateway.generate(request(self.prompt, max_tokens=num_tokens)):
            if events:
                self.stall_s = max(self.stall_s, time.monotonic() - last)
            last = time.monotonic()
            events.append(event)
        assert isinstance(events[-1], Finished), events[-1]
        self.num_resumptions = events[-1].usage.num_resumptions
        tokens = tokens_of(events)
        assert tokens == oracle(self.prompt, num_tokens)
        return tokens


async def ask(made: ProcessCluster, prompt: list[int], num_tokens: int) -> list[int]:
    return await Stream(made, prompt, num_tokens).task


async def streams(made: ProcessCluster, count: int) -> list[Stream]:
    """So many streams that are well under way."""
    running = [Stream(made, [(11 * i + j) % 512 for j in range(30)], LONG) for i in range(count)]
    await made.until(lambda: made.status()["in_flight"]["decoding"] == count, 20, "all streams decode")
    await asyncio.sleep(0.2)
    assert not any(stream.task.done() for stream in running), "they are over before anything happens"
    return running


def busiest(made: ProcessCluster) -> dict[str, Any]:
    return max(made.alive().values(), key=lambda row: row["ledger"]["decoding"])


async def death_of_one(made: ProcessCluster, rank: int, number: signal.Signals) -> None:
    """Signal one rank of the worker that has the load; everything that must follow, with its times."""
    running = await streams(made, 4)
    before = busiest(made)
    name, pids = before["name"], before["rank_pids"]
    struck = time.monotonic()
    os.kill(pids[rank], number)
    gone = await made.until(lambda: not any(is_there(pid) for pid in pids), 4, "every process of the group is gone")
    await made.until(lambda: name not in made.alive(), 1, "the scheduler knows")
    told = time.monotonic() - struck
    await asyncio.gather(*(stream.task for stream in running))
    assert sum(stream.num_resumptions for stream in running) > 0
    await made.until(lambda: name in made.alive(), 60, "the group is back")
    back = time.monotonic() - struck
    after = made.alive()[name]
    assert after["incarnation"] != before["incarnation"]
    assert len(after["rank_pids"]) == len(pids)
    assert not set(after["rank_pids"]) & set(pids)
    assert await ask(made, [7] * 20, 8) == oracle([7] * 20, 8)
    print(
        f"\n{number.name} of rank {rank} of {name}: all {len(pids)} processes gone after {gone:.2f} s, scheduler knew by "
        f"{told:.2f} s, longest stall of a stream {max(stream.stall_s for stream in running):.2f} s, group serves again after "
        f"{back:.2f} s"
    )


async def test_a_killed_rank_takes_its_group_along_and_no_stream_loses_a_token():
    async with processes(prefill__replicas=0, decode__replicas=2, decode__tp=2) as made:
        assert sorted(len(row["rank_pids"]) for row in made.alive().values()) == [2, 2]
        titles = [" ".join(psutil.Process(row["rank_pids"][1]).cmdline()) for row in made.alive().values()]
        assert sorted(title.split()[-1] for title in titles) == ["tandem:decode:0/1", "tandem:decode:1/1"]
        await death_of_one(made, 1, signal.SIGKILL)


@pytest.mark.more
async def test_any_rank_that_dies_or_stops_takes_its_group_along():
    async with processes(prefill__replicas=0, decode__replicas=2, decode__tp=2) as made:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for rank in (0, 1):
                await death_of_one(made, rank, number)


@pytest.mark.more
async def test_prefill_and_decode_groups_of_unequal_sizes_and_a_prefill_rank_that_dies():
    async with processes(prefill__replicas=1, prefill__tp=2, decode__replicas=1, decode__pp=2) as made:
        prompts = [[(13 * i + j) % 512 for j in range(120)] for i in range(4)]
        answers = await asyncio.gather(*(ask(made, prompt, 12) for prompt in prompts))
        assert answers == [oracle(prompt, 12) for prompt in prompts]
        pids = made.alive()["prefill:0"]["rank_pids"]
        asking = [asyncio.create_task(ask(made, [*prompt, 1], 12)) for prompt in prompts * 3]
        os.kill(pids[1], signal.SIGKILL)
        for prompt, task in zip(prompts * 3, asking, strict=True):
            assert await task == oracle([*prompt, 1], 12)
        await made.until(lambda: not any(is_there(pid) for pid in pids), 4, "the prefill group is gone")
        took = await made.until(lambda: "prefill:0" in made.alive(), 60, "the prefill group is back")
        print(f"\nprefill group of 2 x 1 killed: back after {took:.1f} s")
        transfers = made.status()["totals"]["decode"]["transfers"]
        assert await ask(made, [3] * 100, 8) == oracle([3] * 100, 8)
        await made.until(lambda: made.status()["totals"]["decode"]["transfers"] > transfers, 5, "KV travels again")


@pytest.mark.more
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_group_that_is_asked_to_go_drains_as_one(rank):
    """SIGTERM to whichever process: nothing new comes, what runs ends or goes on elsewhere, all processes end, with status 0."""
    async with processes(prefill__replicas=0, decode__replicas=2, decode__tp=2, scheduler__drain_s=1.0) as made:
        running = await streams(made, 4)
        before = busiest(made)
        name, pids = before["name"], before["rank_pids"]
        os.kill(pids[rank], signal.SIGTERM)
        told = await made.until(lambda: made.alive().get(name, {}).get("state") != "ready", 2, "the scheduler knows")
        gone = await made.until(lambda: not any(is_there(pid) for pid in pids), 6, "all of it is gone")
        await asyncio.gather(*(stream.task for stream in running))
        assert [(name, status) for name, status, _ in made.ended] == [(name, 0)]
        print(f"\nSIGTERM to rank {rank}: the scheduler knew after {told:.2f} s, gone after {gone:.2f} s (drain_s 1.0)")
