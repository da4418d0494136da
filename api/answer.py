"""The parts of an answer that streaming and not streaming share: log-probabilities, usage, timings, whole responses.

Plain dicts in OpenAI's shapes, vLLM's where OpenAI has none. Called by `stream.py` and `routes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from api.convert import Job
from api.tokenizer import Tokenizer
from protocol.events import Finished, Placed, PromptScored, TokenLogprobs, Tokens, Usage

LEAST_LOGPROB = -9999.0  # JSON has no -inf


class Scribe:
    """Writes tokens and their log-probabilities the way one job asked for."""

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._tokenizer = tokenizer
        self._num_top = job.num_top
        self._as_ids = job.tokens_as_ids

    def token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def chat(self, scored: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
        """choices[].logprobs.content"""
        return [
            {
                **self._entry(item.token, item.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in item.top[: self._num_top]],
            }
            for item in scored
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.token(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def completion(self, token_ids: Sequence[int], scored: Sequence[TokenLogprobs | None], offset: int) -> dict[str, Any]:
        """choices[].logprobs: parallel lists. offset: characters before the first token. A prompt's first token has
        none.

        The token itself is among its top_logprobs with the very same float, so that comparing the two tells greedy
        from not.
        """
        tokens = [self.token(token) for token in token_ids]
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, text, item in zip(token_ids, tokens, scored, strict=True):
            offsets.append(offset)
            offset += len(self._tokenizer.token_text(token_id))
            if item is None:
                values.append(None)
                tops.append(None)
                continue
            own = max(item.logprob, LEAST_LOGPROB)
            top = {text: own}
            for other, logprob in item.top[: self._num_top]:
                name = self.token(other)
                top[name] = max(logprob, LEAST_LOGPROB, top.get(name, LEAST_LOGPROB))
            values.append(own)
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def prompt(self, scored: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's prompt_logprobs: per position {token id: {logprob, rank, decoded_token}}."""
        return [None if item is None else self._ranked(item) for item in scored]

    def _ranked(self, item: TokenLogprobs) -> dict[str, Any]:
        ranks = {item.token: (item.logprob, item.rank)}
        for rank, (token, logprob) in enumerate(item.top, 1):
            ranks.setdefault(token, (logprob, rank))
        return {
            str(token): {
                "logprob": max(logprob, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token),
            }
            for token, (logprob, rank) in ranks.items()
        }


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def sum_usage(finished: Iterable[Finished], prompt_only: bool) -> Usage:
    prompt = completion = cached = resumptions = 0
    for item in finished:
        prompt += item.usage.prompt_tokens
        completion += 0 if prompt_only else item.usage.completion_tokens
        cached += item.usage.cached_tokens
        resumptions += item.usage.num_resumptions
    return Usage(prompt, completion, cached, resumptions)


def metrics_of(finished: Finished, usage: Usage, num_choices: int) -> dict[str, Any]:
    """The phases of one request in milliseconds. Generation runs from the first token to the last, the transfer included.

    mean_itl_ms: between two tokens of one choice. tokens_per_second: of all choices together, while tokens came. degraded: what
    was taken off to serve it, as in x-tandem-degraded; None for nothing.
    """
    timing = finished.timing
    num_gaps = usage.completion_tokens - num_choices
    spent = timing.decode_s if num_gaps > 0 and timing.decode_s > 0 else timing.e2e_s
    counted = num_gaps if num_gaps > 0 and timing.decode_s > 0 else usage.completion_tokens
    return {
        "time_to_first_token_ms": _ms(timing.ttft_s),
        "queue_time_ms": _ms(timing.queue_s),
        "prefill_time_ms": _ms(timing.prefill_s),
        "transfer_time_ms": _ms(timing.transfer_s),
        "generation_time_ms": _ms(timing.decode_s),
        "e2e_time_ms": _ms(timing.e2e_s),
        "mean_itl_ms": _ms(timing.decode_s * num_choices / num_gaps) if num_gaps > 0 else None,
        "tokens_per_second": round(counted / spent, 3) if spent > 0 else None,
        "resumptions": usage.num_resumptions,
        "degraded": finished.degraded or None,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


class WholeAnswer:
    """Gathers the events of a job that is not streamed; `body()` is the response."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._scribe = Scribe(tokenizer, job)
        self._choices = [_Choice() for _ in range(len(job.requests) * job.num_choices)]
        self._scored: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._finished: dict[int, Finished] = {}
        self.placed: list[Placed] = []

    @property
    def is_complete(self) -> bool:
        return len(self._finished) == len(self._job.requests)

    def add(self, prompt: int, event: Placed | Tokens | PromptScored | Finished) -> None:
        if isinstance(event, Tokens):
            self._choices[prompt * self._job.num_choices + event.choice].add(event)
        elif isinstance(event, PromptScored):
            self._scored[prompt] = event.logprobs
        elif isinstance(event, Placed):
            self.placed.append(event)
        else:
            self._finished[prompt] = event

    def body(self, model: str = "") -> dict[str, Any]:
        """model: that answered, where it is not the one that was asked for."""
        job = self._job
        usage = sum_usage(self._finished.values(), job.prompt_only)
        response: dict[str, Any] = {
            "id": job.response_id,
            "object": "chat.completion" if job.is_chat else "text_completion",
            "created": job.created,
            "model": model or job.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage_of(usage),
        }
        if len(job.requests) == 1:
            response["metrics"] = metrics_of(self._finished[0], usage, job.num_choices)
            if job.is_chat and job.shows_prompt_logprobs:
                response["prompt_logprobs"] = self._scribe.prompt(self._scored.get(0, ()))
            if job.is_chat and job.return_token_ids:
                response["prompt_token_ids"] = job.requests[0].prompt_token_ids
        return response

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        job = self._job
        prompt = index // job.num_choices
        text = "".join(choice.texts)
        answer: dict[str, Any] = {
            "index": index,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if job.is_chat:
            answer["message"] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
            answer["logprobs"] = {"content": self._scribe.chat(choice.logprobs)} if job.has_logprobs else None
        else:
            ids, scored = choice.token_ids, list[TokenLogprobs | None](choice.logprobs)
            if job.prompt_only:
                text, ids, scored = "", [], []
            if job.echo_texts is not None:
                text = job.echo_texts[prompt] + text
                ids = [*job.requests[prompt].prompt_token_ids, *ids]
                scored = [*self._scored.get(prompt, ()), *scored]
            answer["text"] = text
            answer["logprobs"] = self._scribe.completion(ids, scored, 0) if job.has_logprobs else None
            if job.shows_prompt_logprobs:
                answer["prompt_logprobs"] = self._scribe.prompt(self._scored.get(prompt, ()))
            if job.return_token_ids:
                answer["prompt_token_ids"] = job.requests[prompt].prompt_token_ids
        if job.return_token_ids:
            answer["token_ids"] = [] if job.prompt_only else choice.token_ids
        return answer


class _Choice:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, event: Tokens) -> None:
        self.texts.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or ()
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
