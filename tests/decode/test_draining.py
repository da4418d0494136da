"""Workers that are asked to go: nothing new, what is here ends well, what is left at the deadline goes on elsewhere."""

from __future__ import annotations

import asyncio

import pytest

from decode.worker import DecodeWorker
from protocol.errors import Draining, ReservationRefused
from protocol.events import Finished, Tokens
from protocol.messages import Reserve
from protocol.ticket import Ticket, WorkerRef
from tests.system.local import cluster, events_of, oracle, request, tokens_of

PROMPT = list(range(40))


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def decode_workers(made):
    return [worker for worker in made.workers if isinstance(worker, DecodeWorker)]


@pytest.mark.parametrize("replicas", [0, 1], ids=["decode only", "with a prefill worker"])
async def test_what_is_left_at_the_deadline_goes_on_elsewhere(replicas):
    async with cluster(decode__replicas=2, prefill__replicas=replicas) as made:
        prompts = [[i, *PROMPT] for i in range(4)]
        seen: list[list[int]] = [[] for _ in prompts]

        async def one(i):
            events = []
            async for event in made.gateway.generate(request(prompts[i], max_tokens=200)):
                events.append(event)
                if isinstance(event, Tokens):
                    seen[i] += event.token_ids
            return events

        tasks = [asyncio.create_task(one(i)) for i in range(4)]
        await until(lambda: all(len(tokens) > 5 for tokens in seen))
        going = max(decode_workers(made), key=lambda worker: len(worker.in_flight()))
        num_here = len(going.in_flight())
        await going.drain(0.0)
        assert going.is_idle
        assert going.pool.num_used == 0
        results = await asyncio.gather(*tasks)
        assert num_here > 0
        for i, events in enumerate(results):
            assert isinstance(events[-1], Finished)
            assert tokens_of(events) == oracle(prompts[i], 200)
        assert sum(events[-1].usage.num_resumptions for events in results) == num_here, "each of them once, and nobody else"


async def test_what_can_be_finished_in_time_is_finished_here():
    async with cluster(decode__replicas=2, prefill__replicas=0) as made:
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=100)))
        await until(lambda: any(worker.in_flight() for worker in decode_workers(made)))
        (going,) = [worker for worker in decode_workers(made) if worker.in_flight()]
        await going.drain(30.0)
        events = await asyncio.wait_for(task, 1.0)
        assert tokens_of(events) == oracle(PROMPT, 100)
        assert events[-1].usage.num_resumptions == 0
        again = await events_of(made, request(PROMPT, max_tokens=5))
        assert tokens_of(again) == oracle(PROMPT, 5), "somebody else serves now"
        assert not going.in_flight()


async def test_a_draining_worker_refuses_and_says_so():
    async with cluster(prefill__replicas=0) as made:
        (worker,) = decode_workers(made)
        worker.is_draining = True
        ticket = Ticket("r", 1, WorkerRef(worker.settings.incarnation, "decode", ""), None)
        with pytest.raises(Draining, match="draining"):
            await worker._reserve(None, Reserve(ticket, request(PROMPT)))
        assert issubclass(Draining, ReservationRefused)
        worker.is_draining = False


@pytest.mark.parametrize("transport", ["memory", "shm"])
async def test_a_draining_prefill_worker_lives_until_its_kv_is_taken(transport, monkeypatch):
    async with cluster((transport,), prefill__replicas=2, prefill__max_num_batched_tokens=16) as made:
        decode = made.workers[0]
        may_verify = asyncio.Event()
        verify = decode.handover.verify

        async def slow(manifest):
            await may_verify.wait()
            return await verify(manifest)

        monkeypatch.setattr(decode.handover, "verify", slow)
        prompt = [i % 500 for i in range(150)]
        task = asyncio.create_task(events_of(made, request(prompt, max_tokens=10)))
        await until(lambda: any(worker.in_flight() for worker in made.workers[1:]))
        (going,) = [worker for worker in made.workers[1:] if worker.in_flight()]
        drained = asyncio.create_task(going.drain(30.0))
        await asyncio.sleep(0.3)
        assert not drained.done(), "its KV has not been taken"
        may_verify.set()
        await asyncio.wait_for(drained, 5.0)
        assert going.is_idle
        assert going.pool.num_used == 0
        events = await task
        assert tokens_of(events) == oracle(prompt, 10)
        assert going.handover.transfers == 1


async def test_a_prefill_worker_that_must_go_gives_its_prompts_back():
    async with cluster(prefill__replicas=2, prefill__max_num_batched_tokens=8) as made:
        prompt = [i % 500 for i in range(200)]
        task = asyncio.create_task(events_of(made, request(prompt, max_tokens=10)))
        await until(lambda: any(worker.stats().num_steps > 2 for worker in made.workers[1:]))
        (going,) = [worker for worker in made.workers[1:] if worker.in_flight()]
        await going.drain(0.0)
        assert going.is_idle
        assert going.pool.num_used == 0
        assert tokens_of(await task) == oracle(prompt, 10)
        assert going.handover.transfers == 0
