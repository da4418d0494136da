"""A checked body becomes protocol Requests and a note of how to answer it. The only way from HTTP into the cluster.

Nothing of a body crosses that is not named here: no hand-off field, no tenant (truth rule R7). Class, promise and priority are
`rights.py`'s.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from api.backend import ModelCard, Settings
from api.chat_template import RESERVED
from api.schema import IDENTIFIER, MAX_STOP_LEN, ChatBody, CompletionBody, SamplingBody, messages_of, prompts_of
from api.tokenizer import Tokenizer
from protocol.errors import InvalidRequest, NotFound, PromptTooLong, TandemError
from protocol.request import MAX_LOGPROBS, Request, SamplingParams

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI and vLLM have it


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request: what to generate (one Request per prompt) and how to answer."""

    requests: tuple[Request, ...]
    response_id: str
    created: int
    model: str
    is_chat: bool
    stream: bool
    include_usage: bool
    usage_in_each: bool
    echo_texts: tuple[str, ...] | None  # per prompt, when the prompt is to be repeated
    has_logprobs: bool
    num_top: int
    tokens_as_ids: bool
    return_token_ids: bool
    shows_prompt_logprobs: bool  # as a field of its own, vLLM's prompt_logprobs
    prompt_only: bool  # echo with max_tokens 0: one token is generated and thrown away

    @property
    def num_choices(self) -> int:
        """Of one prompt; choice c of prompt p is answered as index p * num_choices + c."""
        return self.requests[0].sampling.n


def find_model(name: str | None, cards: Sequence[ModelCard]) -> ModelCard:
    """The card of that name, the first one when no name is given. Raises NotFound that names what is served."""
    if name is None and cards:
        return cards[0]
    for card in cards:
        if card.id == name:
            return card
    served = ", ".join(card.id for card in cards) or "nothing yet"
    raise NotFound(f"the model {(name or '')[:100]!r} is not served here; served: {served}", param="model")


async def completion_job(
    body: CompletionBody, tenant: str, cards: Sequence[ModelCard], tokenizer: Tokenizer, settings: Settings
) -> Job:
    """Raises InvalidRequest, PromptTooLong, NotFound."""
    card = find_model(body.model, cards)
    prompts = prompts_of(body.prompt)
    _check_width(len(prompts), body, settings)
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    prompt_only = bool(body.echo) and body.max_tokens == 0
    scores_prompt = body.prompt_logprobs
    if scores_prompt is None and body.echo:
        scores_prompt = body.logprobs
    max_tokens = 1 if prompt_only else body.max_tokens
    sampling = _sampling(
        body,
        card,
        max_tokens=max_tokens if max_tokens is not None else card.default_sampling.get("max_tokens", DEFAULT_MAX_TOKENS),
        logprobs=body.logprobs,
        prompt_logprobs=scores_prompt,
    )
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            _refuse_hopeless(prompt, card, tokenizer, body, "prompt")
            prompt = await tokenizer.encode_async(prompt, body.add_special_tokens is not False)
        ids.append(_truncated(prompt, body, card, sampling))
    echo_texts = None
    if body.echo:
        echo_texts = tuple(p if isinstance(p, str) else tokenizer.decode(i, False) for p, i in zip(prompts, ids, strict=True))
    return _job(
        body, card, tenant, settings, ids, sampling,
        is_chat=False, echo_texts=echo_texts, prompt_only=prompt_only, renamed={}, limit_is_ours=max_tokens is None,
        has_logprobs=body.logprobs is not None, num_top=body.logprobs or 0,
    )  # fmt: skip


async def chat_job(body: ChatBody, tenant: str, cards: Sequence[ModelCard], tokenizer: Tokenizer, settings: Settings) -> Job:
    """Raises InvalidRequest, PromptTooLong, NotFound."""
    card = find_model(body.model, cards)
    _check_width(1, body, settings)
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.top_logprobs is not None:
        if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {body.top_logprobs}", param="top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    max_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    text = await render_messages(body, tokenizer, reasoning_effort=body.reasoning_effort, documents=body.documents)
    _refuse_hopeless(text, card, tokenizer, body, "messages")
    ids = await tokenizer.encode_async(text, body.add_special_tokens is True)
    num_top = (body.top_logprobs or 0) if body.logprobs else 0
    renamed = {"prompt": "messages", "max_tokens": max_name, "logprobs": "top_logprobs"}
    with_limit = max_tokens if max_tokens is not None else card.default_sampling.get("max_tokens")
    try:
        sampling = _sampling(
            body, card, max_tokens=with_limit, logprobs=num_top if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )  # fmt: skip
    except InvalidRequest as error:
        raise _renamed(error, renamed) from None
    ids = _truncated(ids, body, card, sampling)
    return _job(
        body, card, tenant, settings, [ids], sampling,
        is_chat=True, echo_texts=None, prompt_only=False, renamed=renamed, limit_is_ours=max_tokens is None,
        has_logprobs=bool(body.logprobs), num_top=num_top,
    )  # fmt: skip


async def render_messages(body: Any, tokenizer: Tokenizer, **variables: Any) -> str:
    """The prompt text of `messages`, `chat_template_kwargs` and the two switches of a chat or tokenize body."""
    messages = messages_of(body.messages)
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other", param="continue_final_message")
    extra = dict(body.chat_template_kwargs or {})
    for name in extra:
        if name in RESERVED or not _VARIABLE.fullmatch(name):
            raise InvalidRequest(f"chat_template_kwargs may not set {name[:60]!r}", param="chat_template_kwargs")
    documents = variables.pop("documents", None)
    extra.update({name: value for name, value in variables.items() if value is not None})
    return tokenizer.render_chat(
        messages,
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        documents=documents,
        variables=extra,
    )


def _sampling(
    body: SamplingBody, card: ModelCard, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    values = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    defaults = {name: value for name, value in card.default_sampling.items() if name != "max_tokens"}
    for stop in [body.stop] if isinstance(body.stop, str) else body.stop or []:
        if len(stop) > MAX_STOP_LEN:
            raise InvalidRequest(f"stop: a stop string may have {MAX_STOP_LEN} characters", param="stop")
    return SamplingParams(
        **{**defaults, **values},
        logit_bias=_logit_bias(body.logit_bias),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(value: dict[str, float] | None) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, strength in (value or {}).items():
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest(f"logit_bias: {key[:60]!r} is not a token id", param="logit_bias")
        bias[int(key)] = strength
    return bias


def _check_width(num_prompts: int, body: SamplingBody, settings: Settings) -> None:
    total = num_prompts * max(1, body.n or 1)
    if body.n is not None and total > settings.max_sequences:
        raise InvalidRequest(f"n x prompts = {total} sequences; at most {settings.max_sequences} at once", param="n")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")


def _refuse_hopeless(text: str, card: ModelCard, tokenizer: Tokenizer, body: SamplingBody, param: str) -> None:
    """A text that cannot fit however well it is tokenized is not worth tokenizing."""
    if len(text) > 1 << 16 and body.truncate_prompt_tokens is None:
        at_least = len(text) // tokenizer.max_token_len
        if at_least >= card.max_model_len:
            raise PromptTooLong(
                f"{param} has {len(text)} characters, at least {at_least} tokens; "
                f"max_model_len = {card.max_model_len} (--max-model-len)",
                param=param,
            )


def _truncated(ids: list[int], body: SamplingBody, card: ModelCard, sampling: SamplingParams) -> list[int]:
    """The last truncate_prompt_tokens ids; -1: as many as leave room for the answer."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit != -1 and not 1 <= limit < 2**31:
        raise InvalidRequest(f"truncate_prompt_tokens must be -1 or at least 1, got {limit}", param="truncate_prompt_tokens")
    if limit == -1:
        limit = max(1, card.max_model_len - (sampling.max_tokens or 1))
    return ids[-limit:]


def _job(
    body: SamplingBody,
    card: ModelCard,
    tenant: str,
    settings: Settings,
    ids: list[list[int]],
    sampling: SamplingParams,
    *,
    is_chat: bool,
    echo_texts: tuple[str, ...] | None,
    prompt_only: bool,
    renamed: dict[str, str],
    limit_is_ours: bool,
    has_logprobs: bool,
    num_top: int,
) -> Job:
    _check_names(body)
    unique = secrets.token_hex(12)
    salt = settings.cache_salt(tenant, body.cache_salt or "")
    requests = []
    wanted = sampling
    for i, prompt in enumerate(ids):
        rest = card.max_model_len - len(prompt)
        if limit_is_ours and rest > 0:  # only a limit that the client asked for may be too large
            sampling = msgspec.structs.replace(wanted, max_tokens=min(wanted.max_tokens or rest, rest))
        request = Request(
            request_id=unique if len(ids) == 1 else f"{unique}-{i}",
            model=card.model or card.id,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            eos_token_ids=card.eos_token_ids,
            tenant=tenant,
            cache_salt=salt,
        )
        try:
            request.validate_tokens(card.vocab_size, card.max_model_len)
        except InvalidRequest as error:
            raise _renamed(error, renamed) from None
        requests.append(request)
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    return Job(
        requests=tuple(requests),
        response_id=("chatcmpl-" if is_chat else "cmpl-") + unique,
        created=int(time.time()),
        model=body.model or card.id,
        is_chat=is_chat,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        usage_in_each=continuous and bool(options and options.include_usage),
        echo_texts=echo_texts,
        has_logprobs=has_logprobs,
        num_top=num_top,
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        return_token_ids=bool(body.return_token_ids),
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        prompt_only=prompt_only,
    )


def _check_names(body: SamplingBody) -> None:
    if body.request_id is not None and not IDENTIFIER.fullmatch(body.request_id):
        raise InvalidRequest("request_id must be 1 to 128 printable ASCII characters without spaces", param="request_id")
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= 256:
        raise InvalidRequest("cache_salt must have 1 to 256 characters", param="cache_salt")


def _renamed(error: InvalidRequest, names: dict[str, str]) -> TandemError:
    """The same error under the field's name in this body."""
    name = names.get(error.param or "", error.param)
    message = error.message
    if name != error.param and error.param and message.startswith(error.param):
        message = f"{name}{message[len(error.param) :]}"
    return type(error)(message, param=name)
