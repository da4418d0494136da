"""`--preemption-mode swap` in the whole walk: sequences that give up their blocks go on where they were, from host memory."""

from __future__ import annotations

import asyncio
import random

import pytest

from decode.worker import DecodeWorker
from tests.system.local import cluster, events_of, oracle, request, teach_that_outputs_are_short, tokens_of

RNG = random.Random(11)
PROMPTS = [[RNG.randrange(512) for _ in range(30)] for _ in range(8)]


async def crowd(made, **sampling):
    """More than fits. -> the decode worker's statistics, all answers checked."""
    await teach_that_outputs_are_short(made)
    asked = [request(prompt, max_tokens=60, **sampling) for prompt in PROMPTS]
    results = await asyncio.gather(*(events_of(made, one) for one in asked))
    for prompt, events in zip(PROMPTS, results, strict=True):
        assert tokens_of(events) == oracle(prompt, 60)
    (worker,) = [worker for worker in made.workers if isinstance(worker, DecodeWorker)]
    stats = worker.stats()
    assert stats.num_preemptions > 0
    return worker, stats


def recomputed(worker) -> int:
    """Tokens that were computed although they had been before."""
    stats = worker.stats()
    return stats.prompt_tokens + stats.decode_slots


@pytest.mark.parametrize("num_prefill", [0, 1])
@pytest.mark.parametrize("caches", ["true", "false"])
async def test_what_was_computed_is_not_computed_again(num_prefill, caches):
    keys = {"model__num_blocks_override": 30, "prefill__replicas": num_prefill, "model__enable_prefix_caching": caches}
    async with cluster(**keys) as made:
        worker, stats = await crowd(made)
        again = recomputed(worker)
        assert stats.swapped_out == 0
    async with cluster(decode__preemption_mode="swap", **keys) as made:
        worker, stats = await crowd(made)
        assert stats.swapped_in > 0
        assert stats.swapped_in <= stats.swapped_out
        assert stats.host_tier_digest_failures == 0
        assert recomputed(worker) < again
        await made.settle()
        assert not worker._sequences._swap


async def test_spoilt_memory_changes_no_answer():
    keys = {"model__num_blocks_override": 30, "model__enable_prefix_caching": "false", "decode__preemption_mode": "swap"}
    async with cluster(**keys) as made:
        tier = [w for w in made.workers if isinstance(w, DecodeWorker)][0]._sequences._swap._tier
        store = tier.store

        def spoiling(evicted):
            store(evicted)
            for _, key in evicted[::2]:
                tier.spoil(key, RNG.randrange(100))

        tier.store = spoiling
        _, stats = await crowd(made)
        assert stats.host_tier_digest_failures > 0


async def test_a_tier_of_one_block_is_enough_to_be_right():
    async with cluster(model__num_blocks_override=30, decode__preemption_mode="swap", model__host_cache_bytes="2KiB") as made:
        worker, stats = await crowd(made)
        assert stats.host_tier_bytes <= 2048
