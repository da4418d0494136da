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
from api.backend import Backend, ModelCard, Settings
from api.convert import Job, chat_job, completion_job, find_model
from api.errors import json_response
from api.intake import read_json
from api.relay import Relay
from api.schema import ChatBody, CompletionBody, validate
from api.stream import ChunkEncoder, EventStream
from api.tokenizer import Tokenizer
from protocol.errors import Unsupported, from_failure
from protocol.events import Failed
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

    def __init__(self, backend: Backend, tokenizer: Tokenizer | Mapping[str, Tokenizer], settings: Settings) -> None:
        self.backend = backend
        self._tokenizer = tokenizer
        self.settings = settings
        self.num_in_flight = 0

    def tokenizer_of(self, name: str | None) -> Tokenizer:
        """Of the model that a client calls so. Raises NotFound."""
        if not isinstance(self._tokenizer, Mapping):
            return self._tokenizer
        card = find_model(name, self.backend.models())
        return self._tokenizer[card.model or card.id]

    async def answer(self, http: HttpRequest, job: Job) -> Response:
        """Generate, and answer as a stream or as a whole. Until the first event an error is an HTTP status."""
        relay = Relay(self.backend, job.requests, self.settings.slow_client_timeout_s)
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
            first = await relay.take(self.settings.keep_alive_s)
            if relay.is_abandoned:
                return Response(status_code=CLIENT_GONE)
            if first and isinstance(first[0][1], Failed):
                raise from_failure(first[0][1].failure)
            response = EventStream(
                relay,
                ChunkEncoder(job, self.tokenizer_of(job.model)),
                first,
                watcher,
                self.settings.keep_alive_s,
                self.settings.slow_client_timeout_s,
                close,
            )
            is_handed_on = True
            return response
        finally:
            if not is_handed_on:
                await close()

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
        return json_response(answer.body())


def with_origin(job: Job, http: HttpRequest, received_at: float) -> Job:
    """The job, its requests labelled with where they came from. received_at: monotonic, when the body was there."""
    traceparent = http.headers.get("traceparent", "").strip()
    origin = Origin(
        client_id=getattr(http.state, "client_id", ""),
        traceparent=traceparent if TRACEPARENT.fullmatch(traceparent) else "",
        intake_s=time.monotonic() - received_at,
        operation="chat" if job.is_chat else "text_completion",
    )
    requests = tuple(msgspec.structs.replace(request, origin=origin) for request in job.requests)
    return msgspec.structs.replace(job, requests=requests)


async def _client_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def add_openai_routes(app: FastAPI, service: Service) -> None:
    async def completions(http: HttpRequest) -> Response:
        data, received_at = await read_json(http, service.settings), time.monotonic()
        cards = service.backend.models()
        body = validate(CompletionBody, data)
        job = await completion_job(body, http.state.tenant, cards, service.tokenizer_of(body.model), service.settings)
        return await service.answer(http, with_origin(job, http, received_at))

    async def chat_completions(http: HttpRequest) -> Response:
        data, received_at = await read_json(http, service.settings), time.monotonic()
        cards = service.backend.models()
        body = validate(ChatBody, data)
        job = await chat_job(body, http.state.tenant, cards, service.tokenizer_of(body.model), service.settings)
        return await service.answer(http, with_origin(job, http, received_at))

    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(card) for card in service.backend.models()]})

    async def model(model_id: str) -> Response:
        return json_response(_model(find_model(model_id, service.backend.models())))

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
