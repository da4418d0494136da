"""Hostile and mistaken input: every body here gets a 4xx in OpenAI's shape that names the field; none reaches the backend."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from api.app import build_app
from api.backend import Settings
from api.intake import parse_object
from api.tokenizer import Tokenizer
from protocol.errors import InvalidRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
HUGE = "1" + "0" * 400


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    return FakeBackend(byte_level)


@pytest.fixture(scope="module")
def app(byte_level: Tokenizer) -> FastAPI:
    return build_app(FakeBackend(byte_level), byte_level)


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend, backend.tokenizer, Settings(max_body_bytes=400_000, max_sequences=64))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


def bad_values() -> list[tuple[str, str, str]]:
    """(path, field, raw JSON of its bad value), for every field and every kind of wrong value."""
    not_a_number = ['"1"', "true", "false", "[]", "[1]", "{}", '""', "NaN", "Infinity", "-Infinity", "1e999"]
    not_an_int = [*not_a_number, "1.5", "1.0", "1e3", HUGE]
    not_a_bool = ["0", "1", '"true"', "[]", "{}", "0.0"]
    both: dict[str, list[str]] = {
        "model": ["1", "true", "[]", "{}", '"nope"', '""', '"../../etc/passwd"', '"m\\r\\nX-Evil: 1"', f'"{"m" * 9000}"'],
        "n": [*not_an_int, "0", "-1", "129", "1000000000"],
        "temperature": [*not_a_number, "-0.1", "-1", "101", "1e308", HUGE],
        "top_p": [*not_a_number, "0", "0.0", "2", "1.0001", "-1"],
        "top_k": [*not_an_int, "-2", "9223372036854775808"],
        "min_p": [*not_a_number, "-0.1", "1.1"],
        "presence_penalty": [*not_a_number, "-2.1", "2.1"],
        "frequency_penalty": [*not_a_number, "-2.1", "2.1"],
        "repetition_penalty": [*not_a_number, "0", "-1", "1e9"],
        "seed": [*not_an_int, "18446744073709551616", "-9223372036854775809"],
        "max_tokens": [*not_an_int, "0", "-1", "1000000000", "9223372036854775808"],
        "min_tokens": [*not_an_int, "-1", "100000"],
        "stop": ["1", "true", "{}", "[1]", '[""]', '""', "[null]", json.dumps(["s"] * 17), json.dumps("s" * 2000), '[["a"]]'],
        "stop_token_ids": ["1", '"1"', "{}", "[true]", '["1"]', "[1.0]", "[-1]", "[100000]", "[9223372036854775808]"],
        "logit_bias": [
            "1", "[]", '"1"', '{"a": 1}', '{"-1": 1}', '{"100000": 1}', '{"1": "1"}', '{"1": null}', '{"1": 101}',
            '{"1": true}', '{"1.0": 1}', '{"": 1}', '{" 1": 1}', '{"1_0": 1}', '{"٣": 1}', f'{{"{HUGE}": 1}}',
            '{"1": 1e999}',
        ],
        "ignore_eos": not_a_bool,
        "skip_special_tokens": not_a_bool,
        "include_stop_str_in_output": not_a_bool,
        "add_special_tokens": not_a_bool,
        "return_token_ids": not_a_bool,
        "stream": not_a_bool,
        "stream_options": ["1", "[]", "true", '{"include_usage": 1}', '{"include_usage": true}', "{}"],
        "truncate_prompt_tokens": [*not_an_int, "0", "-2"],
        "prompt_logprobs": [*not_an_int, "-1", "21"],
        "priority": ['"1"', "1.5", "true", "[]"],
        "request_id": ["1", '""', '"a b"', '"a\\r\\nSet-Cookie: x"', '"\\u0000"', '"ü"', f'"{"x" * 129}"'],
        "cache_salt": ["1", '""', "true", f'"{"x" * 257}"'],
        "user": ["1", "{}", "true"],
        "best_of": ['"2"', "0", "-1", "true", "1.5"],
        "tools": ["1", '"x"', "{}"],
        "tool_choice": ["1", '"maybe"', "true"],
        "response_format": ["1", '"json"', '{"type": "xml"}', '{"type": "json_schema"}', "[1]"],
    }  # fmt: skip
    only_completions = {
        "prompt": [
            "null", '""', "[]", "1", "true", "{}", "[[]]", "[null]", '["a", 1]', '[1, "a"]', "[1.0]", "[true]", "[[1], []]",
            "[[1.5]]", "[-1]", "[100000]", "[[1], [100000]]", "[9223372036854775808]", "[[[1]]]", json.dumps(["a"] * 257),
            json.dumps([1] * 512), json.dumps([1] * 5000), json.dumps("word " * 2000), '[""]', '{"prompt": "a"}',
        ],
        "logprobs": [*not_an_int, "-1", "21"],
        "echo": not_a_bool,
    }  # fmt: skip
    only_chat = {
        "messages": [
            "null", "[]", "{}", '"hi"', "1", "[1]", "[null]", '["hi"]', "[[]]", json.dumps([HI[0]] * 9000),
            json.dumps([{"role": "user", "content": "word " * 4000}]),
        ],
        "messages[0].role": [
            '[{"content": "a"}]', '[{"role": null, "content": "a"}]', '[{"role": 1, "content": "a"}]',
            '[{"role": "end", "content": "a"}]', '[{"role": "user|>x", "content": "a"}]', '[{"role": [], "content": "a"}]',
        ],
        "messages[0].content": [
            '[{"role": "user"}]', '[{"role": "user", "content": null}]', '[{"role": "user", "content": 1}]',
            '[{"role": "user", "content": {"type": "text"}}]', '[{"role": "user", "content": true}]',
        ],
        "messages[0].content[0]": [
            '[{"role": "user", "content": ["a"]}]', '[{"role": "user", "content": [{"type": "text"}]}]',
            '[{"role": "user", "content": [{"type": "text", "text": 1}]}]',
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]',
            '[{"role": "user", "content": [{"text": "a"}]}]', '[{"role": "user", "content": [null]}]',
        ],
        "messages[0].name": ['[{"role": "user", "content": "a", "name": 1}]'],
        "messages[0].tool_calls": ['[{"role": "assistant", "tool_calls": 1}]', '[{"role": "assistant", "tool_calls": [{}]}]'],
        "messages[0].tool_calls[0].function.arguments": [
            '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]',
        ],
        "logprobs": ["0", "1", '"true"', "[]"],
        "top_logprobs": [*not_an_int, "-1", "21", "5"],
        "max_completion_tokens": [*not_an_int, "0", "-1", "1000000000"],
        "add_generation_prompt": not_a_bool,
        "continue_final_message": ["1", '"x"'],
        "chat_template_kwargs": [
            '{"x": 1e999}', "1", '"x"', "[]", '{"messages": []}', '{"tokenize": false}', '{"a b": 1}', '{"tools": []}'
        ],
        "documents": ["1", "{}", '"x"', "[1]", '[{"title": 1}]'],
        "reasoning_effort": ["1", "{}"],
    }  # fmt: skip
    cases = []
    for path, fields in ((COMPLETIONS, {**both, **only_completions}), (CHAT, {**both, **only_chat})):
        cases += [(path, field, value) for field, values in fields.items() for value in values]
    return cases


def _body(path: str, field: str, value: str) -> bytes:
    base: dict[str, Any] = {"prompt": "hi"} if path == COMPLETIONS else {"messages": HI}
    name = field.partition("[")[0]
    base.pop(name, None)
    if name == "priority":
        base["model"] = "m"
    rest = json.dumps(base)[1:-1]
    return f'{{"{name}": {value}{", " if rest else ""}{rest}}}'.encode()


BAD_VALUES = bad_values()


def test_there_are_many_cases() -> None:
    assert len(BAD_VALUES) >= 200


async def test_every_bad_value_is_refused_by_name(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    wrong: list[str] = []
    for path, field, value in BAD_VALUES:
        response = await client.post(path, content=_body(path, field, value), headers={"content-type": "application/json"})
        shown = f"{path} {field} = {value[:60]}: {response.status_code} {response.text[:160]}"
        if not 400 <= response.status_code < 500:
            wrong.append(shown)
            continue
        error = response.json()["error"]
        is_shaped = set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        # What is not JSON at all has no field yet: NaN and Infinity.
        names_it = error["param"] == field or value in ("NaN", "Infinity", "-Infinity")
        also = {"n": "n", "stream_options": "stream_options.include_usage", "messages": "messages[0]"}.get(field)
        if not is_shaped or not (names_it or error["param"] == also):
            wrong.append(shown)
    assert not wrong, "\n".join(wrong)
    assert backend.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "best_of", 2),
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "logits_processors", ["os.system"]),
        (COMPLETIONS, "bad_words", ["x"]),
        (COMPLETIONS, "allowed_token_ids", [1]),
        (COMPLETIONS, "prompt_embeds", "AAAA"),
        (COMPLETIONS, "guided_json", {"type": "object"}),
        (COMPLETIONS, "structured_outputs", {"regex": "(a+)+$"}),
        (COMPLETIONS, "response_format", {"type": "json_object"}),
        (CHAT, "response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "tool_choice", {"type": "function", "function": {"name": "f"}}),
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "chat_template", "{{ messages }}"),
        (CHAT, "echo", True),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "web_search_options", {"a": 1}),
        (CHAT, "regex", "a*"),
    ],
)
async def test_what_is_known_and_not_built_says_so(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, field: str, value: object, stream: bool
) -> None:
    base: dict[str, Any] = {"prompt": "hi"} if path == COMPLETIONS else {"messages": HI}
    response = await client.post(path, json={**base, field: value, "stream": stream})
    assert response.status_code == 501
    assert response.json()["error"]["param"] == field
    assert response.json()["error"]["type"] == "not_implemented_error"
    assert field in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert backend.requests == []


HARMLESS: dict[str, list[Any]] = {
    "stop": [None, [], ["x"], "x"],
    "logprobs": [None],
    "repetition_penalty": [None, 1.0, 1],
    "response_format": [None, {"type": "text"}],
    "tools": [None, []],
    "tool_choice": [None, "none", "auto"],
    "parallel_tool_calls": [True],
    "best_of": [None, 1],
    "suffix": [None, ""],
    "guided_json": [None],
    "structured_outputs": [None],
    "logit_bias": [None, {}, {"5": -100}],
    "stream_options": [None],
    "user": ["someone"],
    "priority": [0, 5],
    "top_k": [-1, 0, 40],
    "seed": [-1, 0, 2**63],
    "store": [True],
    "metadata": [{"a": "b"}],
    "service_tier": ["auto"],
    "kv_transfer_params": [{"remote_host": "evil", "do_remote_prefill": True}],
    "bootstrap_host": ["evil"],
    "tenant": ["other"],
    "slo_class": ["gold"],
    "unknown_field": [{"deep": [1, 2, {"x": None}]}],
    "temperature": [0, 2, None],
    "max_tokens": [None, 1],
    "n": [None, 2],
    "modalities": [["text"]],
    "length_penalty": [1.0],
    "use_beam_search": [False],
    "spaces_between_special_tokens": [True],
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_harmless_values_are_never_refused_and_never_forwarded(
    client: httpx.AsyncClient, backend: FakeBackend, path: str
) -> None:
    base: dict[str, Any] = {"prompt": "hi"} if path == COMPLETIONS else {"messages": HI}
    for field, values in HARMLESS.items():
        for value in values:
            response = await client.post(path, json={**base, field: value})
            assert response.status_code == 200, (field, value, response.text)
    for request in backend.requests:
        assert (request.tenant, request.slo_class, request.cache_salt) == ("default", "standard", "")
        assert request.priority in (0, 5), "rights.py lets a tenant order its own requests"
        assert "evil" not in repr(request)


# ---- bodies that are not a request ---------------------------------------------------------------------------------

BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n ", "empty"),
    "cut off": (b'{"prompt": "a', "not valid JSON"),
    "trailing data": (b'{"prompt": "a"} {}', "not valid JSON"),
    "trailing comma": (b'{"prompt": "a",}', "not valid JSON"),
    "single quotes": (b"{'prompt': 'a'}", "not valid JSON"),
    "comment": (b'{"prompt": "a" /* x */}', "not valid JSON"),
    "control character": (b'{"prompt": "a\x00"}', "not valid JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"),
    "bad utf-8": (b'{"prompt": "\xff\xfe"}', "UTF-8"),
    "overlong utf-8": (b'{"prompt": "\xc0\x80"}', "UTF-8"),
    "surrogate in utf-8": (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "array": (b'["prompt"]', "object"),
    "string": (b'"prompt"', "object"),
    "number": (b"1", "object"),
    "null": (b"null", "object"),
    "twice the same key": (b'{"prompt": "a", "prompt": "b"}', "twice"),
    "twice below": (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "twice"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "surrogate"),
    "lone surrogate in a key": (b'{"prompt": "a", "\\udfff": 1}', "surrogate"),
    "swapped surrogates": (b'{"prompt": "\\ude00\\ud83d"}', "surrogate"),
    "surrogate far below": (b'{"prompt": "a", "x": [{"y": ["\\uDC00"]}]}', "surrogate"),
    "long integer": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "number"),
    "deep arrays": (b"[" * 100_000, "nested"),
    "deep objects": (b'{"a":' * 30_000, "nested"),
    "deep and closed": (b'{"prompt": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}", "nested"),
    "form": (b"prompt=a", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_bodies(client: httpx.AsyncClient, backend: FakeBackend, name: str) -> None:
    body, says = BAD_BODIES[name]
    started = time.perf_counter()
    response = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert time.perf_counter() - started < 0.5
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert backend.requests == []


async def test_a_good_surrogate_pair_is_fine(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = b'{"prompt": "\\ud83d\\ude00 \\u00e9"}'
    response = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert backend.tokenizer.decode(backend.requests[0].prompt_token_ids) == "😀 é"


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"]
)
async def test_content_type_must_be_json(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": content_type})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]
    good = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=good)).status_code == 200


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = await client.post(COMPLETIONS, content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 400


async def test_a_large_body_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    num_sent = 0

    async def drip() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield b'{"prompt": "'
        for _ in range(10_000):
            num_sent += 1
            yield b"a" * 1000
        yield b'"}'

    response = await client.post(COMPLETIONS, content=drip(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert num_sent <= 402
    body = b'{"prompt": "' + b"a" * 500_000 + b'"}'
    response = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    lie = {"content-type": "application/json", "content-length": "-5"}
    assert (await client.post(COMPLETIONS, content=b"{}", headers=lie)).status_code == 400


async def test_a_slow_body_runs_into_its_deadline(byte_level: Tokenizer) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    app = build_app(FakeBackend(byte_level), byte_level, Settings(body_timeout_s=0.05))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        response = await client.post(COMPLETIONS, content=drip(), headers={"content-type": "application/json"})
    assert response.status_code == 408


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_an_object_or_an_invalid_request(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse_object(body), dict)


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
_fields = sorted({field.partition("[")[0] for _, field, _ in BAD_VALUES})


@given(
    path=st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]),
    fields=st.dictionaries(st.sampled_from(_fields), _json_values),
)
@settings(max_examples=200, deadline=None)
def test_no_body_makes_a_500(path: str, fields: dict[str, Any], app: FastAPI) -> None:
    async def post() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
            body = json.dumps({"prompt": "a", "messages": HI, "tokens": [1], **fields}, ensure_ascii=True)
            headers = {"content-type": "application/json"}
            return (await client.post(path, content=body, headers=headers)).status_code

    assert asyncio.run(post()) in (200, 400, 404, 501)
