"""A group's leader and its ranks: how they come together, who is turned away, and that one's death is everybody's.

Ranks here are connections from this process; real processes are in test_groups_of_processes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from cluster import group as group_module
from cluster.group import RANKS, Leader, RankOrder, end_process
from cluster.life import this_process
from cluster.wire import Pulse, SocketNetwork
from kvtransfer.listening import Bind
from kvtransfer.process import observe, start_ticks
from protocol.errors import ModelError, TandemError, WorkerLost, to_failure
from protocol.kv import ProcessRef
from protocol.messages import Ok
from protocol.parallel import Parallel
from protocol.rank import RankFailed, RankHello, RankLeave, RankLoaded, RankPool, RankReady, RankSetup

SECRET = b"s" * 32
SETUP = RankSetup(b"{}", "decode", "decode-0-x", Parallel(3, 1), "127.0.0.1", 1, ("shm",), this_process())


class FakeRank:
    """A rank's half of the conversation; `ended` is what its spawner would notice."""

    def __init__(self, order: RankOrder) -> None:
        self.order = order
        self.killed = 0
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.network = SocketNetwork(order.name, SECRET, codec=RANKS)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.process: ProcessRef = ProcessRef("elsewhere", 1000 + order.rank, 1)

    async def ended(self) -> str:
        return await self.over

    def kill(self) -> None:
        self.killed += 1

    def _on_lost(self, peer) -> None:
        if not self.lost.done():
            self.lost.set_result(peer.closed_because)

    async def hello(self, **changes):
        self.network.answer(self._answer, self._on_lost)
        self.peer = await self.network.connect(self.order.leader)
        said = {"rank": self.order.rank, "group_id": self.order.group_id, "process": self.process, **changes}
        return await self.peer.call(RankHello(**said), 5.0)

    async def _answer(self, peer, message):
        return Ok()

    async def load(self, num_blocks: int = 10, model_hash: str = "m"):
        return await self.peer.call(RankLoaded(self.order.rank, num_blocks, model_hash), 5.0)

    async def all_of_it(self, num_blocks: int = 10):
        setup = await self.hello()
        pool = await self.load(num_blocks)
        ready = await self.peer.call(RankReady(self.order.rank, {}), 5.0)
        return setup, pool, ready


class Made:
    def __init__(self) -> None:
        self.ranks: list[FakeRank] = []
        self.broken: list[str] = []
        self.leaving = 0
        self.leader = Leader("decode:0", Parallel(3, 1), SECRET, Bind("127.0.0.1"), self.spawn, self.broken.append, self.on_leave)

    async def spawn(self, order: RankOrder) -> FakeRank:
        self.ranks.append(FakeRank(order))
        return self.ranks[-1]

    def on_leave(self) -> None:
        self.leaving += 1


@contextlib.asynccontextmanager
async def made() -> AsyncIterator[Made]:
    it = Made()
    await it.leader.start()
    try:
        yield it
    finally:
        await it.leader.close()
        for rank in it.ranks:
            await rank.network.close()


@contextlib.asynccontextmanager
async def serving(num_blocks: tuple[int, int] = (10, 10)) -> AsyncIterator[Made]:
    async with made() as it:
        it.leader.set_up(SETUP)
        tasks = [asyncio.create_task(rank.all_of_it(n)) for rank, n in zip(it.ranks, num_blocks, strict=True)]
        await it.leader.agree(RankLoaded(0, 99, "m"))
        await it.leader.ready()
        await asyncio.gather(*tasks)
        yield it


async def test_all_come_together_and_the_smallest_pool_is_everybodys():
    async with made() as it:
        assert [rank.order.name for rank in it.ranks] == ["decode:0/1", "decode:0/2"]
        tasks = [asyncio.create_task(rank.all_of_it(n)) for rank, n in zip(it.ranks, (7, 9), strict=True)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks), "nobody gets the store's address before there is a store"
        it.leader.set_up(SETUP)
        assert await it.leader.agree(RankLoaded(0, 8, "m")) == 7
        assert set(await it.leader.ready()) == {1, 2}
        assert await asyncio.gather(*tasks) == [(SETUP, RankPool(7), Ok())] * 2
        assert [ref.pid for ref in it.leader.processes] == [1001, 1002]
        assert await it.leader.callers()[2].call(RankPool(1), 5.0) == Ok()
    assert it.broken == []


async def test_who_does_not_belong_is_turned_away():
    async with made() as it:
        it.leader.set_up(SETUP)
        first, second = it.ranks
        for wrong in ({"group_id": "another life"}, {"rank": 0}, {"rank": 3}):
            with pytest.raises(TandemError, match="does not belong"):
                await first.hello(**wrong)
        await first.hello()
        with pytest.raises(TandemError, match="does not belong"):  # a second process of the same rank
            await second.hello(rank=1)
        with pytest.raises(TandemError, match="say hello first"):
            await second.load()


async def test_ranks_with_another_model_do_not_start():
    async with made() as it:
        it.leader.set_up(SETUP)
        for rank, model_hash in zip(it.ranks, ("m", "other"), strict=True):
            await rank.hello()
            asyncio.create_task(rank.load(5, model_hash))  # noqa: RUF006
        with pytest.raises(ModelError, match="rank 2 of decode:0 has loaded another model"):
            await it.leader.agree(RankLoaded(0, 5, "m"))


async def test_why_a_rank_cannot_start_is_what_the_leader_says():
    async with made() as it:
        it.leader.set_up(SETUP)
        await asyncio.gather(*(rank.hello() for rank in it.ranks))
        it.ranks[1].peer.send(RankFailed(2, to_failure(ModelError("shard 7 is cut short"))))
        with pytest.raises(ModelError, match="shard 7 is cut short"):
            await it.leader.agree(RankLoaded(0, 5, "m"))
        assert it.broken == [], "the start failed, which is told by raising"
        assert all(rank.killed for rank in it.ranks)


async def test_a_process_that_dies_before_it_says_hello_fails_the_start():
    async with made() as it:
        it.ranks[0].over.set_result("killed by signal 9")
        waiting = asyncio.get_running_loop().create_future()  # the leader's own join, which waits for that rank
        with pytest.raises(WorkerLost, match=r"lost rank 1 .* its process: killed by signal 9"):
            await it.leader.unless_lost(waiting)


@pytest.mark.parametrize("how", ["connection", "process"])
async def test_a_lost_rank_is_told_once_and_the_others_are_ended(how):
    async with serving() as it:
        first, second = it.ranks
        started = time.monotonic()
        if how == "connection":
            second.peer.close()
        else:
            second.over.set_result("killed by signal 9")
        while not it.broken:
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < 0.5
        second.over.cancel()
        first.peer.close()
        await asyncio.sleep(0.1)
        assert len(it.broken) == 1
        assert "decode:0 lost rank 2 (pid 1002)" in it.broken[0]
        assert first.killed
        assert second.killed


async def test_a_silent_rank_is_lost_within_three_seconds(monkeypatch):
    assert group_module.PULSE.period_s * (group_module.PULSE.misses + 1) <= 3.0
    monkeypatch.setattr(group_module, "PULSE", Pulse(0.05, 5))
    monkeypatch.setattr(group_module, "SLOW_PULSE", Pulse(0.05, 1000))
    async with serving() as it:
        silent = it.ranks[0].peer
        for task in silent._tasks:  # its process is stopped: it neither reads nor pings
            task.cancel()
        started = time.monotonic()
        while not it.broken:
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < 0.4
        assert "silent for" in it.broken[0]


async def test_while_it_starts_a_rank_may_be_silent_for_longer():
    assert group_module.SLOW_PULSE.period_s * group_module.SLOW_PULSE.misses > 60


async def test_a_rank_that_is_asked_to_go_lets_the_group_drain():
    async with serving() as it:
        it.ranks[1].peer.send(RankLeave(2))
        while not it.leaving:
            await asyncio.sleep(0.01)
        assert it.broken == []


async def test_closing_waits_for_those_who_were_told_and_is_no_loss():
    async with serving() as it:

        async def stop() -> None:
            async def go(rank: FakeRank) -> None:
                await asyncio.sleep(0.2)
                assert rank.killed == 0
                await rank.network.close()

            it.going = [asyncio.create_task(go(rank)) for rank in it.ranks]

        started = time.monotonic()
        await it.leader.close(stop=stop())
        assert time.monotonic() - started < 1.5
        await asyncio.gather(*it.going)
        assert it.broken == []


def test_a_process_is_ended_also_when_it_is_stopped_and_only_that_one():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert observe(this_process().boot_id, child.pid, start_ticks(child.pid) + 1) is None, "another process of that pid"
    process = observe(this_process().boot_id, child.pid, start_ticks(child.pid))
    assert process is not None
    os.kill(child.pid, signal.SIGSTOP)
    end_process(process)
    assert child.wait(5) == -signal.SIGKILL
    end_process(process)
    process.close()
