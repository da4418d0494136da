"""protocol.errors as HTTP: one envelope for everything, in OpenAI's shape.

`{"error": {"message", "type", "param", "code"}}`, Retry-After in whole seconds, and x-should-retry, which OpenAI's
clients obey. What the scheduler refused has the reason besides, as `reason` and as x-tandem-refusal. An exception that is not ours
never shows its text: it may hold a prompt.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
from starlette.responses import Response

from protocol.errors import InvalidRequest, TandemError

_FIRST_RETRIED_STATUS = 429  # from here on OpenAI's clients retry unless told not to


class BodyTooSlow(InvalidRequest):
    """408: the body did not arrive within gateway.body_timeout_s."""

    http_status: ClassVar[int] = 408
    code: ClassVar[str | None] = "request_timeout"


class RouteNotFound(InvalidRequest):
    http_status: ClassVar[int] = 404
    code: ClassVar[str | None] = "unknown_url"


class RequestNotFound(InvalidRequest):
    """No request of that id is remembered."""

    http_status: ClassVar[int] = 404
    code: ClassVar[str | None] = "request_not_found"


class MethodNotAllowed(InvalidRequest):
    http_status: ClassVar[int] = 405
    code: ClassVar[str | None] = "method_not_allowed"


def error_body(error: TandemError) -> dict[str, Any]:
    told = {"message": error.message, "type": error.error_type, "param": error.param, "code": error.code}
    return {"error": {**told, "reason": error.reason} if error.reason else told}


def error_headers(error: TandemError) -> dict[str, str]:
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.http_status >= _FIRST_RETRIED_STATUS:
        headers["x-should-retry"] = "true" if error.retryable else "false"
    if error.reason:
        headers["x-tandem-refusal"] = error.reason
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: TandemError) -> Response:
    return json_response(error_body(error), error.http_status, error_headers(error))


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
