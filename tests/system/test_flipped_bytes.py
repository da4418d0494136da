"""Any byte of a KV transfer flipped: no altered token reaches a client.

1,000 requests go through the whole walk on the toy model, whose next token hashes every byte of KV it reads. The transport is
wrapped so that the first attempt of every request has one byte, anywhere in its KV, flipped after it was hashed. Each must be
found before decode reads it, tried again, and answered exactly.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.system.local import cluster, events_of, oracle, request, tokens_of

NUM_FLIPS = 1000
PROMPT_LEN, OUTPUT_LEN = 24, 3


class FlippingSender:
    """A Sender whose peer's memory changes by one bit in one byte, once per grant that is a first attempt, after it was hashed."""

    def __init__(self, inner, receiving_pool, rng: random.Random) -> None:
        self._inner = inner
        self._pool = receiving_pool
        self._rng = rng
        self._grants: dict[str, object] = {}
        self.num_flips = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def open(self, grant, endpoint) -> None:
        self._grants[grant.grant_id] = grant
        self._inner.open(grant, endpoint)

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        digests = await self._inner.finish(grant_id, timeout)
        grant = self._grants.pop(grant_id)
        written = grant.block_ids[grant.num_cached_blocks :]
        if grant.epoch % 2 == 1 and written:
            run = self._pool.run(self._rng.randrange(grant.layout.num_layers), self._rng.choice(written))
            run[self._rng.randrange(len(run))] ^= 1 << self._rng.randrange(8)
            self.num_flips += 1
        return digests


@pytest.mark.parametrize("transport", ["memory", "shm"])
async def test_no_altered_token_reaches_a_client(transport):
    rng = random.Random(20)
    async with cluster(
        (transport,), model__enable_prefix_caching=False, prefill__max_num_batched_tokens=256, scheduler__tpot_target_s=60
    ) as made:
        decode, prefill = made.workers
        senders: list[FlippingSender] = []
        make = prefill._make_sender

        def make_flipping(endpoint, incarnation):
            senders.append(FlippingSender(make(endpoint, incarnation), made.engines[0].kv, rng))
            return senders[-1]

        prefill._make_sender = make_flipping
        found = 0
        while sum(s.num_flips for s in senders) < NUM_FLIPS // 2:  # two transports share the thousand
            prompts = [[rng.randrange(512) for _ in range(PROMPT_LEN)] for _ in range(8)]
            results = await asyncio.gather(*(events_of(made, request(p, max_tokens=OUTPUT_LEN)) for p in prompts))
            for prompt, events in zip(prompts, results, strict=True):
                assert tokens_of(events) == oracle(prompt, OUTPUT_LEN)
            found += len(prompts)
        flips = sum(s.num_flips for s in senders)
        assert decode.handover.digest_failures == flips >= NUM_FLIPS // 2
        print(f"{flips} flips over {transport}, {found} requests, every one found and answered exactly")
