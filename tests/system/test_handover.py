"""Hand-overs that go wrong: R2 under every way to stop a writer, broken connections, refusals that a retry mends, R11."""

from __future__ import annotations

import asyncio
import os
import threading
from types import SimpleNamespace

import pytest

from decode.writers import MAX_VOID_GRANTS, MAX_VOID_WRITERS
from kvtransfer.handoff import MEMORY_S
from kvtransfer.shm import ShmLane
from protocol.errors import DeadlineExceeded, HandshakeRefused, ReservationRefused, TransferFailed, WorkerLost
from protocol.events import Finished
from protocol.messages import Cancel, StopWriting
from tests.system.local import cluster, events_of, oracle, request, tokens_of


class SlowStores:
    """Holds every store into mapped memory between reading its bytes and writing them, until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storing = threading.Event()
        self.go = threading.Event()
        self.num_ended = 0
        store = ShmLane.store

        def slow(lane, transfer, layer, pieces):
            pieces = [(index, data.copy()) for index, data in pieces]
            self.storing.set()
            self.go.wait(5)
            store(lane, transfer, layer, pieces)
            self.num_ended += 1

        monkeypatch.setattr(ShmLane, "store", slow)

    async def begun(self) -> None:
        async with asyncio.timeout(5):
            while not self.storing.is_set():
                await asyncio.sleep(0.002)


async def until(condition, timeout=5.0):
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


async def abandon(task, events):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await events.aclose()


@pytest.mark.parametrize("first", ["cancel", "stop writing", "lease"])
async def test_a_quarantine_outlives_the_store_under_way(monkeypatch, first):
    async with cluster(("shm",)) as made:
        await events_of(made, request(range(300, 340), max_tokens=2))  # the hand-shake
        decode, prefill = made.workers
        slow = SlowStores(monkeypatch)
        events = made.gateway.generate(request(range(40)))
        task = asyncio.create_task(events.__anext__())
        await slow.begun()
        (grant_id,) = decode.handover._jobs
        stops = []
        if first == "stop writing":
            stops.append(asyncio.create_task(prefill.handover.stop_writing(StopWriting(grant_id))))
            await asyncio.sleep(0.02)
        elif first == "lease":  # while finish() waits
            job = prefill.handover._jobs[grant_id]
            await until(lambda: prefill.handover.outbound.phase(grant_id).value == "finishing")
            prefill._fail(job, TransferFailed("the lease ran out"), "transfer")
            await asyncio.sleep(0.02)
        await abandon(task, events)
        stops.append(asyncio.create_task(prefill.handover.stop_writing(StopWriting(grant_id))))
        await asyncio.sleep(0.1)
        assert slow.num_ended == 0
        assert not any(stop.done() for stop in stops), "acknowledged while a store was under way"
        assert decode.pool.num_quarantined > 0
        slow.go.set()
        await asyncio.gather(*stops)
        await until(lambda: decode.pool.num_used == 0)


@pytest.mark.parametrize("lost", ["connection", "word"])
async def test_a_quarantine_ends_after_the_connection_broke(monkeypatch, lost):
    async with cluster(("shm",)) as made:
        await events_of(made, request(range(300, 340), max_tokens=2))
        decode, prefill = made.workers
        slow = SlowStores(monkeypatch)
        events = made.gateway.generate(request(range(40)))
        task = asyncio.create_task(events.__anext__())
        await slow.begun()
        (link,) = prefill.handover.links.values()
        if lost == "word":  # it goes into a connection that breaks before it is read, and so does the question

            async def unanswered(message, timeout):
                raise WorkerLost("broke")

            link.peer.send = lambda message: None
            link.peer.other.call = unanswered
        else:
            link.peer.close()
        await abandon(task, events)
        slow.go.set()
        await until(lambda: prefill.is_idle)
        if lost == "word":
            assert decode.pool.num_quarantined > 0
            link.peer.close()
        await until(lambda: decode.pool.num_quarantined == 0 and decode.pool.num_used == 0)
        await until(lambda: prefill.handover.links.num_owed == 0)
        assert tokens_of(await events_of(made, request(range(40)))) == oracle(list(range(40)), 8)


@pytest.mark.parametrize("lost", ["connection", "answer"])
async def test_a_handshake_whose_answer_is_lost_is_made_again(monkeypatch, lost):
    """Decode knows the writer then and waits for its word; without another hand-shake nobody could ask for it."""
    async with cluster(("shm",)) as made:
        decode, prefill = made.workers
        handshake, num_lost = decode.handover.handshake, []

        def unheard(peer, message):
            answer = handshake(peer, message)
            if not num_lost:
                num_lost.append(1)
                if lost == "connection":
                    peer.close()
                raise DeadlineExceeded("the answer got lost")
            return answer

        monkeypatch.setattr(decode.handover, "handshake", unheard)
        events = made.gateway.generate(request(range(40)))
        task = asyncio.create_task(events.__anext__())
        await until(lambda: decode.pool.num_quarantined > 0 or prefill.handover.links.num_owed > 0)
        await abandon(task, events)
        await until(lambda: prefill.handover.links.num_owed == 0 and len(prefill.handover.links) == 1)
        await until(lambda: decode.pool.num_quarantined == 0 and decode.pool.num_used == 0)


async def test_nobody_waits_for_an_incarnation_that_is_gone():
    async with cluster(("shm",)) as made:
        await events_of(made, request(range(40)))
        decode, prefill = made.workers
        links, address = prefill.handover.links, decode.handover._network.address
        links._owe("decode:0/gone", address, ["g1"])
        await until(lambda: links.num_owed == 0)
        for i in range(100):
            links._owe(f"decode:{i}", "nowhere:1", [f"g{n}" for n in range(5000)] if i == 0 else [])
        assert links.num_owed <= 64
        links._owed.clear()


async def test_a_pidfd_for_each_writer_and_no_more():
    def num_pidfds():
        return sum("pidfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd))

    async with cluster(("shm",)) as made:
        counts = []
        for i in range(4):
            await events_of(made, request([i] * 40))
            counts.append(num_pidfds())
            for link in list(made.workers[1].handover.links.values()):
                link.peer.close()
            await asyncio.sleep(0.02)
        assert counts == counts[:1] * 4


def _is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


async def test_what_is_void_is_said_at_every_handshake_and_remembered_within_bounds():
    async with cluster(("shm",)) as made:
        decode, prefill = made.workers
        handover, writers, now = decode.handover, decode.handover.writers, [0.0]
        writers._clock = lambda: now[0]

        def taken_back(writer, i):
            return handover._has_stopped(SimpleNamespace(prefill_incarnation=writer, grant_id=f"{writer}/{i}"))

        handshake = prefill.handover.links._handshake
        me = prefill.settings.incarnation
        assert taken_back(me, 0)
        peer = SimpleNamespace(name="p", is_closed=False)
        for _ in range(2):  # the first answer is lost
            assert handover.handshake(peer, handshake).void_grants == (f"{me}/0",)
        del writers._void[me]
        writers._writers.pop(me).close()

        assert all(taken_back("w", i) for i in range(MAX_VOID_GRANTS))
        assert not taken_back("w", "one more")
        assert all(taken_back(f"w{i}", 0) for i in range(MAX_VOID_WRITERS - 1))
        assert not taken_back("another", 0), "quarantine, as it cannot be remembered"
        assert len(writers._void) == MAX_VOID_WRITERS
        now[0] += MEMORY_S + 1
        assert taken_back("another", 0)
        assert list(writers._void) == ["another"]


async def test_a_prefill_worker_that_takes_nothing_is_a_matter_of_trying_again():
    async with cluster() as made:
        prefill = made.workers[1]
        prefill.is_draining = True
        task = asyncio.create_task(events_of(made, request(range(40))))
        await asyncio.sleep(0.3)
        prefill.is_draining = False
        assert isinstance((await task)[-1], Finished)


async def test_a_prefill_pool_that_is_too_small_is_not_the_clients_fault():
    async with cluster() as made:
        made.workers[1].pool.num_blocks = 20
        try:
            events = await events_of(made, request([i % 500 for i in range(300)]))
        finally:
            made.workers[1].pool.num_blocks = 96
        assert isinstance(events[-1], Finished), events[-1]


async def test_memory_that_cannot_be_mapped_now_is_a_matter_of_trying_again(monkeypatch):
    make, refusals = ShmLane.__init__, []

    def refuse_once(lane, *args):
        if not refusals:
            refusals.append(HandshakeRefused("shm: process 4711 is not visible from here"))
            raise refusals[0]
        make(lane, *args)

    monkeypatch.setattr(ShmLane, "__init__", refuse_once)
    async with cluster(("shm",), decode__replicas=2) as made:
        assert isinstance((await events_of(made, request(range(60))))[-1], Finished)
    assert refusals


@pytest.mark.parametrize("what", ["cancel", "cancel any", "gateway lost", "newer attempt"])
async def test_what_happens_during_the_handshake_counts(monkeypatch, what):
    async with cluster() as made:
        decode, prefill = made.workers
        links, shake = prefill.handover.links, prefill.handover.links._shake_hands
        may_go = asyncio.Event()

        async def slow(*args):
            link = await shake(*args)
            await may_go.wait()
            return link

        monkeypatch.setattr(links, "_shake_hands", slow)
        accept, errors = prefill._accept, []

        async def watched(gateway, message):
            try:
                return await accept(gateway, message)
            except Exception as error:
                errors.append(error)
                raise

        monkeypatch.setattr(prefill, "_accept", watched)
        events = made.gateway.generate(request(range(40)))
        task = asyncio.create_task(events.__anext__())
        await until(lambda: prefill._accepting)
        ((request_id, epoch),) = prefill._accepting
        if what == "cancel":
            await abandon(task, events)
            await until(lambda: (request_id, epoch) in prefill._cancels)
        elif what == "cancel any":
            await prefill.handle(SimpleNamespace(), Cancel(request_id))
        elif what == "gateway lost":
            made.gateway._network._peers[prefill._network.address].close()
        else:
            prefill._jobs[request_id] = newer = SimpleNamespace(epoch=epoch + 1, gateway=None, decode=None)
        may_go.set()
        if what == "gateway lost":  # its handler goes with the connection
            await asyncio.sleep(0.05)
            assert not any(job.epoch == epoch for job in prefill._jobs.values())
        else:
            await until(lambda: errors)
            assert isinstance(errors[0], (TransferFailed, WorkerLost))
        if what == "newer attempt":
            assert prefill._jobs.pop(request_id) is newer
        await abandon(task, events)
        assert not prefill._accepting
        assert not links._linking


async def test_a_full_prefill_worker_says_so_retryably():
    async with cluster() as made:
        prefill = made.workers[1]
        prefill.is_draining = True
        settings = SimpleNamespace(prefill=SimpleNamespace(incarnation=prefill.settings.incarnation), epoch=1)
        message = SimpleNamespace(
            ticket=settings, grant=SimpleNamespace(request_id="x", epoch=1), request=SimpleNamespace(request_id="x")
        )
        with pytest.raises(ReservationRefused, match="draining"):
            await prefill._accept(SimpleNamespace(), message)


@pytest.mark.parametrize("place", ["plan", "attach_prefix", "seal_full_blocks", "finish_reason", "compute"])
async def test_whatever_fails_in_a_step_fails_its_prompts_and_the_loop_goes_on(monkeypatch, place):
    async with cluster() as made:
        prefill = made.workers[1]
        num_calls = [0]

        def broken(*args, **kwargs):
            num_calls[0] += 1
            raise ZeroDivisionError("on purpose")

        with monkeypatch.context() as patch:
            if place == "compute":
                patch.setattr(prefill, "_compute", broken)
            else:
                patch.setattr(f"prefill.worker.{place}", broken)
            events = await asyncio.wait_for(events_of(made, request(range(40))), 10)
        assert num_calls[0] >= 1
        assert events[-1].failure.kind == "InternalError"
        assert tokens_of(await events_of(made, request(range(40)))) == oracle(list(range(40)), 8)


async def test_blocks_given_back_by_others_let_a_waiting_prompt_in():
    async with cluster() as made:
        prefill = made.workers[1]
        taken = prefill.pool.allocate(prefill.pool.num_free)
        task = asyncio.create_task(events_of(made, request(range(40))))
        await until(lambda: prefill._waiting)
        await asyncio.sleep(0.02)
        prefill.pool.release(taken)
        prefill.wake()
        assert isinstance((await asyncio.wait_for(task, 5))[-1], Finished)
