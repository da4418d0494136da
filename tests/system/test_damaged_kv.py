"""KV in the prefix cache that turned into NaN: one request fails and says so, and the next one computes the prompt anew."""

from __future__ import annotations

import msgspec
import pytest

from protocol.events import Failed
from tests.system.local import cluster, events_of, request, tokens_of

KEYS = {"model__name": "bundled", "model__block_size": 16, "scheduler__disaggregation_threshold": 0}
PROMPT = [7, 11, 13, 17, 19, 23, 29, 31] * 9


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_damaged_prefix_is_forgotten_by_the_request_that_meets_it(role):
    async with cluster(**KEYS, prefill__replicas=int(role == "prefill")) as made:

        def asked():
            return msgspec.structs.replace(request(PROMPT, max_tokens=6), model="bundled")

        first = tokens_of(await events_of(made, asked()))
        await made.settle()
        worker = next(w for w in made.workers if type(w).__name__.lower().startswith(role))
        damaged = [worker.pool._block_of[h] for h in worker.pool.cached_hashes()]
        assert len(damaged) >= 4
        for block in damaged[:2]:
            worker.runner.fill_block(block, float("nan"))
        (failed,) = await events_of(made, asked())
        assert isinstance(failed, Failed)
        assert "not finite" in failed.failure.message
        await made.settle()
        assert tokens_of(await events_of(made, asked())) == first
