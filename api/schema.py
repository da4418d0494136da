"""The bodies of the HTTP requests, field by field. Strict types, unknown fields ignored, null means absent.

What a client may send and what is refused is decided here; `convert.py` turns a body into protocol Requests. Ranges of
sampling parameters are SamplingParams' own. A field that we know but did not build is refused by name
(`refuse_unbuilt`) unless its value asks for nothing.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from api.intake import parse_object
from protocol.errors import InvalidRequest, TandemError, Unsupported

MAX_STOP_LEN = 1024  # characters of one stop string
MAX_PROMPTS = 256
MAX_MESSAGES = 8192
ROLES = ("system", "developer", "user", "assistant", "tool")
IDENTIFIER = re.compile(r"[!-~]{1,128}")  # printable ASCII without spaces: safe in headers and logs
_BodyT = TypeVar("_BodyT", bound=BaseModel)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(BaseModel):
    """What completions and chat have in common. Names and meanings are OpenAI's, then vLLM's."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    priority: int | None = None  # lower is earlier, among the tenant's own requests (rights.py)
    user: str | None = None


class CompletionBody(SamplingBody):
    """POST /v1/completions. `prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    reasoning_effort: str | None = None


class TokenizeBody(BaseModel):
    """POST /tokenize: `prompt`, or `messages` to go through the chat template."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    tokens: list[int]


def validate(body_type: type[_BodyT], values: dict[str, Any]) -> _BodyT:
    """The body, or InvalidRequest that names the first field at fault."""
    try:
        body = body_type.model_validate(values)
    except ValidationError as error:
        raise _as_invalid(error, values) from None
    refuse_unbuilt(body_type, values)
    return body


def _as_invalid(error: ValidationError, values: dict[str, Any]) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    wanted = "; ".join(dict.fromkeys(e["msg"] for e in error.errors(include_url=False) if e["loc"][0] == first["loc"][0]))
    if field == "stream_options" and len(first["loc"]) > 1:
        field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return InvalidRequest(f"{field} is missing", param=field)
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return InvalidRequest(f"{field}: {wanted.lower()}; got {shown}", param=field)


# ---- fields that are known and not built ---------------------------------------------------------------------------

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
_UNBUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    # field: (values that ask for nothing, what to say)
    "suffix": (_NOTHING, "infilling between a prompt and a suffix is not built"),
    "use_beam_search": (_NOTHING, "beam search is not built; use n with a temperature"),
    "length_penalty": ((*_NOTHING, 1, 1.0), "it belongs to beam search, which is not built"),
    "early_stopping": (_NOTHING, "it belongs to beam search, which is not built"),
    "structured_outputs": (_NOTHING, "constrained output is not built"),
    "guided_json": (_NOTHING, "constrained output is not built"),
    "guided_regex": (_NOTHING, "constrained output is not built"),
    "guided_choice": (_NOTHING, "constrained output is not built"),
    "guided_grammar": (_NOTHING, "constrained output is not built"),
    "regex": (_NOTHING, "constrained output is not built"),
    "ebnf": (_NOTHING, "constrained output is not built"),
    "json_schema": (_NOTHING, "constrained output is not built"),
    "stop_regex": (_NOTHING, "only plain stop strings are built; use stop"),
    "logits_processors": (_NOTHING, "code from a client is never run"),
    "logits_processor": (_NOTHING, "code from a client is never run"),
    "custom_logit_processor": (_NOTHING, "code from a client is never run"),
    "bad_words": (_NOTHING, "not built; use logit_bias with -100"),
    "allowed_token_ids": (_NOTHING, "not built; use logit_bias"),
    "thinking_token_budget": (_NOTHING, "not built"),
    "prompt_embeds": (_NOTHING, "prompts are text or token ids"),
    "lora_path": (_NOTHING, "adapters are not built"),
    "functions": (_NOTHING, "tool calls are not parsed out of answers yet"),
    "function_call": ((*_NOTHING, "none"), "tool calls are not parsed out of answers yet"),
    "chat_template": (_NOTHING, "a template from a client is never run; the model's own is used"),
    "audio": (_NOTHING, "text only"),
    "modalities": ((*_NOTHING, ["text"]), "text only"),
    "web_search_options": (_NOTHING, "there is no web search"),
    "mm_processor_kwargs": (_NOTHING, "text only"),
}
_CHAT_ONLY_UNBUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "echo": (_NOTHING, "it is built for /v1/completions only"),
}


def refuse_unbuilt(body_type: type[BaseModel], values: dict[str, Any]) -> None:
    """Raises Unsupported (501) or InvalidRequest (400) that names the field."""
    known = {**_UNBUILT, **_CHAT_ONLY_UNBUILT} if body_type is ChatBody else _UNBUILT
    for field in values.keys() & known.keys():
        harmless, why = known[field]
        if not any(type(values[field]) is type(value) and values[field] == value for value in harmless):
            raise Unsupported(f"{field} is not supported: {why}", param=field)
    _check_best_of(values)
    _check_tools(values)
    _check_response_format(values.get("response_format"))


def _check_best_of(values: dict[str, Any]) -> None:
    best_of, n = values.get("best_of"), values.get("n") or 1
    if best_of is None:
        return
    if not isinstance(best_of, int) or isinstance(best_of, bool) or best_of < 1:
        raise InvalidRequest(f"best_of: a positive integer is needed; got {best_of!r}"[:200], param="best_of")
    if best_of < n:
        raise InvalidRequest(f"best_of {best_of} is below n {n}", param="best_of")
    if best_of > n:
        raise Unsupported("best_of above n is not supported: ask for n answers and choose", param="best_of")


def _check_tools(values: dict[str, Any]) -> None:
    tools, choice = values.get("tools"), values.get("tool_choice")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest("tools: an array is needed", param="tools")
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise InvalidRequest("tool_choice must be none, auto, required, or an object that names a function", param="tool_choice")
    if choice is not None and not isinstance(choice, (str, dict)):
        raise InvalidRequest("tool_choice must be a string or an object", param="tool_choice")
    if choice == "required" or isinstance(choice, dict):
        raise Unsupported("tool_choice is not supported: tool calls are not parsed out of answers yet", param="tool_choice")
    if tools and choice != "none":
        raise Unsupported(
            "tools are not supported: tool calls are not parsed out of answers yet (tool_choice none ignores them)",
            param="tools",
        )


def _check_response_format(value: Any) -> None:
    if value is None or value == {}:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema", "structural_tag", "regex", "grammar"):
        raise InvalidRequest(
            "response_format must be an object with type text, json_object or json_schema", param="response_format"
        )
    if kind == "json_schema" and not isinstance(value.get("json_schema"), dict):
        raise InvalidRequest("response_format: type json_schema needs a json_schema object", param="response_format")
    if kind != "text":
        raise Unsupported(f"response_format {kind} is not supported: constrained output is not built", param="response_format")


# ---- prompts and messages ------------------------------------------------------------------------------------------


def prompts_of(value: Any) -> list[str | list[int]]:
    """`prompt` in its four forms, as a list. Raises InvalidRequest."""
    if isinstance(value, str):
        return [value]
    if value is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt holds {len(value)} prompts; at most {MAX_PROMPTS} are taken at once", param="prompt")
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return list(value)
    if value == []:
        raise InvalidRequest("prompt is empty", param="prompt")
    raise InvalidRequest(
        "prompt must be a string, an array of strings, an array of token ids, or an array of arrays of token ids",
        param="prompt",
    )


def messages_of(value: Any) -> list[dict[str, Any]]:
    """`messages` as the chat template wants them: content flattened to text, only known keys. Raises InvalidRequest."""
    if value is None:
        raise InvalidRequest("messages is missing", param="messages")
    if not isinstance(value, list):
        raise InvalidRequest("messages must be an array of objects", param="messages")
    if not value:
        raise InvalidRequest("messages is empty; it needs at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(value)}; at most {MAX_MESSAGES} are taken", param="messages")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object with role and content", param=where)
    role = item.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    message: dict[str, Any] = {"role": role}
    calls = item.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = item.get("content")
    if content is None and role == "assistant":
        message["content"] = None if calls else ""
    else:
        message["content"] = _content(content, f"{where}.content")
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if item.get(name) is not None:
            if not isinstance(item[name], str):
                raise InvalidRequest(f"{where}.{name} must be a string", param=f"{where}.{name}")
            message[name] = item[name]
    return message


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} must be a string or an array of text parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else None
        if not isinstance(text, str):
            raise InvalidRequest(
                f'{where}[{i}] must be {{"type": "text", "text": ...}}; this model reads text only',
                param=f"{where}[{i}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Earlier tool calls of a conversation. Templates want the arguments as an object; clients send them as JSON
    text."""
    if not isinstance(value, list) or not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in value):
        raise InvalidRequest(f"{where} must be an array of objects with a function", param=where)
    calls = []
    for i, call in enumerate(value):
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"], f"{where}[{i}].function.arguments")
        calls.append({**call, "function": function})
    return calls


def _arguments(text: str, where: str) -> Any:
    try:
        return parse_object(text.encode()) if text.strip() else {}
    except TandemError as error:
        raise InvalidRequest(f"{where}: {error.message}", param=where) from None
