"""Ten thousand flipped bits in the KV stream between prefill and decode: headers, tables, payload, whatever they hit.

No client sees another token than the oracle's, and no worker ends.
"""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from tests.faultproxy import FaultProxy, RandomFlips
from tests.system.local import cluster, events_of, oracle, request, tokens_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

NUM_FLIPS = int(os.environ.get("TANDEM_CHAOS_FLIPS", "10000"))
PROMPT_LEN, OUTPUT_LEN = 24, 3
MEAN_NBYTES = 3000  # between two flips: about the length of one transfer


async def test_ten_thousand_flips(capsys):
    rng = random.Random(29)
    flips = RandomFlips(rng, MEAN_NBYTES)
    keys = {"model__enable_prefix_caching": False, "prefill__max_num_batched_tokens": 256, "scheduler__tpot_target_s": 60}
    async with cluster(("tcp",), **keys) as made:
        decode, prefill = made.workers
        receivers = decode.handover._receivers
        (endpoint,) = receivers.endpoints["tcp"]
        proxy = FaultProxy(endpoint, flips)
        receivers.endpoints["tcp"] = (proxy.endpoint,)
        num_requests = 0
        while flips.count < NUM_FLIPS:
            prompts = [[rng.randrange(512) for _ in range(PROMPT_LEN)] for _ in range(8)]
            results = await asyncio.gather(*(events_of(made, request(prompt, max_tokens=OUTPUT_LEN)) for prompt in prompts))
            for prompt, events in zip(prompts, results, strict=True):
                assert tokens_of(events) == oracle(prompt, OUTPUT_LEN)
            num_requests += len(prompts)
        assert all(not loop.done() for loop in made._loops)
        failures = decode.handover.digest_failures
        with capsys.disabled():
            print(f"\n{flips.count} flips, {num_requests} requests, all exact; {failures} transfers refused by a digest, ", end="")
            print(f"{prefill.stats().transfers_failed} ended otherwise, {proxy.num_connections} connections")
        assert failures > 0
        proxy.close()
