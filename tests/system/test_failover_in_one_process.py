"""Workers that die under running requests, in one process on the toy model: nothing lost, repeated, altered or left behind."""

from __future__ import annotations

import asyncio

import pytest

from decode.worker import DecodeWorker
from protocol.events import Finished, Tokens
from protocol.messages import TokenFrame
from tests.system.local import cluster, events_of, oracle, request, tokens_of


class StopsAfter:
    """A detokenizer whose stop string comes with the n-th token."""

    def __init__(self, num_tokens: int | None) -> None:
        self.num_tokens = num_tokens
        self.count = 0

    def feed(self, token_ids):
        self.count += len(token_ids)
        return "x", ("STOP" if self.num_tokens is not None and self.count >= self.num_tokens else None)

    def flush(self) -> str:
        return ""


async def kill(made, worker) -> None:
    """As kill -9 would: its loop, its heartbeats and its connections end at once."""
    index = made.workers.index(worker)
    made._loops[index].cancel()
    await made._agents[index].close()
    await worker._network.close()
    for others in (made.workers, made._loops, made._agents, made.engines):
        others.pop(index)


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def decode_workers(made):
    return [worker for worker in made.workers if isinstance(worker, DecodeWorker)]


async def test_a_token_that_never_comes_is_missed_while_later_ones_do(monkeypatch):
    """The gateway holds a gap for gateway.token_timeout_s, not until the worker has nothing more to say."""
    async with cluster(decode__replicas=2, gateway__token_timeout_s=0.3) as made:
        for worker in decode_workers(made):
            compute = worker._compute

            async def slowly(function, compute=compute):
                await asyncio.sleep(0.01)
                return await compute(function)

            worker._compute = slowly
        handle, lost = made.gateway.handle, []

        async def loses_one(peer, message):
            if isinstance(message, TokenFrame) and message.updates[0].index == 5 and not lost:
                lost.append(message)
                return None
            return await handle(peer, message)

        made.gateway._network.handler = loses_one
        started = asyncio.get_running_loop().time()
        tokens, missed_for = [], 0.0
        async for event in made.gateway.generate(request(range(40), max_tokens=400)):
            if isinstance(event, Tokens):
                tokens += event.token_ids
                if lost and not missed_for:
                    missed_for = asyncio.get_running_loop().time() - started
        assert lost
        assert tokens == oracle(range(40), 400)
        assert missed_for < 2.0


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_dead_worker_costs_no_token(role):
    prompts = [[i, *range(40)] for i in range(6)]
    async with cluster(prefill__replicas=2, decode__replicas=2, prefill__max_num_batched_tokens=16) as made:
        tasks = [asyncio.create_task(events_of(made, request(p, max_tokens=60))) for p in prompts]
        is_role = [w for w in made.workers if isinstance(w, DecodeWorker) == (role == "decode")]
        await until(lambda: any(w.stats().num_running for w in is_role))
        victim = max(is_role, key=lambda w: w.stats().num_running)
        await kill(made, victim)
        results = await asyncio.gather(*tasks)
        for prompt, events in zip(prompts, results, strict=True):
            assert tokens_of(events) == oracle(prompt, 60)
        if role == "decode":
            assert sum(events[-1].usage.num_resumptions for events in results) > 0


@pytest.mark.parametrize(("prompt_len", "num_blocks"), [(40, 96), (320, 96)], ids=["small", "fills the pool"])
async def test_choices_that_have_ended_are_not_started_again(prompt_len, num_blocks):
    """n = 4, one choice stopped by a stop string; then their decode worker dies."""
    async with cluster(prefill__replicas=0, decode__replicas=2, model__num_blocks_override=num_blocks) as made:
        stops = iter([None, 3, None, None])
        made.gateway._detokenizer = lambda _: StopsAfter(next(stops))
        wanted = request(list(range(prompt_len)), n=4, max_tokens=60, temperature=1.5)
        task = asyncio.create_task(events_of(made, wanted))
        await until(lambda: any(len(s) > 12 + prompt_len for w in decode_workers(made) for s in w._sequences.running))
        await kill(made, next(w for w in decode_workers(made) if w.in_flight()))
        (survivor,) = decode_workers(made)
        seen: set[int] = set()

        def resumed() -> bool:
            seen.update(choice for job in survivor._jobs.values() for choice in job.sequences)
            return task.done()

        await until(resumed, 30)
        events = task.result()
    assert isinstance(events[-1], Finished)
    assert seen == {0, 2, 3}
    assert [len(tokens_of(events, choice)) for choice in range(4)] == [60, 3, 60, 60]


@pytest.mark.parametrize("replicas", [0, 1], ids=["decode only", "1 + 1"])
async def test_a_stop_string_ends_the_work_too(replicas):
    async with cluster(prefill__replicas=replicas) as made:
        made.gateway._detokenizer = lambda _: StopsAfter(3)
        events = await events_of(made, request(list(range(40)), max_tokens=300))
        (worker,) = decode_workers(made)
        await until(lambda: worker.is_idle, 2.0)
        assert len(tokens_of(events)) == 3
        assert [e.stop_reason for e in events if isinstance(e, Tokens)][-1] == "STOP"
        assert worker.stats().generation_tokens < 20


async def test_a_prompt_is_scored_once_also_when_it_is_preempted_halfway():
    async with cluster(prefill__replicas=0, decode__max_num_batched_tokens=64, decode__max_num_seqs=8) as made:
        (worker,) = decode_workers(made)
        task = asyncio.create_task(events_of(made, request(list(range(140)), max_tokens=3, prompt_logprobs=1)))
        await until(lambda: any(0 < s.num_computed < 140 for s in worker._sequences.running))
        worker._soon(lambda: worker._sequences.preempt(worker._sequences.running[0]))
        events = await task
    assert len(events[0].logprobs) == 140
    assert [entry is None for entry in events[0].logprobs].count(True) == 1


async def test_an_error_outside_the_model_ends_the_request_and_not_the_loop(monkeypatch):
    async with cluster(prefill__replicas=0) as made:
        (worker,) = decode_workers(made)
        emit = worker._emit
        monkeypatch.setattr(worker, "_emit", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
        events = await events_of(made, request(list(range(20))))
        assert events[-1].failure.kind == "InternalError"
        monkeypatch.setattr(worker, "_emit", emit)
        assert tokens_of(await events_of(made, request(list(range(20))))) == oracle(list(range(20)), 8)
