"""A backend by script: each request's events are made by a function of the test; closing is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from api.backend import InForce, ModelCard
from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from configs.tenants import without_file
from protocol.errors import NotFound
from protocol.events import Event, Finished, PromptScored, Timing, TokenLogprobs, Tokens, Usage
from protocol.request import Request

TIMING = Timing(queue_s=0.001, prefill_s=0.02, transfer_s=0.003, decode_s=0.09, ttft_s=0.021, e2e_s=0.111)


def script_of(tokenizer: Tokenizer, answer: str) -> Callable[[Request, int], list[int]]:
    """Every choice says the same text, then EOS (unless ignore_eos), cut at max_tokens as an engine does."""
    token_ids = tokenizer.encode(answer, add_special_tokens=False)

    def say(request: Request, choice: int) -> list[int]:
        ids = [*token_ids]
        if request.sampling.ignore_eos or not request.eos_token_ids:
            while len(ids) < (request.sampling.max_tokens or 0):
                ids += token_ids
        else:
            ids.append(request.eos_token_ids[0])
        return ids[: request.sampling.max_tokens]

    return say


class FakeBackend:
    """Answers with `say(request, choice)` through the real detokenizer. The fields below stage every kind of trouble."""

    def __init__(self, tokenizer: Tokenizer, answer: str = "Hello from the cluster, naïve 😀 world.") -> None:
        self.tokenizer = tokenizer
        self.say = script_of(tokenizer, answer)
        self.requests: list[Request] = []
        self.num_open = 0
        self.num_closed = 0
        self.num_cancelled = 0
        self.delay_s = 0.0
        self.hold_s = 0.0  # before the first event
        self.events: Callable[[Request], list[Event]] | None = None  # a whole script instead
        self.error: Exception | None = None  # raised after the first token
        self.ready = True
        self.asked: list[tuple[str, dict[str, Any]]] = []  # of the history
        self.notices: list[tuple[str, float]] = []
        self.sla_rows: list[dict[str, Any]] = []
        self.in_force = InForce(without_file(2.0, 0.2, 0.99))
        self.cards = [
            ModelCard(
                id=name,
                root="org/model",
                max_model_len=512,
                vocab_size=tokenizer.vocab_size,
                eos_token_ids=tokenizer.eos_token_ids,
                created=1_700_000_000,
            )
            for name in ("m", "org/model")
        ]

    def models(self) -> list[ModelCard]:
        return self.cards

    def tenants(self) -> InForce:
        return self.in_force

    def is_ready(self) -> bool:
        return self.ready

    def reason(self) -> str:
        return "" if self.ready else "no decode worker is up yet"

    async def status(self) -> dict[str, Any]:
        return {"workers": [{"name": "decode:0", "role": "decode", "state": "ready"}], "queue": {"num_requests": 0}}

    async def history(self, what: str, **query: Any) -> dict[str, Any]:
        self.asked.append((what, query))
        if what == "requests":
            return {"requests": []}
        if what == "request":
            if query["request_id"] != "known":
                raise NotFound("no such request is remembered")
            return {"request": {"id": "known"}, "timeline": [], "why": None}
        if what == "decision":
            if query["request_id"] != "known":
                raise NotFound("no such decision is remembered")
            return {"id": "known", "words": ["request known"]}
        if what == "sla":
            return {"window_s": query["window_s"], "rows": self.sla_rows}
        series = {"step_s": 5, "point": None, **({"history": {"t": []}} if what == "snapshot" else {})}
        return {"now": 1e9, "status": await self.status(), "series": series, "events": []}

    async def notice(self, worker: str, seconds: float) -> tuple[str, ...]:
        if worker == "nobody":
            raise NotFound("no worker or host is called 'nobody'; alive: decode:0")
        self.notices.append((worker, seconds))
        return (worker,)

    async def metrics(self) -> str:
        return "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        self.requests.append(request)
        self.num_open += 1
        has_ended = False
        try:
            await asyncio.sleep(self.hold_s)
            for event in self.events(request) if self.events else self._script(request):
                yield event
                if self.error is not None and isinstance(event, Tokens):
                    raise self.error
                await asyncio.sleep(self.delay_s)
            has_ended = True
        finally:
            self.num_open -= 1
            self.num_closed += 1
            self.num_cancelled += not has_ended

    def _script(self, request: Request) -> list[Event]:
        sampling = request.sampling
        events: list[Event] = []
        if sampling.prompt_logprobs is not None:
            scored = [None, *(_score(t, sampling.prompt_logprobs) for t in request.prompt_token_ids[1:])]
            events.append(PromptScored(tuple(scored)))
        total = 0
        streams = [self._choice(request, choice) for choice in range(sampling.n)]
        for round_ in range(max(map(len, streams))):
            events += [stream[round_] for stream in streams if round_ < len(stream)]
        total = sum(len(event.token_ids) for event in events if isinstance(event, Tokens))
        events.append(Finished(Usage(request.prompt_len, total, cached_tokens=min(4, request.prompt_len)), TIMING))
        return events

    def _choice(self, request: Request, choice: int) -> list[Tokens]:
        detokenizer = Detokenizer.for_request(self.tokenizer, request)
        ids = self.say(request, choice)
        events: list[Tokens] = []
        for index, token in enumerate(ids):
            text, stop = detokenizer.feed([token])
            reason: str | None = None
            is_eos = token in request.eos_token_ids and not request.sampling.ignore_eos
            if stop is not None or is_eos:
                reason = "stop"
            elif index == len(ids) - 1:
                reason = "length"
            if reason is not None and stop is None:
                text += detokenizer.flush()
            logprobs = None if request.sampling.logprobs is None else (_score(token, request.sampling.logprobs),)
            events.append(Tokens(choice, index, (token,), text, logprobs, reason, stop))
            if reason is not None:
                break
        return events


def _score(token: int, num_top: int) -> TokenLogprobs:
    """The token is the most likely one; its rivals are the ids around it."""
    top = tuple(((token + i) % 200, -0.25 - 1.5 * i) for i in range(num_top))
    return TokenLogprobs(token, -0.25, 1, ((token, -0.25), *top[1:]) if num_top else ())
