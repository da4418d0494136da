"""A gateway's copy of the tenants file: whom it lets in and for what. Always one whole version, never parts of two.

`Gateway` keeps it fresh: every beat's answer names the version in force, and a request that was judged under another one is not
admitted but judged again. Read by the HTTP side through `Door.tenants`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from api.backend import InForce
from cluster.tenants_file import unpacked
from configs.tenants import Tenants
from protocol.errors import Overloaded
from protocol.messages import AskTenants, Message, OfferServices, TenantsInForce, TenantsVersion

log = logging.getLogger(__name__)

RETRY_S = 1.0


class TenantsView:
    """without: what holds in a cluster that has no file; None where there is one, which must come before anybody is served."""

    def __init__(self, without: Tenants | None) -> None:
        self.document: TenantsInForce | None = None
        self._in_force = InForce(without) if without is not None else None
        self._has_file = without is None
        self._life = ""
        self._services: tuple[tuple[int, str, float], ...] = ()
        self._lock = asyncio.Lock()

    @property
    def version(self) -> str:
        return self._in_force.version if self._in_force is not None else ""

    @property
    def is_missing(self) -> bool:
        return self._in_force is None

    def in_force(self) -> InForce:
        """Raises Overloaded (503) while the file has not come."""
        if self._in_force is None:
            raise Overloaded("the tenants file has not come from the scheduler yet", retry_after=RETRY_S)
        return self._in_force

    def heard(self, answer: TenantsVersion) -> OfferServices | None:
        """A beat's answer; what a scheduler of another life than the last one is to be told, None for nothing."""
        before, self._services = self._services, answer.services
        is_another, self._life = bool(self._life) and answer.life != self._life, answer.life
        return OfferServices(before) if is_another and before else None

    async def refresh(self, stale: str, ask: Callable[[Message], Awaitable[Message]]) -> None:
        """Fetch what is in force, unless somebody did while we waited. stale: the version that will not do any more. Raises what
        `ask` raises."""
        if not self._has_file:
            return
        async with self._lock:
            if self._in_force is not None and self.version != stale:
                return
            answer = await ask(AskTenants())
            if not isinstance(answer, TenantsInForce) or answer.version == self.version:
                return
            try:
                tenants = unpacked(answer)
            except (msgspec.DecodeError, msgspec.ValidationError):
                log.exception("tenants of version %s", answer.version)
                return
            self.document = answer
            self._in_force = InForce(tenants, answer.version)
            log.info("tenants: version %s is in force here", answer.version)
