"""The OpenAI routes: completions, chat completions, models, and a clear refusal for the ones that are not built.

`Service` is what every route shares. Handlers read the body by themselves (`intake.py`), so that authentication comes
first and limits hold while reading.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from api.answer import WholeAnswer
from api.auth import Doorkeeper
from api.backend import Backend, ModelCard, Settings
from api.convert import Job, chat_job, completion_job, find_model
from api.errors import json_response
from api.intake import read_json
from api.relay import MAX_BUFFERED, Relay
from api.rights import Judged, judge
from api.schema import ChatBody, CompletionBody, SamplingBody, validate
from api.stream import ChunkEncoder, EventStream
from api.tokenizer import Tokenizer
from protocol.errors import ModelForbidden, Unsupported, from_failure
from protocol.events import Event, Failed, Placed
from protocol.request import Request
from protocol.timeline import Origin

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # nobody reads it
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context
UNBUILT_ROUTES = {
    "/v1/embeddings": "embeddings",
    "/v1/responses": "the Responses API",
    "/v1/messages": "the Messages API",
    "/v1/messages/count_tokens": "the Messages API",
    "/v1/score": "scoring",
    "/v1/rerank": "reranking",
    "/v1/moderations": "moderation",
    "/v1/audio/transcriptions": "audio",
    "/v1/audio/speech": "audio",
    "/v1/images/generations": "images",
    "/v1/load_lora_adapter": "adapters",
    "/v1/unload_lora_adapter": "adapters",
    "/reset_prefix_cache": "dropping the prefix cache by hand",
    "/start_profile": "profiling over HTTP",
    "/stop_profile": "profiling over HTTP",
}


class Service:
    """What the routes share: the backend, the tokenizers, the settings, and what is going on here now."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | Mapping[str, Tokenizer], settings: Settings, keeper: Doorkeeper
    ) -> None:
        self.backend = backend
        self._tokenizer = tokenizer
        self.settings = settings
        self.keeper = keeper
        self.num_in_flight = 0

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """Of the model that a client calls so. Raises NotFound."""
        if not isinstance(self._tokenizer, Mapping):
            return self._tokenizer
        card = find_model(name, self.backend.models())
        return self._tokenizer[card.model or card.id]

    # ---- rights ----------------------------------------------------------------------------------------------------

    def cards_of(self, tenant: str) -> list[ModelCard]:
        """The models that this tenant may use."""
        allowed = self.backend.tenants().tenants.tenant(tenant).models
        cards = self.backend.models()
        return cards if allowed is None else [card for card in cards if card.id in allowed or card.model in allowed]

    def model_for(self, name: str | None, tenant: str) -> tuple[list[ModelCard], Tokenizer]:
        """The models of this tenant, and the tokenizer of the one called so (of the first one without a name). Raises
        ModelForbidden (403) for a model that only others have, NotFound (404) for one that nobody has."""
        cards = self.cards_of(tenant)
        is_missing = (not cards or name is not None) and all(card.id != name for card in cards)
        if is_missing and any(name is None or card.id == name for card in self.backend.models()):
            text = f"tenant {tenant} has no access to the model {(name or 'that is served here')[:100]}"
            raise ModelForbidden(text, param="model")
        return cards, self.tokenizer_of(find_model(name, cards).id)

    def judged(self, http: HttpRequest, body: SamplingBody) -> Judged:
        """Raises InvalidRequest that names the header and the right."""
        crosses = self.settings.priority_crosses_tenants
        return judge(http.headers, body.priority, http.state.tenant, self.backend.tenants(), crosses)

    def _judged_again(self, http: HttpRequest, body: SamplingBody) -> Callable[[Request], Request]:
        def rejudge(request: Request) -> Request:
            http.state.tenant = tenant = self.keeper.caller(http.headers.getlist("authorization")).tenant
            self.model_for(body.model, tenant)
            salt = self.settings.cache_salt(tenant, body.cache_salt or "")
            return under(self.judged(http, body), msgspec.structs.replace(request, cache_salt=salt))

        return rejudge

    def _may_degrade(self, job: Job) -> bool:
        return self.backend.tenants().tenants.slo_class(job.requests[0].slo_class).may_degrade

    # ---- answers ---------------------------------------------------------------------------------------------------

    async def answer(self, http: HttpRequest, job: Job, body: SamplingBody) -> Response:
        """Generate, and answer as a stream or as a whole. Until the first event an error is an HTTP status."""
        timeout_s = self.settings.slow_client_timeout_s
        relay = Relay(self.backend, job.requests, timeout_s, self._judged_again(http, body))
        watcher = asyncio.ensure_future(_client_gone(http))
        watcher.add_done_callback(relay.abandon)
        self.num_in_flight += 1

        async def close() -> None:
            self.num_in_flight -= 1
            watcher.cancel()
            await relay.close()

        is_handed_on = False
        try:
            if not job.stream:
                return await self._whole(relay, job)
            placed, first = await self._head(relay, job)
            if relay.is_abandoned:
                return Response(status_code=CLIENT_GONE)
            if first and isinstance(first[0][1], Failed):
                raise from_failure(first[0][1].failure)
            encoder = ChunkEncoder(_served_by(job, placed), self.tokenizer_of(job.model))
            response = EventStream(relay, encoder, first, watcher, self.settings.keep_alive_s, timeout_s, close)
            response.headers.update(degraded_headers(placed))
            is_handed_on = True
            return response
        finally:
            if not is_handed_on:
                await close()

    async def _head(self, relay: Relay, job: Job) -> tuple[list[Placed], list[tuple[int, Event]]]:
        """What has to be known before a stream's first byte: the tickets, where they may degrade the answer; else whether it
        begins or fails within keep_alive_s, after which an idle connection has to hear something."""
        placed: list[Placed] = []
        first: list[tuple[int, Event]] = []
        unplaced = set(range(len(job.requests))) if self._may_degrade(job) else set()
        while True:
            batch = await relay.take(self.settings.keep_alive_s)
            placed += [event for _, event in batch if isinstance(event, Placed)]
            first += [pair for pair in batch if not isinstance(pair[1], Placed)]
            unplaced -= {prompt for prompt, _ in batch}  # whatever came of it, its ticket came before
            if relay.is_abandoned or not batch and not unplaced:
                return placed, first
            if first and (not unplaced or isinstance(first[0][1], Failed) or len(first) >= MAX_BUFFERED):
                return placed, first

    async def _whole(self, relay: Relay, job: Job) -> Response:
        answer = WholeAnswer(job, self.tokenizer_of(job.model))
        while not answer.is_complete:
            batch = await relay.take()
            if relay.is_abandoned:
                return Response(status_code=CLIENT_GONE)
            for prompt, event in batch:
                if isinstance(event, Failed):
                    raise from_failure(event.failure)
                answer.add(prompt, event)
        return json_response(answer.body(_served_by(job, answer.placed).model), headers=degraded_headers(answer.placed))


def under(judged: Judged, request: Request) -> Request:
    """The request with what its tenant may have."""
    return msgspec.structs.replace(
        request, tenant=judged.tenant, slo_class=judged.slo_class, priority=judged.priority, claim=judged.claim
    )


def degraded_headers(placed: list[Placed]) -> dict[str, str]:
    """x-tandem-degraded: what was taken off, in words; no header where nothing was."""
    words = "; ".join(dict.fromkeys(one.degraded for one in placed if one.degraded))
    return {"x-tandem-degraded": words.encode("ascii", "replace").decode()[:500].replace("\n", " ")} if words else {}


def _served_by(job: Job, placed: list[Placed]) -> Job:
    """The job under the name of the model that answers."""
    models = [one.model for one in placed if one.model]
    return msgspec.structs.replace(job, model=models[0]) if models else job


def with_origin(job: Job, judged: Judged, http: HttpRequest, received_at: float) -> Job:
    """The job, its requests labelled with where they came from and what they may have. received_at: monotonic, when the body was
    there."""
    traceparent = http.headers.get("traceparent", "").strip()
    origin = Origin(
        client_id=getattr(http.state, "client_id", ""),
        traceparent=traceparent if TRACEPARENT.fullmatch(traceparent) else "",
        intake_s=time.monotonic() - received_at,
        operation="chat" if job.is_chat else "text_completion",
    )
    requests = tuple(under(judged, msgspec.structs.replace(request, origin=origin)) for request in job.requests)
    return msgspec.structs.replace(job, requests=requests)


async def _client_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def add_openai_routes(app: FastAPI, service: Service) -> None:
    async def completions(http: HttpRequest) -> Response:
        data, received_at = await read_json(http, service.settings), time.monotonic()
        body = validate(CompletionBody, data)
        judged, (cards, tokenizer) = service.judged(http, body), service.model_for(body.model, http.state.tenant)
        job = await completion_job(body, judged.tenant, cards, tokenizer, service.settings)
        return await service.answer(http, with_origin(job, judged, http, received_at), body)

    async def chat_completions(http: HttpRequest) -> Response:
        data, received_at = await read_json(http, service.settings), time.monotonic()
        body = validate(ChatBody, data)
        judged, (cards, tokenizer) = service.judged(http, body), service.model_for(body.model, http.state.tenant)
        job = await chat_job(body, judged.tenant, cards, tokenizer, service.settings)
        return await service.answer(http, with_origin(job, judged, http, received_at), body)

    async def models(http: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [_model(card) for card in service.cards_of(http.state.tenant)]})

    async def model(model_id: str, http: HttpRequest) -> Response:
        return json_response(_model(find_model(model_id, service.cards_of(http.state.tenant))))

    app.add_api_route("/v1/completions", completions, methods=["POST"], openapi_extra=_schema_of(CompletionBody))
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"], openapi_extra=_schema_of(ChatBody))
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", model, methods=["GET"])
    for path, feature in UNBUILT_ROUTES.items():
        app.add_api_route(path, _refusal(path, feature), methods=["POST"])


def _refusal(path: str, feature: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise Unsupported(f"{path} is not supported: {feature} is not built")

    return refuse


def _schema_of(body_type: type[BaseModel]) -> dict[str, Any]:
    """The body for /openapi.json, which FastAPI cannot see because the handlers read it by themselves."""
    schema = body_type.model_json_schema()
    nested = schema.pop("$defs", {})
    if "StreamOptions" in nested:
        schema["properties"]["stream_options"] = nested["StreamOptions"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _model(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
