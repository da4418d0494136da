"""Workers of several ranks, prefill and decode of unequal sizes: the same tokens as ever. Ranks are threads of this process.

The toy model's next token is a hash of all KV that it reads, on every rank: one byte that went to the wrong rank, layer, head or
block, or not at all, changes the output.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.local import LocalCluster
from configs.load import load
from protocol.events import Finished
from protocol.request import Request, SamplingParams
from tests.oracle import Judge, first_divergence, make_checkpoint, make_tokenizer, ragged_prompts
from tests.system.local import cluster, events_of, oracle, request, tokens_of

PAIRS = [
    ((4, 1), (2, 1)),  # two KV heads on four ranks: each head is copied
    ((2, 1), (4, 1)),
    ((1, 1), (2, 1)),
    ((2, 1), (1, 1)),
    ((1, 2), (1, 1)),
    ((1, 1), (1, 2)),
    ((2, 2), (1, 2)),
    ((1, 2), (2, 2)),
    ((1, 3), (2, 1)),  # four layers in three stages
    ((1, 4), (1, 3)),
]


def sizes(prefill: tuple[int, int], decode: tuple[int, int]) -> dict[str, int]:
    names = ("prefill__tp", "prefill__pp", "decode__tp", "decode__pp")
    return dict(zip(names, (*prefill, *decode), strict=True))


def name(pair) -> str:
    (a, b), (c, d) = pair
    return f"{a}x{b}-to-{c}x{d}"


def nothing_is_left_on_any_rank(made: LocalCluster) -> None:
    """Blocks are counted by the leader alone; what the other ranks keep is the transfers that they know of."""
    for group in made.groups:
        for rank, part in group.parts.items():
            assert not part._transfers._senders._by_grant, f"rank {rank} still sends"
            if part.receivers is not None:
                assert not part.receivers._arrivals, f"rank {rank} still expects KV"


@pytest.mark.parametrize("pair", PAIRS, ids=name)
@pytest.mark.parametrize("transport", ["memory", "shm"])
async def test_every_pair_gives_the_oracles_tokens(pair, transport):
    rng = random.Random(str(pair))
    if transport == "shm" and pair not in PAIRS[:2] + PAIRS[6:8]:
        pytest.skip("one way of each kind is enough over shm")
    prompts = [[rng.randrange(512) for _ in range(length)] for length in (1, 7, 8, 9, 40, 65, 100)]
    async with cluster(transports=(transport,), prefill__max_num_batched_tokens=48, **sizes(*pair)) as made:
        results = await asyncio.gather(*(events_of(made, request(prompt, max_tokens=12)) for prompt in prompts))
        for prompt, events in zip(prompts, results, strict=True):
            assert isinstance(events[-1], Finished), events[-1]
            assert tokens_of(events) == oracle(prompt, 12)
        transfers = sum(worker.stats().transfers for worker in made.workers if worker.settings.incarnation.startswith("decode"))
        assert transfers == len(prompts)
        await made.settle()
        nothing_is_left_on_any_rank(made)
        rows = {row["role"]: row for row in made.status_rows()}
        assert [(rows[role]["tp"], rows[role]["pp"]) for role in ("prefill", "decode")] == list(pair)
        assert [len(rows[role]["rank_pids"]) for role in ("prefill", "decode")] == [a * b for a, b in pair]


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[6], PAIRS[4]], ids=name)
async def test_choices_share_a_prompt_and_part_ways_on_every_rank(pair):
    """n > 1 copies the prompt's last, partial block once for each choice: each rank copies its own part."""
    prompt = list(range(100, 143))
    async with cluster(**sizes(*pair)) as made:
        greedy = await events_of(made, request(prompt, n=3, max_tokens=10))
        drawn = await events_of(made, request(prompt, n=3, max_tokens=10, temperature=1.0, seed=5))
        local = await events_of(made, request(prompt, n=3, max_tokens=10, temperature=1.0, seed=5, prompt_logprobs=0))
    assert [tokens_of(greedy, choice) for choice in range(3)] == [oracle(prompt, 10)] * 3
    choices = [tokens_of(drawn, choice) for choice in range(3)]
    assert len({tuple(tokens) for tokens in choices}) == 3
    assert [tokens_of(local, choice) for choice in range(3)] == choices, "prefilled by the decode worker itself"


@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[7]], ids=name)
async def test_a_prefix_that_is_kept_is_right_on_every_rank(pair):
    shared = [(3 * i) % 512 for i in range(64)]
    async with cluster(**sizes(*pair)) as made:
        for tail in ([1], [2, 3, 4], [5] * 20):
            events = await events_of(made, request([*shared, *tail], max_tokens=8))
            assert tokens_of(events) == oracle([*shared, *tail], 8)
        assert events[-1].usage.cached_tokens >= 64
        hits = [worker.stats().prefix_hits for worker in made.workers]
        assert all(hit >= 64 for hit in hits), hits


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[5], PAIRS[6]], ids=name)
async def test_clients_that_leave_at_any_moment_leave_nothing_on_any_rank(pair):
    rng = random.Random(11)
    async with cluster(prefill__max_num_batched_tokens=16, **sizes(*pair)) as made:

        async def leave(after: int) -> None:
            generation = made.gateway.generate(request([rng.randrange(512) for _ in range(60)], max_tokens=40))

            async def consume() -> None:
                seen = 0
                async for _ in generation:
                    seen += 1
                    if seen == after:
                        return

            task = asyncio.create_task(consume())
            await asyncio.sleep(rng.random() * 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await generation.aclose()

        stays = [asyncio.create_task(events_of(made, request(range(200, 260), max_tokens=30))) for _ in range(2)]
        for _ in range(3):
            await asyncio.gather(*(leave(rng.randrange(1, 30)) for _ in range(6)))
        for task in stays:
            assert tokens_of(await task) == oracle(list(range(200, 260)), 30)
        await made.settle()
        nothing_is_left_on_any_rank(made)
        async with asyncio.timeout(0.5):  # outcomes under way; heartbeats would not correct it so soon
            while made.service.scheduler.ledger.entries:
                await asyncio.sleep(0)


async def test_preempted_sequences_come_back_on_every_rank():
    prompts = [[(7 * i + j) % 512 for j in range(30)] for i in range(6)]
    async with cluster(model__num_blocks_override=24, decode__max_num_batched_tokens=64, **sizes((2, 1), (1, 2))) as made:
        results = await asyncio.gather(*(events_of(made, request(prompt, max_tokens=24)) for prompt in prompts))
        for prompt, events in zip(prompts, results, strict=True):
            assert tokens_of(events) == oracle(prompt, 24)


async def test_a_scheduler_that_is_replaced_counts_what_runs_again():
    """Streams go on; the successor learns of them from workers and gateways; what is placed next has an epoch of its own."""
    async with cluster(decode__replicas=2, decode__tp=2, scheduler__heartbeat_s=0.05) as made:
        running = [asyncio.create_task(events_of(made, request([i] * 30, max_tokens=200))) for i in range(4)]
        clock = asyncio.get_running_loop().time

        def status() -> dict:
            return made.service.scheduler.status(clock())

        async with asyncio.timeout(10):
            while status()["in_flight"]["decoding"] < 4:
                await asyncio.sleep(0.01)
        await made.replace_scheduler()
        assert status()["in_flight"]["total"] == 0
        async with asyncio.timeout(5):
            while (status()["in_flight"]["total"], len([w for w in status()["workers"] if w["alive"]])) != (4, 3):
                assert not any(task.done() for task in running), "they ended before they were counted"
                await asyncio.sleep(0.01)
        later = asyncio.create_task(events_of(made, request([9] * 30, max_tokens=4)))
        assert tokens_of(await later) == oracle([9] * 30, 4)
        for i, task in enumerate(running):
            assert tokens_of(await task) == oracle([i] * 30, 200)
        async with asyncio.timeout(5):
            while status()["in_flight"]["total"]:
                await asyncio.sleep(0.01)
        made.service.scheduler.check_integrity()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("groups") / "tiny")
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("pair", [((2, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 1), (1, 3)), ((2, 1), (4, 1))], ids=name)
async def test_greedy_output_is_that_of_transformers(checkpoint, pair):
    keys = {key.replace("__", "."): value for key, value in sizes(*pair).items()}
    judge = Judge(checkpoint)
    prompts = ragged_prompts(6, 8, seed=3)
    sets = {"model.name": str(checkpoint), "model.block_size": 8, "model.num_blocks_override": 96, "model.max_len": 256}
    config = load(flags={**sets, "scheduler.disaggregation_threshold": 0, **keys}, env={}).config
    made = LocalCluster(config, encoded=True)
    await made.start()
    try:
        for number, prompt in enumerate(prompts):
            asked = Request(
                request_id=f"judged-{number}",
                model=str(checkpoint),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
            )
            tokens = tokens_of(await events_of(made, asked))
            problem = first_divergence(judge.greedy(prompt, 16), tokens)
            assert problem is None, f"{pair}, prompt of {len(prompt)}: {problem}"
        await made.settle()
    finally:
        await made.close()
