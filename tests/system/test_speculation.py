"""Speculation in the whole walk, on the toy model: what is said is what is said without it, token for token, whatever happens."""

from __future__ import annotations

import asyncio
import json

import pytest

from decode.worker import DecodeWorker
from engine.speculation.speculator import Speculator
from protocol.errors import WorkerLost
from protocol.events import Finished, Tokens
from tests.prophet import Prophet
from tests.system.local import cluster, events_of, oracle, request, teach_that_outputs_are_short, tokens_of

DRAFT = {"decode__speculative_model": "toy"}
NGRAM = {"decode__speculative_method": "ngram", "decode__adapt_speculation": "false"}


def decoders(made) -> list[DecodeWorker]:
    return [worker for worker in made.workers if isinstance(worker, DecodeWorker)]


def speculator(made) -> Speculator:
    drafting = decoders(made)[0].drafting
    assert drafting is not None
    return drafting.speculator


def foretell(made, answers, share_right: float, seed: int = 0, adapts: bool = False, longest: int = 4) -> Prophet:
    """Give every decode worker a guesser that knows the answers."""
    prophet = Prophet(answers, share_right, seed)
    for worker in decoders(made):
        own = worker.drafting.speculator
        own.guesser, own.adapts, own.longest = prophet, adapts, longest
    return prophet


async def answers_of(made, prompts, **sampling):
    """-> (prompt, choice) -> tokens, and per request its events."""
    results = await asyncio.gather(*(events_of(made, request(prompt, **sampling)) for prompt in prompts))
    answers = {
        (tuple(prompt), choice): tokens_of(events, choice)
        for prompt, events in zip(prompts, results, strict=True)
        for choice in range(sampling.get("n", 1))
    }
    return answers, results


def prompts(num: int, length: int = 20) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 512 for j in range(length + i)] for i in range(num)]


SAMPLINGS = [
    {"max_tokens": 24},
    {"max_tokens": 24, "temperature": 1.5, "seed": 9},
    {"max_tokens": 20, "temperature": 1.0, "n": 3, "seed": 4},
    {"max_tokens": 24, "temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 2},
    {"max_tokens": 24, "temperature": 1.5, "min_tokens": 10, "ignore_eos": False, "stop_token_ids": tuple(range(40, 120))},
    {"max_tokens": 12, "prompt_logprobs": 1},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: ",".join(s))
@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_nothing_changes_but_the_number_of_steps(sampling, num_prefill):
    """Through prefix hits too: the same prompts come again and again."""
    async with cluster(prefill__replicas=num_prefill) as made:
        answers, plain = await answers_of(made, prompts(6), **sampling)
        plain_steps = decoders(made)[0].stats().num_steps
    async with cluster(prefill__replicas=num_prefill, **NGRAM) as made:
        for seed in range(4):
            foretell(made, answers, share_right=(0.9, 0.5, 1.0, 0.0)[seed], seed=seed)
            found, results = await answers_of(made, prompts(6), **sampling)
            assert found == answers
            for before, after in zip(plain, results, strict=True):
                assert isinstance(after[-1], Finished)
                assert after[-1].usage.completion_tokens == before[-1].usage.completion_tokens
                assert reasons(before) == reasons(after)
                assert logprobs(before) == logprobs(after)
        stats = decoders(made)[0].stats()
    assert stats.num_drafts > 40
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.num_steps < 4 * plain_steps


def reasons(events):
    return {e.choice: (e.finish_reason, e.stop_reason) for e in events if isinstance(e, Tokens) and e.finish_reason}


def logprobs(events):
    return sorted(
        (e.choice, e.index + i, entry.token, round(entry.logprob, 4))
        for e in events
        if isinstance(e, Tokens)
        for i, entry in enumerate(e.logprobs or ())
    )


async def test_a_step_brings_several_tokens_in_one_frame():
    async with cluster() as made:
        answers, _ = await answers_of(made, prompts(1), max_tokens=25)
    async with cluster(**NGRAM) as made:
        foretell(made, answers, share_right=1.0)
        _, ((*events,),) = await answers_of(made, prompts(1), max_tokens=25)
        stats = decoders(made)[0].stats()
    sizes = [len(event.token_ids) for event in events if isinstance(event, Tokens)]
    assert sizes[0] == 1
    assert set(sizes[1:-1]) == {5}
    assert (stats.accepted_tokens, stats.generation_tokens) == (19, 24)  # the first came from prefill
    assert stats.decode_slots == stats.num_steps == 5


async def test_a_stop_string_amid_a_step_ends_the_answer_there():
    sampling = {"max_tokens": 40}
    async with cluster() as made:
        answers, _ = await answers_of(made, prompts(1), **sampling)
        text = made.tokenizer.decode(next(iter(answers.values())))
        stop = text[12:14]
        plain = await events_of(made, request(prompts(1)[0], stop=(stop,), **sampling))
    async with cluster(**NGRAM) as made:
        foretell(made, answers, share_right=1.0)
        found = await events_of(made, request(prompts(1)[0], stop=(stop,), **sampling))
    texts = ["".join(e.text for e in events if isinstance(e, Tokens)) for events in (plain, found)]
    assert texts[0] == texts[1]
    assert reasons(plain) == reasons(found)
    assert tokens_of(plain) == tokens_of(found)


async def test_max_tokens_and_the_context_end_where_they_do():
    for max_tokens in (1, 2, 3, 5, 6):
        async with cluster(**NGRAM) as made:
            answer = oracle(prompts(1)[0], 64)
            foretell(made, {(tuple(prompts(1)[0]), 0): answer}, share_right=1.0)
            events = await events_of(made, request(prompts(1)[0], max_tokens=max_tokens))
            assert tokens_of(events) == answer[:max_tokens]
    async with cluster(model__max_len=32, **NGRAM) as made:
        foretell(made, {(tuple(prompts(1)[0]), 0): answer}, share_right=1.0)
        events = await events_of(made, request(prompts(1)[0], max_tokens=12))
        assert tokens_of(events) == answer[:12]
        assert reasons(events)[0][0] == "length"


@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_preempted_sequences_go_on(num_prefill):
    asked = prompts(8, 30)
    async with cluster(model__num_blocks_override=30, prefill__replicas=num_prefill, **NGRAM) as made:
        await teach_that_outputs_are_short(made)
        answers = {(tuple(prompt), 0): oracle(prompt, 60) for prompt in asked}
        foretell(made, answers, share_right=0.8)
        found, _ = await answers_of(made, asked, max_tokens=60)
        stats = decoders(made)[0].stats()
    assert found == answers
    assert stats.num_preemptions > 0
    assert stats.accepted_tokens > 20


async def test_a_draft_takes_no_block_that_somebody_needs():
    """Drafts alone never cause a preemption: with room for all that is said there is none."""
    asked = prompts(4, 30)  # 30..33 and 18 tokens: seven blocks of 8 each
    async with cluster(model__num_blocks_override=28, model__max_len=160, **NGRAM) as made:
        answers = {(tuple(prompt), 0): oracle(prompt, 18) for prompt in asked}
        foretell(made, answers, share_right=0.0)
        found, _ = await answers_of(made, asked, max_tokens=18)
        stats = decoders(made)[0].stats()
    assert found == answers
    assert stats.num_preemptions == 0
    assert stats.num_drafts > 0


async def test_kv_of_rejected_tokens_is_nobodys_prefix():
    """Every block that the cache has, recomputed from its tokens by another cluster, gives the same answer."""
    asked = prompts(3, 16)
    async with cluster(**NGRAM) as made:
        answers = {(tuple(prompt), 0): oracle(prompt, 30) for prompt in asked}
        foretell(made, answers, share_right=0.4)
        await answers_of(made, asked, max_tokens=30)
        for prompt in asked:  # go on from what was said: prefix hits on blocks that drafts were written through
            longer = [*prompt, *answers[tuple(prompt), 0][:28]]
            events = await events_of(made, request(longer, max_tokens=6))
            assert tokens_of(events) == oracle(longer, 6)
            assert events[-1].usage.cached_tokens >= 40


async def test_a_stream_survives_its_worker_and_drafts():
    for temperature in (0.0, 1.2):
        sampling = {"max_tokens": 60, "temperature": temperature, "seed": 3}
        async with cluster() as made:
            answers, _ = await answers_of(made, prompts(1), **sampling)
        async with cluster(decode__replicas=2, **NGRAM) as made:
            foretell(made, answers, share_right=0.7)
            events = []
            async for event in made.gateway.generate(request(prompts(1)[0], **sampling)):
                events.append(event)
                if len(events) == 5:
                    (busy,) = [worker for worker in decoders(made) if worker._jobs]
                    for job in list(busy._jobs.values()):
                        busy._soon(lambda job=job, busy=busy: busy._fail(job, "decode", WorkerLost("gone")))
            assert tokens_of(events) == answers[tuple(prompts(1)[0]), 0]
            assert events[-1].usage.num_resumptions == 1


@pytest.mark.parametrize("sizes", [("2", "1"), ("1", "2"), ("2", "2")], ids="x".join)
@pytest.mark.parametrize("method", [NGRAM, DRAFT], ids=["ngram", "draft"])
async def test_groups_verify_as_one_rank_does(sizes, method):
    async with cluster(decode__tp=sizes[0], decode__pp=sizes[1], **method) as made:
        answers = {(tuple(prompt), 0): oracle(prompt, 20) for prompt in prompts(3)}
        if method is NGRAM:
            foretell(made, answers, share_right=0.8)
        else:
            speculator(made).adapts = False
        found, _ = await answers_of(made, prompts(3), max_tokens=20)
        stats = decoders(made)[0].stats()
    assert found == answers
    assert stats.accepted_tokens > 10


# ---- a draft model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: ",".join(s))
@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_a_draft_model_beside_decode(sampling, num_prefill):
    """The toy is its own draft model, so nearly every guess is right, sampled ones included: the two draw the same numbers."""
    async with cluster(prefill__replicas=num_prefill) as made:
        answers, _ = await answers_of(made, prompts(5), **sampling)
    async with cluster(prefill__replicas=num_prefill, decode__adapt_speculation="false", **DRAFT) as made:
        for _ in range(2):
            found, _ = await answers_of(made, prompts(5), **sampling)
            assert found == answers
        stats = decoders(made)[0].stats()
        guesser = speculator(made).guesser
        assert stats.accepted_tokens == stats.draft_tokens > 20 or "repetition_penalty" in sampling or "stop_token_ids" in sampling
        assert stats.accepted_tokens >= 0.7 * stats.draft_tokens
        await made.settle()
        assert len(guesser) == 0
        assert guesser.pool.num_used == 0
        guesser.pool.check_integrity()


async def test_a_draft_model_catches_up_with_a_long_prompt_in_pieces():
    prompt = [(5 * j) % 512 for j in range(400)]
    async with cluster(decode__adapt_speculation="false", **DRAFT) as made:
        guesser = speculator(made).guesser
        guesser._max_tokens = 64
        lengths = []
        run = guesser.runner.run

        def recorded(chunks, *args):
            lengths.append(sum(chunk.num_tokens for chunk in chunks))
            return run(chunks, *args)

        guesser.runner.run = recorded
        events = await events_of(made, request(prompt, max_tokens=40))
        assert tokens_of(events) == oracle(prompt, 40)
        assert max(lengths) <= 64
        assert lengths[:6] == [64] * 6
        assert decoders(made)[0].stats().accepted_tokens >= 20


async def test_a_draft_model_without_blocks_costs_nobody_anything():
    async with cluster(decode__adapt_speculation="false", **DRAFT) as made:
        guesser = speculator(made).guesser
        held = guesser.pool.allocate(guesser.pool.num_free - 5)
        found, _ = await answers_of(made, prompts(6), max_tokens=20)
        assert found == {(tuple(prompt), 0): oracle(prompt, 20) for prompt in prompts(6)}
        guesser.pool.release(held)


async def test_a_guesser_that_fails_costs_its_drafts_and_nothing_else():
    async with cluster(**NGRAM) as made:
        prophet = foretell(made, {(tuple(prompts(1)[0]), 0): oracle(prompts(1)[0], 30)}, share_right=1.0)

        def fail(asked):
            raise RuntimeError("no idea")

        prophet.draft = fail
        assert tokens_of(await events_of(made, request(prompts(1)[0], max_tokens=30))) == oracle(prompts(1)[0], 30)
        assert decoders(made)[0].stats().num_drafts == 0


# ---- what others see -------------------------------------------------------------------------------------------------


async def test_the_step_log_and_the_scheduler_are_told(tmp_path):
    async with cluster(model__step_log=str(tmp_path / "s.jsonl"), scheduler__heartbeat_s=0.05, **NGRAM) as made:
        answers = {(tuple(prompts(1)[0]), 0): oracle(prompts(1)[0], 30)}
        foretell(made, answers, share_right=1.0)
        await answers_of(made, prompts(1), max_tokens=30)
        await asyncio.sleep(0.2)
        row = made.status_rows()[0]
    lines = [json.loads(line) for line in (tmp_path / "s.decode-0.jsonl").read_text().splitlines()]
    assert sum(line["accepted"] for line in lines) == 23
    assert max(line["drafted"] for line in lines) == 4
    assert all(0 <= line["slots_unused"] <= 8 + 4 for line in lines)  # a draft may need a block ahead of its time
    assert row["stats"]["accepted_tokens"] == 23


async def test_off_by_default():
    async with cluster() as made:
        assert decoders(made)[0].drafting is None
