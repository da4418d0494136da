"""`POST /admin/workers/{name}/notice`: a machine goes away, as clouds tell of spot machines a little before. For operators."""

from __future__ import annotations

import math

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.auth import operators_only
from api.errors import RequestNotFound, json_response
from api.intake import read_json
from api.routes import Service
from protocol.errors import InvalidRequest, NotFound

DEFAULT_S = 30.0
MAX_S = 3600.0


def add_notice_routes(app: FastAPI, service: Service) -> None:
    async def notice(name: str, http: HttpRequest) -> Response:
        """name: a worker's, or a host's for all workers there. Body: {"seconds": until it is gone}."""
        body = await read_json(http, service.settings)
        unknown = sorted(body.keys() - {"seconds"})
        if unknown:
            raise InvalidRequest(f"{unknown[0][:60]!r} is not known here; the body has seconds alone", param=unknown[0][:60])
        seconds = body.get("seconds", DEFAULT_S)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_S or math.isnan(seconds):
            raise InvalidRequest(f"seconds must be a number in [0, {MAX_S:g}]", param="seconds")
        try:
            told = await service.backend.notice(name[:256], float(seconds))
        except NotFound as error:
            raise RequestNotFound(error.message, param="name") from None
        return json_response({"workers": list(told), "seconds": seconds}, 202)

    app.add_api_route("/admin/workers/{name:path}/notice", operators_only(notice), methods=["POST"], include_in_schema=False)
