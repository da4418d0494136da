"""An OpenAI-compatible server as an engine: token ids in, token ids out, over `/v1/completions` with streaming.

A server that takes and returns token ids (vLLM: `return_token_ids`) is exact: what it says is what is delivered. Any other one gets
the prompt as text, and its text is made into tokens of this model again, cut only before white space and only where the tokens say
exactly that text (`Retokenizer`). Which of the two it is, `probe` finds out.

Not here: our control protocol (`overflow.py`). Knows nothing of a cluster; `Upstream` is all that a worker needs of an engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

import aiohttp

from api.tokenizer import Tokenizer
from protocol.errors import CannotServe, ReservationRefused, TandemError, TransferFailed, WorkerLost
from protocol.request import SamplingParams

log = logging.getLogger(__name__)

CONNECT_S = 5.0
PROBE_S = 10.0
MAX_LINE_BYTES = 1 << 20  # of one event; a server that sends more is not one
MAX_ERROR_CHARS = 300
NUM_CONTEXT_TOKENS = 8  # before a piece of text, so that its first space is kept where it belongs


class Asked(NamedTuple):
    """One choice to be generated. token_ids: the prompt and what was delivered already; sampling.max_tokens: what is left of it."""

    token_ids: tuple[int, ...]
    num_delivered: int
    sampling: SamplingParams


class Piece(NamedTuple):
    """Some tokens, or the end: finish_reason "stop" | "length"."""

    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


class Upstream(Protocol):
    """An engine somewhere else."""

    @property
    def name(self) -> str: ...

    async def probe(self) -> None:
        """Is it there, and can it do what we need? Raises TandemError with the reason."""
        ...

    def check(self, sampling: SamplingParams, num_delivered: int) -> None:
        """Raises CannotServe with a sentence when it cannot sample like that."""
        ...

    def generate(self, asked: Asked) -> AsyncIterator[Piece]:
        """An async generator; closing it ends the work there. Its last piece has a finish_reason. Raises TandemError."""
        ...

    async def close(self) -> None: ...


class OpenAIServer:
    """One server. url: up to and with /v1. silence_s: between two tokens, then it counts as lost."""

    def __init__(self, url: str, model: str, tokenizer: Tokenizer, api_key: str | None = None, silence_s: float = 30.0) -> None:
        self.name = url
        self._url = url.rstrip("/")
        self._model = model
        self._tokenizer = tokenizer
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._silence_s = silence_s
        self._session: aiohttp.ClientSession | None = None
        self.speaks_ids: bool | None = None  # None: not asked yet

    # ---- is it there -------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """The first time a token is generated, to see whether ids come back; afterwards the list of models has to do."""
        if self.speaks_ids is not None:
            await self._get_models()
            return
        some_id = self._tokenizer.encode("a", add_special_tokens=False)[:1] or [0]
        body = {"model": self._model, "prompt": some_id, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
        try:
            answer = await self._post(body)
            self.speaks_ids = bool(answer["choices"][0].get("token_ids"))
        except CannotServe:
            self.speaks_ids = False  # it takes no ids, or does not know the field
        except (KeyError, IndexError, TypeError, AttributeError):
            raise WorkerLost(f"{self._url} does not answer as an OpenAI server does") from None
        if not self.speaks_ids:
            answer = await self._post({"model": self._model, "prompt": "a", "max_tokens": 1, "temperature": 0.0})
            if not isinstance(answer.get("choices"), list):
                raise WorkerLost(f"{self._url} does not answer as an OpenAI server does")
        log.info("%s speaks %s", self._url, "token ids" if self.speaks_ids else "text")

    async def _get_models(self) -> None:
        async with self._request("GET", "/models", None) as answer:
            await answer.read()

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._request("POST", "/completions", body) as answer:
            try:
                found = json.loads(await answer.read())
            except ValueError:
                raise WorkerLost(f"{self._url} did not answer with JSON") from None
        if not isinstance(found, dict):
            raise WorkerLost(f"{self._url} does not answer as an OpenAI server does")
        return found

    def _request(self, method: str, path: str, body: dict[str, Any] | None, silence_s: float | None = None) -> _Exchange:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers)
        wait = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s or PROBE_S)
        return _Exchange(self._url, self._session.request(method, f"{self._url}{path}", json=body, timeout=wait))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    # ---- generating --------------------------------------------------------------------------------------------------

    def check(self, sampling: SamplingParams, num_delivered: int) -> None:
        asked = {
            "logprobs": sampling.logprobs is not None,
            "prompt_logprobs": sampling.prompt_logprobs is not None,
        }
        if num_delivered:  # they look at the answer alone, and its first part is a prompt now
            asked["a presence_penalty across a resumption"] = sampling.presence_penalty != 0
            asked["a frequency_penalty across a resumption"] = sampling.frequency_penalty != 0
            asked["min_tokens across a resumption"] = sampling.min_tokens > 0
        if not self.speaks_ids:
            asked |= {
                "top_k": sampling.top_k > 0,
                "min_p": sampling.min_p != 0,
                "repetition_penalty": sampling.repetition_penalty != 1,
                "logit_bias": bool(sampling.logit_bias),
                "stop_token_ids": bool(sampling.stop_token_ids),
                "min_tokens": sampling.min_tokens > 0,
                "ignore_eos": sampling.ignore_eos,
                "skip_special_tokens: false": not sampling.skip_special_tokens,
            }
        wanted = [name for name, is_wanted in asked.items() if is_wanted]
        if wanted:
            raise CannotServe(f"the overflow server {self._url} cannot do {', '.join(wanted)}", param=wanted[0].split(":")[0])

    async def generate(self, asked: Asked) -> AsyncIterator[Piece]:
        body = self._body(asked)
        retokenizer = None if self.speaks_ids else Retokenizer(self._tokenizer, asked.token_ids)
        finish: str | None = None
        async with self._request("POST", "/completions", body, self._silence_s) as answer:
            async for event in _events(answer, self._url):
                choice = (event.get("choices") or [{}])[0]
                if "error" in event or not isinstance(choice, dict):
                    raise WorkerLost(f"{self._url}: {str(event.get('error'))[:MAX_ERROR_CHARS]}")
                ids = choice.get("token_ids") or ()
                if retokenizer is not None:
                    ids = retokenizer.push(str(choice.get("text") or ""))
                elif choice.get("text") and not ids:
                    raise WorkerLost(f"{self._url} sent text without its token_ids")
                if ids:
                    yield Piece(tuple(map(int, ids)))
                finish = choice.get("finish_reason") or finish
        if finish is None:
            raise WorkerLost(f"the stream of {self._url} broke off")
        if retokenizer is not None:
            rest = retokenizer.flush()
            if rest:
                yield Piece(tuple(rest))
        yield Piece((), "length" if finish == "length" else "stop")

    def _body(self, asked: Asked) -> dict[str, Any]:
        sampling = asked.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "stream": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed & (2**31 - 1)  # as much as every server takes
        if not self.speaks_ids:
            return {**body, "prompt": self._text_of(asked.token_ids)}
        return {
            **body,
            "prompt": list(asked.token_ids),
            "return_token_ids": True,
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
            "stop_token_ids": list(sampling.stop_token_ids or ()),
            "min_tokens": sampling.min_tokens,
            "ignore_eos": sampling.ignore_eos,
        }

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """Without the first BOS, which the server puts there itself."""
        bos = self._tokenizer.special_tokens.get("bos_token")
        if bos is not None and token_ids and token_ids[0] == self._tokenizer.token_id(bos):
            token_ids = token_ids[1:]
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class _Exchange:
    """One HTTP exchange; what goes wrong in it becomes an error of ours, with the server's own words."""

    def __init__(self, url: str, request: Any) -> None:
        self._url = url
        self._request = request

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            answer: aiohttp.ClientResponse = await self._request.__aenter__()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise WorkerLost(f"{self._url} cannot be reached: {type(error).__name__}") from None
        if answer.status == 200:
            return answer
        try:
            words = (await answer.content.read(4096)).decode("utf-8", "replace")[:MAX_ERROR_CHARS]
        except (aiohttp.ClientError, TimeoutError, OSError):
            words = ""
        await self._request.__aexit__(None, None, None)
        said = f"{self._url} answered {answer.status}: {words}"
        if answer.status in (429, 503):
            raise ReservationRefused(said)
        if answer.status in (400, 404, 413, 422, 501):
            raise CannotServe(said)
        raise WorkerLost(said)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        await self._request.__aexit__(kind, error, trace)
        if isinstance(error, (aiohttp.ClientError, TimeoutError, OSError)) and not isinstance(error, asyncio.CancelledError):
            raise WorkerLost(f"the stream of {self._url} broke off: {type(error).__name__}") from None


async def _events(answer: aiohttp.ClientResponse, url: str) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to [DONE]."""
    rest = b""
    async for data in answer.content.iter_any():
        rest += data
        *lines, rest = rest.split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise WorkerLost(f"{url} sent a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                return
            try:
                event = json.loads(payload)
            except ValueError:
                raise WorkerLost(f"{url} sent an event that is not JSON") from None
            if isinstance(event, dict):
                yield event


class Retokenizer:
    """Text as it comes, to tokens that say exactly that text. Raises TransferFailed (at the end) when there are none that do."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(context[-NUM_CONTEXT_TOKENS:])
        self._pending = ""

    def push(self, text: str) -> list[int]:
        self._pending += text
        cut = _safe_cut(self._pending)
        ids = self._tokens_of(self._pending[:cut]) if cut else None
        if ids is None:
            return []
        self._pending = self._pending[cut:]
        return ids

    def flush(self) -> list[int]:
        ids = self._tokens_of(self._pending)
        if ids is None:
            raise TransferFailed("the overflow server's text cannot be written in this model's tokens")
        self._pending = ""
        return ids

    def _tokens_of(self, text: str) -> list[int] | None:
        """None when no way of writing it says exactly this after what was said before."""
        if not text:
            return []
        decode, before = self._tokenizer.decode, self._context
        said = decode(before, skip_special_tokens=False)
        together = self._tokenizer.encode(said + text, add_special_tokens=False)
        for ids in (self._tokenizer.encode(text, add_special_tokens=False), together[len(before) :]):
            if decode([*before, *ids], skip_special_tokens=False) == said + text:
                self._context = [*before, *ids][-NUM_CONTEXT_TOKENS:]
                return ids
        return None


def _safe_cut(text: str) -> int:
    """Before the last white space that follows something else: what comes next cannot change the tokens of what is before it."""
    for at in range(len(text) - 1, 0, -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return 0


def wrapped(error: BaseException, name: str) -> TandemError:
    """Whatever went wrong with a server, as an error that is worth another attempt elsewhere."""
    if isinstance(error, TandemError):
        return error
    return WorkerLost(f"the overflow server {name} failed: {type(error).__name__}")
