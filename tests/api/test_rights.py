"""Keys and rights of a tenants file over HTTP: who comes in, for which class, promise, place and model, and what a change does."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import TIMING, FakeBackend
from fastapi import FastAPI

from api.app import build_app
from api.backend import InForce, Settings, hash_api_key
from api.tokenizer import Tokenizer
from configs.tenants import Tenants, read_tenants, without_file
from protocol.errors import Failure, Overloaded
from protocol.events import Event, Failed, Finished, Placed, Tokens, Usage
from protocol.request import Claim, Request

FILE = f"""
classes:
  fast: {{ttft_s: 0.5, tpot_s: 0.05, band: 0, degrade_max_tokens: 4}}
  slow: {{ttft_s: 5, tpot_s: 1, band: 2, when_late: queue}}
tenants:
  acme: {{api_keys: [{hash_api_key("sk-acme")}], class: slow, classes: [fast]}}
  globex: {{api_keys: [{hash_api_key("sk-globex")}], class: slow, models: [m]}}
  ops: {{api_keys: [{hash_api_key("sk-ops")}], class: slow, is_operator: true, models: []}}
"""
TENANTS = read_tenants(FILE, "f")
BODY = {"prompt": "hi", "max_tokens": 4}


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    made = FakeBackend(byte_level)
    made.in_force = InForce(TENANTS, "v1")
    return made


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with reach(build_app(backend, backend.tokenizer, Settings(api_keys={hash_api_key("sk-server"): "default"}))) as made:
        yield made


def reach(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False)


def key(tenant: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{tenant}", **{name.replace("_", "-"): value for name, value in more.items()}}


async def send(
    client: httpx.AsyncClient, tenant: str = "acme", body: dict[str, Any] | None = None, **headers: str
) -> httpx.Response:
    return await client.post("/v1/completions", json={**BODY, **(body or {})}, headers=key(tenant, **headers))


# ---- who -------------------------------------------------------------------------------------------------------------


async def test_each_key_is_its_tenants(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for tenant, known in (("acme", "acme"), ("globex", "globex"), ("server", "default")):
        assert (await send(client, tenant)).status_code == 200
        assert backend.requests[-1].tenant == known
        assert backend.requests[-1].cache_salt
    assert len({request.cache_salt for request in backend.requests}) == 3, "nobody's prefix blocks are another's"
    for wrong in ({}, key("nobody"), {"authorization": "Basic sk-acme"}, {"authorization": f"Bearer {hash_api_key('sk-acme')}"}):
        assert (await client.post("/v1/completions", json=BODY, headers=wrong)).status_code == 401


async def test_operators_alone_see_everybody(client: httpx.AsyncClient) -> None:
    for path in ("/admin/sla", "/dashboard/data", "/admin/decisions/known"):
        assert (await client.get(path, headers=key("server"))).status_code == 200, path
        assert (await client.get(path, headers=key("ops"))).status_code == 200, path
        refused = await client.get(path, headers=key("acme"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden"), path


async def test_keys_change_with_the_file_and_no_file_opens_the_door(backend: FakeBackend) -> None:
    async with reach(build_app(backend, backend.tokenizer, Settings())) as client:
        assert (await send(client)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        changed = read_tenants(FILE.replace(hash_api_key("sk-acme"), hash_api_key("sk-new")), "f")
        backend.in_force = InForce(changed, "v2")
        assert (await send(client)).status_code == 401
        assert (await send(client, "new")).status_code == 200
        backend.in_force = InForce(without_file(1, 1, 0.9), "v3")
        assert (await client.get("/v1/models")).status_code == 401, "once keys were asked for, they are"


async def test_until_the_file_has_come_only_the_servers_own_key_opens(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> InForce:
        raise Overloaded("the tenants file has not come yet", retry_after=0.3)

    monkeypatch.setattr(backend, "tenants", missing)
    refused = await send(client)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (await client.get("/dashboard/data", headers=key("server"))).status_code == 200
    assert (await client.get("/health")).status_code == 200


# ---- for what --------------------------------------------------------------------------------------------------------


async def test_what_is_within_the_rights_reaches_the_scheduler(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for headers, body, expected in (
        ({}, {}, ("slow", 0, Claim(tenants_version="v1"))),
        ({"x_slo_class": "fast"}, {}, ("fast", 0, Claim(tenants_version="v1"))),
        ({"x_slo_ttft_ms": "800"}, {"priority": -3}, ("slow", -3, Claim(ttft_slo_s=0.8, tenants_version="v1"))),
        ({"x_slo_tpot_ms": "50"}, {}, ("slow", 0, Claim(tpot_slo_s=0.05, tenants_version="v1"))),
        ({"x_slo_class": "fast", "x_slo_ttft_ms": "500"}, {}, ("fast", 0, Claim(ttft_slo_s=0.5, tenants_version="v1"))),
        ({"x_priority": "7"}, {}, ("slow", 7, Claim(tenants_version="v1"))),
        ({"x_priority": "7"}, {"priority": 7}, ("slow", 7, Claim(tenants_version="v1"))),
        ({"x_stainless_retry_count": "2"}, {}, ("slow", 0, Claim(is_retry=True, tenants_version="v1"))),
        ({"x_stainless_retry_count": "0"}, {}, ("slow", 0, Claim(tenants_version="v1"))),
        ({"x_stainless_retry_count": "what"}, {}, ("slow", 0, Claim(tenants_version="v1"))),
        ({"x_tandem_retry": "1"}, {}, ("slow", 0, Claim(is_retry=True, tenants_version="v1"))),
        ({"priority": "u=1, i"}, {}, ("slow", 0, Claim(tenants_version="v1"))),  # RFC 9218: browsers send it by themselves
    ):
        response = await send(client, body=body, **headers)
        assert response.status_code == 200, (headers, response.text)
        request = backend.requests[-1]
        assert (request.slo_class, request.priority, request.claim) == expected, headers


@pytest.mark.parametrize(
    ("headers", "body", "param", "said"),
    [
        ({"x_slo_class": "gold"}, {}, "x-slo-class", "none of tenant acme's classes: slow, fast"),
        ({"x_slo_class": "slow, fast"}, {}, "x-slo-class", "none of tenant"),
        ({"x_slo_ttft_ms": "400"}, {}, "x-slo-ttft-ms", "beyond the right of tenant acme, whose tightest class promises 500 ms"),
        ({"x_slo_ttft_ms": "6000"}, {}, "x-slo-ttft-ms", "looser than the 5000 ms of class slow"),
        ({"x_slo_class": "fast", "x_slo_ttft_ms": "501"}, {}, "x-slo-ttft-ms", "looser than the 500 ms of class fast"),
        *(
            ({"x_slo_tpot_ms": bad}, {}, "x-slo-tpot-ms", "milliseconds above 0")
            for bad in ("0", "-1", "nan", "inf", "soon", "1e999")
        ),
        ({"x_priority": "high"}, {}, "x-priority", "an integer"),
        ({"x_priority": "1001"}, {}, "x-priority", "from -1000"),
        ({}, {"priority": -1001}, "priority", "from -1000"),
        ({"x_priority": "1"}, {"priority": 2}, "x-priority", "says 1 and the body's priority 2"),
        ({"x_tandem_retry": "-1"}, {}, "x-tandem-retry", "a whole number"),
    ],
)
async def test_what_goes_beyond_is_refused_with_its_name(
    client: httpx.AsyncClient, backend: FakeBackend, headers: dict[str, str], body: dict[str, Any], param: str, said: str
) -> None:
    for path, base in (("/v1/completions", BODY), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):
        response = await client.post(path, json={**base, **body}, headers=key("acme", **headers))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert said in error["message"]
    assert backend.requests == []


async def test_a_header_that_is_there_twice_is_refused(client: httpx.AsyncClient) -> None:
    headers = [*key("acme").items(), ("x-slo-class", "slow"), ("x-slo-class", "fast")]
    response = await client.post("/v1/completions", json=BODY, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-slo-class")


async def test_a_tenant_of_one_class_cannot_tighten_it(client: httpx.AsyncClient) -> None:
    """A tighter time per token empties a decode worker for one tenant: it is a right like another class."""
    assert (await send(client, "globex", x_slo_tpot_ms="999")).json()["error"]["param"] == "x-slo-tpot-ms"
    assert (await send(client, "globex", x_slo_class="fast")).json()["error"]["param"] == "x-slo-class"
    assert (await send(client, "globex", x_slo_tpot_ms="1000")).status_code == 200


async def test_without_a_file_a_request_may_tighten_as_it_likes(backend: FakeBackend) -> None:
    backend.in_force = InForce(without_file(2.0, 0.2, 0.99))
    async with reach(build_app(backend, backend.tokenizer, Settings())) as client:
        response = await client.post("/v1/completions", json=BODY, headers={"x-slo-ttft-ms": "5"})
        assert response.status_code == 200
        assert backend.requests[-1].claim == Claim(ttft_slo_s=0.005)
        assert (await client.post("/v1/completions", json=BODY, headers={"x-slo-ttft-ms": "2001"})).status_code == 400


async def test_where_priorities_cross_tenants_nobody_jumps_the_queue(backend: FakeBackend) -> None:
    settings = Settings(priority_crosses_tenants=True)
    async with reach(build_app(backend, backend.tokenizer, settings)) as client:
        assert (await send(client, body={"priority": -1})).json()["error"]["param"] == "priority"
        assert (await send(client, body={"priority": 1})).status_code == 200


async def test_models_are_a_right(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await send(client, "globex", {"model": "m"})).status_code == 200
    refused = await send(client, "globex", {"model": "org/model"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_found")
    assert (await send(client, "globex", {"model": "none"})).status_code == 404
    assert (await send(client, "acme", {"model": "org/model"})).status_code == 200
    listed = [card["id"] for card in (await client.get("/v1/models", headers=key("globex"))).json()["data"]]
    assert listed == ["m"]
    assert (await client.get("/v1/models/org/model", headers=key("globex"))).status_code == 404
    assert (await client.post("/tokenize", json={"prompt": "a", "model": "org/model"}, headers=key("globex"))).status_code == 403
    assert (await send(client, "ops")).status_code == 403, "no model at all"


# ---- what changes on the way -----------------------------------------------------------------------------------------


def stale_then(backend: FakeBackend, changes: list[Tenants]) -> None:
    """The scheduler goes by another version than the request was judged under, as often as there are changes."""
    script = backend._script

    def events(request: Request) -> list[Event]:
        if changes:
            backend.in_force = InForce(changes.pop(0), f"{backend.in_force.version}+")
            return [Failed(Failure("TenantsChanged", "changed", None, 1.0))]
        return script(request)

    backend.events = events


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_met_a_new_file_is_judged_again(client: httpx.AsyncClient, backend: FakeBackend, stream: bool) -> None:
    moved = read_tenants(FILE.replace("class: slow, classes: [fast]", "class: fast"), "f")
    stale_then(backend, [moved])
    response = await send(client, body={"stream": stream})
    assert response.status_code == 200
    assert [(r.slo_class, r.claim.tenants_version) for r in backend.requests] == [("slow", "v1"), ("fast", "v1+")]
    assert len({r.request_id for r in backend.requests}) == 1


async def test_and_may_have_lost_its_rights(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    stale_then(backend, [read_tenants(FILE.replace(hash_api_key("sk-acme"), "0" * 64), "f")])
    assert (await send(client)).status_code == 401
    backend.in_force = InForce(TENANTS, "v1")
    stale_then(backend, [read_tenants(FILE.replace(", classes: [fast]", ""), "f")])
    refused = await send(client, x_slo_class="fast")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-slo-class")
    backend.in_force = InForce(TENANTS, "v1")
    stale_then(backend, [TENANTS] * 10)
    chased = await send(client)
    assert (chased.status_code, chased.json()["error"]["code"], chased.headers["retry-after"]) == (503, "tenants_changed", "1")
    assert len(backend.requests) <= 6


# ---- what is told ----------------------------------------------------------------------------------------------------


async def test_a_refusal_has_its_reason_and_its_time(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.events = lambda _: [Failed(Failure("TenantOverLimit", "too many tokens", None, 2.2, "tenant_tokens"))]
    for stream in (False, True):
        response = await send(client, body={"stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (429, str(math.ceil(2.2)))
        assert response.headers["x-tandem-refusal"] == response.json()["error"]["reason"] == "tenant_tokens"
        assert response.headers["x-should-retry"] == "true"


def degraded(request: Request) -> list[Event]:
    words = "at most 4 tokens (asked for 10)"
    return [Placed(words, "org/model"), Tokens(0, 0, (65,), "A", None, "length"), Finished(Usage(2, 1), TIMING, words)]


async def test_a_degraded_answer_says_so(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.events = degraded
    whole = await send(client)
    assert whole.headers["x-tandem-degraded"] == whole.json()["metrics"]["degraded"] == "at most 4 tokens (asked for 10)"
    assert whole.json()["model"] == "org/model", "the one that answered"
    stream = await send(client, body={"stream": True, "stream_options": {"include_usage": True}})
    assert stream.headers["x-tandem-degraded"] == "at most 4 tokens (asked for 10)"
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {"org/model"}
    assert chunks[-1]["metrics"]["degraded"] == "at most 4 tokens (asked for 10)"
    backend.events = None
    plain = await send(client)
    assert "x-tandem-degraded" not in plain.headers
    assert plain.json()["metrics"]["degraded"] is None


async def test_a_stream_waits_for_its_ticket_where_it_may_be_degraded_and_for_no_token(backend: FakeBackend) -> None:
    """Headers come before the first byte: in a class that may degrade, after the ticket; in another one after keep_alive_s."""
    placed, go_on = asyncio.Event(), asyncio.Event()

    async def generate(request: Request) -> AsyncIterator[Event]:
        await placed.wait()
        yield Placed("less")
        await go_on.wait()
        yield Tokens(0, 0, (65,), "A", None, "length")
        yield Finished(Usage(2, 1), TIMING)

    backend.generate = generate  # type: ignore[method-assign]
    app = build_app(backend, backend.tokenizer, Settings(keep_alive_s=0.05))
    for slo_class, waits in (("fast", True), ("slow", False)):
        placed.clear()
        go_on.clear()
        sent: list[Any] = []
        task = asyncio.create_task(raw(app, {**BODY, "stream": True}, key("acme", x_slo_class=slo_class), sent))
        await asyncio.sleep(0.3)
        assert bool(sent) is not waits, slo_class
        placed.set()
        await asyncio.sleep(0.2)
        assert sent, "the ticket is there, a token is not"
        headers = dict(sent[0]["headers"])
        assert headers.get(b"x-tandem-degraded") == (b"less" if waits else None)
        assert any(message.get("body") == b": keep-alive\n\n" for message in sent)
        go_on.set()
        await task


async def raw(app: FastAPI, body: dict[str, Any], headers: dict[str, str], sent: list[Any]) -> None:
    """The bare ASGI messages, as they come."""
    data = json.dumps(body).encode()
    given = {**headers, "content-type": "application/json", "content-length": str(len(data))}
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("t", 80), "client": ("t", 1),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip

    async def send_on(message: Any) -> None:
        sent.append(message)

    await app(scope, incoming.get, send_on)


async def test_an_id_is_on_an_answer_once(backend: FakeBackend) -> None:
    """Ray Serve's proxy puts it there by itself."""
    for behind_proxy, times in ((False, 1), (True, 0)):
        app = build_app(backend, backend.tokenizer, Settings(proxy_names_requests=behind_proxy))
        async with reach(app) as client:
            for response in (
                await send(client, x_request_id="mine"),
                await client.get("/nowhere", headers={"x-request-id": "mine"}),
            ):
                assert response.headers.get_list("x-request-id") == ["mine"] * times
        assert backend.requests[-1].origin.client_id == "mine"


async def test_decisions_are_told_by_their_id(client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin/decisions/known", headers=key("ops"))).json()["words"] == ["request known"]
    missing = await client.get("/admin/decisions/a/b", headers=key("ops"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
