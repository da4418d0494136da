"""The whole walk with pools too small for prompts that return: evicted prefixes come back from host memory, whole or not at all."""

from __future__ import annotations

import pytest

from tests.system.local import cluster, events_of, oracle, request, tokens_of

PROMPT = list(range(100, 180))  # 10 blocks
OTHERS = [list(range(1000 * i, 1000 * i + 80)) for i in range(1, 6)]  # together more than a pool holds
KEYS = {"model__num_blocks_override": 32, "model__host_cache_bytes": "1MiB"}


async def answered(made, prompt):
    assert tokens_of(await events_of(made, request(prompt))) == oracle(prompt, 8)


def tiers(made):
    return [worker.pool.tier for worker in made.workers]


@pytest.mark.parametrize("transports", [("memory",), ("shm",)], ids=lambda t: t[0])
@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_an_evicted_prefix_is_hit_again(num_prefill, transports):
    async with cluster(transports, prefill__replicas=num_prefill, **KEYS) as made:
        await answered(made, PROMPT)
        for other in OTHERS:
            await answered(made, other)
        before = [worker.stats() for worker in made.workers]
        await answered(made, PROMPT)
        after = [worker.stats() for worker in made.workers]
        # With a prefill worker the decode worker has every whole block in its own tier, and grants none of them.
        decode = 0
        assert after[decode].host_tier_restored - before[decode].host_tier_restored >= 9
        assert after[decode].prefix_hits - before[decode].prefix_hits >= 72
        for old, new in zip(before, after, strict=True):
            assert old.host_tier_stored > 0
            assert new.host_tier_digest_failures == 0
            assert 0 < new.host_tier_bytes <= 1 << 20


@pytest.mark.parametrize("num_prefill", [0, 1])
async def test_spoilt_host_memory_changes_no_answer(num_prefill):
    async with cluster(prefill__replicas=num_prefill, **KEYS) as made:
        await answered(made, PROMPT)
        for other in OTHERS:
            await answered(made, other)
        for tier in tiers(made):
            for place, block_hash in enumerate(list(tier._slots)):
                tier.spoil(block_hash, place % tier._block_nbytes)
        restored = [worker.stats().host_tier_restored for worker in made.workers]
        await answered(made, PROMPT)
        assert made.workers[0].stats().host_tier_digest_failures >= 1
        assert [worker.stats().host_tier_restored for worker in made.workers] == restored


async def test_off_by_default():
    async with cluster() as made:
        assert tiers(made) == [None, None]
        await answered(made, PROMPT)
        assert made.workers[0].stats().host_tier_stored == 0
