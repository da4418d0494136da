"""What a decode worker can be made to do without, for measuring: the answers stay, and what is missing is missing."""

from __future__ import annotations

import asyncio

import pytest

from tests.system.local import cluster, events_of, oracle, request, tokens_of

PROMPTS = [list(range(5 + i, 45 + 3 * i)) for i in range(6)]
LENGTHS = [6, 30, 12, 9, 25, 4]


async def answers(made, gap_s: float = 0.0) -> list[list[int]]:
    async def one(index: int) -> list[int]:
        await asyncio.sleep(index * gap_s)
        return tokens_of(await events_of(made, request(PROMPTS[index], max_tokens=LENGTHS[index])))

    return await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize("without", ["continuous-batching", "paging"])
async def test_the_answers_are_the_same(without: str, num_prefill: int):
    async with cluster(decode__without=without, prefill__replicas=num_prefill, model__max_len=128) as made:
        got = await answers(made, 0.002)
    assert got == [oracle(prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_a_static_batch_takes_nobody_in_before_it_is_over(num_prefill: int):
    async with cluster(decode__without="continuous-batching", prefill__replicas=num_prefill) as made:
        decode = next(worker for worker in made.workers if worker.settings.incarnation.startswith("decode"))
        steps: list[set[str]] = []
        run = decode.runner.run

        def recorded(chunks, *more, **named):
            steps.append({chunk.sequence.request.request_id for chunk in chunks})
            return run(chunks, *more, **named)

        decode.runner.run = recorded
        await answers(made, 0.002)
    for before, after in zip(steps, steps[1:], strict=False):
        assert after <= before or not (after & before), "somebody joined a batch under way"


@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_without_paging_a_sequence_holds_all_it_may_ever_need(num_prefill: int):
    async with cluster(decode__without="paging", prefill__replicas=num_prefill, model__max_len=128) as made:
        decode = next(worker for worker in made.workers if worker.settings.incarnation.startswith("decode"))
        held: list[int] = []
        run = decode.runner.run

        def recorded(chunks, *more, **named):
            held.extend(len(sequence.blocks) for sequence in decode._sequences.running)
            return run(chunks, *more, **named)

        decode.runner.run = recorded
        await answers(made)
    assert held
    assert set(held) == {128 // 8}


async def test_without_admission_nobody_is_refused_for_a_promise():
    keys = {"scheduler__ttft_target_s": 1e-6, "scheduler__tpot_target_s": 1e-6}
    for admission in (True, False):
        async with cluster(scheduler__admission=admission, **keys) as made:
            assert made.service.scheduler.admission is admission
            await events_of(made, request(range(5, 40)))
