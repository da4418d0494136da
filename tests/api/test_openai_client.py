"""The official `openai` client against a real uvicorn on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from fake_backend import FakeBackend

from api.app import build_app
from api.backend import Settings, hash_api_key
from api.tokenizer import Tokenizer
from protocol.errors import Failure, WorkerLost
from protocol.events import Failed

KEY = "sk-tandem-1"
ANSWER = "Hello from the cluster, naïve 😀 world."
HI = [{"role": "user", "content": "hi"}]


class Server:
    """uvicorn in a thread of its own; `client` has no retries, so that each refusal is seen once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = FakeBackend(tokenizer, ANSWER)
        app = build_app(self.backend, tokenizer, Settings(api_keys={hash_api_key(KEY): "t"}))
        self.service = app.state.service
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([sock],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=20)

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self.backend.num_open or self.service.num_in_flight:
            assert time.monotonic() < deadline, "the backend's generator is still open"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def running(byte_level: Tokenizer) -> Iterator[Server]:
    server = Server(byte_level)
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    backend = running.backend
    backend.events, backend.error, backend.delay_s, backend.hold_s = None, None, 0.0, 0.0
    backend.requests.clear()
    running.wait_until_idle()


def test_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["m", "org/model"]
    assert server.client.models.retrieve("org/model").id == "org/model"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")


def test_completion(server: Server) -> None:
    got = server.client.completions.create(model="m", prompt="a", max_tokens=90, n=2, seed=7, stop=["world"], logprobs=2)
    assert [choice.text for choice in got.choices] == ["Hello from the cluster, naïve 😀 "] * 2
    assert got.choices[0].finish_reason == "stop"
    assert got.choices[0].logprobs is not None
    assert got.choices[0].logprobs.token_logprobs
    assert got.usage is not None
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got._request_id
    assert server.backend.requests[0].sampling.seed == 7


def test_completion_stream(server: Server) -> None:
    stream = server.client.completions.create(
        model="m", prompt="a", max_tokens=90, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat(server: Server) -> None:
    got = server.client.chat.completions.create(model="m", messages=HI, logprobs=True, top_logprobs=2, max_completion_tokens=5)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == ANSWER[: len(got.choices[0].message.content or "")] != ""
    assert got.choices[0].finish_reason == "length"
    assert got.choices[0].logprobs is not None
    assert len(got.choices[0].logprobs.content or []) == 5
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 4


def test_chat_stream(server: Server) -> None:
    chunks = list(server.client.chat.completions.create(model="m", messages=HI, stream=True, n=2))
    for index in (0, 1):
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index)
        assert text == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_stream_helper_of_the_client(server: Server) -> None:
    """It accumulates chunks into a whole completion and checks them on the way."""
    with server.client.chat.completions.stream(model="m", messages=HI, stream_options={"include_usage": True}) as stream:
        events = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage is not None
    assert "content.done" in events


def test_async_streams_side_by_side(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(24)))

    assert asyncio.run(all_of_them()) == [ANSWER] * 24


def test_refusals_are_the_clients_own_exceptions(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=HI, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="m", prompt="a", max_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert missing.value.code == "model_not_found"
    assert "org/model" in missing.value.message
    with pytest.raises(openai.InternalServerError) as unbuilt:
        client.embeddings.create(model="m", input="a")
    assert unbuilt.value.status_code == 501
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()


def test_overload_tells_when_to_come_back(server: Server) -> None:
    server.backend.events = lambda request: [Failed(Failure("TenantOverLimit", "over your share", None, 3.2))]
    with pytest.raises(openai.RateLimitError) as limited:
        server.client.chat.completions.create(model="m", messages=HI, stream=True)
    assert limited.value.response.headers["retry-after"] == "4"
    server.backend.events = lambda request: [Failed(Failure("Unsupported", "no"))]
    with pytest.raises(openai.InternalServerError) as refused:  # and it is not tried again
        server.client.with_options(max_retries=3).chat.completions.create(model="m", messages=HI)
    assert refused.value.status_code == 501
    assert len(server.backend.requests) == 2


def test_a_retry_after_is_obeyed(server: Server) -> None:
    def first_full(request: object) -> list[Failed]:
        server.backend.events = None
        return [Failed(Failure("Overloaded", "full", None, 0.3))]

    server.backend.events = first_full  # type: ignore[assignment]
    started = time.monotonic()
    got = server.client.with_options(max_retries=1).chat.completions.create(model="m", messages=HI)
    assert got.choices[0].message.content == ANSWER
    assert 0.9 <= time.monotonic() - started < 3.0


def test_a_failure_in_mid_stream_raises(server: Server) -> None:
    server.backend.error = WorkerLost("the decode worker is gone")
    stream = server.client.chat.completions.create(model="m", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="decode worker is gone"):
        list(stream)


def test_closing_a_stream_stops_the_work(server: Server) -> None:
    server.backend.delay_s = 0.02
    before = server.backend.num_cancelled
    stream = server.client.completions.create(model="m", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.wait_until_idle(2.0)
    assert server.backend.num_cancelled == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_waiting_stops_the_work(server: Server, stream: bool) -> None:
    server.backend.hold_s = 10.0
    before = server.backend.num_cancelled
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.3).completions.create(model="m", prompt="a", stream=stream)
    server.wait_until_idle(2.0)
    assert server.backend.num_cancelled == before + 1


def raw(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """Bytes as they are, and the answer up to the closing of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/completions HTTP/1.1\r\nContent-Length: -1",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 1e3",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked, identity",
        "GET /health\r\nHTTP/1.1",
        "GARBAGE",
    ],
)
def test_malformed_http_reaches_no_backend(server: Server, head: str) -> None:
    request = f"{head}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\r\nabcd".encode()
    answer = raw(server.port, request)
    assert not answer.startswith(b"HTTP/1.1 2")
    assert not answer.startswith(b"HTTP/1.1 5")
    assert server.backend.requests == []
    assert server.client.models.list().data  # and the server goes on


def test_a_pipelined_request_is_answered_for_itself(server: Server) -> None:
    good = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(good)}\r\n"
    with_key = f"{head}Authorization: Bearer {KEY}\r\n\r\n".encode() + good
    without_key = f"{head}Connection: close\r\n\r\n".encode() + good
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(with_key + without_key)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 401") == 1
    assert len(server.backend.requests) == 1
