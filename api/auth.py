"""Who asks: the bearer key of a request, and the tenant that it stands for.

Decided per matched route and closed by default: a route is open only if its function is marked with `open_to_all`. So
no spelling of a path can pass the check of one route and reach another. Keys are kept and compared as SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from api.backend import Settings
from api.errors import Forbidden
from protocol.errors import Unauthorized

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
DEFAULT_TENANT = "default"


def open_to_all(endpoint: _Endpoint) -> _Endpoint:
    """Marks a route that needs no key. It must not show or change anything of a tenant's."""
    endpoint.is_open = True  # type: ignore[attr-defined]
    return endpoint


def operators_only(endpoint: _Endpoint) -> _Endpoint:
    """Marks a route that shows every tenant's affairs: where keys stand for several tenants, it wants an operator's."""
    endpoint.is_for_operators = True  # type: ignore[attr-defined]
    return endpoint


def authenticator(settings: Settings) -> Callable[[HttpRequest], Any]:
    """A dependency of the whole app. Puts the tenant into `request.state.tenant`; raises Unauthorized."""

    async def authenticate(http: HttpRequest) -> None:
        if not settings.api_keys or getattr(http.scope.get("endpoint"), "is_open", False):
            http.state.tenant = DEFAULT_TENANT
            return
        tenant = tenant_of(http.headers.getlist("authorization"), settings)
        is_guarded = getattr(http.scope.get("endpoint"), "is_for_operators", False)
        if is_guarded and settings.operators and tenant not in settings.operators:
            raise Forbidden("this key is a tenant's; the figures of all tenants want the server's own key (gateway.api_key)")
        http.state.tenant = tenant

    return authenticate


def tenant_of(headers: list[str], settings: Settings) -> str:
    """The tenant of a request's Authorization headers. Takes the same time for every wrong key."""
    scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()  # headers arrive as Latin-1: these are the bytes sent
    tenant = ""
    for known, name in settings.api_keys.items():
        if hmac.compare_digest(digest, known):
            tenant = name
    if not tenant or scheme.lower() != "bearer":
        raise Unauthorized("no valid API key: send the header 'Authorization: Bearer KEY' with a key of this server")
    return tenant
