"""What the HTTP routes need from the rest of the cluster, and what they are told at start-up.

`cluster/` implements `Backend` over the gateway; tests implement it with a script. api/ imports nothing of cluster/.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from configs.tenants import DEFAULT_TENANT, Tenants
from protocol.events import Event
from protocol.request import Request


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model. Several names may stand for the same model: one card each, with the same `root`.

    model: the name under which workers register it, where that is not the id itself (an alias).
    vocab_size: the width of the logits; every token id that a client names is checked against it. default_sampling:
    values of SamplingParams that hold where a request says nothing (generation_config.json).
    """

    id: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    created: int = 0  # unix seconds, for people
    owned_by: str = "tandem"
    model: str = ""
    default_sampling: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the HTTP side behaves. Durations in seconds.

    api_keys: SHA-256 (hex) of each key that does not come from the tenants file -> its tenant; without any key here or there none
    is asked for. operators: of these tenants, those that may see everybody's figures; empty: every one may. salt_secret: the
    cluster's, so that every gateway salts a tenant's prefix blocks alike. proxy_names_requests: whoever stands in front puts
    X-Request-Id on answers already, as Ray Serve's proxy does. priority_crosses_tenants: the queue goes by priorities before it
    looks at tenants (scheduler.policy priority), so that nobody may name one above the others'. promise_*: what the dashboard
    measures against.
    """

    api_keys: dict[str, str] = {}
    operators: tuple[str, ...] = ()
    salt_secret: bytes = b""
    version: str = "0.1.0"
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    keep_alive_s: float = 15.0
    slow_client_timeout_s: float = 60.0
    max_sequences: int = 256  # prompts x n of one HTTP request
    not_ready_retry_s: float = 2.0  # how long a probe should wait before it asks again
    priority_crosses_tenants: bool = False
    proxy_names_requests: bool = False
    promise_ttft_s: float = 1.0
    promise_tpot_s: float = 0.1

    def cache_salt(self, tenant: str, client_salt: str = "") -> str:
        """What keeps this tenant's prefix blocks apart. A client may divide its own blocks further, never reach
        others'."""
        if tenant == DEFAULT_TENANT and not self.api_keys and not client_salt:
            return ""
        message = tenant.encode() + b"\0" + client_salt.encode()
        return hmac.new(self.salt_secret, message, hashlib.sha256).hexdigest()[:32]


class InForce(msgspec.Struct, frozen=True):
    """The tenants file as this gateway goes by it. version: "" where the cluster has none, which leaves one tenant of one class."""

    tenants: Tenants
    version: str = ""


def hash_api_key(key: str) -> str:
    """The form in which keys are kept: Settings(api_keys={hash_api_key(key): tenant})."""
    return hashlib.sha256(key.encode()).hexdigest()


class Backend(Protocol):
    """The cluster as the HTTP routes see it."""

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """An async generator: the request's events, the last one and only that Finished or Failed.

        `aclose()` (or cancelling the task that waits in it) means that the client is gone: all work on it stops.
        """
        ...

    def models(self) -> list[ModelCard]: ...

    def tenants(self) -> InForce:
        """Who may come in, and for what. Raises Overloaded (503) while that is not known."""
        ...

    def is_ready(self) -> bool: ...

    def reason(self) -> str:
        """Why it is not ready, in words; "" when it is."""
        ...

    async def status(self) -> dict[str, Any]:
        """The scheduler's view as plain JSON values; may raise TandemError. The dashboard reads, each part optional:

        workers, queue, in_flight, latencies (class -> ttft_s, tpot_s, kept), window_s, counters, totals, starting,
        as `scheduler/status.py` describes them.
        """
        ...

    async def history(self, what: str, **query: Any) -> dict[str, Any]:
        """One document of the last hour, as plain JSON values; may raise TandemError. Times in seconds where no unit is named.

        "snapshot": now (unix), promise, status (as above), sla {window_s, rows (scheduler.sla.Sla.rows)},
        pools {queue, workers, links}, series {step_s, point, history}, events. "tick": the same without series.history.
        "requests" (tenant, state, limit): {requests}, newest first. "request" (request_id): {request, timeline, why};
        raises NotFound. "decision" (request_id): what `cluster/explain.py` describes; raises NotFound. "sla" (window_s):
        {window_s, rows}.
        """
        ...

    async def notice(self, worker: str, seconds: float) -> tuple[str, ...]:
        """The machine of this worker (or this host) goes away in so many seconds: its workers drain. -> who was told. Raises
        NotFound."""
        ...

    async def metrics(self) -> str:
        """The whole cluster in Prometheus text format 0.0.4."""
        ...
