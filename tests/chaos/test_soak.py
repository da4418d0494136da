"""Leaks show by count, not by hours: a hundred thousand hand-overs, a tenth of them left halfway; everything is as at the start.

Memory: what is remembered of requests that are over (their last epoch, that they were cancelled) is bounded by number or by time.
At the scheduler that is 65,536 requests, some 28 MB, and Python doubles such a table once more before it is level, which looks like
growth until about the 90,000th request. So these bounds are made small here: all tables are full after the first tenth of the run,
and what grows then is a leak.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
from pathlib import Path

import psutil
import pytest

import cluster.scheduler_service
import decode.worker
import prefill.links
import prefill.worker
import scheduler.scheduler
from kvtransfer.handoff import Inbound
from kvtransfer.outbound import Outbound
from tests.chaos.fleet import Fleet, make_config
from tests.system.local import cluster as local_cluster
from tests.system.local import request

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

NUM_REQUESTS = int(os.environ.get("TANDEM_SOAK_REQUESTS", "100000"))
NUM_SAMPLES = 20
MAX_BYTES_PER_REQUEST = 40  # of growth, over the second half: 2 MB in 50,000 requests
BOUNDS = {
    scheduler.scheduler: {"MAX_REMEMBERED": 1000},
    cluster.scheduler_service: {"MAX_GONE": 200},
    prefill.worker: {"MAX_CANCELS": 100},
    prefill.links: {"MAX_OWED_GRANTS": 100},
    decode.worker: {"MAX_CANCELLED": 100},
}


def memory_nbytes() -> int:
    """RssAnon and VmSwap: what was swapped out has not gone away."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def slope(values: list[int]) -> float:
    """Per step, by least squares."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(len(values)))


async def test_memory_and_blocks_stay_flat(monkeypatch):
    for machine in (Inbound, Outbound):  # ids of ended grants are remembered for ten minutes
        monkeypatch.setattr(machine.__init__, "__kwdefaults__", {"memory_s": 1.0})
    for module, bounds in BOUNDS.items():
        for name, bound in bounds.items():
            monkeypatch.setattr(module, name, bound)
    rng = random.Random(9)
    process = psutil.Process()
    async with local_cluster(("shm",), decode__replicas=2, scheduler__tpot_target_s=60) as made:

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

        async def many(num_requests: int) -> dict[str, int]:
            for _ in range(num_requests // 16):
                await asyncio.gather(*(one() for _ in range(16)))
            await made.settle(30)
            gc.collect()
            return {
                "fds": process.num_fds(),
                "threads": process.num_threads(),
                "segments": sum("memfd:tandem-kv" in m.path for m in process.memory_maps(grouped=False)),
                "free": sum(worker.pool.num_free for worker in made.workers),
                "tasks": len(asyncio.all_tasks()),
            }

        before = await many(512)
        sizes = []
        for _ in range(NUM_SAMPLES):
            after = await many(NUM_REQUESTS // NUM_SAMPLES)
            sizes.append(memory_nbytes())
        transfers = sum(worker.stats().transfers for worker in made.workers) // 2  # each is counted at both ends
    growth = slope(sizes[NUM_SAMPLES // 2 :]) / (NUM_REQUESTS / NUM_SAMPLES)
    print(f"{NUM_REQUESTS} requests, {transfers} hand-overs; {growth:.1f} bytes of growth per request in the second half")
    print(f"{before} before, {after} after; MB of memory: {[round(size / 1e6, 1) for size in sizes]}")
    assert after == before
    assert transfers >= 0.8 * NUM_REQUESTS
    assert growth <= MAX_BYTES_PER_REQUEST


async def test_processes_keep_their_descriptors_threads_and_segments(tmp_path):
    """Through sockets, shm and tcp, in processes of their own: a fifth as many, as each costs more here."""
    wanted = NUM_REQUESTS // 5
    specs = {"prefill:0": {"transports": ["shm"]}, "prefill:1": {"transports": ["tcp"]}, "decode": {"transports": ["shm", "tcp"]}}
    shape = {"prompt_len": [20, 60], "max_tokens": [1, 4], "leave_rate": 0.1, "choices_rate": 0.0}
    async with Fleet(tmp_path, make_config(decode__max_num_seqs=24), {"gateway": 1, "prefill": 2, "decode": 2}, specs) as fleet:

        async def many(num_requests: int) -> dict[str, dict[str, int]]:
            gateway = fleet["gateway:0"]
            done = (await gateway.call("report")).get("streams", 0)
            await gateway.call("start", num_streams=32, seed=str(done), **shape)
            while (await gateway.call("report")).get("streams", 0) < done + num_requests:
                await asyncio.sleep(0.5)
            await gateway.call("drain", seconds=60.0)
            await fleet.settle(30)
            return {name: await fleet[name].call("process") for name in fleet.slots}

        before = await many(500)
        after = await many(wanted)
        report = await fleet["gateway:0"].call("report")
        checks = await fleet.settle()
    for name, numbers in before.items():
        print(f"{name}: {numbers} before, {after[name]} after")
        for what in ("fds", "threads", "segments", "tasks"):
            assert after[name][what] == numbers[what], f"{name}: {what} {numbers[what]} -> {after[name][what]}"
    transfers = sum(checks[name]["transfers"] for name in ("decode:0", "decode:1"))
    print(f"{report['streams']} streams, {transfers} hand-overs, {report.get('cancelled', 0)} left early")
    assert report.get("wrong", 0) == report.get("lost", 0) == report.get("failed", 0) == 0, report["named"]
    assert not fleet.survivors()
