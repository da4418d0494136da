"""Answers that are not streamed: shapes, fields, and what reaches the cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from fake_backend import FakeBackend

from api.app import build_app
from api.backend import Settings, hash_api_key
from api.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
ANSWER = "Hello from the cluster, naïve 😀 world."


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    return FakeBackend(byte_level, ANSWER)


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend, backend.tokenizer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_completion(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got = await post(client, "/v1/completions", model="m", prompt="hi there", max_tokens=100)
    assert got["object"] == "text_completion"
    assert got["id"].startswith("cmpl-")
    assert got["model"] == "m"
    assert got["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    usage, request = got["usage"], backend.requests[0]
    assert usage["prompt_tokens"] == request.prompt_len
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == min(4, request.prompt_len)
    assert got["metrics"]["queue_time_ms"] == 1.0
    assert backend.tokenizer.decode(request.prompt_token_ids) == "hi there"
    assert request.model == "m"
    assert request.sampling.seed is None  # the gateway draws it, one for each prompt


async def test_a_chat_completion(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got = await post(client, "/v1/chat/completions", messages=HI)
    assert got["object"] == "chat.completion"
    assert got["model"] == "m"
    choice = got["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None, "tool_calls": []}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    prompt = backend.tokenizer.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    assert backend.requests[0].max_total_len == 512  # no limit given: up to the context's end


async def test_defaults_and_names_of_limits(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await post(client, "/v1/completions", prompt="a")
    await post(client, "/v1/completions", prompt=[1] * 505)
    await post(client, "/v1/chat/completions", messages=HI, max_tokens=5)
    await post(client, "/v1/chat/completions", messages=HI, max_tokens=5, max_completion_tokens=7)
    assert [request.sampling.max_tokens for request in backend.requests] == [16, 7, 5, 7]


async def test_sampling_reaches_the_cluster_as_it_was_asked(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    asked: dict[str, Any] = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.2, "seed": 42, "stop": ["x", "yy"], "stop_token_ids": [3], "min_tokens": 2, "max_tokens": 9,
        "ignore_eos": True, "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    await post(client, "/v1/completions", prompt="a", logit_bias={"5": -100, "6": 2.5}, logprobs=3, **asked)
    sampling = msgspec.to_builtins(backend.requests[0].sampling)
    assert {name: list(v) if isinstance(v := sampling[name], tuple) else v for name in asked} == asked
    assert sampling["logit_bias"] == {5: -100.0, 6: 2.5}
    assert (sampling["logprobs"], sampling["prompt_logprobs"]) == (3, None)


async def test_the_models_defaults_hold_where_a_request_is_silent(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level)
    recommended = {"temperature": 0.6, "top_k": 20, "max_tokens": 50}
    backend.cards = [msgspec.structs.replace(backend.cards[0], default_sampling=recommended)]
    app = build_app(backend, byte_level)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        await post(client, "/v1/completions", prompt="a")
        await post(client, "/v1/chat/completions", messages=HI, temperature=0, max_tokens=3)
    first, second = (request.sampling for request in backend.requests)
    assert (first.temperature, first.top_k, first.max_tokens) == (0.6, 20, 50)
    assert (second.temperature, second.top_k, second.max_tokens) == (0.0, 20, 3)


@pytest.mark.parametrize(
    "prompt", ["hi", ["hi"], [65, 66], [[65, 66]], ["a", "b", "c"], [[65], [66, 67]]], ids=lambda p: str(p)[:20]
)
async def test_every_form_of_prompt(client: httpx.AsyncClient, backend: FakeBackend, prompt: Any) -> None:
    got = await post(client, "/v1/completions", prompt=prompt, n=2)
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    assert [choice["index"] for choice in got["choices"]] == list(range(2 * len(prompts)))
    ids = [list(request.prompt_token_ids) for request in sorted(backend.requests, key=lambda r: r.request_id)]
    assert ids == [backend.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]


async def test_content_parts_are_flattened(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await post(client, "/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert "one\ntwo" in backend.tokenizer.decode(backend.requests[0].prompt_token_ids)


async def test_chat_options_reach_the_template(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    chat = [*HI, {"role": "assistant", "content": "The answer is"}]
    await post(client, "/v1/chat/completions", messages=chat, continue_final_message=True)
    await post(client, "/v1/chat/completions", messages=HI, add_generation_prompt=False)
    await post(client, "/v1/chat/completions", messages=HI, chat_template_kwargs={"bos_token": "<pad>"})
    texts = [backend.tokenizer.decode(request.prompt_token_ids, False) for request in backend.requests]
    assert texts[0].endswith("<|assistant|>\nThe answer is")
    assert texts[1].endswith("hi</s>\n")
    assert texts[2].startswith("<pad><|user|>")
    refused = await client.post("/v1/chat/completions", json={"messages": [*HI, {"role": "tool", "content": "x"}]})
    assert refused.status_code == 400
    assert "only system, user and assistant, not tool" in refused.json()["error"]["message"]


@pytest.mark.parametrize("include", [True, False])
async def test_stop_strings(client: httpx.AsyncClient, include: bool) -> None:
    got = await post(client, "/v1/completions", prompt="a", max_tokens=90, stop=["clust"], include_stop_str_in_output=include)
    choice = got["choices"][0]
    assert choice["text"] == "Hello from the " + ("clust" if include else "")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "clust")


# ---- log-probabilities ---------------------------------------------------------------------------------------------


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    got = await post(client, "/v1/completions", prompt="a", max_tokens=90, logprobs=2)
    choice = got["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert len({len(values) for values in logprobs.values()}) == 1
    for offset, token, value, top in zip(
        *(logprobs[k] for k in ("text_offset", "tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        if "\ufffd" not in token and token != "</s>" and offset < 26:  # before the first split glyph
            assert choice["text"][offset:].startswith(token)
        assert value == -0.25 == top[token]
        assert max(top.values()) == value


async def test_log_likelihood_as_lm_eval_asks_for_it(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    """lm-eval scores a continuation by echoing the prompt and reading [context:-1]."""
    context, continuation = [70, 71, 72], [73, 74]
    body = {
        "prompt": [context + continuation] * 2,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    got = await post(client, "/v1/completions", model="m", **body)
    assert len(got["choices"]) == 2
    for choice in got["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(context + continuation) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        scores = logprobs["token_logprobs"][len(context) : -1]
        tops = logprobs["top_logprobs"][len(context) : -1]
        assert len(scores) == len(continuation)
        assert all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
    assert backend.requests[0].sampling.prompt_logprobs == 1


async def test_echo_alone(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got = await post(client, "/v1/completions", prompt="hello ", echo=True, max_tokens=2)
    assert got["choices"][0]["text"].startswith("hello Hel")
    assert backend.requests[0].sampling.prompt_logprobs is None
    got = await post(client, "/v1/completions", prompt="hello", echo=True, max_tokens=0, logprobs=0)
    assert got["choices"][0]["text"] == "hello"
    assert len(got["choices"][0]["logprobs"]["tokens"]) == got["usage"]["prompt_tokens"]
    assert got["usage"]["completion_tokens"] == 0
    assert backend.requests[1].sampling.max_tokens == 1


async def test_chat_logprobs(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got = await post(client, "/v1/chat/completions", messages=HI, logprobs=True, top_logprobs=3)
    content = got["choices"][0]["logprobs"]["content"]
    assert len(content) == got["usage"]["completion_tokens"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == ANSWER
    got = await post(client, "/v1/chat/completions", messages=HI, logprobs=True)
    assert got["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert backend.requests[1].sampling.logprobs == 0


async def test_token_ids_on_request(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 3}
    got = await post(client, "/v1/completions", prompt="hi", **body)
    choice = got["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["prompt_token_ids"] == list(backend.requests[0].prompt_token_ids)


async def test_prompt_logprobs_as_vllm_has_them(client: httpx.AsyncClient) -> None:
    got = await post(client, "/v1/completions", prompt=[70, 71], prompt_logprobs=2)
    first, second = got["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["71"]["logprob"] == -0.25
    assert second["71"]["rank"] == 1
    assert len(second) == 2
    refused = await client.post("/v1/completions", json={"prompt": "a", "prompt_logprobs": 1, "stream": True})
    assert refused.status_code == 400


async def test_infinite_logprobs_are_json(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    from protocol.events import Finished, Timing, TokenLogprobs, Tokens, Usage

    dead = TokenLogprobs(5, float("-inf"), 9, ((6, 0.0), (7, float("-inf"))))
    backend.events = lambda request: [Tokens(0, 0, (5,), "x", (dead,), "length"), Finished(Usage(1, 1), Timing())]
    got = await post(client, "/v1/completions", prompt="a", logprobs=2)
    logprobs = got["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"][0][logprobs["tokens"][0]] == -9999.0  # the token itself, though not among the best
    assert len(logprobs["top_logprobs"][0]) == 3
    got = await post(client, "/v1/chat/completions", messages=HI, logprobs=True, top_logprobs=2)
    assert got["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


# ---- tenants, prompts that are cut, long prompts -------------------------------------------------------------------


async def test_tenants_have_salts_of_their_own(byte_level: Tokenizer) -> None:
    backend = FakeBackend(byte_level)
    keys = {hash_api_key("key a"): "a", hash_api_key("key b"): "b"}
    app = build_app(backend, byte_level, Settings(api_keys=keys, salt_secret=b"s"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        for key, salt in (("key a", None), ("key b", None), ("key a", "x"), ("key b", "x")):
            body = {"prompt": "a", "cache_salt": salt, "tenant": "b"}
            response = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
    assert [request.tenant for request in backend.requests] == ["a", "b", "a", "b"]
    salts = {request.cache_salt for request in backend.requests}
    assert len(salts) == 4
    assert all(salt and "x" not in salt for salt in salts)


async def test_truncation_keeps_the_end(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await post(client, "/v1/completions", prompt=[*range(70, 90)], truncate_prompt_tokens=3)
    await post(client, "/v1/completions", prompt=[70] * 600 + [71], truncate_prompt_tokens=-1, max_tokens=12)
    assert backend.requests[0].prompt_token_ids == (87, 88, 89)
    assert backend.requests[1].max_total_len == 512
    assert backend.requests[1].prompt_token_ids[-1] == 71


async def test_a_prompt_that_is_too_long_says_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for path, body, param in (
        ("/v1/completions", {"prompt": [70] * 512}, "prompt"),
        ("/v1/completions", {"prompt": [70] * 500, "max_tokens": 13}, "max_tokens"),
        ("/v1/completions", {"prompt": "word " * 1_000_000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ("/v1/chat/completions", {"messages": HI, "max_completion_tokens": 510}, "max_completion_tokens"),
    ):
        response = await client.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        assert "512" in error["message"]
    assert backend.requests == []


# ---- tokenizing ----------------------------------------------------------------------------------------------------


async def test_tokenize_and_back(client: httpx.AsyncClient, byte_level: Tokenizer) -> None:
    got = await post(client, "/tokenize", model="m", prompt="naïve 😀", return_token_strs=True)
    assert got["tokens"] == byte_level.encode("naïve 😀")
    assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 512)
    assert len(got["token_strs"]) == got["count"]
    assert await post(client, "/detokenize", tokens=got["tokens"]) == {"prompt": "naïve 😀"}
    chat = await post(client, "/tokenize", messages=HI)
    assert byte_level.decode(chat["tokens"], False) == byte_level.render_chat(HI)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": [{}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
)
async def test_tokenize_refusals(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
