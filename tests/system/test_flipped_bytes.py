"""Any byte of a KV transfer flipped: no altered token reaches a client.

1,000 requests go through the whole walk on the toy model, whose next token hashes every byte of KV it reads. The lane is
wrapped so that the first attempt of every request has one byte, anywhere in its KV, flipped after it was hashed and before it is
read at the other end. Each must be found before decode reads it, tried again, and answered exactly.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.system.local import cluster, events_of, oracle, request, tokens_of

NUM_FLIPS = 1000
PROMPT_LEN, OUTPUT_LEN = 24, 3


class FlippingLane:
    """A lane that changes one bit of one byte on its way, once per grant that is a first attempt: in which layer and run is drawn
    when the grant's first layer comes."""

    def __init__(self, inner, rng: random.Random) -> None:
        self._inner = inner
        self._rng = rng
        self._layers: dict[str, int] = {}
        self.num_flips = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def store(self, transfer, layer, pieces) -> None:
        grant = transfer.grant
        chosen = self._layers.setdefault(grant.grant_id, self._rng.randrange(grant.layout.num_layers))
        if grant.epoch % 2 == 1 and layer == chosen:
            pieces = [(index, data.copy()) for index, data in pieces]
            data = self._rng.choice(pieces)[1].reshape(-1)
            data[self._rng.randrange(data.size)] ^= 1 << self._rng.randrange(8)
            self.num_flips += 1
        self._inner.store(transfer, layer, pieces)


@pytest.mark.parametrize("transport", ["memory", "shm"])
async def test_no_altered_token_reaches_a_client(transport):
    rng = random.Random(20)
    async with cluster(
        (transport,), model__enable_prefix_caching=False, prefill__max_num_batched_tokens=256, scheduler__tpot_target_s=60
    ) as made:
        decode, prefill = made.workers
        lanes: list[FlippingLane] = []

        def tamper(lane):
            lanes.append(FlippingLane(lane, rng))
            return lanes[-1]

        prefill.connector.options["tamper"] = tamper
        found = 0
        while sum(lane.num_flips for lane in lanes) < NUM_FLIPS // 2:  # two transports share the thousand
            prompts = [[rng.randrange(512) for _ in range(PROMPT_LEN)] for _ in range(8)]
            results = await asyncio.gather(*(events_of(made, request(p, max_tokens=OUTPUT_LEN)) for p in prompts))
            for prompt, events in zip(prompts, results, strict=True):
                assert tokens_of(events) == oracle(prompt, OUTPUT_LEN)
            found += len(prompts)
        flips = sum(lane.num_flips for lane in lanes)
        assert decode.handover.digest_failures == flips >= NUM_FLIPS // 2
        print(f"{flips} flips over {transport}, {found} requests, every one found and answered exactly")
