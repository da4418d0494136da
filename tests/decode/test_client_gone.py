"""A client that goes away at any stage: every block is back within a second, while the writer lives."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvtransfer.memory import MemoryLane
from kvtransfer.shm import ShmLane
from kvtransfer.tcp_lane import TcpLane
from protocol.events import Tokens
from tests.system.local import cluster, events_of, request

PROMPT = [i % 500 for i in range(203)]
LANES = {"memory": MemoryLane, "shm": ShmLane, "tcp": TcpLane}
STAGES = ["reserved", "prefilling", "transferring", "verifying", "decoding"]


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def hold(monkeypatch, made, transport, stage):
    """Make the stage last. -> a condition: it has been reached."""
    decode, prefill = made.workers
    reached = []
    if stage == "reserved":

        async def never(*args):
            reached.append(stage)
            await asyncio.Event().wait()

        monkeypatch.setattr(prefill, "_accept", never)
    elif stage == "transferring":
        lane = LANES[transport]
        store = lane.store

        def slow(self, transfer, layer, pieces):
            reached.append(stage)
            time.sleep(0.05)
            store(self, transfer, layer, pieces)

        monkeypatch.setattr(lane, "store", slow)
    elif stage == "verifying":
        receivers = decode.handover._receivers
        verify = receivers.verify

        async def slow(grant, manifest):
            reached.append(stage)
            await asyncio.sleep(0.3)
            return await verify(grant, manifest)

        monkeypatch.setattr(receivers, "verify", slow)
    elif stage == "prefilling":
        return lambda: prefill.in_flight() and prefill.pool.num_used and prefill._active
    return lambda: bool(reached)


@pytest.mark.parametrize("has_met", [False, True], ids=["first meeting", "known pair"])
@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
@pytest.mark.parametrize("stage", STAGES)
async def test_blocks_are_back_within_a_second(monkeypatch, stage, transport, has_met):
    async with cluster((transport,), prefill__max_num_batched_tokens=16) as made:
        decode, prefill = made.workers
        if has_met:
            await events_of(made, request(range(300, 320), max_tokens=2))
        is_reached = hold(monkeypatch, made, transport, stage)
        events = made.gateway.generate(request(PROMPT, max_tokens=250))
        first = asyncio.Event()

        async def read():
            async for event in events:
                if isinstance(event, Tokens) and event.index > 2:
                    first.set()

        task = asyncio.create_task(read())
        await until(first.is_set if stage == "decoding" else is_reached)
        assert decode.pool.num_used > 0, "too late to be a test"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await events.aclose()
        started = time.monotonic()
        await until(lambda: decode.pool.num_used == 0 and prefill.pool.num_used == 0, 5.0)
        assert time.monotonic() - started < 1.0
        assert decode.pool.num_quarantined == 0
        assert not decode.in_flight()
        await until(lambda: decode.is_idle and prefill.is_idle, 5.0)
