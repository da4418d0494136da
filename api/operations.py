"""Routes beside the OpenAI ones: tokenizing, health, metrics, version, load, the front page and the dashboard."""

from __future__ import annotations

import math

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from api.auth import open_to_all
from api.convert import find_model, render_messages
from api.errors import error_body, json_response
from api.intake import read_json
from api.page import add_page_routes
from api.routes import Service
from api.schema import DetokenizeBody, TokenizeBody, validate
from protocol.errors import InvalidRequest, Overloaded

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENDPOINTS = {
    "POST /v1/completions": "OpenAI completions",
    "POST /v1/chat/completions": "OpenAI chat completions",
    "GET /v1/models": "what is served",
    "POST /tokenize": "text or messages to token ids",
    "POST /detokenize": "token ids to text",
    "GET /tokenizer_info": "special tokens and chat template",
    "GET /health": "200 when a token can be produced (also /ready, /ping)",
    "GET /metrics": "Prometheus, text format 0.0.4",
    "GET /dashboard": "promises per tenant, pools, requests, events, a playground",
    "GET /admin/sla": "promises and what was kept, per tenant: json, csv or md (also /admin/sla.csv)",
    "GET /admin/decisions/{id}": "one decision of the scheduler: candidates, predictions, choice, what came true",
    "POST /admin/workers/{name}/notice": 'its machine goes away: {"seconds": 30}',
    "GET /version": "",
    "GET /load": "",
    "GET /openapi.json": "",
}


def add_operation_routes(app: FastAPI, service: Service) -> None:
    _add_tokenizer_routes(app, service)
    _add_health_routes(app, service)
    _add_pages(app, service)
    add_page_routes(app)


def _add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    async def tokenize(http: HttpRequest) -> Response:
        body = validate(TokenizeBody, await read_json(http, service.settings))
        cards, tokenizer = service.model_for(body.model, http.state.tenant)
        card = find_model(body.model, cards)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("either prompt or messages is needed, and not both", param="prompt")
        if body.prompt is not None:
            token_ids = await tokenizer.encode_async(body.prompt, body.add_special_tokens is not False)
        else:
            token_ids = await tokenizer.encode_async(await render_messages(body, tokenizer), body.add_special_tokens is True)
        return json_response(
            {
                "count": len(token_ids),
                "max_model_len": card.max_model_len,
                "tokens": token_ids,
                "token_strs": [tokenizer.token_text(token) for token in token_ids] if body.return_token_strs else None,
            }
        )

    async def detokenize(http: HttpRequest) -> Response:
        body = validate(DetokenizeBody, await read_json(http, service.settings))
        cards, tokenizer = service.model_for(body.model, http.state.tenant)
        card = find_model(body.model, cards)
        size = max(card.vocab_size, tokenizer.vocab_size)
        for token in body.tokens:
            if not 0 <= token < size:
                raise InvalidRequest(f"tokens: id {token} is outside the vocabulary [0, {size})", param="tokens")
        return json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def tokenizer_info(model: str | None = None) -> Response:
        return json_response(service.tokenizer_of(model).info())

    app.add_api_route("/tokenize", tokenize, methods=["POST"])
    app.add_api_route("/detokenize", detokenize, methods=["POST"])
    app.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"])


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @open_to_all
    async def health() -> Response:
        """200 and nothing when ready, else 503 with the reason and Retry-After."""
        if service.backend.is_ready():
            return Response()
        error = Overloaded(service.backend.reason() or "not ready")
        retry_after = str(max(1, math.ceil(service.settings.not_ready_retry_s)))
        return json_response(error_body(error), 503, {"retry-after": retry_after})

    @open_to_all
    async def version() -> Response:
        return json_response({"version": service.settings.version})

    @open_to_all
    async def metrics() -> Response:
        # Always 0.0.4: prometheus_client's OpenMetrics output rewrites the ':' of vllm: names.
        return Response(await service.backend.metrics(), headers={"content-type": METRICS_TYPE})

    async def load() -> Response:
        return json_response({"server_load": service.num_in_flight})

    for path in ("/health", "/ready", "/ping"):
        app.add_api_route(path, health, methods=["GET"])
        app.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/load", load, methods=["GET"])


def _add_pages(app: FastAPI, service: Service) -> None:
    @open_to_all
    async def front(http: HttpRequest) -> Response:
        if "text/html" in http.headers.get("accept", ""):
            rows = "".join(f"<tr><td><code>{route}</code><td>{what}" for route, what in ENDPOINTS.items())
            return HTMLResponse(_FRONT_PAGE.format(rows=rows))
        return json_response({"name": "tandem", "version": service.settings.version, "endpoints": ENDPOINTS})

    async def openapi() -> Response:
        return json_response(app.openapi())

    app.add_api_route("/", front, methods=["GET"], include_in_schema=False)
    app.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)


_FRONT_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Tandem</title>
<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui;max-width:44rem;margin:3rem auto;padding:0 1rem}}
td{{padding:.2rem 1.5rem .2rem 0;vertical-align:top}}</style>
<h1>Tandem</h1><p>An OpenAI-compatible endpoint. <a href="dashboard">Dashboard</a></p><table>{rows}</table></html>"""
