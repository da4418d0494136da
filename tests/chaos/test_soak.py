"""Leaks show by count, not by hours: thousands of hand-overs in one process, a tenth of them left halfway; memory stays flat."""

from __future__ import annotations

import asyncio
import os
import random

import psutil
import pytest

from kvtransfer.handoff import Inbound
from kvtransfer.outbound import Outbound
from tests.system.local import cluster, request

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

NUM_REQUESTS = int(os.environ.get("TANDEM_SOAK_REQUESTS", "100000"))


async def test_memory_and_blocks_stay_flat(monkeypatch):
    # Ids of ended grants are remembered for minutes; here for a second, so that their number is level within the test.
    for machine in (Inbound, Outbound):
        monkeypatch.setattr(machine.__init__, "__kwdefaults__", {"memory_s": 1.0})
    rng = random.Random(9)
    process = psutil.Process()
    async with cluster(("shm",), decode__replicas=2, scheduler__tpot_target_s=60) as made:

        async def one() -> None:
            prompt = [rng.randrange(512) for _ in range(rng.randint(1, 60))]
            generation = made.gateway.generate(request(prompt, max_tokens=4))
            leave_after = 1 if rng.random() < 0.1 else 100
            count = 0
            async for _ in generation:
                count += 1
                if count >= leave_after:
                    break
            await generation.aclose()

        sizes = []
        for _ in range(10):
            for _ in range(NUM_REQUESTS // 160):
                await asyncio.gather(*(one() for _ in range(16)))
            await made.settle(30)
            sizes.append(process.memory_info().rss)
    growth = (sizes[-1] - sizes[5]) / (NUM_REQUESTS * 0.4)  # after the bounded tables are full
    print(f"{NUM_REQUESTS} requests, {growth:.0f} bytes of growth per request")
    assert growth < 200
