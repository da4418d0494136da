"""Who asks: the bearer key of a request, and the tenant that it stands for.

Decided per matched route and closed by default: a route is open only if its function is marked with `open_to_all`. So
no spelling of a path can pass the check of one route and reach another. Keys are kept as SHA-256 digests, from two places: the
settings (the server's own key) and the tenants file, whose keys change when it does.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest

from api.backend import InForce, Settings
from configs.tenants import DEFAULT_TENANT, Tenants
from protocol.errors import Forbidden, Unauthorized

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def open_to_all(endpoint: _Endpoint) -> _Endpoint:
    """Marks a route that needs no key. It must not show or change anything of a tenant's."""
    endpoint.is_open = True  # type: ignore[attr-defined]
    return endpoint


def operators_only(endpoint: _Endpoint) -> _Endpoint:
    """Marks a route that shows every tenant's affairs: where keys stand for several tenants, it wants an operator's."""
    endpoint.is_for_operators = True  # type: ignore[attr-defined]
    return endpoint


class Caller(NamedTuple):
    """Whom a key stands for."""

    tenant: str
    is_operator: bool


class Keys:
    """Digests of keys and whom they stand for.

    A digest is looked up under a second one, keyed by a secret of this process: how long a look-up takes says nothing about any
    key, however many there are.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._secret = secrets.token_bytes(32)
        self._callers = {self._blinded(digest): caller for digest, caller in callers.items()}

    def __len__(self) -> int:
        return len(self._callers)

    def caller(self, headers: list[str]) -> Caller | None:
        """Of a request's Authorization headers; None for no key, a wrong one, or more than one header."""
        scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()  # headers arrive as Latin-1: these are the bytes sent
        found = self._callers.get(self._blinded(digest))
        return found if scheme.lower() == "bearer" else None

    def _blinded(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def keys_of(settings: Settings) -> Keys:
    """Those that are there without a tenants file."""
    operators = settings.operators
    return Keys({digest: Caller(name, not operators or name in operators) for digest, name in settings.api_keys.items()})


def keys_in(tenants: Tenants) -> Keys:
    """Those of a tenants file."""
    named = tenants.tenants.items()
    return Keys({digest: Caller(name, one.is_operator) for name, one in named for digest in one.api_keys})


class Doorkeeper:
    """Tells whom a request comes from. in_force: the tenants file as it is now; may raise TandemError while that is not known."""

    def __init__(self, settings: Settings, in_force: Callable[[], InForce]) -> None:
        self._own = keys_of(settings)
        self._in_force = in_force
        self._version = ""
        self._filed = Keys({})
        self._asks = bool(len(self._own))

    def caller(self, headers: list[str]) -> Caller:
        """Raises Unauthorized, or what `in_force` raises for a key that is not the server's own."""
        found = self._own.caller(headers)
        if found is None:
            self._refresh()
            if not self._asks:
                return Caller(DEFAULT_TENANT, True)
            found = self._filed.caller(headers)
        if found is None:
            raise Unauthorized("no valid API key: send the header 'Authorization: Bearer KEY' with a key of this server")
        return found

    def _refresh(self) -> None:
        now = self._in_force()
        if now.version != self._version:
            self._version, self._filed = now.version, keys_in(now.tenants)
            self._asks = self._asks or len(self._filed) > 0  # a file that loses its keys does not open the door


def authenticator(keeper: Doorkeeper) -> Callable[[HttpRequest], Any]:
    """A dependency of the whole app. Puts the tenant into `request.state.tenant`; raises Unauthorized, Forbidden."""

    async def authenticate(http: HttpRequest) -> None:
        if getattr(http.scope.get("endpoint"), "is_open", False):
            http.state.tenant = DEFAULT_TENANT
            return
        caller = keeper.caller(http.headers.getlist("authorization"))
        if getattr(http.scope.get("endpoint"), "is_for_operators", False) and not caller.is_operator:
            raise Forbidden(
                "this key is a tenant's; the figures of all tenants want the server's own key (gateway.api_key) or an operator's"
            )
        http.state.tenant = caller.tenant

    return authenticate
