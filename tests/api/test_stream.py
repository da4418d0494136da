"""The wire format of streams, chunk by chunk, as clients read it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import TIMING, FakeBackend

from api.answer import metrics_of
from api.app import build_app
from api.backend import Settings
from api.convert import Job
from api.stream import ChunkEncoder
from api.tokenizer import Tokenizer
from protocol.errors import Failure, Overloaded, TenantOverLimit, WorkerLost
from protocol.events import Event, Failed, Finished, Timing, Tokens, Usage
from protocol.request import Request, SamplingParams

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    return FakeBackend(byte_level)


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend, backend.tokenizer, Settings(keep_alive_s=0.05))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


async def frames(client: httpx.AsyncClient, path: str, **body: Any) -> list[str]:
    response = await client.post(path, json={"model": "m", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    text = response.text
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def chunks(all_frames: list[str]) -> list[dict[str, Any]]:
    assert all_frames[-1] == "data: [DONE]"
    assert all_frames.count("data: [DONE]") == 1
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in all_frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in all_frames[:-1]]


async def test_completion_chunks(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got = chunks(await frames(client, "/v1/completions", prompt="hi", max_tokens=6, ignore_eos=True))
    assert {chunk["object"] for chunk in got} == {"text_completion"}
    assert len({chunk["id"] for chunk in got}) == 1
    assert got[0]["id"].startswith("cmpl-")
    assert all(len(chunk["choices"]) == 1 and chunk["choices"][0]["text"] for chunk in got)  # none is empty
    assert [chunk["choices"][0]["finish_reason"] for chunk in got] == [None] * (len(got) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in got)
    whole = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 6, "ignore_eos": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == whole.json()["choices"][0]["text"]


async def test_chat_chunks(client: httpx.AsyncClient) -> None:
    got = chunks(await frames(client, "/v1/chat/completions", messages=HI, n=2))
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    assert got[0]["id"].startswith("chatcmpl-")
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in got if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hello from the cluster, naïve 😀 world."
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["finish_reason"] == "stop"
        assert mine[-1]["delta"] == {}  # EOS has no text: nothing that a client would count as a token
        assert all(choice["delta"]["content"] for choice in mine[1:-1])


async def test_finish_reason_rides_on_the_last_text(client: httpx.AsyncClient) -> None:
    got = chunks(await frames(client, "/v1/chat/completions", messages=HI, max_tokens=3))
    assert got[-1]["choices"][0]["finish_reason"] == "length"
    assert got[-1]["choices"][0]["delta"]["content"]


async def test_usage_comes_in_a_chunk_of_its_own(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    got = chunks(await frames(client, "/v1/chat/completions", messages=HI, max_tokens=3, stream_options=options))
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 3
    assert got[-1]["usage"]["total_tokens"] == got[-1]["usage"]["prompt_tokens"] + 3
    assert got[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert got[-1]["metrics"]["time_to_first_token_ms"] == 21.0
    assert set(got[-1]["metrics"]) >= {
        "time_to_first_token_ms", "queue_time_ms", "prefill_time_ms", "transfer_time_ms", "generation_time_ms",
        "mean_itl_ms", "tokens_per_second", "resumptions",
    }  # fmt: skip
    assert all("usage" not in chunk for chunk in got[:-1])


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = chunks(await frames(client, "/v1/completions", prompt="hi", max_tokens=4, ignore_eos=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in got]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 4
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in got)


async def test_several_prompts_and_choices(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "ignore_eos": True, "stream_options": {"include_usage": True}}
    got = chunks(await frames(client, "/v1/completions", **body))
    assert {chunk["choices"][0]["index"] for chunk in got[:-1]} == {0, 1, 2, 3}
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in got[:-1]) == 4
    assert got[-1]["usage"]["completion_tokens"] == 12
    assert len({request.request_id for request in backend.requests}) == 2


async def test_echo_and_logprobs_in_a_stream(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "echo": True, "logprobs": 1, "ignore_eos": True}
    got = chunks(await frames(client, "/v1/completions", **body))
    text = "".join(chunk["choices"][0]["text"] for chunk in got)
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert text == whole["text"]
    joined: dict[str, list[Any]] = {}
    for chunk in got:
        for name, values in chunk["choices"][0]["logprobs"].items():
            joined.setdefault(name, []).extend(values)
    assert joined == whole["logprobs"]


async def test_logprobs_of_tokens_without_text_come_with_the_next_text(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level, "😀!")
    app = build_app(backend, byte_level)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        body = {"messages": HI, "logprobs": True, "return_token_ids": True}
        got = chunks(await frames(client, "/v1/chat/completions", **body))
        whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    choices = [chunk["choices"][0] for chunk in got[1:]]
    joined = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert joined == whole["logprobs"]["content"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert bytes(byte for entry in joined[:-1] for byte in entry["bytes"]).decode() == "😀!"


# ---- the end, and what can go wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_is_a_status(client: httpx.AsyncClient, backend: FakeBackend, stream: bool) -> None:
    backend.events = lambda request: [Failed(Failure("TenantOverLimit", "over its share", None, 2.3))]
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == TenantOverLimit.http_status == 429
    assert response.headers["retry-after"] == "3"
    assert response.headers["x-should-retry"] == "true"
    assert response.json()["error"]["message"] == "over its share"
    backend.events = lambda request: [Failed(Failure("Overloaded", "full", None, 0.2))]
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (Overloaded.http_status, "1")
    assert backend.num_open == 0


async def test_a_failure_in_mid_stream_is_an_error_event(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error = WorkerLost("the decode worker is gone")
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI})):
        got = await frames(client, path, **body)
        assert got[-1] == "data: [DONE]"
        event, data = got[-2].split("\n")
        assert event == "event: error"
        error = json.loads(data.removeprefix("data: "))["error"]
        assert error["code"] == "worker_lost"
        assert sum('finish_reason":"' in frame for frame in got) == 0


async def test_an_exception_of_the_backend_shows_none_of_its_text(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error = KeyError("the secret prompt")
    got = await frames(client, "/v1/completions", prompt="a")
    assert "event: error" in got[-2]
    assert not any("secret" in frame for frame in got)
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert "secret" not in response.text


async def test_events_that_end_without_a_last_one_are_a_failure(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.events = lambda request: [Tokens(0, 0, (1,), "x")]
    got = await frames(client, "/v1/completions", prompt="a")
    assert got[-2].startswith("event: error")
    assert got[-1] == "data: [DONE]"
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 500


async def test_nothing_comes_after_the_last_event(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    end = Finished(Usage(1, 1), TIMING)
    tokens = Tokens(0, 0, (1,), "x", None, "stop")
    backend.events = lambda request: [tokens, end, Tokens(0, 1, (1,), "late"), end, Failed(Failure("InternalError", "late"))]
    got = await frames(client, "/v1/completions", prompt="a")
    assert len(got) == 2
    assert "late" not in "".join(got)


async def test_keep_alive_comments_only_while_idle(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.hold_s = 0.18
    got = await frames(client, "/v1/completions", prompt="a", max_tokens=2)
    assert got[:2] == [": keep-alive"] * 2
    assert chunks([frame for frame in got if not frame.startswith(":")])
    backend.hold_s = 0.0
    got = await frames(client, "/v1/completions", prompt="a", max_tokens=2)
    assert ": keep-alive" not in got


async def test_a_failure_after_the_first_keep_alive_is_in_the_stream(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.hold_s = 0.12
    backend.events = lambda request: [Failed(Failure("NoWorker", "nobody", None, 4.0))]
    got = await frames(client, "/v1/completions", prompt="a")
    assert got[0] == ": keep-alive"
    assert '"code":"no_worker"' in got[-2]


# ---- the client is gone --------------------------------------------------------------------------------------------


async def _call(app: Any, body: dict[str, Any], path: str, gone_after: float, send: Any = None) -> list[dict[str, Any]]:
    """One ASGI call whose client disconnects after a while."""
    messages: list[dict[str, Any]] = []
    is_sent = False

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await asyncio.sleep(gone_after)
        return {"type": "http.disconnect"}

    async def collect(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send or collect)
    return messages


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("hold_s", "delay_s"), [(5.0, 0.0), (0.0, 5.0), (0.0, 0.02)])
async def test_a_disconnect_closes_the_generator(byte_level: Tokenizer, stream: bool, hold_s: float, delay_s: float) -> None:
    backend = FakeBackend(byte_level)
    backend.hold_s, backend.delay_s = hold_s, delay_s
    app = build_app(backend, byte_level)
    started = time.perf_counter()
    body = {"prompt": ["a", "b"], "stream": stream, "max_tokens": 200, "ignore_eos": True}
    await _call(app, body, "/v1/completions", gone_after=0.1)
    assert time.perf_counter() - started < 1.0
    assert (backend.num_open, backend.num_closed, backend.num_cancelled) == (0, 2, 2)
    assert app.state.service.num_in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_handler_closes_the_generator(byte_level: Tokenizer, stream: bool) -> None:
    """Ray Serve's proxy cancels the task of a request whose client is gone."""
    backend = FakeBackend(byte_level)
    backend.delay_s = 5.0
    app = build_app(backend, byte_level)
    call = asyncio.create_task(_call(app, {"prompt": "a", "stream": stream}, "/v1/completions", gone_after=60.0))
    await asyncio.sleep(0.1)
    assert backend.num_open == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (backend.num_open, backend.num_cancelled) == (0, 1)


async def test_a_broken_connection_closes_the_generator(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level)
    backend.delay_s = 0.01

    async def broken(message: dict[str, Any]) -> None:
        if message.get("body"):
            raise OSError("broken pipe")

    await _call(build_app(backend, byte_level), {"prompt": "a", "stream": True}, "/v1/completions", 60.0, broken)
    assert (backend.num_open, backend.num_cancelled) == (0, 1)


async def test_a_client_that_does_not_read_is_cut_off(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level)
    app = build_app(backend, byte_level, Settings(slow_client_timeout_s=0.2))

    async def stuck(message: dict[str, Any]) -> None:
        if message.get("body"):
            await asyncio.sleep(30)

    started = time.perf_counter()
    with pytest.raises(TimeoutError):
        await _call(app, {"prompt": "a", "stream": True, "max_tokens": 400, "ignore_eos": True}, "/v1/completions", 60.0, stuck)
    assert time.perf_counter() - started < 2.0
    assert backend.num_open == 0


async def test_a_slow_client_holds_its_own_stream_and_no_more(byte_level: Tokenizer) -> None:
    """The buffer between backend and client is bounded: the backend is made to wait."""
    from api import relay

    backend = FakeBackend(byte_level)
    num_made = 0

    def endless(request: Request) -> Any:
        nonlocal num_made
        while True:
            num_made += 1
            yield Tokens(0, num_made - 1, (1,), "x")

    backend.events = endless  # type: ignore[assignment]
    app = build_app(backend, byte_level, Settings(slow_client_timeout_s=0.3))

    async def stuck(message: dict[str, Any]) -> None:
        if message.get("body"):
            await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        await _call(app, {"prompt": "a", "stream": True}, "/v1/completions", 60.0, stuck)
    assert num_made <= 2 * relay.MAX_BUFFERED + 2
    assert backend.num_open == 0


# ---- cost ----------------------------------------------------------------------------------------------------------


def test_encoding_is_cheap(byte_level: Tokenizer) -> None:
    """Far below the 50 microseconds per chunk that 20,000 chunks per second and core allow."""
    request = Request(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(seed=1))
    job = Job(
        requests=(request,), response_id="chatcmpl-1", created=1, model="m", is_chat=True, stream=True, include_usage=True,
        usage_in_each=False, echo_texts=None, has_logprobs=False, num_top=0, tokens_as_ids=False, return_token_ids=False,
        shows_prompt_logprobs=False, prompt_only=False,
    )  # fmt: skip
    encoder = ChunkEncoder(job, byte_level)
    num_chunks = 20_000
    batches: list[list[tuple[int, Event]]] = [[(0, Tokens(0, i, (5,), " word"))] for i in range(num_chunks)]
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)
    assert time.perf_counter() - started < num_chunks * 25e-6


def test_metrics_arithmetic() -> None:
    timing = Timing(queue_s=0.5, prefill_s=0.25, transfer_s=0.125, decode_s=2.0, ttft_s=0.75, e2e_s=2.75)
    metrics = metrics_of(Finished(Usage(10, 11), timing), Usage(10, 11), 1)
    assert metrics["mean_itl_ms"] == 200.0
    assert metrics["tokens_per_second"] == 5.0
    assert metrics["degraded"] is None
    assert metrics_of(Finished(Usage(10, 11), timing, "at most 8 tokens"), Usage(10, 11), 1)["degraded"] == "at most 8 tokens"
    two = metrics_of(Finished(Usage(10, 22), timing), Usage(10, 22), 2)
    assert (two["mean_itl_ms"], two["tokens_per_second"]) == (200.0, 10.0)
    one = metrics_of(Finished(Usage(10, 1), Timing(ttft_s=0.5, e2e_s=0.5)), Usage(10, 1), 1)
    assert (one["mean_itl_ms"], one["tokens_per_second"]) == (None, 2.0)
    assert metrics_of(Finished(Usage(1, 0), Timing()), Usage(1, 0), 1)["tokens_per_second"] is None
