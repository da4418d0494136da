"""Who may reach which route, what the small routes answer, and headers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from fastapi import FastAPI

from api.app import build_app
from api.auth import keys_of
from api.backend import Settings, hash_api_key
from api.routes import UNBUILT_ROUTES
from api.tokenizer import Tokenizer
from protocol.errors import WorkerLost

KEY = "sk-tandem-1"
OPEN = {"/", "/health", "/ready", "/ping", "/version", "/metrics", "/dashboard"}


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    return FakeBackend(byte_level)


@pytest.fixture
def locked(backend: FakeBackend) -> FastAPI:
    return build_app(backend, backend.tokenizer, Settings(api_keys={hash_api_key(KEY): "tenant"}))


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend, backend.tokenizer, Settings(version="1.2.3"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


def reach(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False)


def all_routes() -> list[tuple[str, str]]:
    return [
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/m"),
        ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info"), ("GET", "/load"),
        ("GET", "/dashboard/data"), ("GET", "/dashboard/requests"), ("GET", "/admin/sla"), ("GET", "/admin/sla.csv"),
        ("GET", "/dashboard/requests/known"), ("GET", "/admin/decisions/known"),
        ("GET", "/openapi.json"), *(("GET", path) for path in OPEN),
        *(("POST", path) for path in UNBUILT_ROUTES),
    ]  # fmt: skip


async def test_every_route_but_the_open_ones_needs_a_key(locked: FastAPI) -> None:
    async with reach(locked) as client:
        for method, path in all_routes():
            for headers in (
                {}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY},
                {"authorization": "Bearer "}, {"authorization": f"Bearer {KEY}x"}, {"x-api-key": KEY},
            ):  # fmt: skip
                response = await client.request(method, path, headers=headers)
                if path in OPEN:
                    assert response.status_code == 200, path
                else:
                    assert response.status_code == 401, path
                    assert response.json()["error"]["type"] == "authentication_error"
                    assert response.headers["www-authenticate"] == "Bearer"
            response = await client.request(method, path, headers={"authorization": f"Bearer {KEY}"})
            assert response.status_code not in (401, 404, 405, 500), (path, response.text)


async def test_no_app_route_was_forgotten_above(locked: FastAPI) -> None:
    known = [path for _, path in all_routes()]
    paths = {path.replace("{model_id:path}", "m") for path in locked.openapi()["paths"]}
    assert paths <= {*known, "/v1/models/{model_id}"}


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/health/../v1/models", "/%2e%2e/v1/models", "/v1/%6dodels",
     "/v1/models?api_key=sk-tandem-1", "/health/v1/models", "/v1", "/.env", "/docs", "/redoc", "/dashboard/../v1/models"],
)  # fmt: skip
async def test_no_spelling_of_a_path_gets_around_the_key(locked: FastAPI, path: str) -> None:
    async with reach(locked) as client:
        response = await client.get(path)
        assert response.status_code in (401, 404)
        assert "error" in response.json()
        assert "org/model" not in response.text


def test_keys_are_compared_as_bytes() -> None:
    keys = keys_of(Settings(api_keys={hash_api_key("schlüssel"): "t", hash_api_key(KEY): "u"}, operators=("u",)))
    assert keys.caller([f"Bearer {'schlüssel'.encode().decode('latin-1')}"]) == ("t", False)
    assert keys.caller([f"bearer  {KEY} "]) == ("u", True)
    for headers in ([], [f"Bearer {KEY}", f"Bearer {KEY}"], ["Bearer " + "x" * 100_000], [f"Bearer {hash_api_key(KEY)}"]):
        assert keys.caller(headers) is None


async def test_without_keys_everything_is_open(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models")).status_code == 200


# ---- the small routes ----------------------------------------------------------------------------------------------


async def test_models(client: httpx.AsyncClient) -> None:
    got = (await client.get("/v1/models")).json()
    assert got["object"] == "list"
    assert [card["id"] for card in got["data"]] == ["m", "org/model"]
    for card in got["data"]:
        assert {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"} <= set(card)
    assert (await client.get("/v1/models/org/model")).json() == got["data"][1]
    response = await client.get("/v1/models/org/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "served: m, org/model" in response.json()["error"]["message"]


async def test_health_follows_the_backend(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for path in ("/health", "/ready", "/ping"):
        backend.ready = True
        response = await client.get(path)
        assert (response.status_code, response.content) == (200, b"")
        assert (await client.head(path)).status_code == 200
        backend.ready = False
        response = await client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert response.json()["error"]["message"] == "no decode worker is up yet"


async def test_metrics_ignore_the_accept_header(client: httpx.AsyncClient) -> None:
    for accept in ("*/*", "application/openmetrics-text; version=1.0.0", "application/json"):
        response = await client.get("/metrics", headers={"accept": accept})
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "vllm:num_requests_running" in response.text


async def test_small_answers(client: httpx.AsyncClient, byte_level: Tokenizer) -> None:
    assert (await client.get("/version")).json() == {"version": "1.2.3"}
    assert (await client.get("/load")).json() == {"server_load": 0}
    info = (await client.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("</s>", "<s>", "<pad>")
    assert info["chat_template"] == byte_level.chat_template.source if byte_level.chat_template else None
    assert "POST /v1/completions" in (await client.get("/")).json()["endpoints"]
    page = await client.get("/", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    spec = (await client.get("/openapi.json")).json()
    schema = spec["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "max_tokens" in schema["properties"]


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    for path in UNBUILT_ROUTES:
        response = await client.post(path, json={})
        assert response.status_code == 501
        assert response.json()["error"]["type"] == "not_implemented_error"
        assert path in response.json()["error"]["message"]
    response = await client.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    for method, path in (("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("PUT", "/health"), ("POST", "/metrics")):
        response = await client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"]


async def test_request_ids(client: httpx.AsyncClient) -> None:
    response = await client.get("/health", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 129, "tab\there", "ü"):
        response = await client.get("/v1/nothing", headers={"x-request-id": bad.encode()})
        assert response.headers["x-request-id"].isalnum()
    ids = {(await client.get("/health")).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


async def test_an_unexpected_exception_is_a_500_in_our_shape(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    async def broken() -> str:
        raise RuntimeError("the secret")

    backend.metrics = broken  # type: ignore[method-assign]
    response = await client.get("/metrics")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "x-request-id" in response.headers


# ---- the dashboard -------------------------------------------------------------------------------------------------


async def test_the_dashboards_figures(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    got: dict[str, Any] = (await client.get("/dashboard/data")).json()
    assert got["status"] == await backend.status()
    assert got["models"] == ["m", "org/model"]
    assert got["promise"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert (got["ready"], got["error"]) == (True, None)


async def test_the_dashboard_outlives_the_scheduler(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    async def lost() -> dict[str, Any]:
        raise WorkerLost("no scheduler for 30 s")

    backend.status = lost  # type: ignore[method-assign]
    response = await client.get("/dashboard/data")
    assert response.status_code == 200
    assert (response.json()["status"], response.json()["error"]) == ({}, "no scheduler for 30 s")
