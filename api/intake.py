"""From bytes on a socket to a checked JSON object: everything hostile about a body is refused here.

Size and time are limited while reading; JSON is strict: UTF-8, no BOM, no duplicate keys, no NaN or Infinity, nothing
after the value, no deep nesting, no lone surrogates. What the fields mean is `schema.py`'s.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from starlette.requests import Request as HttpRequest

from api.backend import Settings
from api.errors import BodyTooSlow
from protocol.errors import BodyTooLarge, InvalidRequest

MAX_DEPTH = 64
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,15}")


async def read_json(http: HttpRequest, settings: Settings) -> dict[str, Any]:
    """The body's JSON object. Raises InvalidRequest (400), BodyTooSlow (408), BodyTooLarge (413)."""
    content_type = http.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest(
            f"Content-Type must be application/json, got {content_type[:100]!r} (curl: -H 'Content-Type: application/json')",
            param="Content-Type",
        )
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("a compressed body is not accepted; send it plain", param="Content-Encoding")
    return parse_object(await _read_body(http, settings))


async def _read_body(http: HttpRequest, settings: Settings) -> bytes:
    limit = settings.max_body_bytes
    announced = http.headers.get("content-length")
    if announced is not None:
        if not _CONTENT_LENGTH.fullmatch(announced):
            raise InvalidRequest("Content-Length is not a number", param="Content-Length")
        if int(announced) > limit:
            raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in http.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {settings.body_timeout_s:g} s") from None
    return b"".join(chunks)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes (gateway.max_body_bytes)")


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON to a dict. Raises InvalidRequest that says what is wrong and, where there is one, at which field."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise InvalidRequest("the body is empty; a JSON object is needed")
    if text.startswith("\ufeff"):
        raise InvalidRequest("the body begins with a byte order mark; send plain UTF-8")
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error.msg} (line {error.lineno} column {error.colno})") from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise InvalidRequest(f"the body holds a number that cannot be read: {str(error)[:60]}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_json_name(value)}")
    must_check_text = _ESCAPED_SURROGATE.search(body) is not None
    for name, field in value.items():
        _check(field, name, 1, must_check_text)
        if must_check_text:
            _check_text(name, name)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"the key {twice[:60]!r} is there twice", param=twice[:60])
    return found


def _no_constant(name: str) -> None:
    raise InvalidRequest(f"{name} is not JSON; numbers must be finite")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _check(value: Any, field: str, depth: int, must_check_text: bool) -> None:
    """No float that overflowed, no lone surrogate, no depth beyond MAX_DEPTH, anywhere below `field`."""
    if isinstance(value, str):
        if must_check_text:
            _check_text(value, field)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(f"{field}: a number is too large", param=field)
    elif isinstance(value, (list, dict)):
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{field} is nested more than {MAX_DEPTH} levels deep", param=field)
        if isinstance(value, dict):
            if must_check_text:
                for name in value:
                    _check_text(name, field)
            value = value.values()
        for item in value:
            if type(item) is not int:  # token ids are most of what comes in bulk
                _check(item, field, depth + 1, must_check_text)


def _check_text(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        shown = field.encode("ascii", "backslashreplace").decode()[:60]
        raise InvalidRequest(f"{shown} holds half of a surrogate pair, which is not a character", param=shown) from None


def _json_name(value: Any) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "something else")
