"""Server-sent events of one answer: `data: {json}\\n\\n` per chunk, at most one terminal event, then `data: [DONE]`.

Chunks follow what clients count and compare (each rule was read in a client's source): a chat choice begins with a
chunk that holds its role and no text; text chunks hold no role; a completion has no empty first chunk; finish_reason
comes once per choice, on the chunk with its last text when they arrive together; usage comes in a chunk of its own
without choices; a failure in mid-stream is an `event: error` with the error envelope as data. Comments keep an idle
connection open.

The constant bytes of a chunk are made once per choice, so that a chunk costs little more than quoting its text.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answer import Scribe, metrics_of, sum_usage, usage_of
from api.convert import Job
from api.errors import error_body
from api.relay import Relay
from api.tokenizer import Tokenizer
from protocol.errors import from_failure
from protocol.events import Event, Failed, Finished, Placed, PromptScored, TokenLogprobs, Tokens, Usage

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_json = msgspec.json.Encoder().encode


class ChunkEncoder:
    """Events of one job in, SSE bytes out. `is_done` once [DONE] is among them."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._scribe = Scribe(tokenizer, job)
        kind = b"chat.completion.chunk" if job.is_chat else b"text_completion"
        self._envelope = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":' % (
            _json(job.response_id), kind, job.created, _json(job.model),
        )  # fmt: skip
        self._choices = [_ChoiceState(i, job, self._envelope) for i in range(len(job.requests) * job.num_choices)]
        self._scored: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._finished: dict[int, Finished] = {}
        self._num_tokens = [0] * len(job.requests)
        text_is_all = not (job.has_logprobs or job.usage_in_each or job.return_token_ids or job.prompt_only)
        self._text_is_all = text_is_all and job.echo_texts is None
        self.is_done = False

    def encode(self, events: list[tuple[int, Event]]) -> bytes:
        """The frames of some events; b"" when they complete nothing that a client would see."""
        frames: list[bytes] = []
        for prompt, event in events:
            if self.is_done:
                break
            if isinstance(event, Tokens):
                self._tokens(frames, prompt, event)
            elif isinstance(event, Finished):
                self._finished[prompt] = event
                if len(self._finished) == len(self._job.requests):
                    self._end(frames)
            elif isinstance(event, Failed):
                frames.append(b"event: error\ndata: " + _json(error_body(from_failure(event.failure))) + b"\n\n" + DONE)
                self.is_done = True
            elif not isinstance(event, Placed):
                assert isinstance(event, PromptScored)
                self._scored[prompt] = event.logprobs
        return b"".join(frames)

    def _tokens(self, frames: list[bytes], prompt: int, event: Tokens) -> None:
        choice = self._choices[prompt * self._job.num_choices + event.choice]
        if not choice.has_begun:
            choice.has_begun = True
            if self._job.is_chat:
                frames.append(choice.role_frame)
        if self._text_is_all and event.finish_reason is None:
            if event.text:
                frames.append(choice.head + _json(event.text) + choice.tail)
            return
        self._num_tokens[prompt] += len(event.token_ids)
        choice.hold(event)
        if event.text or event.finish_reason is not None:
            frames.append(self._frame(prompt, choice, event))

    def _frame(self, prompt: int, choice: _ChoiceState, event: Tokens) -> bytes:
        """A chunk with everything that can be in one, built the plain way."""
        job = self._job
        text = "" if job.prompt_only else event.text
        ids, scored = choice.take_held()
        body: dict[str, Any] = {"index": choice.index}
        if job.is_chat:
            body["delta"] = {"content": text} if text else {}
            body["logprobs"] = {"content": self._scribe.chat(scored)} if job.has_logprobs else None
        else:
            all_ids, all_scored = ([], []) if job.prompt_only else (ids, list[TokenLogprobs | None](scored))
            if job.echo_texts is not None and not choice.has_echoed:
                choice.has_echoed = True
                text = job.echo_texts[prompt] + text
                all_ids = [*job.requests[prompt].prompt_token_ids, *all_ids]
                all_scored = [*self._scored.get(prompt, ()), *all_scored]
            body["text"] = text
            body["logprobs"] = self._scribe.completion(all_ids, all_scored, choice.num_chars) if job.has_logprobs else None
            choice.num_chars += len(text)
        body["finish_reason"] = event.finish_reason
        if event.finish_reason is not None:
            body["stop_reason"] = event.stop_reason
        if job.return_token_ids:
            body["token_ids"] = [] if job.prompt_only else ids
        usage = b""
        if job.usage_in_each:
            so_far = Usage(job.requests[prompt].prompt_len, 0 if job.prompt_only else self._num_tokens[prompt])
            usage = b',"usage":' + _json(usage_of(so_far))
        return self._envelope + b"[" + _json(body) + b"]" + usage + b"}\n\n"

    def _end(self, frames: list[bytes]) -> None:
        job = self._job
        if job.include_usage:
            usage = sum_usage(self._finished.values(), job.prompt_only)
            tail = b'[],"usage":' + _json(usage_of(usage))
            if len(job.requests) == 1:
                tail += b',"metrics":' + _json(metrics_of(self._finished[0], usage, job.num_choices))
            frames.append(self._envelope + tail + b"}\n\n")
        frames.append(DONE)
        self.is_done = True


class _ChoiceState:
    """One choice of a stream: its constant bytes, and what waits for the next chunk that carries text."""

    def __init__(self, index: int, job: Job, envelope: bytes) -> None:
        self.index = index
        self.has_begun = False
        self.has_echoed = False
        self.num_chars = 0
        self._ids: list[int] = []
        self._scored: list[TokenLogprobs] = []
        start = envelope + b'[{"index":%d,' % index
        self.head = start + (b'"delta":{"content":' if job.is_chat else b'"text":')
        self.tail = (b"}" if job.is_chat else b"") + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self.role_frame = start + b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'

    def hold(self, event: Tokens) -> None:
        self._ids += event.token_ids
        self._scored += event.logprobs or ()

    def take_held(self) -> tuple[list[int], list[TokenLogprobs]]:
        held = self._ids, self._scored
        self._ids, self._scored = [], []
        return held


class EventStream(Response):
    """The streaming response. Closes the relay however it ends: finished, failed, client gone, client too slow."""

    def __init__(
        self,
        relay: Relay,
        encoder: ChunkEncoder,
        first: list[tuple[int, Event]],
        watcher: asyncio.Future[None],
        keep_alive_s: float,
        write_timeout_s: float,
        on_close: Any,
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self._relay = relay
        self._encoder = encoder
        self._first = first
        self._watcher = watcher
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.timeout(None) as limit:
                with _Patience(self._write_timeout_s, limit) as patience:
                    await self._write(send, patience)
        except TimeoutError:
            log.info("%r: the client does not read, cut off", scope.get("path"))
            raise
        except OSError:  # the connection broke while writing
            pass
        finally:
            self._watcher.cancel()
            await asyncio.shield(self._on_close())

    async def _write(self, send: Send, patience: _Patience) -> None:
        batch = self._first
        while not self._relay.is_abandoned:
            data = self._encoder.encode(batch) if batch else KEEP_ALIVE
            if data:
                patience.begin()
                await send({"type": "http.response.body", "body": data, "more_body": not self._encoder.is_done})
                patience.end()
            if self._encoder.is_done:
                break
            batch = await self._relay.take(self._keep_alive_s)


class _Patience:
    """A limit to each of many writes. Its timer looks at the clock when it fires, so that a write that ends at once costs nothing:
    an `asyncio.timeout` for each would set and cancel one for every token."""

    def __init__(self, seconds: float, limit: asyncio.Timeout) -> None:
        self._seconds = seconds
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when the write under way began
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> _Patience:
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def begin(self) -> None:
        self._since = self._loop.time()

    def end(self) -> None:
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        until = (self._since if self._since is not None else now) + self._seconds
        if now >= until:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_at(until, self._look)
