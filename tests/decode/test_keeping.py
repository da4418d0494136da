"""What a prefill worker had written well before it was lost is not written again: the next attempt finds it in the prefix cache."""

from __future__ import annotations

import asyncio

import pytest

from decode.claims import Claims
from engine.blocks import BlockState
from protocol.kv import KVLayout
from protocol.messages import Cancel
from protocol.ticket import Grant, Landed
from tests.system.local import cluster, events_of, oracle, request, tokens_of

PROMPT = [(7 * i) % 500 for i in range(163)]  # 20 full blocks of 8 and 3 tokens


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0)


def grants_of(decode):
    """Every grant that leaves this decode worker from now on."""
    grants = []
    receivers = decode.handover._receivers
    expect = receivers.expect

    async def watched(grant):
        grants.append(grant)
        await expect(grant)

    receivers.expect = watched
    return grants


def hold_after(workers, num_steps):
    """They wait before the step after so many, so that a test finds them amid a prompt however slow it is itself. -> let go on."""
    go_on = asyncio.Event()

    def held(compute):
        left = num_steps

        async def step(call):
            nonlocal left
            left -= 1
            if left < 0:
                await go_on.wait()
            return await compute(call)

        return step

    for worker in workers:
        worker._compute = held(worker._compute)
    return go_on


async def kill(made, worker) -> None:
    """As kill -9 would: its loop, its heartbeats and its connections end at once."""
    index = made.workers.index(worker)
    made._loops.pop(index).cancel()
    await made._agents.pop(index).close()
    await worker._network.close()
    made.workers.remove(worker)
    made.engines.pop(index)


def num_claimed(decode) -> int:
    """Blocks that papers claim in all their rows, of the newest grant."""
    claims = list(decode.handover._claims.values())
    return claims[-1]._num_claimed.count(claims[-1]._num_rows) if claims else 0


@pytest.mark.parametrize("num_chunks", [1, 3])
async def test_a_killed_prefill_worker_leaves_its_verified_blocks(num_chunks):
    async with cluster(prefill__replicas=2, prefill__max_num_batched_tokens=32) as made:
        decode = made.workers[0]
        grants = grants_of(decode)
        go_on = hold_after(made.workers[1:], num_chunks)
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=12)))
        await until(lambda: num_claimed(decode) == 4 * num_chunks)
        claimed = num_claimed(decode)
        (victim,) = [worker for worker in made.workers[1:] if worker.in_flight()]
        await kill(made, victim)
        go_on.set()
        assert tokens_of(await task) == oracle(PROMPT, 12)
        first, second = grants
        assert first.num_cached_blocks == 0
        assert second.num_cached_blocks == claimed >= 4 * num_chunks, "the second attempt writes only the rest"
        assert second.block_ids[:claimed] == first.block_ids[:claimed]
        assert decode.handover.num_kept_blocks == claimed
        assert decode.stats().transfer_bytes == (21 - claimed) * made.engines[0].layout.block_nbytes


async def test_bytes_that_changed_since_they_were_claimed_are_not_kept():
    async with cluster(prefill__replicas=2, prefill__max_num_batched_tokens=32) as made:
        decode = made.workers[0]
        grants = grants_of(decode)
        go_on = hold_after(made.workers[1:], 2)
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=12)))
        await until(lambda: num_claimed(decode) == 8)
        run = made.engines[0].kv.run(1, grants[0].block_ids[5])
        run[3] ^= 1  # a torn store of a writer that is about to die
        (victim,) = [worker for worker in made.workers[1:] if worker.in_flight()]
        await kill(made, victim)
        go_on.set()
        assert tokens_of(await task) == oracle(PROMPT, 12)
        assert grants[1].num_cached_blocks == 5, "up to the damaged one"


async def test_in_mapped_memory_nothing_is_kept_before_the_writer_has_stopped(monkeypatch):
    """Quarantine first: the blocks enter the cache with the writer's acknowledgement, not before."""
    async with cluster(("shm",), prefill__max_num_batched_tokens=32) as made:
        decode, prefill = made.workers
        await events_of(made, request(range(300, 340), max_tokens=2))  # the hand-shake
        may_answer = asyncio.Event()
        stop = prefill.handover.stop_writing

        async def slow(message):
            await may_answer.wait()
            return await stop(message)

        monkeypatch.setattr(prefill.handover, "stop_writing", slow)
        # On its own way the writer would say so at once, as its client's Cancel reaches it too.
        monkeypatch.setattr(prefill.handover.links, "writer_done", lambda grant: None)
        go_on = hold_after([prefill], 2)
        events = made.gateway.generate(request(PROMPT, max_tokens=12))
        task = asyncio.create_task(events.__anext__())
        await until(lambda: num_claimed(decode) == 8)
        (grant_id,) = decode.handover._jobs
        grant = decode.handover._inbound.grant(grant_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await events.aclose()
        go_on.set()
        await until(lambda: decode.pool.num_quarantined > 0)
        await asyncio.sleep(0.05)
        assert decode.pool.num_quarantined == len(grant.block_ids)
        assert decode.handover.num_kept_blocks == 0
        may_answer.set()
        await until(lambda: decode.pool.num_quarantined == 0 and decode.pool.num_used == 0)
        kept = decode.handover.num_kept_blocks
        assert kept >= 8
        assert all(decode.pool.state(block) is BlockState.SEALED for block in grant.block_ids[:kept])
        events = await events_of(made, request(PROMPT, max_tokens=12))
        assert tokens_of(events) == oracle(PROMPT, 12)
        assert events[-1].usage.cached_tokens >= 8 * kept


async def test_without_a_prefix_cache_nothing_is_kept():
    async with cluster(prefill__replicas=2, prefill__max_num_batched_tokens=32, model__enable_prefix_caching=False) as made:
        decode = made.workers[0]
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=4)))
        await until(lambda: num_claimed(decode) >= 8)
        (victim,) = [worker for worker in made.workers[1:] if worker.in_flight()]
        await kill(made, victim)
        assert tokens_of(await task) == oracle(PROMPT, 4)
        assert decode.handover.num_kept_blocks == 0


async def test_a_cancelled_request_gives_everything_back_and_keeps_what_is_good():
    async with cluster(prefill__max_num_batched_tokens=32) as made:
        decode = made.workers[0]
        wanted = request(PROMPT, max_tokens=4)
        events = made.gateway.generate(wanted)
        task = asyncio.create_task(events.__anext__())
        await until(lambda: num_claimed(decode) >= 8)
        await decode.handle(None, Cancel(wanted.request_id))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await events.aclose()
        await until(lambda: decode.pool.num_used == 0)
        assert decode.pool.num_cached == decode.handover.num_kept_blocks >= 8


LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32", model_hash="m")


def landed(row, num_rows, first, count, byte=1):
    return Landed("g", "r", 1, "D", "P", row, num_rows, first, count, bytes([byte]) * (16 * num_rows * count))


def claims(num_tokens=18, num_cached=1):
    grant = Grant("g", "r", 1, "D", "P", (4, 5, 6, 7, 8), num_cached, num_tokens, LAYOUT, 1.0, (), "")
    return Claims(grant, [b"h%d" % i for i in range(num_tokens // 4)])


def test_only_leading_full_blocks_with_all_their_rows_count():
    some = claims()
    assert some.part(1 << 30) is None
    some.put(landed(0, 1, 1, 4))
    assert some.part(1 << 30) is None, "one row of two"
    some.put(landed(1, 1, 1, 2, byte=2))
    grant, manifest = some.part(1 << 30)
    assert (grant.block_ids, grant.num_cached_blocks, grant.num_tokens, manifest.num_written) == ((4, 5, 6), 1, 12, 2)
    assert manifest.digests == b"\x01" * 32 + b"\x02" * 32
    some.put(landed(1, 1, 1, 4, byte=3))
    grant, manifest = some.part(1 << 30)
    assert grant.block_ids == (4, 5, 6, 7), "the last one is not full"
    assert manifest.digests == b"\x01" * 48 + b"\x03" * 48, "what was claimed last counts"
    assert some.part(2 * LAYOUT.block_nbytes)[1].num_written == 2, "no more than may be read again"
