"""What the cluster did, over HTTP: the dashboard's data, its live stream, the list of requests, the SLA report.

All of it needs the key where there is one; the page that draws it is `api/page.py`'s. Every answer has a deadline, and a
scheduler that does not answer in time is an answer too: the same shape, empty, with `error`.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.auth import operators_only
from api.errors import RequestNotFound, json_response
from api.live import Live
from api.routes import Service
from api.sla_report import as_csv, as_markdown
from protocol.errors import DeadlineExceeded, InvalidRequest, NotFound, TandemError

TIMEOUT_S = 5.0
MAX_LIMIT = 1000
MAX_WINDOW_S = 3600.0
STATES = ("queued", "prefill", "transfer", "decode", "finished", "failed", "cancelled", "refused")
NO_STORE = {"cache-control": "no-store"}


def add_observation_routes(app: FastAPI, service: Service) -> None:
    async def tick() -> dict[str, Any]:
        return await snapshot(service, "tick")

    live = Live(tick, service.settings.slow_client_timeout_s)

    async def dashboard_data() -> Response:
        return json_response(await snapshot(service, "snapshot"), headers=NO_STORE)

    async def dashboard_live(http: HttpRequest) -> Response:
        live.check_room()
        return live.stream(msgspec.json.encode(await snapshot(service, "snapshot")))

    async def requests(http: HttpRequest) -> Response:
        given = http.query_params
        state = given.get("state", "")
        if state and state not in STATES:
            raise InvalidRequest(f"state must be one of {', '.join(STATES)}", param="state")
        limit = int(_number(given.get("limit"), "limit", 100, 1, MAX_LIMIT))
        found = await _asked(service, "requests", tenant=given.get("tenant", "")[:64], state=state, limit=limit)
        return json_response(found, headers=NO_STORE)

    async def request(request_id: str) -> Response:
        try:
            return json_response(await _asked(service, "request", request_id=request_id[:128]), headers=NO_STORE)
        except NotFound as error:
            raise RequestNotFound(error.message, param="request_id") from None

    async def decision(request_id: str) -> Response:
        try:
            return json_response(await _asked(service, "decision", request_id=request_id[:128]), headers=NO_STORE)
        except NotFound as error:
            raise RequestNotFound(error.message, param="request_id") from None

    async def sla(http: HttpRequest) -> Response:
        return await _report(service, http, http.query_params.get("format", "json"))

    async def sla_csv(http: HttpRequest) -> Response:
        return await _report(service, http, "csv")

    for path, endpoint in (
        ("/dashboard/data", dashboard_data),
        ("/dashboard/live", dashboard_live),
        ("/dashboard/requests", requests),
        ("/dashboard/requests/{request_id:path}", request),
        ("/admin/decisions/{request_id:path}", decision),
        ("/admin/sla", sla),
        ("/admin/sla.csv", sla_csv),
    ):
        app.add_api_route(path, operators_only(endpoint), methods=["GET"], include_in_schema=False)


async def snapshot(service: Service, what: str) -> dict[str, Any]:
    """What the dashboard reads. A scheduler that does not answer leaves its parts empty, with the reason in `error`."""
    settings, backend = service.settings, service.backend
    error: str | None = None
    try:
        found = await _asked(service, what)
    except TandemError as failure:
        error, found = failure.message, {}
    return {
        "now": time.time(),
        "promise": {"ttft_s": settings.promise_ttft_s, "tpot_s": settings.promise_tpot_s},
        "status": {},
        "sla": {"window_s": 300.0, "rows": []},
        "pools": {"queue": {"requests": 0, "tokens": 0}, "workers": [], "links": []},
        "series": {"step_s": 5, "point": None},
        "events": [],
        **found,
        "version": settings.version,
        "models": [card.id for card in backend.models()],
        "ready": backend.is_ready(),
        "reason": backend.reason() or None,
        "error": error,
    }


async def _asked(service: Service, what: str, **query: Any) -> dict[str, Any]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await service.backend.history(what, **query)
    except TimeoutError:
        raise DeadlineExceeded(f"the scheduler did not answer within {TIMEOUT_S:g} s") from None


async def _report(service: Service, http: HttpRequest, kind: str) -> Response:
    window_s = _number(http.query_params.get("window"), "window", 300.0, 10.0, MAX_WINDOW_S)
    if kind not in ("json", "csv", "md"):
        raise InvalidRequest("format must be json, csv or md", param="format")
    found = await _asked(service, "sla", window_s=window_s)
    if kind == "json":
        return json_response(found, headers=NO_STORE)
    text, media_type = (as_csv(found), "text/csv") if kind == "csv" else (as_markdown(found), "text/markdown")
    return Response(text, headers=NO_STORE, media_type=f"{media_type}; charset=utf-8")


def _number(text: str | None, name: str, default: float, low: float, high: float) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return value
