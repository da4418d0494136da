"""The HTTP door of one gateway replica: `api.build_app` in front of `Gateway`. No Ray, no torch; the scheduler says who is ready.

Called by `deployments.GatewayReplica`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI

from api.app import build_app
from api.backend import InForce, ModelCard, Settings, hash_api_key
from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from cluster import otel
from cluster.gateway import Gateway, Limits
from cluster.history import mark_document
from cluster.preflight import max_model_len
from cluster.tenants_view import TenantsView
from cluster.walk import Walk
from configs.schema import Config
from configs.tenants import DEFAULT_TENANT, Tenants, without_file
from models.config import read_config
from models.locate import locate
from protocol.errors import NotFound, TandemError
from protocol.events import Event
from protocol.lifecycle import Phase
from protocol.messages import AskHistory, AskMetrics, AskStatus, Metrics, Notice, Noticed, Outcome, Status
from protocol.network import Network
from protocol.request import Request

log = logging.getLogger(__name__)

STATUS_S = 0.5
ALL_READY_S = 120.0  # so long a new gateway waits for the last of several models before it opens for the others
FRESH_TOKEN_S = 30.0  # ready means: a token was produced so recently (R10)


def limits_of(config: Config) -> Limits:
    gateway = config.gateway
    return Limits(
        queue_timeout_s=config.scheduler.queue_timeout_s,
        prefill_timeout_s=gateway.prefill_timeout_s,
        token_timeout_s=gateway.token_timeout_s,
        recovery_timeout_s=gateway.recovery_timeout_s,
        request_timeout_s=gateway.request_timeout_s,
        lease_s=config.transfer.lease_s,
    )


class Door:
    """Implements `api.backend.Backend` over the gateway, and holds the FastAPI app."""

    def __init__(
        self,
        config: Config,
        network: Network,
        find_scheduler: Callable[[], Awaitable[str]],
        gateway_id: str,
        secret: bytes,
        observers: Sequence[Callable[[Request, Outcome], None]] = (),
        proxy_names_requests: bool = False,
    ) -> None:
        served = [_served(one) for one in config.each()]
        self._cards = [card for card, _ in served]
        self._tokenizers = {card.id: tokenizer for card, tokenizer in served}
        self._has_been_ready: set[str] = set()  # models
        endpoint = config.gateway.otlp_endpoint
        self._spans = otel.open_spans(endpoint) if otel.is_wanted(endpoint, os.environ) else None
        self._status: dict[str, Any] = {}
        self._reason = "starting: no worker has reported yet"
        self._tenants = TenantsView(_without_file(config) if config.scheduler.tenants_file is None else None)
        self._gateway = Gateway(
            gateway_id,
            network,
            find_scheduler,
            lambda request: Detokenizer.for_request(self._tokenizers[request.model], request),
            time.monotonic,  # not the loop's clock: uvloop's counts whole milliseconds, and a token may take less
            limits_of(config),
            config.model.seed,
            config.gateway.timelines,
            [*observers, *([self._spans] if self._spans is not None else [])],
            self._tenants,
            self._adapted,
        )
        key = config.gateway.api_key
        settings = Settings(
            api_keys={hash_api_key(key): DEFAULT_TENANT} if key else {},
            salt_secret=secret,
            priority_crosses_tenants=config.scheduler.policy == "priority",
            proxy_names_requests=proxy_names_requests,
            max_body_bytes=config.gateway.max_body_bytes,
            promise_ttft_s=config.scheduler.ttft_target_s,
            promise_tpot_s=config.scheduler.tpot_target_s,
        )
        self.app: FastAPI = build_app(self, self._tokenizers, settings)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._gateway.start()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self._gateway.close()
        if self._spans is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._spans.close)

    # ---- api.backend.Backend -----------------------------------------------------------------------------------------

    def generate(self, request: Request) -> AsyncIterator[Event]:
        in_force = self._tenants.in_force().tenants
        return self._gateway.generate(request, tells_placed=in_force.slo_class(request.slo_class).may_degrade)

    def tenants(self) -> InForce:
        return self._tenants.in_force()

    def models(self) -> list[ModelCard]:
        return self._cards

    def is_ready(self) -> bool:
        return not self._reason

    def reason(self) -> str:
        return self._reason

    async def status(self) -> dict[str, Any]:
        answer = await self._gateway.ask(AskStatus())
        assert isinstance(answer, Status)
        status: dict[str, Any] = msgspec.json.decode(answer.json)
        return status

    async def history(self, what: str, **query: Any) -> dict[str, Any]:
        walk = self._gateway.walk_of(query["request_id"]) if what == "request" else None
        try:
            answer = await self._gateway.ask(AskHistory(what=what, **query))
        except NotFound:
            if walk is None:
                raise
            return _as_it_runs({"request": {"id": walk.request.request_id}, "timeline": [], "why": None}, walk)
        assert isinstance(answer, Status)
        document: dict[str, Any] = msgspec.json.decode(answer.json)
        return document if walk is None else _as_it_runs(document, walk)

    async def notice(self, worker: str, seconds: float) -> tuple[str, ...]:
        answer = await self._gateway.ask(Notice(worker, seconds))
        assert isinstance(answer, Noticed)
        return answer.workers

    async def metrics(self) -> str:
        answer = await self._gateway.ask(AskMetrics())
        assert isinstance(answer, Metrics)
        return answer.text

    def _adapted(self, request: Request, model: str) -> Request | None:
        """The request as another model of this cluster takes it: only one that reads text alike. A prompt of other token ids would
        have to be tokenized anew, and its text is not here any more (a chat's never was, as the other's template writes it)."""
        card = next((card for card in self._cards if model in (card.id, card.model)), None)
        mine = self._tokenizers.get(request.model)
        if card is None or mine is None or mine.fingerprint != self._tokenizers[card.id].fingerprint:
            return None
        if request.max_total_len > card.max_model_len:
            return None
        return msgspec.structs.replace(request, model=card.model or card.id, eos_token_ids=card.eos_token_ids)

    # ---- readiness ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until every model has once been ready the start-up is not over, for a while; then one that is suffices: requests for
        another are refused one by one, and taking the door away would refuse all."""
        patient_until = time.monotonic() + ALL_READY_S
        while True:
            try:
                status = await self.status()
                reasons = {card.id: _why_not_ready(status, card.id) for card in self._cards}
                self._has_been_ready |= {name for name, reason in reasons.items() if not reason}
                has_begun = len(self._has_been_ready) == len(reasons) or time.monotonic() > patient_until
                not_ready = [reason for reason in reasons.values() if reason]
                if self._tenants.is_missing:
                    not_ready, has_begun = ["the tenants file has not come from the scheduler yet"], False
                self._reason = not_ready[0] if not_ready and (not has_begun or len(not_ready) == len(reasons)) else ""
            except (TandemError, OSError) as error:
                self._reason = f"the scheduler does not answer: {error}"
            except Exception:
                log.exception("readiness")
                self._reason = "the readiness check failed; the gateway's log has the details"
            await asyncio.sleep(STATUS_S)


_STATES = {
    Phase.RECEIVED: "queued",
    Phase.QUEUED: "queued",
    Phase.PLACED: "prefill",
    Phase.RESERVED: "prefill",
    Phase.PREFILLING: "prefill",
    Phase.TRANSFERRING: "transfer",
}


def _as_it_runs(document: dict[str, Any], walk: Walk) -> dict[str, Any]:
    """What the scheduler knows of a request that runs here, with what only its own gateway knows."""
    usage = walk.usage()
    now = {
        "state": _STATES.get(walk.phase, "decode"),
        "output_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "resumptions": usage.num_resumptions,
    }
    timeline = [mark_document(mark) for mark in walk.timeline.marks()]
    return {**document, "request": {**document["request"], **now}, "timeline": timeline}


def _why_not_ready(status: dict[str, Any], model: str) -> str:
    """One decode worker of the model that produced a token lately is enough: it can prefill for itself."""
    decode = [w for w in status.get("workers", ()) if w["role"] == "decode" and w["alive"] and w["model"] == model]
    if not decode:
        return f"no decode worker of {model} is alive"
    fresh = [w for w in decode if 0 <= w["stats"]["last_token_age_s"] < FRESH_TOKEN_S]
    return "" if fresh else f"no decode worker of {model} has produced a token in the last {FRESH_TOKEN_S:.0f} s"


def _without_file(config: Config) -> Tenants:
    scheduler = config.scheduler
    return without_file(scheduler.ttft_target_s, scheduler.tpot_target_s, scheduler.attainment_target)


def _served(config: Config) -> tuple[ModelCard, Tokenizer]:
    """What clients are told of a model, and how its text becomes tokens."""
    folder = locate(config.model.name, config.model.revision)
    model = read_config(folder)
    tokenizer = Tokenizer(folder, config.model.chat_template)
    card = ModelCard(
        id=config.served_name,
        root=str(folder),
        max_model_len=max_model_len(config, model),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        created=int(time.time()),
        default_sampling=tokenizer.default_sampling,
    )
    return card, tokenizer
