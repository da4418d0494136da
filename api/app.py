"""The HTTP application: `build_app(backend, tokenizer, settings)` gives a plain FastAPI app.

Nothing of Ray Serve is in it: `cluster/` mounts it there, uvicorn or a test can run it as well.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Doorkeeper, authenticator
from api.backend import Backend, Settings
from api.errors import MethodNotAllowed, RouteNotFound, error_response
from api.notices import add_notice_routes
from api.observe import add_observation_routes
from api.operations import add_operation_routes
from api.routes import CLIENT_GONE, Service, add_openai_routes
from api.schema import IDENTIFIER
from api.tokenizer import Tokenizer
from protocol.errors import InternalError, InvalidRequest, TandemError

log = logging.getLogger(__name__)


def build_app(backend: Backend, tokenizer: Tokenizer | Mapping[str, Tokenizer], settings: Settings | None = None) -> FastAPI:
    """Every route of DESIGN's endpoint. The app holds no loop and no connection until it is called.

    tokenizer: of every model, or one for each, by the name under which its workers register it.
    """
    settings = settings or Settings()
    keeper = Doorkeeper(settings, backend.tenants)
    app = FastAPI(
        title="Tandem",
        version=settings.version,
        dependencies=[Depends(authenticator(keeper))],
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # served by a route of ours, behind the key
        redirect_slashes=False,
    )
    service = Service(backend, tokenizer, settings, keeper)
    app.state.service = service
    add_openai_routes(app, service)
    add_observation_routes(app, service)
    add_operation_routes(app, service)
    add_notice_routes(app, service)
    _add_error_handlers(app)
    app.add_middleware(Edge, names_answers=not settings.proxy_names_requests)
    return app


class Edge:
    """The outermost layer of ours: gives every answer its X-Request-Id, and turns what nobody caught into a 500.

    names_answers: false behind a proxy that gives every request a name and puts it on the answer itself; two headers of one name
    would be one value, "a, a", for a browser.
    """

    def __init__(self, app: ASGIApp, names_answers: bool = True) -> None:
        self._app = app
        self._names_answers = names_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if IDENTIFIER.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["client_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._names_answers:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if has_started:
                raise
            log.exception("%r %r", scope["method"], scope["path"])
            response = error_response(InternalError("internal error; the gateway's log has the details"))
            await response(scope, receive, send_with_id)


def _add_error_handlers(app: FastAPI) -> None:
    async def ours(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, TandemError)
        return error_response(error)

    async def starlettes(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{http.method} {http.url.path}"[:200]
        if error.status_code == 404:
            return error_response(RouteNotFound(f"there is no {where}; GET / lists the endpoints"))
        if error.status_code == 405:
            response = error_response(MethodNotAllowed(f"{where}: wrong method"))
            response.headers.update(error.headers or {})
            return response
        return error_response(InvalidRequest(str(error.detail)))

    async def validation(http: HttpRequest, error: Exception) -> Response:
        return error_response(InvalidRequest("the request is malformed"))

    async def gone(http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(TandemError, ours)
    app.add_exception_handler(HTTPException, starlettes)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(ClientDisconnect, gone)
