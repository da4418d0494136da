"""An OpenAI-compatible server that is none: the toy model's next tokens with token ids, as vLLM has them, or a text that was given.

Real HTTP on a real port, so that broken streams, refusals and silence are real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from models.toy import toy_next_token


class FakeServer:
    """with_ids: as vLLM; else it takes and gives text alone, `text` cut into `pieces`. cut_after: tokens, then a broken stream.
    status: what every completion is answered with instead. silent_after: tokens, then nothing more comes."""

    def __init__(self, with_ids: bool = True) -> None:
        self.with_ids = with_ids
        self.pieces: list[str] = []
        self.finish_reason = "stop"
        self.cut_after: int | None = None
        self.silent_after: int | None = None
        self.status = 200
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.num_open = 0
        self.num_told = 0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m"}]}, status=self.status)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if self.status != 200:
            return web.json_response({"error": {"message": "not today"}}, status=self.status)
        if not self.with_ids and not isinstance(body["prompt"], str):
            return web.json_response({"error": {"message": "prompt must be a string"}}, status=400)
        if not body.get("stream"):
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            if self.with_ids:
                choice["token_ids"] = [1]
            return web.json_response({"choices": [choice]})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.num_open += 1
        try:
            async for choice in self._choices(body, request):
                await response.write(b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n")
                self.num_told += 1
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.num_open -= 1
        return response

    async def _choices(self, body: dict[str, Any], request: web.Request) -> AsyncIterator[dict[str, Any]]:
        if self.with_ids:
            ids = list(body["prompt"])
            for i in range(body["max_tokens"]):
                await self._pause(i, request)
                ids.append(toy_next_token(ids))
                is_last = i + 1 == body["max_tokens"]
                yield {"text": "?", "token_ids": ids[-1:], "finish_reason": "length" if is_last else None}
            return
        for i, piece in enumerate(self.pieces):
            await self._pause(i, request)
            yield {"text": piece, "finish_reason": None}
        yield {"text": "", "finish_reason": self.finish_reason}

    async def _pause(self, i: int, request: web.Request) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.cut_after == i:
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        if self.silent_after == i:
            await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def fake_server(with_ids: bool = True) -> AsyncIterator[FakeServer]:
    made = FakeServer(with_ids)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
