"""Greedy tokens equal transformers' in float32, token for token, in four set-ups; a divergence is forgiven only at a near-tie.

32 prompts of ragged lengths (1 token, block size and its neighbours, several chunks) x 64 tokens. Each set-up runs the whole
walk; shm and tcp are the real transports, with their threads, sockets and mapped memory, in one process.

The judge reads prompt and answer in one forward pass: if each token is transformers' best one after all the tokens before it,
the answer is transformers' greedy answer, by induction.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.local import LocalCluster
from configs.load import load
from decode.worker import DecodeWorker
from models.load import load_model
from models.locate import locate
from protocol.request import Request, SamplingParams
from tests.oracle import NEAR_TIE, Judge, make_checkpoint, make_tokenizer, ragged_prompts
from tests.system.local import events_of, tokens_of

NUM_PROMPTS, NUM_TOKENS, BLOCK_SIZE = 32, 64, 16
MODELS = ("bundled", "llama", "mistral", "qwen2", "qwen3")
SETUPS = {
    "offline": ({"prefill.replicas": 0, "model.enable_prefix_caching": False}, ("memory",)),
    "decode-only": ({"prefill.replicas": 0, "decode.replicas": 2, "decode.max_num_seqs": 8}, ("memory",)),
    "1 + 1 over shm": ({"prefill.replicas": 1}, ("shm",)),
    "2 + 2 over tcp": ({"prefill.replicas": 2, "decode.replicas": 2}, ("tcp",)),
}


@pytest.fixture(scope="module", params=MODELS)
def judged(request, tmp_path_factory):
    """(folder, loaded model, prompts, judge): made once per family."""
    if request.param == "bundled":
        folder = locate("bundled")
    else:
        folder = make_tokenizer(make_checkpoint(request.param, tmp_path_factory.mktemp(request.param)))
    loaded = load_model(str(folder))
    prompts = ragged_prompts(NUM_PROMPTS, BLOCK_SIZE, min(loaded.config.vocab_size, 4000), longest=120)
    return folder, loaded, prompts, Judge(folder)


def first_departure(judge: Judge, prompt: list[int], token_ids: list[int]) -> str | None:
    """None if every token is the judge's best after those before it, or (printed) within a near-tie of it; else a sentence."""
    logprobs = judge.logprobs([*prompt, *token_ids])[len(prompt) - 1 : -1]
    best = logprobs.argmax(-1).tolist()
    for index, (wanted, found) in enumerate(zip(best, token_ids, strict=True)):
        gap = float(logprobs[index, wanted] - logprobs[index, found])
        if wanted != found and gap > NEAR_TIE:
            return f"token {index}: {found} instead of {wanted}, logit gap {gap:.2e}"
        if wanted != found:
            print(f"near-tie: token {index}: {found} instead of {wanted}, logit gap {gap:.2e}")
    return None


@pytest.mark.parametrize("setup", SETUPS)
def test_greedy_tokens_equal_transformers(judged, setup):
    folder, loaded, prompts, judge = judged
    keys, transports = SETUPS[setup]
    sets = {
        "model.name": str(folder),
        "model.block_size": BLOCK_SIZE,
        "model.num_blocks_override": 400,
        "prefill.max_num_batched_tokens": 48,
        "decode.max_num_batched_tokens": 64,
        "scheduler.disaggregation_threshold": 0,
        "scheduler.tpot_target_s": 60,
        **keys,
    }
    found = asyncio.run(generate(sets, transports, loaded, prompts))
    assert all(len(token_ids) == NUM_TOKENS for token_ids in found)
    stories = [
        f"prompt {i} of {len(prompts[i])} tokens, {setup}: {story}"
        for i, token_ids in enumerate(found)
        if (story := first_departure(judge, prompts[i], token_ids)) is not None
    ]
    assert not stories, "\n".join(stories)


async def generate(sets, transports, loaded, prompts) -> list[list[int]]:
    sets = {"decode.max_num_seqs": 32, **sets}
    made = LocalCluster(load(flags=sets, env={}).config, loaded, transports=transports)
    await made.start()
    try:
        order = list(range(len(prompts)))
        random.Random(1).shuffle(order)
        wanted = {
            i: Request(
                request_id=f"r{i}",
                model=str(sets["model.name"]),
                prompt_token_ids=tuple(prompts[i]),
                sampling=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
            )
            for i in order
        }
        results = dict(zip(order, await asyncio.gather(*(events_of(made, wanted[i]) for i in order)), strict=True))
        if "prefill.replicas" in sets and sets["prefill.replicas"]:
            transfers = sum(worker.stats().transfers for worker in made.workers if isinstance(worker, DecodeWorker))
            assert transfers == len(prompts)
        await made.settle()
    finally:
        await made.close()
    return [tokens_of(results[i]) for i in range(len(prompts))]
