"""An OpenAI-compatible server behind gateway and scheduler: its tokens are delivered exactly, its faults cost nobody a token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from cluster.local import LocalCluster
from cluster.overflow_life import upstream_of
from configs.load import load
from models.load import load_model
from protocol.errors import CannotServe, ConfigError, WorkerLost, from_failure
from protocol.events import Event, Failed, Finished, Tokens
from tests.system.fake_openai import FakeServer, fake_server
from tests.system.local import events_of, oracle, request, tokens_of

pytestmark = pytest.mark.timeout(40)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@contextlib.asynccontextmanager
async def cluster(server: FakeServer, native: bool = False, with_more: str = "", **keys: Any) -> AsyncIterator[LocalCluster]:
    """native: whether our own decode worker takes work beside the server."""
    sets = {
        "model.name": "toy",
        "model.block_size": 8,
        "model.num_blocks_override": 96,
        "model.max_len": 512,
        "prefill.replicas": 0,
        "scheduler.heartbeat_s": 0.1,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    config = load(flags=sets, env={}, overflow=[f"{server.url},model=m,timeout_s=1{with_more}"]).config
    made = LocalCluster(config, load_model("toy"), encoded=True)
    await made.start()
    try:
        if not native:
            stop_native(made)
        await asyncio.sleep(0.05)
        yield made
        await made.settle()
        assert all(life.worker.is_idle and not life.worker.num_running for life in made.overflow)
    finally:
        await made.close()


def stop_native(made: LocalCluster, stopped: bool = True) -> None:
    for agent in made._agents:
        agent.worker.is_draining = stopped
        agent.beat_now()


def finish_of(events: list[Event], choice: int = 0) -> Tokens:
    return [event for event in events if isinstance(event, Tokens) and event.choice == choice][-1]


async def told(server: FakeServer, number: int) -> None:
    async with asyncio.timeout(10):
        while server.num_told < number:
            await asyncio.sleep(0.005)


async def test_its_tokens_are_delivered_as_they_are() -> None:
    async with fake_server() as server, cluster(server) as made:
        results = await asyncio.gather(*(events_of(made, request([*PROMPT, i], max_tokens=20)) for i in range(6)))
        for i, events in enumerate(results):
            assert tokens_of(events) == oracle([*PROMPT, i], 20)
            assert finish_of(events).finish_reason == "length"
        body = server.bodies[-1]
        assert body["prompt"][:8] == PROMPT
        assert body["return_token_ids"] is True
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (20, 0.0, True)
        await asyncio.sleep(0.3)  # a heartbeat
        (row,) = [row for row in made.service.scheduler.status(0.0)["workers"] if row["name"] == "overflow:0"]
        assert row["stats"]["generation_tokens"] == 120


async def test_parameters_are_mapped_and_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_OVERFLOW_KEY", "sk-1")
    async with fake_server() as server, cluster(server, with_more=",key_env=TEST_OVERFLOW_KEY") as made:
        wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 2**63 + 5, "repetition_penalty": 1.1}
        await events_of(made, request(PROMPT, **wanted, logit_bias={3: -1.0}, stop_token_ids=(250,), min_tokens=2))
        body = server.bodies[-1]
        assert {name: body[name] for name in wanted if name != "seed"} == {k: v for k, v in wanted.items() if k != "seed"}
        assert body["seed"] == 5
        assert (body["logit_bias"], body["stop_token_ids"], body["min_tokens"]) == ({"3": -1.0}, [250], 2)
        assert set(server.keys) == {"Bearer sk-1"}
    monkeypatch.delenv("TEST_OVERFLOW_KEY")
    config = load(env={}, overflow=["http://nowhere/v1,key_env=TEST_OVERFLOW_KEY"]).config
    with pytest.raises(ConfigError, match="TEST_OVERFLOW_KEY"):
        upstream_of(config, config.overflow[0])


async def test_an_end_token_ends_it_where_ours_would() -> None:
    reference = oracle(PROMPT, 30)
    stop = reference[7]
    first = reference.index(stop)
    async with fake_server() as server, cluster(server) as made:
        events = await events_of(made, request(PROMPT, max_tokens=30, stop_token_ids=(stop,)))
        assert tokens_of(events) == reference[: first + 1]
        assert (finish_of(events).finish_reason, finish_of(events).stop_reason) == ("stop", stop)
        async with asyncio.timeout(5):
            while server.num_open:  # the rest is not generated for nobody
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("to_native", [True, False])
async def test_a_stream_that_breaks_off_goes_on_from_its_last_token(to_native: bool) -> None:
    async with fake_server() as server, cluster(server) as made:
        server.cut_after, server.delay_s = 10, 0.01
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=40, n=2)))
        await told(server, 4)
        stop_native(made, not to_native)
        if not to_native:
            async with asyncio.timeout(10):
                while len(server.bodies) < 4:  # a look, two choices, and one of them again
                    await asyncio.sleep(0.005)
            server.cut_after = None
        events = await task
        assert isinstance(events[-1], Finished), events[-1]
        assert events[-1].usage.num_resumptions >= 1
        for choice in (0, 1):
            assert tokens_of(events, choice) == oracle(PROMPT, 40)
        if not to_native:
            assert len(server.bodies[-1]["prompt"]) > len(PROMPT)
            assert server.bodies[-1]["max_tokens"] < 40


async def test_silence_is_a_broken_stream() -> None:
    async with fake_server() as server, cluster(server) as made:
        server.silent_after = 5
        task = asyncio.create_task(events_of(made, request(PROMPT, max_tokens=20)))
        await told(server, 5)
        stop_native(made, False)
        events = await task
        assert tokens_of(events) == oracle(PROMPT, 20)
        assert events[-1].usage.num_resumptions == 1  # type: ignore[union-attr]


async def test_a_client_that_leaves_closes_the_stream_over_there() -> None:
    async with fake_server() as server, cluster(server) as made:
        server.delay_s = 0.01
        stream = made.gateway.generate(request(PROMPT, max_tokens=400))
        async for _ in stream:
            break
        assert server.num_open == 1
        await stream.aclose()
        async with asyncio.timeout(5):
            while server.num_open:
                await asyncio.sleep(0.01)
        assert server.num_told < 100


async def test_what_it_cannot_do_goes_elsewhere_or_is_said() -> None:
    async with fake_server() as server, cluster(server, native=True) as made:
        for _ in range(4):
            events = await events_of(made, request(PROMPT, max_tokens=4, logprobs=1))
            assert tokens_of(events) == oracle(PROMPT, 4)
        stop_native(made)
        await asyncio.sleep(0.05)
        events = await asyncio.wait_for(events_of(made, request(PROMPT, max_tokens=4, logprobs=1)), 5)
        assert isinstance(events[-1], Failed)
        error = from_failure(events[-1].failure)
        assert isinstance(error, CannotServe)
        assert error.http_status == 501
        assert "cannot do logprobs" in error.message


async def test_a_server_that_is_not_there_gets_nothing_and_is_noticed_when_it_comes() -> None:
    async with fake_server() as server:
        await server.stop()
        async with cluster(server, native=True) as made:
            worker = made.overflow[0].worker
            assert worker.is_draining
            assert "cannot be reached" in worker.why_down
            for i in range(4):
                assert tokens_of(await events_of(made, request([*PROMPT, i]))) == oracle([*PROMPT, i], 8)
            assert not server.bodies
            await server.start()
            async with asyncio.timeout(5):
                while worker.is_draining:
                    await asyncio.sleep(0.02)
            stop_native(made)
            await asyncio.sleep(0.1)
            assert tokens_of(await events_of(made, request(PROMPT))) == oracle(PROMPT, 8)
            assert len(server.bodies) == 2, "the look at it, and the request"


@pytest.mark.parametrize("status", [429, 500, 401])
async def test_a_refusal_over_there_is_tried_elsewhere(status: int) -> None:
    async with fake_server() as server, cluster(server) as made:
        server.status = status
        task = asyncio.create_task(events_of(made, request(PROMPT)))
        async with asyncio.timeout(5):
            while len(server.bodies) < 2:
                await asyncio.sleep(0.005)
        stop_native(made, False)
        assert tokens_of(await task) == oracle(PROMPT, 8)
        assert isinstance(made.overflow[0].worker.why_down, str)


async def test_it_is_given_no_more_than_it_may_have_and_drains() -> None:
    async with fake_server() as server, cluster(server, with_more=",max_num_seqs=3") as made:
        server.delay_s = 0.01
        tasks = [asyncio.create_task(events_of(made, request([*PROMPT, i], max_tokens=60))) for i in range(5)]
        await told(server, 10)
        assert server.num_open == 3
        stop_native(made, False)
        life = made.overflow[0]
        life._drain_s = 0.05
        await life.drain()
        assert life.worker.is_idle
        resumed = 0
        for i, task in enumerate(tasks):
            events = await task
            assert tokens_of(events) == oracle([*PROMPT, i], 60)
            resumed += events[-1].usage.num_resumptions  # type: ignore[union-attr]
        assert resumed == 3
        assert server.num_open == 0


TEXT = "The quick brown fox — über 世界 😀 — jumps  over\n\n  the lazy dog. END of it"


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
@pytest.mark.parametrize("eos", [(), (1,)])
async def test_text_alone_becomes_tokens_that_say_exactly_it(step: int, eos: tuple[int, ...]) -> None:
    async with fake_server(with_ids=False) as server:
        server.pieces = [TEXT[i : i + step] for i in range(0, len(TEXT), step)]
        async with cluster(server) as made:
            assert made.overflow[0].worker._upstream.speaks_ids is False  # type: ignore[attr-defined]
            prompt = made.tokenizer.encode("Once upon a time")
            wanted = msgspec.structs.replace(request(prompt, max_tokens=400, ignore_eos=False), eos_token_ids=eos)
            events = await events_of(made, wanted)
            assert "".join(event.text for event in events if isinstance(event, Tokens)) == TEXT
            assert finish_of(events).finish_reason == "stop"
            assert server.bodies[-1]["prompt"] == "Once upon a time"
            assert "top_k" not in server.bodies[-1]
            stopped = await events_of(made, request(prompt, max_tokens=400, ignore_eos=False, stop=("END",)))
            assert "".join(event.text for event in stopped if isinstance(event, Tokens)) == TEXT[: TEXT.index("END")]
            refused = await events_of(made, request(prompt, max_tokens=400, ignore_eos=False, top_k=5))
            assert "cannot do top_k" in refused[-1].failure.message  # type: ignore[union-attr]


async def test_a_text_that_breaks_off_goes_on_with_what_was_said() -> None:
    async with fake_server(with_ids=False) as server:
        words = [f"word{i} " for i in range(12)]
        server.pieces, server.cut_after = words, 6
        async with cluster(server) as made:
            task = asyncio.create_task(events_of(made, request(made.tokenizer.encode("Say: "), max_tokens=400, ignore_eos=False)))
            await told(server, 6)
            server.cut_after = None
            async with asyncio.timeout(10):
                while len(server.bodies) < 4:  # two looks, the first stream, the second one
                    await asyncio.sleep(0.01)
                    if isinstance(server.bodies[-1]["prompt"], str) and server.bodies[-1]["prompt"].startswith("Say: word"):
                        break
            said = server.bodies[-1]["prompt"].removeprefix("Say: ")
            assert "".join(words).startswith(said)
            assert said
            events = await task
            assert isinstance(events[-1], Finished)
            text = "".join(event.text for event in events if isinstance(event, Tokens))
            assert text == said + "".join(words), "the fake begins anew; what was delivered stays"


async def test_a_place_that_is_no_openai_server_is_never_ready() -> None:
    async with fake_server() as server:
        server.status = 302
        async with cluster(server, native=True) as made:
            assert made.overflow[0].worker.is_draining
            assert isinstance(from_failure_of(made), WorkerLost)


def from_failure_of(made: LocalCluster) -> Exception:
    return WorkerLost(made.overflow[0].worker.why_down)


async def test_it_gets_only_what_our_own_workers_cannot_take_in_time() -> None:
    keys = {"decode__max_num_seqs": 2, "scheduler__ttft_target_s": 0.05}
    async with fake_server() as server, cluster(server, native=True, **keys) as made:
        for i in range(6):
            await events_of(made, request([*PROMPT, i], max_tokens=4))
        assert len(server.bodies) == 1, "a look at it, and nothing else"
        tasks = [asyncio.create_task(events_of(made, request([*PROMPT, i, i], max_tokens=200))) for i in range(8)]
        for i, task in enumerate(tasks):
            assert tokens_of(await task) == oracle([*PROMPT, i, i], 200)
        assert 1 <= len(server.bodies) - 1 <= 7
