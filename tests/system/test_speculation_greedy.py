"""With real weights: greedy tokens equal transformers' with speculation on, whoever guesses and however badly."""

from __future__ import annotations

import asyncio

import pytest

from cluster.local import LocalCluster
from configs.load import load
from models.load import load_model
from protocol.request import Request, SamplingParams
from tests.oracle import Judge, make_checkpoint, make_tokenizer, ragged_prompts
from tests.system.local import events_of, tokens_of
from tests.system.test_greedy_equality import first_departure

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The target, and a draft model that knows nothing of it."""
    target = make_tokenizer(make_checkpoint("llama", tmp_path_factory.mktemp("target")))
    other = make_checkpoint("llama", tmp_path_factory.mktemp("draft"), seed=5, num_hidden_layers=1, hidden_size=24)
    return target, make_tokenizer(other)


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize("guesser", ["ngram", "itself", "another"])
async def test_greedy_equals_transformers(folders, guesser, num_prefill):
    target, other = folders
    prompts = ragged_prompts(10, 16, 199, longest=80)
    prompts += [prompt[:12] * 5 for prompt in prompts[6:8]]  # of which a lookup finds something
    model = {"itself": str(target), "another": str(other)}.get(guesser)
    keys = (
        {"decode.speculative_method": "ngram", "decode.prompt_lookup_min": 1}
        if model is None
        else {"decode.speculative_model": model}
    )
    config = load(
        flags={
            "model.name": str(target), "model.block_size": 16, "model.num_blocks_override": 128, "model.max_len": 256,
            "prefill.replicas": num_prefill, "scheduler.disaggregation_threshold": 0, "decode.adapt_speculation": False, **keys,
        },
        env={},
    ).config  # fmt: skip
    made = LocalCluster(config, load_model(str(target)), encoded=True, transports=("memory",))
    await made.start()
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        asked = [
            Request(request_id=str(i), model=str(target), prompt_token_ids=tuple(prompt), sampling=sampling)
            for i, prompt in enumerate(prompts)
        ]
        answers = [tokens_of(events) for events in await asyncio.gather(*(events_of(made, one) for one in asked))]
        stats = made.workers[0].stats()
        await made.settle()
    finally:
        await made.close()
    judge = Judge(target)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        assert first_departure(judge, prompt, answer) is None
    assert stats.num_drafts > 10
    if guesser == "itself":
        assert stats.accepted_tokens >= 0.95 * stats.draft_tokens
    if guesser == "another":
        assert stats.accepted_tokens < 0.3 * stats.draft_tokens
