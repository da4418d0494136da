"""The dashboard's page: its HTML, styles and scripts from api/dashboard/, and its chart library out of an installed wheel.

Not its figures: those are routes of `operations.py` and need the key, while this page shows nothing of anybody's and is
open. Nothing is built, nothing comes from elsewhere, and no chart code lies in this repository: uPlot's two files are read
out of the `youplot` wheel, which is never imported, and are served only if they are, byte for byte, the published ones.
"""

from __future__ import annotations

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from api.auth import open_to_all
from api.errors import RouteNotFound

log = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("dashboard")
CHART_PACKAGE = "youplot"
# name in the page -> (file in the wheel, SHA-256 of that file in uPlot 1.6.31 as its author published it)
CHART_FILES = {
    "uplot.js": ("vendor/uplot.iife.min.js", "2d27e8ad3d228164525ce213f9dc716f39b4e3aee0cc773fb3491c96cf4921a2"),
    "uplot.css": ("vendor/uplot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
}
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, answered 304 while it is the same
}


class Asset(NamedTuple):
    body: bytes
    media_type: str
    etag: str


def add_page_routes(app: FastAPI) -> None:
    """GET /dashboard and GET /dashboard/assets/NAME."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assets = load_assets()

    @open_to_all
    async def dashboard() -> Response:
        """The page alone, without a figure in it; the figures need the key."""
        return HTMLResponse(html, headers={**HEADERS, "content-security-policy": POLICY})

    @open_to_all
    async def asset(name: str, http: HttpRequest) -> Response:
        found = assets.get(name)
        if found is None:
            raise RouteNotFound("the dashboard has no such file")
        headers = {**HEADERS, "etag": found.etag}
        if http.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.body, headers=headers, media_type=found.media_type)

    app.add_api_route("/dashboard", dashboard, methods=["GET"], include_in_schema=False)
    app.add_api_route("/dashboard/assets/{name}", asset, methods=["GET"], include_in_schema=False)


def load_assets() -> dict[str, Asset]:
    """Everything that the page loads, in memory (about 120 KB): a name that is not a key reaches no file."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    files |= {name: body for name in CHART_FILES if (body := _chart_file(name)) is not None}
    return {
        name: Asset(body, TYPES[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"') for name, body in files.items()
    }


def _chart_file(name: str) -> bytes | None:
    """One of uPlot's files; None, and a line in the log, where the wheel is missing or holds another file."""
    inside, digest = CHART_FILES[name]
    spec = find_spec(CHART_PACKAGE)  # of a package without a dot: finding it runs nothing of it
    places = list(spec.submodule_search_locations or ()) if spec else []
    try:
        body = (Path(places[0]) / inside).read_bytes() if places else None
    except OSError:
        body = None
    if body is None or hashlib.sha256(body).hexdigest() != digest:
        log.warning("the dashboard draws no charts: %s is missing or altered; reinstall %s", name, CHART_PACKAGE)
        return None
    return body
