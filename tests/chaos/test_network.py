"""Faults of the network and of data, on a fleet of real processes: rows 22 to 44 of the table in docs/reliability.md that are not
covered by smaller tests. `faultproxy` stands in front of a decode worker's control port, as gateways and as prefill workers see it,
and of its KV port.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Any

import pytest
from msgspec import to_builtins

from cluster.walk import Walk
from protocol.kv import TcpEndpoint
from tests.chaos.door import exact, fleet_and_door, until
from tests.chaos.fleet import Fleet, make_config
from tests.chaos.test_processes import stopped
from tests.faultproxy import FaultProxy
from tests.system.served import free_port

pytestmark = [pytest.mark.more, pytest.mark.timeout(180)]

TCP: dict[str, Any] = {"transports": ["tcp"]}


class Ways:
    """Proxies in front of one decode worker. `spec` is for its slot; `aim` once the fleet is there."""

    def __init__(self, slot: str) -> None:
        self.slot = slot
        port = free_port()
        self.gateways = FaultProxy(f"127.0.0.1:{port}")
        self.peers = FaultProxy(f"127.0.0.1:{port}")
        self.kv = FaultProxy()
        self.all = (self.gateways, self.peers, self.kv)
        self.spec = {
            **TCP,
            "port": port,
            "seen_by_gateways_at": self.gateways.address,
            "seen_by_peers_at": self.peers.address,
            "kv_seen_at": self.kv.endpoint.port,
        }

    def aim(self, fleet: Fleet) -> None:
        self.kv.target = TcpEndpoint("127.0.0.1", fleet[self.slot].said["kv_port"])

    def close(self) -> None:
        for proxy in self.all:
            proxy.close()


@pytest.fixture
def ways():
    made = Ways("decode:1")  # of two that are empty, the scheduler fills this one first
    yield made
    made.close()


def specs_of(ways: Ways) -> dict[str, dict[str, Any]]:
    return {"prefill": TCP, ways.slot: ways.spec}


# ---- connections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["22: both ways", "23: only towards prefill"])
async def test_prefill_and_decode_cannot_reach_each_other(tmp_path, ways, row):
    """Both still reach everybody else. Whoever was between them is placed again, and decode has its blocks back without them."""
    lease_s = 3.0
    async with fleet_and_door(tmp_path, 2, 2, specs_of(ways), transfer__lease_s=lease_s) as (fleet, opened):
        ways.aim(fleet)
        await opened.streams(6, prompt_len=200, max_tokens=10)
        assert ways.kv.there.num_bytes > 0, "nothing went this way"
        for proxy in (ways.peers, ways.kv):
            proxy.there.is_stalled = row.startswith("22")
            proxy.back.is_stalled = True
        streams = await opened.streams(8, prompt_len=200, max_tokens=10)
        later = await opened.streams(8, prompt_len=200, max_tokens=10)
        await fleet.settle(2 * lease_s + 2)
        back = time.monotonic() - max(s.ended_at for s in later)
        held_up = [max(max(s.ttft_s, s.longest_silence_s) for s in of) for of in (streams, later)]
        print(
            f"row {row}: nobody held up for more than {held_up[0]:.1f} s, of those that came later {held_up[1]:.1f} s; all blocks "
            f"back {back:.1f} s after the last stream, still apart"
        )
        assert max(held_up) <= 5.0
        for proxy in (ways.peers, ways.kv):
            proxy.stall(False)
        await opened.streams(8, prompt_len=200, max_tokens=10)


@pytest.mark.parametrize("seconds", [5.0, 12.0])
async def test_a_worker_and_the_scheduler_cannot_reach_each_other(tmp_path, seconds):
    """Row 24: its streams go on, as they need no scheduler; it gets nothing new, and is a member again soon after."""
    port = free_port()
    way = FaultProxy(f"127.0.0.1:{port}")
    specs = {"scheduler": {"port": port}, "decode": {"scheduler_at": way.address}}
    async with fleet_and_door(tmp_path, 1, 1, specs) as (fleet, opened):
        streaming = opened.begin(6, max_tokens=int(seconds / 0.02) + 50)
        await until(lambda: opened.is_streaming(6), 10, "all stream")
        way.stall()
        await asyncio.sleep(seconds)
        way.stall(False)
        healed = time.monotonic()
        await opened.streams(1, max_tokens=2)
        member = time.monotonic() - healed
        streams = await exact(streaming)
        print(f"row 24: {seconds:.0f} s apart; a new request answered {member:.1f} s after it was healed")
        assert all(len({epoch for _, epoch in s.epochs}) == 1 for s in streams), "a running stream was placed again"
        assert member <= 8.0
    way.close()


async def test_a_slow_link_holds_up_nobody_else(tmp_path, ways):
    """Row 25: KV to one decode worker crawls. Streams of the other one, from the same prefill worker, are as quick as before."""
    keys = {"decode__max_num_seqs": 8}
    async with fleet_and_door(tmp_path, 1, 2, specs_of(ways), **keys) as (fleet, opened):
        ways.aim(fleet)
        await opened.streams(8, prompt_len=200, max_tokens=4)

        async def through(slot: str) -> list[float]:
            found: list[float] = []
            for _ in range(3):
                streams = await opened.streams(16, prompt_len=200, max_tokens=30)
                found += [s.ttft_s for s in streams if s.decode == fleet[slot].incarnation]
            return sorted(found)

        before = await through("decode:0")
        ways.kv.there.bytes_per_s = 100_000
        after = await through("decode:0")
        print(f"row 25: p50 TTFT of the other worker's {len(after)} streams {before[len(before) // 2]:.2f} s before, "
              f"{after[len(after) // 2]:.2f} s beside a slow link; worst {before[-1]:.2f} and {after[-1]:.2f} s")  # fmt: skip
        assert len(before) >= 8
        assert len(after) >= 8
        assert after[-1] <= 1.3 * before[-1] + 0.2


async def test_delay_and_jitter_everywhere(tmp_path, ways):
    """Row 26: 50 ms and up to 150 more on every byte between this worker and everybody. Slower, and exact."""
    for proxy in ways.all:
        for way in (proxy.there, proxy.back):
            way.delay_s, way.jitter_s = 0.05, 0.15
    async with fleet_and_door(tmp_path, 1, 2, specs_of(ways)) as (fleet, opened):
        ways.aim(fleet)
        streams = await opened.streams(16, prompt_len=150, max_tokens=60)
        assert sum(s.decode == fleet["decode:1"].incarnation for s in streams) >= 8
        placed_again = sum(s.epochs[-1][1] > 1 for s in streams)
        print(f"row 26: 16 exact, {placed_again} placed again, first tokens after {max(s.ttft_s for s in streams):.2f} s")


async def test_resets_at_any_moment(tmp_path, ways):
    """Rows 27 and 39: RST on every connection of this worker, control and KV, every half second, in the middle of frames, calls and
    answers. Whatever was lost with them is asked again and done once."""
    async with fleet_and_door(tmp_path, 2, 2, specs_of(ways), prefill__max_num_batched_tokens=64) as (fleet, opened):
        ways.aim(fleet)
        rng, num_resets, streams = random.Random(27), 0, []
        for _ in range(6):
            streaming = opened.begin(10, prompt_len=200, max_tokens=40)
            for _ in range(3):
                await asyncio.sleep(rng.uniform(0.1, 0.6))
                for proxy in ways.all:
                    proxy.reset()
                num_resets += 1
            streams += await exact(streaming)
        attempts = sum(s.epochs[-1][1] for s in streams)
        print(f"rows 27, 39: {num_resets} times all connections reset; {len(streams)} streams exact in {attempts} attempts")
        assert attempts > len(streams), "no reset ever hit a stream"


async def test_a_half_open_connection(tmp_path, ways):
    """Row 28: the worker lives, the gateway's connection to it says nothing any more, and no FIN ever comes."""
    async with fleet_and_door(tmp_path, 1, 2, specs_of(ways)) as (fleet, opened):
        ways.aim(fleet)
        streaming = opened.begin(8, max_tokens=200)
        await until(lambda: opened.is_streaming(8), 10, "all stream")
        ways.gateways.stall()
        streams = await exact(streaming)
        silence = max(s.longest_silence_s for s in streams)
        print(f"row 28: longest silence {silence:.2f} s")
        assert 2.5 < silence <= 5.0
        ways.gateways.stall(False)


# ---- memory and blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_blocks_of_a_late_writer_are_nobody_elses(tmp_path, transport):
    """Row 32, the recipe of vLLM's report: a lease of 50 ms, a pool of 24 blocks, a writer that is stopped for two seconds in the
    middle. Requests that want its blocks wait or go elsewhere; none reads what the late writer stores."""
    specs = {"prefill": {"transports": [transport]}, "prefill:1": {"hook": {"when": "push", "nth": 6, "do": "stop"}}}
    keys = {"transfer__lease_s": 0.05, "model__num_blocks_override": 24, "prefill__max_num_batched_tokens": 32}
    async with fleet_and_door(tmp_path, 2, 1, specs, **keys) as (fleet, opened):
        streaming = opened.begin(12, prompt_len=90, max_tokens=30)
        await until(lambda: stopped(fleet, "prefill:1"), 10, "stopped")
        await asyncio.sleep(2.0)
        fleet["prefill:1"].kill(signal.SIGCONT)
        await exact(streaming)
        check = await fleet["decode:0"].call("check")
        print(f"row 32 over {transport}: 12 exact, {check['digest_failures']} digest failures, {check['refused']} frames refused")


async def test_a_full_decode_pool_is_shared_by_turns(tmp_path):
    """Rows 34 and 36: five times what the pool of 64 blocks holds, prefilled elsewhere. Somebody always moves, nobody starves, and
    whoever was preempted goes on exactly."""
    async with fleet_and_door(tmp_path, 1, 1, model__num_blocks_override=64) as (fleet, opened):
        streaming = opened.begin(32, prompt_len=30, max_tokens=300)
        pauses, before, since = [], -1, time.monotonic()
        while not all(task.done() for task in streaming):
            await asyncio.sleep(0.05)
            tokens = opened.load._counts["tokens"]
            if tokens != before:
                pauses.append(time.monotonic() - since)
                before, since = tokens, time.monotonic()
        streams = await exact(streaming)
        check = await fleet["decode:0"].call("check")
        print(f"rows 34, 36: {check['num_preemptions']} preemptions, {check['transfers']} hand-overs; no token for "
              f"{max(pauses):.2f} s at most, one stream silent for {max(s.longest_silence_s for s in streams):.1f} s")  # fmt: skip
        assert check["num_preemptions"] > 0
        assert check["transfers"] > 0
        assert max(pauses) <= 2.0
        assert max(s.longest_silence_s for s in streams) <= 30.0


async def test_a_slow_decode_pool_holds_back_admission(tmp_path):
    """Row 35: what decode cannot take waits in the scheduler's queue, not in prefill's memory."""
    specs = {"decode": {"min_step_s": 0.1}}
    keys = {"decode__max_num_seqs": 4, "model__num_blocks_override": 64}
    async with fleet_and_door(tmp_path, 1, 1, specs, **keys) as (fleet, opened):
        streaming = opened.begin(24, prompt_len=100, max_tokens=8)
        most = queued = 0
        while not all(task.done() for task in streaming):
            most = max(most, (await fleet["prefill:0"].call("check"))["used"])
            queued = max(queued, (await fleet.status())["queue"]["requests"])
            await asyncio.sleep(0.05)
        await exact(streaming)
        print(f"row 35: at most {most} of 64 prefill blocks in use, {queued} requests in the queue")
        assert queued >= 8
        assert most <= 32


async def test_a_full_log_device(tmp_path):
    """Row 37: every line that is logged fails with ENOSPC."""
    specs = {role: {"log": "/dev/full", "log_level": "DEBUG"} for role in ("scheduler", "prefill", "decode")}
    async with fleet_and_door(tmp_path, 1, 2, specs) as (fleet, opened):
        streaming = opened.begin(8, max_tokens=60)
        await asyncio.sleep(0.5)
        fleet["decode:1"].kill()  # something to write about
        await exact(streaming)


# ---- identity ----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_returns_at_the_same_address(tmp_path):
    """Row 41: host and port are its predecessor's, the incarnation is not; the first request after it is served."""
    specs = {"decode": {"port": free_port()}, "prefill": {"port": free_port()}}
    async with fleet_and_door(tmp_path, 1, 1, specs) as (fleet, opened):
        for name in ("decode:0", "prefill:0", "decode:0"):
            await opened.streams(4, max_tokens=10)
            before = fleet[name]
            before.kill()
            await before.ended.wait()
            await fleet.ready(name)
            assert fleet[name].address == before.address
            assert fleet[name].incarnation != before.incarnation
            (stream,) = await opened.streams(1, max_tokens=10)
            print(f"row 41: after {name} came back, the first token came after {stream.ttft_s:.2f} s")
            assert stream.ttft_s <= 5.0


async def test_another_layout_is_refused_at_the_handshake(tmp_path):
    """Row 42: a decode worker with other blocks shares the cluster; no KV goes there, and no request suffers for it."""
    specs = {"decode:1": {"config": to_builtins(make_config(model__block_size=32, decode__max_num_seqs=8))}}
    async with fleet_and_door(tmp_path, 1, 2, specs, model__block_size=16, decode__max_num_seqs=8) as (fleet, opened):
        streams = await opened.streams(12, prompt_len=100, max_tokens=20)
        check = await fleet["decode:1"].call("check")
        slowest = max(s.ttft_s for s in streams)
        print(f"row 42: 12 exact, {check['transfers']} hand-overs to the odd one, first tokens by {slowest:.2f} s")
        assert check["transfers"] == 0
        assert (await fleet["decode:0"].call("check"))["transfers"] >= 1


# ---- clients -----------------------------------------------------------------------------------------------------------

STAGES = ("queued", "placed", "reserved", "prefilling", "transferring", "decoding", "first token", "mid-stream", "last token")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_clients_that_leave_at_every_stage(tmp_path, monkeypatch, transport):
    """Row 43: nine moments, two hundred clients each. Work stops, and everything is given back within a second."""
    leaving: dict[str, tuple[str, asyncio.Task[Any]]] = {}
    move = Walk.move

    def moved(self: Walk, target: Any) -> None:
        move(self, target)
        stage, task = leaving.get(self.request.request_id, ("", None))
        if task is not None and stage == target.value:
            task.cancel()

    monkeypatch.setattr(Walk, "move", moved)
    async with fleet_and_door(tmp_path, 1, 1, {"prefill": {"transports": [transport]}}) as (fleet, opened):
        worst = 0.0
        for stage in STAGES:
            tasks = []
            for _ in range(200):
                wanted = opened.request(prompt_len=40, max_tokens=12)
                after = {"first token": 1, "mid-stream": 6, "last token": 12}.get(stage)
                task = asyncio.create_task(opened.load.run(wanted, leaves_after=after))
                leaving[wanted.request_id] = (stage, task)
                tasks.append(task)
                if len(tasks) % 20 == 0:
                    await asyncio.sleep(0.05)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            left = sum(isinstance(o, asyncio.CancelledError) or not getattr(o, "terminal", True) for o in outcomes)
            assert not [o for o in outcomes if isinstance(o, Exception)]
            assert left >= 150, f"{stage}: only {left} of 200 left"
            ended = time.monotonic()
            await fleet.settle(5.0)
            worst = max(worst, time.monotonic() - ended)
        await asyncio.sleep(2.5)  # two heartbeats
        workers = (await fleet.status())["workers"]
        print(f"row 43 over {transport}: {200 * len(STAGES)} clients left; all blocks back within {worst:.2f} s")
        assert worst <= 1.0
        assert all(worker["stats"]["num_running"] == 0 for worker in workers)


async def test_a_storm_of_clients_that_leave(tmp_path):
    """Row 44: nine in ten leave. The others are served as before."""
    async with fleet_and_door(tmp_path, 1, 2) as (fleet, opened):
        calm = await opened.streams(30, prompt_len=60, max_tokens=40)
        streaming, rng = [], random.Random(44)
        for _ in range(30):
            streaming += opened.begin(1, prompt_len=60, max_tokens=40)
            for _ in range(9):
                wanted = opened.request(prompt_len=60, max_tokens=40)
                streaming.append(asyncio.create_task(opened.load.run(wanted, leaves_after=rng.randint(1, 4))))
            await asyncio.sleep(0.1)
        streams = await exact(streaming)
        stayed = [s for s in streams if s.leaves_after is None]
        times = [max(s.ended_at - s.began_at for s in of) for of in (calm, stayed)]
        print(f"row 44: 270 left, 30 stayed; slowest of 30 in the calm {times[0]:.2f} s, in the storm {times[1]:.2f} s")
        assert times[1] <= 1.5 * times[0] + 0.5
