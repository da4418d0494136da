"""The dashboard's data, its live stream and the SLA report over HTTP: shapes, limits, deadlines, and who may see them."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from fastapi import FastAPI

import api.live
import api.observe
from api.app import build_app
from api.backend import Settings, hash_api_key
from api.live import KEEP_ALIVE, MAX_LISTENERS, Live
from api.sla_report import COLUMNS
from api.tokenizer import Tokenizer
from protocol.errors import Overloaded, WorkerLost

ROW = {
    "tenant": "a", "class": "standard",
    "ttft": {"p50": 0.1, "p95": 0.2, "p99": 0.3}, "tpot": {"p50": None, "p95": None, "p99": None},
    "promise": {"ttft_s": 2.0, "tpot_s": 0.2, "attainment": 0.99}, "attainment": 0.9996, "budget_left": 0.25, "goodput_per_s": 1.5,
    "requests": 12, "finished": 10, "failed": 0, "cancelled": 0, "refused": {"tenant_share": 2},
    "tokens": {"input": 100, "cached": 40, "output": 50}, "cost": None,
}  # fmt: skip


@pytest.fixture
def backend(byte_level: Tokenizer) -> FakeBackend:
    return FakeBackend(byte_level)


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend, backend.tokenizer, Settings(version="1.2.3"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        yield client


async def test_a_snapshot_has_every_part(client: httpx.AsyncClient) -> None:
    response = await client.get("/dashboard/data")
    assert response.headers["cache-control"] == "no-store"
    got = response.json()
    assert {"now", "version", "models", "ready", "reason", "error", "promise", "status", "sla", "pools", "series", "events"} <= set(
        got
    )
    assert (got["version"], got["models"], got["ready"], got["error"]) == ("1.2.3", ["m", "org/model"], True, None)
    assert "history" in got["series"]


async def test_a_scheduler_that_does_not_answer_is_an_answer(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(what: str, **query: Any) -> dict[str, Any]:
        raise WorkerLost("nobody is there")

    backend.history = gone  # type: ignore[method-assign]
    got = (await client.get("/dashboard/data")).json()
    assert got["error"] == "nobody is there"
    assert got["pools"]["workers"] == []

    async def silent(what: str, **query: Any) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    monkeypatch.setattr(api.observe, "TIMEOUT_S", 0.05)
    backend.history = silent  # type: ignore[method-assign]
    assert "did not answer" in (await client.get("/dashboard/data")).json()["error"]
    assert (await client.get("/dashboard/requests")).status_code == 504


async def test_requests_are_asked_for_with_bounds(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await client.get("/dashboard/requests?tenant=a&state=failed&limit=7")).json() == {"requests": []}
    assert backend.asked[-1] == ("requests", {"tenant": "a", "state": "failed", "limit": 7})
    for query in ("limit=0", "limit=1001", "limit=x", "limit=nan", "state=nonsense"):
        response = await client.get(f"/dashboard/requests?{query}")
        assert response.status_code == 400, query
        assert response.json()["error"]["param"] == query.split("=")[0]


async def test_one_request(client: httpx.AsyncClient) -> None:
    assert (await client.get("/dashboard/requests/known")).json()["request"]["id"] == "known"
    for unknown in ("unknown", "a/b", "%00"):
        response = await client.get(f"/dashboard/requests/{unknown}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"


async def test_the_report_in_three_forms(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.sla_rows = [ROW, {**ROW, "tenant": "b", "attainment": None, "budget_left": None, "cost": 1.25}]
    got = (await client.get("/admin/sla?window=600")).json()
    assert got == {"window_s": 600.0, "rows": backend.sla_rows}
    for path in ("/admin/sla.csv", "/admin/sla?format=csv"):
        response = await client.get(path)
        assert response.headers["content-type"] == "text/csv; charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(response.text)))
        assert tuple(rows[0]) == COLUMNS
        assert (rows[0]["tenant"], rows[0]["ttft_p95_ms"], rows[0]["tpot_p50_ms"], rows[0]["refused"]) == ("a", "200.0", "", "2")
        assert (rows[1]["attainment"], rows[1]["cost"]) == ("", "1.25")
    text = (await client.get("/admin/sla?format=md")).text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "99.9 %" in table[2], "never rounded up to a kept promise"
    assert "2 tenant_share" in table[2]
    backend.sla_rows = []
    assert "No request" in (await client.get("/admin/sla?format=md")).text
    for query in ("format=xml", "window=1", "window=1e9", "window=nan"):
        assert (await client.get(f"/admin/sla?{query}")).status_code == 400


async def test_all_of_it_needs_the_key(backend: FakeBackend) -> None:
    app = build_app(backend, backend.tokenizer, Settings(api_keys={hash_api_key("k"): "t"}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tandem", verify=False) as client:
        for path in (
            "/dashboard/data",
            "/dashboard/live",
            "/dashboard/requests",
            "/dashboard/requests/known",
            "/admin/sla",
            "/admin/sla.csv",
        ):
            assert (await client.get(path)).status_code == 401, path
    assert backend.asked == []


# ---- the live stream -------------------------------------------------------------------------------------------------


def app_of(backend: FakeBackend) -> FastAPI:
    return build_app(backend, backend.tokenizer, Settings())


async def test_a_snapshot_then_ticks(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.live.Live.__init__, "__defaults__", (0.02,))
    sent: list[dict[str, Any]] = []
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not sent:
            return {"type": "http.request", "body": b"", "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) > 4:
            left.set()

    scope = {
        "type": "http", "method": "GET", "path": "/dashboard/live", "raw_path": b"/dashboard/live", "query_string": b"",
        "headers": [], "http_version": "1.1", "scheme": "http", "server": ("tandem", 80), "client": ("c", 1), "root_path": "",
    }  # fmt: skip
    async with asyncio.timeout(10):
        await app_of(backend)(scope, receive, send)  # type: ignore[arg-type]
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    frames = [message["body"].decode() for message in sent[1:]]
    kinds = [frame.splitlines()[0] for frame in frames if frame]
    assert kinds[0] == "event: snapshot"
    assert set(kinds[1:]) == {"event: tick"}
    documents = [json.loads(frame.splitlines()[1].removeprefix("data: ")) for frame in frames if frame]
    assert "history" in documents[0]["series"]
    assert all("history" not in document["series"] for document in documents[1:])


async def test_all_listeners_share_one_question_a_tick() -> None:
    asked = 0

    async def fetch() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"n": asked}

    live = Live(fetch, 1.0, tick_s=0.02)
    heard: list[list[bytes]] = [[] for _ in range(10)]

    async def listen(into: list[bytes]) -> None:
        async def send(data: bytes) -> None:
            into.append(data)

        await live.listen(send, b"{}")

    tasks = [asyncio.create_task(listen(into)) for into in heard]
    await asyncio.sleep(0.3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(len(into) >= 3 for into in heard)
    assert asked <= 20
    assert live.num_listeners == 0
    before = asked
    await asyncio.sleep(0.1)
    assert asked <= before + 1, "nobody listens, nobody is asked"


async def test_who_does_not_read_is_cut_off_and_who_reads_slowly_queues_nothing() -> None:
    n = 0

    async def fetch() -> dict[str, Any]:
        nonlocal n
        n += 1
        return {"n": n}

    live = Live(fetch, 0.05, tick_s=0.01)

    async def stuck(data: bytes) -> None:
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await live.listen(stuck, b"{}")
    assert live.num_listeners == 0
    heard: list[bytes] = []

    async def slow(data: bytes) -> None:
        heard.append(data)
        await asyncio.sleep(0.04)

    task = asyncio.create_task(live.listen(slow, b"{}"))
    await asyncio.sleep(0.5)
    task.cancel()
    numbers = [json.loads(data.splitlines()[1][6:])["n"] for data in heard[1:] if data != KEEP_ALIVE]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] - numbers[0] > len(numbers), "it missed some"


async def test_no_more_listeners_than_there_is_room_for(backend: FakeBackend) -> None:
    async def fetch() -> dict[str, Any]:
        return {}

    live = Live(fetch, 1.0)

    async def send(data: bytes) -> None:
        await asyncio.sleep(60)

    tasks = [asyncio.create_task(live.listen(send, b"{}")) for _ in range(MAX_LISTENERS)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        live.check_room()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    live.check_room()
