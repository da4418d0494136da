"""Chat templates: a list of messages becomes one prompt text, in jinja2's sandbox, as transformers renders it.

Templates come with a model and are not trusted; a client can never send one. Not here: tokenizing (`tokenizer.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import InvalidRequest, ModelError

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"})
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")  # one thing; templates read the first two
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # its trailing space tells whether the template trims the message


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training; here it only renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # what is set inside stays inside


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without underscore attributes, so that a template cannot reach into CPython."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja's own: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_make_dict)
    return environment


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class ChatTemplate:
    """One compiled template with the special tokens that it may name. Raises ModelError when it does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._render: Callable[..., str] = _environment().from_string(source).render
        except jinja2.exceptions.TemplateError as error:
            raise ModelError(f"the chat template in {origin} does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, str]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Raises InvalidRequest with the template's own words when it refuses the messages."""
        chat = [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        if not chat:
            raise _refused("messages is empty; it needs at least one message")
        final = self._mark_end(chat) if continue_final_message else None
        try:
            text = self._render(
                messages=chat,
                tools=None,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(variables or {})},
            )
        except jinja2.exceptions.TemplateError as error:
            raise _refused(f"the model's chat template refuses these messages: {error}") from None
        except Exception as error:  # a template is a program: whatever it trips over, it was given these messages
            raise _refused(f"the model's chat template fails on these messages ({type(error).__name__})") from None
        return text if final is None else _cut_at_mark(text, final)

    def _mark_end(self, chat: list[dict[str, Any]]) -> str:
        content = chat[-1].get("content")
        if not isinstance(content, str) or not content:
            raise _refused("continue_final_message: the last message has no text to continue")
        chat[-1]["content"] = content + _END_MARK
        return content


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(why, param="messages")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _cut_at_mark(text: str, final: str) -> str:
    mark = text.rfind(_END_MARK.strip())
    if mark < 0 or final.strip() not in text:
        raise _refused("continue_final_message: the chat template does not keep the last message whole")
    is_trimmed = text[mark : mark + len(_END_MARK)] != _END_MARK
    return text[:mark].rstrip() if is_trimmed else text[:mark]
