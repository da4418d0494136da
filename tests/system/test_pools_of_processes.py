"""Workers whose machine is taken away, and workers that change their role: real processes, streams that must not notice."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from protocol.errors import NotFound
from protocol.events import Event, Failed, Finished
from protocol.messages import Notice, Noticed
from tests.system.local import oracle, request, tokens_of
from tests.system.processes import ProcessCluster, processes

pytestmark = pytest.mark.timeout(180)
_numbers = itertools.count()


async def stream(made: ProcessCluster, prompt: list[int], **sampling: Any) -> list[Event]:
    events = [event async for event in made.gateway.generate(request(prompt, **sampling))]
    assert [event for event in events if isinstance(event, (Finished, Failed))] == events[-1:]
    assert tokens_of(events) == oracle(prompt, sampling["max_tokens"]), events[-1]
    return events


def prompt_of(length: int) -> list[int]:
    """Never the same twice, so that nothing of it is cached."""
    return [7 + next(_numbers) % 200, *((i * 31 + next(_numbers)) % 250 for i in range(length - 1))]


@pytest.mark.parametrize(("seconds", "max_tokens", "is_handed_over"), [(30.0, 400, False), (1.2, 800, True)])
async def test_a_notice_loses_nothing(seconds: float, max_tokens: int, is_handed_over: bool) -> None:
    """With thirty seconds what runs ends where it is; with one it goes on elsewhere. Either way the process is gone in time, and
    nothing new comes to it meanwhile."""
    async with processes(decode__replicas=2, prefill__replicas=1, decode__max_num_seqs=16) as made:
        tasks = [asyncio.create_task(stream(made, prompt_of(60), max_tokens=max_tokens)) for _ in range(24)]
        await made.until(lambda: all(w["ledger"]["decoding"] for n, w in made.alive().items() if "decode" in n), 30, "both decode")
        name, going = "decode:1", made.alive()["decode:1"]["incarnation"]
        pid = made.workers[name].pid
        answer = await made.gateway.ask(Notice(name, seconds))
        assert answer == Noticed((name,))
        told_at = time.monotonic()
        await made.until(lambda: made.alive().get(name, {"state": "draining"})["state"] == "draining", 2, "draining")
        later = [asyncio.create_task(stream(made, prompt_of(20), max_tokens=5)) for _ in range(4)]
        ends = await asyncio.gather(*tasks, *later)
        await made.until(lambda: any(end[0] == name for end in made.ended), seconds, "the worker's end")
        (end,) = [end for end in made.ended if end[0] == name]
        assert end[1] == 0, "it ended by itself, and well"
        assert end[2] - told_at < seconds
        resumed = sum(events[-1].usage.num_resumptions for events in ends if isinstance(events[-1], Finished))
        assert (resumed > 0) is is_handed_over
        assert made.status()["counters"].get("failed", 0) == 0
        await made.until(lambda: made.alive().get(name, {}).get("incarnation", going) != going, 60, "its successor")
        assert made.workers[name].pid != pid


async def test_a_notice_to_nobody_names_who_is_there() -> None:
    async with processes(decode__replicas=1, prefill__replicas=0) as made:
        with pytest.raises(NotFound, match="decode:9.*alive: decode:0"):
            await made.gateway.ask(Notice("decode:9", 30.0))
        host = made.alive()["decode:0"]["host"]
        assert await made.gateway.ask(Notice(host, 5.0)) == Noticed(("decode:0",))


async def test_a_change_of_the_load_switches_one_worker_and_back() -> None:
    """Many long answers: one of two prefill workers decodes. Many long prompts: it prefills again. Every token is compared."""
    keys: dict[str, Any] = {
        "scheduler__switch_roles": True,
        "scheduler__switch_cooldown_s": 3.0,
        "scheduler__scale_up_s": 1.0,
        "scheduler__ttft_target_s": 0.02,
        "scheduler__heartbeat_s": 0.25,
        "decode__max_num_seqs": 4,
        "model__num_blocks_override": 4096,
    }
    async with processes(decode__replicas=1, prefill__replicas=2, **keys) as made:
        roles = lambda: sorted(w["role"] for w in made.alive().values())  # noqa: E731
        pids = {w["pid"] for w in made.alive().values()}
        assert roles() == ["decode", "prefill", "prefill"]
        until_switched = asyncio.Event()

        async def client(prompt_len: int, num_tokens: int) -> int:
            count = 0
            while not until_switched.is_set():
                await stream(made, prompt_of(prompt_len), max_tokens=num_tokens)
                count += 1
            return count

        async def load(num_clients: int, prompt_len: int, num_tokens: int, wanted: list[str]) -> int:
            until_switched.clear()
            clients = [asyncio.create_task(client(prompt_len, num_tokens)) for _ in range(num_clients)]
            await made.until(lambda: roles() == wanted or any(c.done() for c in clients), 60, f"{wanted}, it is {roles()}")
            await asyncio.sleep(1.0)
            until_switched.set()
            return sum(await asyncio.gather(*clients))

        assert await load(12, 20, 300, ["decode", "decode", "prefill"]) > 0
        name = next(n for n, w in made.alive().items() if n.startswith("decode:1"))
        assert name in ("decode:1000", "decode:1001")
        assert await load(24, 900, 2, ["decode", "prefill", "prefill"]) > 0
        assert {w["pid"] for w in made.alive().values()} == pids, "the same processes, with the model still loaded"
        assert not made.ended
        events = made.service.history.snapshot(60, False, time.monotonic())["events"]
        assert [event["kind"] for event in events].count("role_switch") == 2
        assert made.status()["counters"].get("failed", 0) == 0
