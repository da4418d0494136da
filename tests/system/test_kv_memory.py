"""How few KV blocks a decode worker takes: choices share their prompt's, and little of what is allocated holds nothing."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from decode.worker import DecodeWorker
from tests.system.local import cluster, events_of, oracle, request, tokens_of


async def most_blocks_used(num_choices: int, prompt_len: int, block_size: int, num_prefill: int) -> int:
    """While the last of the choices still runs, at most."""
    prompt = [(3 * j) % 512 for j in range(prompt_len)]
    async with cluster(
        model__block_size=block_size, model__num_blocks_override=400, model__max_len=4096, prefill__replicas=num_prefill,
    ) as made:  # fmt: skip
        (worker,) = [worker for worker in made.workers if isinstance(worker, DecodeWorker)]
        used = []
        execute = worker._execute

        async def recorded(chunks):
            used.append(worker.pool.num_used)
            return await execute(chunks)

        worker._execute = recorded
        events = await events_of(made, request(prompt, n=num_choices, max_tokens=8))
        for choice in range(num_choices):
            assert tokens_of(events, choice) == oracle(prompt, 8)
    return max(used)


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("prompt_len", [2048, 2000])
async def test_eight_choices_take_little_more_than_one(num_prefill, block_size, prompt_len):
    one = await most_blocks_used(1, prompt_len, block_size, num_prefill)
    eight = await most_blocks_used(8, prompt_len, block_size, num_prefill)
    print(f"prompt {prompt_len}, blocks of {block_size}: {one} blocks for one choice, {eight} for eight, {eight / one:.3f} x")
    assert eight <= 1.2 * one
    assert eight >= one + 7  # each has a block of its own to write in


@pytest.mark.parametrize(("block_size", "limit"), [(16, 0.04), (32, 0.10)])
@pytest.mark.parametrize("method", [None, "ngram"])
async def test_little_of_what_is_allocated_is_empty(tmp_path, block_size, limit, method):
    """Chat-like lengths, many at once, through prefill and decode: unused slots over allocated ones, mean over the steps."""
    rng = random.Random(4)
    lengths = [(min(1600, int(rng.lognormvariate(5.8, 0.8))) + 8, rng.randint(8, 60)) for _ in range(48)]
    keys = {"model__block_size": block_size, "model__num_blocks_override": 16000 // block_size, "model__max_len": 2048}
    if method is not None:
        keys |= {"decode__speculative_method": method, "decode__adapt_speculation": "false", "decode__prompt_lookup_min": 1}
    async with cluster(model__step_log=str(tmp_path / "s.jsonl"), **keys) as made:

        async def ask(prompt_len: int, output_len: int) -> None:
            prompt = [rng.randrange(512) for _ in range(prompt_len)]
            assert len(tokens_of(await events_of(made, request(prompt, max_tokens=output_len)))) == output_len

        await asyncio.gather(*(ask(*one) for one in lengths))
    lines = [json.loads(line) for line in (tmp_path / "s.decode-0.jsonl").read_text().splitlines()]
    unused = sum(line["slots_unused"] for line in lines)
    allocated = sum(line["blocks_used"] * block_size for line in lines)
    mean_len = sum(p + o / 2 for p, o in lengths) / len(lengths)
    print(f"blocks of {block_size}, {mean_len:.0f} tokens a sequence: {unused / allocated:.2%} of {allocated} slots unused")
    assert allocated > 0
    assert unused / allocated <= limit
