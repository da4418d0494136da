"""The whole walk in one process on the toy model, whose next token is a hash of all the KV it reads.

Equality with the oracle therefore means: every byte of KV was this request's own, whichever worker computed it, however it
travelled, whatever was shared, preempted or copied on the way.
"""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from protocol.errors import InvalidRequest, from_failure
from protocol.events import Failed, Finished
from tests.system.local import cluster, events_of, oracle, request, tokens_of

SETUPS = {
    "decode only": {"prefill__replicas": 0},
    "1 + 1": {},
    "2 + 2": {"prefill__replicas": 2, "decode__replicas": 2},
    "threshold": {"scheduler__disaggregation_threshold": 24},
    "small chunks": {
        "prefill__max_num_batched_tokens": 8,
        "decode__max_num_batched_tokens": 64,
        "decode__max_num_seqs": 4,
    },
    "no prefix cache": {"model__enable_prefix_caching": False},
}


@pytest.mark.parametrize("keys", SETUPS.values(), ids=SETUPS.keys())
async def test_tokens_equal_the_oracle(keys):
    rng = random.Random(7)
    lengths = [1, 7, 8, 9, 15, 16, 17, 40, 63, 64, 65, 100]
    prompts = [[rng.randrange(512) for _ in range(n)] for n in lengths]
    async with cluster(**keys) as made:
        results = await asyncio.gather(*(events_of(made, request(p, max_tokens=12)) for p in prompts))
        for prompt, events in zip(prompts, results, strict=True):
            assert tokens_of(events) == oracle(prompt, 12)
            assert events[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("keys", [{}, {"prefill__replicas": 0}], ids=["1 + 1", "decode only"])
async def test_shared_prefixes_hit_the_cache_and_change_nothing(keys):
    rng = random.Random(3)
    common = [rng.randrange(512) for _ in range(50)]
    async with cluster(**keys) as made:
        for round_ in range(3):
            prompts = [[*common[: 10 + 10 * i], *(rng.randrange(512) for _ in range(5))] for i in range(5)]
            results = await asyncio.gather(*(events_of(made, request(p)) for p in prompts))
            for prompt, events in zip(prompts, results, strict=True):
                assert tokens_of(events) == oracle(prompt, 8)
            if round_:
                assert sum(events[-1].usage.cached_tokens for events in results) >= 80


async def test_another_salt_shares_nothing():
    prompt = list(range(64))
    async with cluster() as made:
        salted = [request(prompt) for _ in range(2)]
        first = await events_of(made, salted[0])
        import msgspec

        second = await events_of(made, msgspec.structs.replace(salted[1], cache_salt="another tenant"))
        third = await events_of(made, request(prompt))
    assert first[-1].usage.cached_tokens == second[-1].usage.cached_tokens == 0
    assert third[-1].usage.cached_tokens > 0
    assert tokens_of(first) == tokens_of(second) == tokens_of(third)


@pytest.mark.parametrize("keys", [{}, {"prefill__replicas": 0}], ids=["1 + 1", "decode only"])
@pytest.mark.parametrize("length", [1, 8, 13, 40])
async def test_n_choices_share_the_prompt_and_part_ways(keys, length):
    prompt = list(range(100, 100 + length))
    async with cluster(**keys) as made:
        greedy = await events_of(made, request(prompt, n=3))
        for choice in range(3):
            assert tokens_of(greedy, choice) == oracle(prompt, 8)
        sampled = await events_of(made, request(prompt, n=4, temperature=2.0, seed=5, max_tokens=10))
        alone = await events_of(made, request(prompt, n=1, temperature=2.0, seed=5, max_tokens=10))
    answers = [tuple(tokens_of(sampled, choice)) for choice in range(4)]
    assert len(set(answers)) > 1
    assert list(answers[0]) == tokens_of(alone)  # random numbers do not depend on the batch


@pytest.mark.parametrize("keys", [{}, {"prefill__replicas": 0}], ids=["1 + 1", "decode only"])
async def test_preemption_resumes_exactly(keys):
    rng = random.Random(11)
    prompts = [[rng.randrange(512) for _ in range(30)] for _ in range(8)]
    async with cluster(model__num_blocks_override=30, decode__max_num_seqs=8, **keys) as made:
        for i in range(30):  # the scheduler learns that outputs are short, and so places more than will fit
            await events_of(made, request([i, i], max_tokens=1))
        results = await asyncio.gather(*(events_of(made, request(p, max_tokens=60)) for p in prompts))
        preemptions = sum(worker.stats().num_preemptions for worker in made.workers)
    assert preemptions > 0
    for prompt, events in zip(prompts, results, strict=True):
        assert tokens_of(events) == oracle(prompt, 60)


async def test_a_request_may_end_with_its_first_token():
    async with cluster() as made:
        events = await events_of(made, request(list(range(40)), max_tokens=1))
        assert tokens_of(events) == oracle(list(range(40)), 1)
        await made.settle()


async def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind():
    rng = random.Random(5)
    async with cluster(prefill__max_num_batched_tokens=16) as made:

        async def leave(after: int) -> None:
            generation = made.gateway.generate(request([rng.randrange(512) for _ in range(60)], max_tokens=40))
            task = asyncio.create_task(consume(generation, after))
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await generation.aclose()

        async def consume(generation, after: int) -> None:
            seen = 0
            async for _ in generation:
                seen += 1
                if seen == after:
                    return

        for _ in range(10):
            await asyncio.gather(*(leave(rng.randrange(1, 30)) for _ in range(6)))
        await made.settle()
        assert made.gateway.num_in_flight == 0
        assert made.service.scheduler.status(asyncio.get_running_loop().time())["in_flight"]["total"] == 0


async def test_what_can_never_fit_is_refused_with_the_knob():
    async with cluster(model__num_blocks_override=8) as made:
        events = await events_of(made, request(list(range(40)), max_tokens=100))
        assert isinstance(events[-1], Failed)
        with pytest.raises(InvalidRequest, match="num-gpu-blocks-override"):
            raise from_failure(events[-1].failure)


async def test_logprobs_and_prompt_logprobs_come_with_their_tokens():
    prompt = list(range(30))
    async with cluster() as made:
        events = await events_of(made, request(prompt, logprobs=3, prompt_logprobs=2))
    scored = events[0].logprobs
    assert scored[0] is None
    assert [entry.token for entry in scored[1:]] == prompt[1:]
    assert all(len(entry.top) == 2 for entry in scored[1:])
    entries = [entry for event in events[1:] if not isinstance(event, Finished) for entry in event.logprobs]
    assert [entry.token for entry in entries] == oracle(prompt, 8)
    assert all(entry.rank == 1 and entry.top[0] == (entry.token, entry.logprob) for entry in entries)


async def test_logprobs_survive_the_hand_over():
    async with cluster() as made:
        events = await events_of(made, request(list(range(30)), logprobs=1))
    entries = [entry for event in events[:-1] for entry in event.logprobs]
    assert [entry.token for entry in entries] == oracle(list(range(30)), 8)


async def test_a_hand_over_is_in_the_requests_timeline_and_in_the_links():
    """What workers measure reaches the history: both phases of prefill, the transfer, and whose link it went over."""
    wanted = request(list(range(40)))
    async with cluster() as made:
        await events_of(made, wanted)
        await made.settle()
        prefill = next(worker for worker in made.workers if worker.stats().pairs and worker.stats().transfer_s > 0)
        (pair,) = prefill.stats().pairs
        assert (pair.transport, pair.transfers) == ("memory", 1)
        history = made.service.history
        async with asyncio.timeout(10):
            while not (history.requests("", "finished", 1) and history.snapshot(300, False, 0.0)["pools"]["links"]):
                await asyncio.sleep(0.05)
        found = history.request(wanted.request_id)
        (link,) = history.snapshot(300, False, 0.0)["pools"]["links"]
    marks = {mark["name"]: mark["at_ms"] for mark in found["timeline"]}
    order = ["received", "admitted", "reserved", "prefill_start", "prefill_end", "transfer_end", "end"]
    assert [marks[name] for name in order] == sorted(marks[name] for name in order)
    assert marks["transfer_end"] > marks["prefill_end"]
    assert (found["request"]["prefill_worker"], found["request"]["decode_worker"]) == ("prefill:0", "decode:0")
    assert (link["from"], link["to"], link["transport"], link["failures"]) == ("prefill:0", "decode:0", "memory", 0)


async def test_the_step_log_tells_of_every_token(tmp_path):
    """A prompt of 40 in chunks of 16 on the prefill worker; then 11 steps of decode, for the first token came from prefill."""
    wanted, logs = request(list(range(40)), max_tokens=12), {}
    async with cluster(model__step_log=str(tmp_path / "s.jsonl"), prefill__max_num_batched_tokens=16) as made:
        assert tokens_of(await events_of(made, wanted)) == oracle(list(range(40)), 12)
    for role in ("prefill", "decode"):
        logs[role] = [json.loads(line) for line in (tmp_path / f"s.{role}-0.jsonl").read_text().splitlines()]
    assert [line["tokens"].get(wanted.request_id) for line in logs["prefill"]] == [16, 16, 8]
    assert [line["tokens"].get(wanted.request_id) for line in logs["decode"]] == [1] * 11
    assert [line["step"] for line in logs["decode"]] == list(range(1, 12))
    assert sum(line["blocks_allocated"] for line in logs["decode"]) == 7  # 51 tokens with KV, in blocks of 8
    assert all(line["step_s"] > 0 for line in logs["prefill"] + logs["decode"])
