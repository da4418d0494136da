"""Faults of processes at chosen moments, on a fleet of real ones: rows 1 to 21 of the table in docs/reliability.md, as far as they
need no Ray. Every test ends with all streams exact, all blocks back and nothing left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time

import psutil
import pytest

from protocol.events import Failed
from tests.chaos.door import door, exact, fleet_and_door, until
from tests.chaos.fleet import Fleet

pytestmark = [pytest.mark.more, pytest.mark.timeout(120)]


def stopped(fleet: Fleet, name: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(fleet[name].pid).status() == psutil.STATUS_STOPPED
    return False


# ---- killed ------------------------------------------------------------------------------------------------------------

KILLED_PREFILL = {"row 1: second chunk": ("prefill_chunk", 2), "row 2: mid-transfer": ("push", 9), "row 2: all sent": ("finish", 1)}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("moment", KILLED_PREFILL)
async def test_prefill_killed(tmp_path, moment, transport):
    """Whoever it was prefilling is prefilled elsewhere; the client sees a delay. Decode's half-written blocks come back."""
    when, nth = KILLED_PREFILL[moment]
    specs = {"prefill": {"transports": [transport], "hook": {"when": when, "nth": nth, "do": "kill"}}}
    async with fleet_and_door(tmp_path, 2, 2, specs, prefill__max_num_batched_tokens=64) as (fleet, opened):
        first = [fleet["prefill:0"], fleet["prefill:1"]]
        streams = await opened.streams(12, prompt_len=300, max_tokens=20)
        killed = [life for life in first if life.ended.is_set()]
        assert killed, "the hook never came"
        resumed = [s for s in streams if s.terminal[0].usage and s.epochs[0][1] > 1]
        late = max((s.first_token_at - max(life.ended_at for life in killed) for s in resumed), default=0.0)
        print(f"{moment} over {transport}: {len(killed)} killed, {len(resumed)} placed again, last first token {late:.2f} s later")
        assert resumed
        assert late <= 2.0


@pytest.mark.parametrize(("row", "when", "nth"), [(3, "token", 20 * 8), (4, "sealed", 3)])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_decode_killed(tmp_path, row, when, nth, transport):
    """Mid-stream, or between the KV's receipt and the first token: another one goes on from prompt and delivered tokens."""
    hook = {"when": when, "nth": nth, "do": "kill"}
    specs = {"decode": {"hook": hook}, "prefill": {"transports": [transport]}}
    async with fleet_and_door(tmp_path, 1, 2, specs) as (fleet, opened):
        first = [fleet["decode:0"], fleet["decode:1"]]
        streams = await opened.streams(8, prompt_len=60, max_tokens=60)
        killed = [life for life in first if life.ended.is_set()]
        assert killed
        silence = max(s.longest_silence_s for s in streams)
        print(f"row {row} over {transport}: {len(killed)} killed, longest silence {silence:.2f} s")
        assert sum(len({e for _, e in s.epochs}) > 1 or s.epochs[0][1] > 1 for s in streams) >= 3
        assert silence <= 3.0


async def test_the_only_decode_worker_killed(tmp_path):
    """Row 5: requests wait for it; when it does not come back, each ends with one error, in time, with a Retry-After."""
    async with fleet_and_door(tmp_path, 1, 1, scheduler__recovery_s=3) as (fleet, opened):
        streaming = opened.begin(8, max_tokens=60)
        await until(lambda: opened.gateway.num_in_flight == 8, 5, "all began")
        await asyncio.sleep(0.4)
        fleet["decode:0"].kill()
        await exact(streaming)
        await fleet.ready("decode:0")
        fleet.slots["decode:0"].restarts = False
        streaming = opened.begin(8, max_tokens=200)
        await asyncio.sleep(0.5)
        fleet["decode:0"].kill()
        killed = time.monotonic()
        streams = await asyncio.wait_for(asyncio.gather(*streaming), 10)
        waited = time.monotonic() - killed
        print(f"row 5: the last stream ended {waited:.1f} s after the only decode worker")
        for stream in streams:
            (end,) = stream.terminal
            assert isinstance(end, Failed)
            assert end.failure.retry_after
            assert stream.check() == "failed", "what was delivered is exact"
        assert 3.0 <= waited <= 3.0 + 1.5
        fleet.slots["decode:0"].restarts = True
        fleet.start("decode:0")
        await fleet.ready("decode:0")
        await opened.streams(4)


async def test_the_scheduler_killed(tmp_path):
    """Row 6: running streams do not notice; its successor knows what runs, from the workers' heartbeats."""
    async with fleet_and_door(tmp_path, 2, 2) as (fleet, opened):
        streaming = opened.begin(12, max_tokens=200)
        await until(lambda: opened.is_streaming(12), 10, "all stream")
        fleet["scheduler"].kill()
        killed = time.monotonic()
        await opened.streams(1, max_tokens=2)
        back = time.monotonic() - killed
        alive, running = 0, 0
        while time.monotonic() < killed + 5 and (alive, running) != (4, 12):
            await asyncio.sleep(0.05)
            with contextlib.suppress(Exception):
                workers = (await fleet.status())["workers"]
                alive = sum(worker["alive"] for worker in workers)
                running = sum(worker["stats"]["num_running"] for worker in workers if worker["role"] == "decode")
        rebuilt = time.monotonic() - killed
        assert (alive, running) == (4, 12)
        streams = await exact(streaming)
        print(f"row 6: a new request answered {back:.2f} s after the kill, the ledger whole after {rebuilt:.2f} s")
        assert all(len({epoch for _, epoch in s.epochs}) == 1 for s in streams), "a running stream was placed again"
        assert back <= 5.0


async def test_a_gateway_killed(tmp_path):
    """Row 7: its own streams break, nobody else's; what it held at the workers is given back at once, and another one serves."""
    async with fleet_and_door(tmp_path, 1, 2, gateways=1) as (fleet, opened):
        await fleet["gateway:0"].call("start", num_streams=16, seed="7", max_tokens=[400, 400], prompt_len=[50, 90])
        streaming = opened.begin(6, max_tokens=100)
        await asyncio.sleep(1.0)
        assert await fleet["gateway:0"].call("in_flight") == 16
        fleet["gateway:0"].kill()
        killed = time.monotonic()
        await exact(streaming)
        await fleet.settle(20)
        print(f"row 7: all blocks of 16 broken streams back within {time.monotonic() - killed:.1f} s (ours included)")
        await fleet.ready("gateway:0")
        await fleet["gateway:0"].call("start", num_streams=4, seed="7", max_tokens=[4, 8])
        await asyncio.sleep(0.5)
        await fleet["gateway:0"].call("drain", seconds=10.0)
        assert (await fleet["gateway:0"].call("report"))["good"] >= 4


# ---- stopped -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_prefill_worker_stopped_in_mid_transfer_wakes_as_a_zombie(tmp_path, transport):
    """Row 12: over shm its blocks stay in quarantine until it has said that it stopped; over tcp its late frames are refused."""
    specs = {"prefill:0": {"hook": {"when": "push", "nth": 3, "do": "stop"}}, "prefill": {"transports": [transport]}}
    async with fleet_and_door(tmp_path, 2, 1, specs, prefill__max_num_batched_tokens=64) as (fleet, opened):
        streaming = opened.begin(10, prompt_len=300, max_tokens=40)
        await until(lambda: stopped(fleet, "prefill:0"), 10, "stopped")
        at = time.monotonic()
        streams = await exact(streaming)
        slowest = max(s.ended_at for s in streams) - at
        quarantined = (await fleet["decode:0"].call("check"))["num_quarantined_blocks"]
        await asyncio.sleep(max(0.0, 10.0 - (time.monotonic() - at)))
        fleet["prefill:0"].kill(signal.SIGCONT)
        continued = time.monotonic()
        await fleet.settle(10)
        back = time.monotonic() - continued
        refused = (await fleet["decode:0"].call("check"))["refused"]
        print(
            f"row 12 over {transport}: all streams ended {slowest:.1f} s after the stop; {quarantined} blocks in quarantine, "
            f"back {back:.2f} s after SIGCONT; {refused} late frames refused"
        )
        assert slowest <= 7.0
        assert (quarantined > 0) == (transport == "shm")
        assert transport == "shm" or refused > 0
        await opened.streams(10, prompt_len=300)


async def test_a_decode_worker_stopped_in_mid_stream(tmp_path):
    """Row 13: its streams move; the tokens it sends when it wakes carry an older epoch and are nobody's."""
    specs = {"decode": {"hook": {"when": "token", "nth": 160, "do": "stop"}}}
    async with fleet_and_door(tmp_path, 1, 2, specs) as (fleet, opened):
        streaming = opened.begin(8, max_tokens=300)
        await until(lambda: stopped(fleet, "decode:0") or stopped(fleet, "decode:1"), 10, "stopped")
        victim, other = ("decode:0", "decode:1") if stopped(fleet, "decode:0") else ("decode:1", "decode:0")
        await asyncio.sleep(5.0)
        if stopped(fleet, other):  # the hook is in both: the one that took over stops as well
            fleet[other].kill(signal.SIGCONT)
        fleet[victim].kill(signal.SIGCONT)
        streams = await exact(streaming)
        print(f"row 13: longest silence {max(s.longest_silence_s for s in streams):.2f} s")


async def test_a_wedged_event_loop(tmp_path):
    """Row 14: a process that lives but does nothing is as good as dead after its missed heartbeats."""
    specs = {"decode:1": {"hook": {"when": "token", "nth": 80, "do": "wedge", "seconds": 20.0}}}
    async with fleet_and_door(tmp_path, 1, 2, specs) as (fleet, opened):
        streams = await opened.streams(8, max_tokens=100)
        silence = max(s.longest_silence_s for s in streams)
        print(f"row 14: longest silence {silence:.2f} s")
        assert 2.5 < silence <= 5.0
        await asyncio.sleep(16)


# ---- going and coming --------------------------------------------------------------------------------------------------


async def test_every_worker_replaced_one_after_the_other_under_load(tmp_path):
    """Rows 16 and 17, without Ray: each worker drains as a replica does at its end; what outlives its drain moves on."""
    async with fleet_and_door(tmp_path, 2, 2, gateways=1) as (fleet, opened):
        await fleet["gateway:0"].call("start", num_streams=48, seed="16", max_tokens=[20, 60], leave_rate=0.0)
        await asyncio.sleep(1.0)
        exits = []
        for name in ("prefill:0", "decode:0", "prefill:1", "decode:1"):
            life = fleet[name]
            started = time.monotonic()
            await life.call("drain", seconds=1.0)
            await asyncio.wait_for(life.ended.wait(), 5)
            exits.append(time.monotonic() - started)
            await fleet.ready(name)
            await asyncio.sleep(1.5)
        while (await fleet["gateway:0"].call("report")).get("streams", 0) < 1000:
            await asyncio.sleep(0.5)
        await fleet["gateway:0"].call("drain", seconds=30.0)
        report = await fleet["gateway:0"].call("report")
        print(f"rows 16, 17: {report['streams']} streams, {report['good']} good; exits after {[round(e, 2) for e in exits]} s")
        assert report["good"] == report["streams"], report["named"]
        assert max(exits) <= 1.0 + 2.0


async def test_all_prefill_workers_killed_at_once(tmp_path):
    """Row 18: decode workers prefill by themselves until one is back."""
    async with fleet_and_door(tmp_path, 2, 2) as (fleet, opened):
        streaming = opened.begin(12, max_tokens=150)
        await asyncio.sleep(0.5)
        for name in ("prefill:0", "prefill:1"):
            fleet.slots[name].restarts = False
            fleet[name].kill()
        killed = time.monotonic()
        streams = await opened.streams(8, prompt_len=200, max_tokens=10)
        print(f"row 18: without any prefill worker new streams had their first token after {max(s.ttft_s for s in streams):.2f} s")
        await exact(streaming)
        for name in ("prefill:0", "prefill:1"):
            fleet.slots[name].restarts = True
            fleet.start(name)
        await fleet.ready()
        before = sum([(await fleet[n].call("check"))["transfers"] for n in ("prefill:0", "prefill:1")])
        back = time.monotonic()
        while sum([(await fleet[n].call("check"))["transfers"] for n in ("prefill:0", "prefill:1")]) == before:
            await opened.streams(4, prompt_len=200, max_tokens=3)
            assert time.monotonic() - back < 10.0
        assert killed


async def test_out_of_descriptors(tmp_path):
    """Row 21: newcomers wait or fail, those that run go on, and all is well as soon as there are descriptors again."""
    async with fleet_and_door(tmp_path, 1, 1) as (fleet, opened):
        await opened.streams(2)
        streaming = opened.begin(8, max_tokens=300)
        await until(lambda: opened.is_streaming(8), 10, "all stream")
        process = psutil.Process(fleet["decode:0"].pid)
        limits = process.rlimit(resource.RLIMIT_NOFILE)
        process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds() + 2, limits[1]))
        host, _, port = fleet["decode:0"].address.rpartition(":")
        knocking = [socket.create_connection((host, int(port)), 2.0) for _ in range(40)]
        await asyncio.sleep(2.0)
        assert not fleet["decode:0"].ended.is_set()
        process.rlimit(resource.RLIMIT_NOFILE, limits)
        for sock in knocking:
            sock.close()
        released = time.monotonic()
        async with door(fleet) as another:
            await another.streams(2, max_tokens=4)
        print(f"row 21: a new gateway was served {time.monotonic() - released:.2f} s after the descriptors were back")
        assert time.monotonic() - released <= 5.0
        await exact(streaming)
        assert os.path.exists(f"/proc/{fleet['decode:0'].pid}")
