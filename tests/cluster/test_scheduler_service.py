"""The scheduler's service: who waits, who stopped waiting, and which broken connection means a dead worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from cluster.loopback import Hub
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from configs.schema import SchedulerConfig
from protocol.errors import TandemError
from protocol.kv import KVLayout
from protocol.messages import Admit, Message, Outcome, Withdraw, WorkerBeat, WorkerInfo, WorkerStats
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler

INFO = WorkerInfo(
    incarnation="d",
    role="decode",
    name="decode:0",
    address="d:0",
    model="m",
    layout=KVLayout(2, 2, 16, 16, "float32", "hash"),
    num_blocks=100,
    max_model_len=4096,
    max_num_seqs=1,
    pid=1,
    host="h",
    device="cpu",
)


def admit(request_id: str, last_epoch: int = 0) -> Admit:
    return Admit(
        request_id=request_id,
        model="m",
        tenant="t",
        slo_class="standard",
        priority=0,
        prompt_len=10,
        max_tokens=10,
        last_epoch=last_epoch,
        resumption=last_epoch > 0,
    )


def outcome(request_id: str, epoch: int = 0) -> Outcome:
    return Outcome(
        request_id=request_id,
        epoch=epoch,
        kind="cancelled",
        tenant="t",
        slo_class="standard",
        prompt_tokens=10,
        cached_tokens=0,
        output_tokens=0,
        queue_s=0.0,
        ttft_s=0.0,
        tpot_s=0.0,
        e2e_s=0.0,
    )


class Peer:
    """One connection, as the service sees it."""

    name = "peer"
    is_closed = False

    def send(self, message: Message) -> None: ...

    async def call(self, message: Message, timeout: float) -> Message:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def service() -> AsyncIterator[SchedulerService]:
    clock = asyncio.get_running_loop().time
    made = SchedulerService(Scheduler(SchedulerConfig()), Hub().network("scheduler"), clock, ClusterMetrics("m"))
    yield made
    made.scheduler.check_integrity()
    await made.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


async def in_queue(made: SchedulerService, message: Admit) -> asyncio.Task[Message | None]:
    task = asyncio.create_task(made.handle(Peer(), message))
    await asyncio.sleep(0)
    return task


def is_clean(made: SchedulerService) -> bool:
    return not made._waiting and len(made.scheduler.queue) == 0 and not made.scheduler.ledger.entries


def test_a_late_break_of_an_old_connection_does_not_kill_a_worker_that_came_back() -> None:
    async def go() -> None:
        async with service() as made:
            old, new = Peer(), Peer()
            await made.handle(old, INFO)
            await made.handle(new, WorkerBeat("d", "ready", WorkerStats(num_free_blocks=100)))
            made.on_lost(old)
            assert "d" in made.scheduler.workers
            made.on_lost(new)
            assert "d" not in made.scheduler.workers

    run(go())


@pytest.mark.parametrize("end", [Withdraw("a"), outcome("a")])
def test_nobody_waits_for_a_request_that_is_over(end: Message) -> None:
    async def go() -> None:
        async with service() as made:
            task = await in_queue(made, admit("a"))
            assert not is_clean(made)
            await made.handle(Peer(), end)
            assert is_clean(made)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert is_clean(made)

    run(go())


@pytest.mark.parametrize("end", [Withdraw("a"), outcome("a")])
def test_an_admission_that_was_overtaken_by_its_end_is_not_queued(end: Message) -> None:
    async def go() -> None:
        async with service() as made:
            await made.handle(Peer(), end)
            with pytest.raises(TandemError, match="withdrawn"):
                await made.handle(Peer(), admit("a"))
            assert is_clean(made)

    run(go())


def test_a_failover_is_admitted_again() -> None:
    async def go() -> None:
        async with service() as made:
            await made.handle(Peer(), INFO)
            first = await made.handle(Peer(), admit("a"))
            await made.handle(Peer(), WorkerBeat("d", "ready", WorkerStats(num_free_blocks=90), (("a", 1),)))
            again = await made.handle(Peer(), admit("a", last_epoch=1))
            assert isinstance(first, Ticket)
            assert isinstance(again, Ticket)
            assert (first.epoch, again.epoch) == (1, 2)

    run(go())


def test_a_caller_that_is_cancelled_with_its_ticket_in_hand_leaves_nothing() -> None:
    async def go() -> None:
        async with service() as made:
            task = await in_queue(made, admit("a"))
            await made.handle(Peer(), INFO)  # decides; the caller has not run yet
            assert made.scheduler.ledger.entries
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert is_clean(made)

    run(go())


def test_an_error_while_deciding_leaves_no_waiter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with service() as made:

            def broken(now: float) -> list[Any]:
                raise AssertionError("of all invariants, this one")

            monkeypatch.setattr(made.scheduler, "decisions", broken)
            with pytest.raises(AssertionError):
                await made.handle(Peer(), admit("a"))
            assert is_clean(made)

    run(go())


def test_who_asks_again_keeps_its_place_and_gets_the_answer() -> None:
    """The first answer may be lost; the gateway asks the same once more."""

    async def go() -> None:
        async with service() as made:
            first = await in_queue(made, admit("a"))
            await in_queue(made, admit("b"))
            again = await in_queue(made, admit("a"))
            assert [item.admit.request_id for item in made.scheduler.queue] == ["a", "b"]
            await made.handle(Peer(), INFO)
            assert isinstance(await again, Ticket)
            with pytest.raises(asyncio.CancelledError):
                await first
            assert made.scheduler.records.counters["submitted"] == 2
            for request_id in "ab":
                await made.handle(Peer(), outcome(request_id))

    run(go())
