"""Several models behind one door, each with its own tokenizer; and the notice that a machine goes away."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from fake_backend import FakeBackend

from api.app import build_app
from api.backend import Settings, hash_api_key
from api.tokenizer import Tokenizer


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    made = FakeBackend(byte_level)
    card = made.cards[0]
    made.cards = [
        msgspec.structs.replace(card, id="first", model=""),
        msgspec.structs.replace(card, id="second", model=""),
        msgspec.structs.replace(card, id="alias", model="second"),
    ]
    return made


@pytest.fixture
async def client(backend: FakeBackend, byte_level: Tokenizer, sentencepiece: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(api_keys={hash_api_key("op"): "ops", hash_api_key("t"): "acme"}, operators=("ops",))
    app = build_app(backend, {"first": byte_level, "second": sentencepiece}, settings)
    transport, headers = httpx.ASGITransport(app=app), {"authorization": "Bearer op"}
    async with httpx.AsyncClient(transport=transport, base_url="http://tandem", headers=headers) as made:
        yield made


@pytest.mark.parametrize(("model", "registered"), [("first", "first"), ("second", "second"), ("alias", "second"), (None, "first")])
async def test_each_request_has_its_own_models_tokens(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    byte_level: Tokenizer,
    sentencepiece: Tokenizer,
    model: str | None,
    registered: str,
) -> None:
    body = {"prompt": "The quick brown fox", "max_tokens": 4, **({"model": model} if model else {})}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    wanted = {"first": byte_level, "second": sentencepiece}[registered].encode("The quick brown fox")
    assert list(backend.requests[-1].prompt_token_ids) == wanted
    assert backend.requests[-1].model == registered
    asked = {"prompt": "The quick brown fox", **({"model": model} if model else {})}
    assert (await client.post("/tokenize", json=asked)).json()["tokens"] == wanted
    assert byte_level.encode("The quick brown fox") != sentencepiece.encode("The quick brown fox")


async def test_an_unknown_model_is_told_which_there_are(client: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
    ):
        answer = await client.post(path, json={"model": "third", **body})
        assert answer.status_code == 404
        assert "served: first, second, alias" in answer.json()["error"]["message"]
    assert (await client.get("/tokenizer_info", params={"model": "third"})).status_code == 404
    infos = [(await client.get("/tokenizer_info", params={"model": name})).json() for name in ("first", "second")]
    assert infos[0]["vocab_size"] != infos[1]["vocab_size"]


async def test_a_notice_is_passed_on(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    answer = await client.post("/admin/workers/toy/decode:0/notice", json={"seconds": 12})
    assert (answer.status_code, answer.json()) == (202, {"workers": ["toy/decode:0"], "seconds": 12})
    assert (await client.post("/admin/workers/host-7/notice", json={})).status_code == 202
    assert backend.notices == [("toy/decode:0", 12.0), ("host-7", 30.0)]


@pytest.mark.parametrize("body", [{"seconds": -1}, {"seconds": "soon"}, {"seconds": True}, {"seconds": 1e9}, {"second": 1}, []])
async def test_a_wrong_notice_is_refused(client: httpx.AsyncClient, backend: FakeBackend, body: object) -> None:
    answer = await client.post("/admin/workers/decode:0/notice", json=body)
    assert answer.status_code == 400
    assert not backend.notices


async def test_only_operators_give_notice_and_only_to_who_is_there(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for headers, status in (({"authorization": "Bearer t"}, 403), ({"authorization": "Bearer x"}, 401)):
        assert (await client.post("/admin/workers/decode:0/notice", json={}, headers=headers)).status_code == status
    assert not backend.notices
    answer = await client.post("/admin/workers/nobody/notice", json={})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")
