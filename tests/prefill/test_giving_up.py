"""A prefill worker's word that it has stopped is given when it is true, and not before."""

from __future__ import annotations

import asyncio

from protocol.errors import DeadlineExceeded
from tests.system.local import cluster, events_of, oracle, request, tokens_of


async def test_a_rank_that_does_not_say_that_it_stopped_keeps_the_blocks_of_both_sides(monkeypatch):
    """It may still store into mapped memory, and read our blocks for it: nothing is guessed, it is asked again."""
    monkeypatch.setattr("prefill.handover.STOP_AGAIN_S", 0.05)
    async with cluster(("shm",), prefill__max_num_batched_tokens=8) as made:
        decode, prefill = made.workers
        assert tokens_of(await events_of(made, request(range(40)))) == oracle(range(40), 8)
        (link,) = prefill.handover.links.values()
        abort, is_mute = link.sender.abort, True

        async def may_be_late(grant_id):
            if is_mute:
                raise DeadlineExceeded("rank 1 did not answer RankAbort within 30.0 s")
            await abort(grant_id)

        monkeypatch.setattr(link.sender, "abort", may_be_late)
        walk = made.gateway.generate(request(range(100, 400)))
        reading = asyncio.create_task(anext(walk))
        async with asyncio.timeout(5):
            while not prefill._active:
                await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await walk.aclose()
        await asyncio.sleep(0.3)
        assert decode.pool.num_quarantined > 0, "they were given back while somebody may store into them"
        assert prefill.pool.num_used > 0, "they were given back while somebody may read them"
        assert not prefill.is_idle
        is_mute = False
        async with asyncio.timeout(5):
            while decode.pool.num_quarantined or prefill.pool.num_used:
                await asyncio.sleep(0.01)
