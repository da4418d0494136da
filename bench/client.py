"""One streamed completion over raw HTTP/1.1, timed as a client sees it. asyncio, no third package, http and https.

Not a general client: it reads a status line, headers, a body (chunked, counted, or until the end) and server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

MAX_HEAD = 64 << 10
MAX_LINE = 8 << 20


@dataclass
class Sample:
    """What became of one request. Times are seconds since the run began.

    outcome: "ok", "refused" (429 or 503 before a token; reason: the error's code), "failed" (anything else that ended badly).
    """

    tenant: str
    planned: float
    sent: float = 0.0
    first: float | None = None
    end: float = 0.0
    outcome: str = "failed"
    reason: str = ""
    retry_after: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    request_id: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)  # filled when the body asks for return_token_ids

    @property
    def ttft(self) -> float | None:
        """Since it was due, not since it was sent: a client that falls behind must not make a server look quick."""
        return None if self.first is None else self.first - self.planned

    @property
    def tpot(self) -> float | None:
        return sum(self.gaps) / (self.output_tokens - 1) if self.output_tokens > 1 and self.gaps else None


class Client:
    """url: the server's root or its /v1."""

    def __init__(self, url: str, keys: dict[str, str], api_key: str = "", timeout_s: float = 600.0) -> None:
        self._where = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if self._where.scheme not in ("http", "https") or not self._where.hostname:
            raise ValueError(f"{url}: wanted http://HOST:PORT")
        self._keys = keys
        self._api_key = api_key
        self._timeout_s = timeout_s
        self.origin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.origin

    async def complete(self, sample: Sample, body: dict[str, Any], path: str = "/v1/completions") -> Sample:
        """Send it now; fills `sample` and never raises for what the server or the network does."""
        sample.sent = self.now()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(sample, body, path)
        except TimeoutError:
            sample.outcome, sample.reason = "failed", f"no end within {self._timeout_s:g} s"
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            sample.outcome, sample.reason = "failed", f"{type(error).__name__}: {error}"[:200]
        sample.end = self.now()
        return sample

    async def get(self, path: str) -> Any:
        """A JSON document. Raises OSError when the answer is not 200."""
        reader, writer = await self._connect()
        try:
            writer.write(_head("GET", self._where, path, self._authorization("")) + b"\r\n")
            status, headers = await _read_head(reader)
            data = b"".join([piece async for piece in _body(reader, headers)])
            if status != 200:
                raise OSError(f"GET {path}: {status} {data[:200].decode(errors='replace')}")
            return json.loads(data)
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = self._where.scheme == "https"
        port = self._where.port or (443 if secure else 80)
        return await asyncio.open_connection(self._where.hostname, port, ssl=secure or None, limit=MAX_LINE)

    def _authorization(self, tenant: str) -> bytes:
        key = self._keys.get(tenant, self._api_key)
        return f"Authorization: Bearer {key}\r\n".encode() if key else b""

    async def _stream(self, sample: Sample, body: dict[str, Any], path: str) -> None:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        reader, writer = await self._connect()
        try:
            more = (
                self._authorization(sample.tenant) + f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n".encode()
            )
            if sample.request_id:
                more += f"X-Request-Id: {sample.request_id}\r\n".encode()
            writer.write(_head("POST", self._where, path, more) + b"\r\n" + data)
            status, headers = await _read_head(reader)
            if status != 200:
                text = b"".join([piece async for piece in _body(reader, headers)])
                _refused(sample, status, headers, text)
                return
            await self._events(sample, _body(reader, headers))
        finally:
            writer.close()

    async def _events(self, sample: Sample, pieces: AsyncIterator[bytes]) -> None:
        rest, last = b"", 0.0  # a chat's first chunk holds a role and no text: that is no token yet
        async for piece in pieces:
            now = self.now()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    sample.reason = str(event["error"].get("code") or event["error"].get("message"))[:200]
                    return
                for choice in event.get("choices", ())[:1]:
                    sample.token_ids += choice.get("token_ids") or ()
                    if sample.first is None and (_has_text(choice) or choice.get("finish_reason")):
                        sample.first = last = now
                    elif _has_text(choice):
                        sample.gaps.append(now - last)
                        last = now
                _usage(sample, event)
        if sample.first is not None:
            sample.outcome = "ok"
            sample.output_tokens = sample.output_tokens or 1 + len(sample.gaps)
        else:
            sample.reason = "the stream held no token"


def _has_text(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text") or (choice.get("delta") or {}).get("content"))


def _usage(sample: Sample, event: dict[str, Any]) -> None:
    usage = event.get("usage")
    if usage:
        sample.prompt_tokens = usage.get("prompt_tokens") or 0
        sample.output_tokens = usage.get("completion_tokens") or 0
        sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        sample.metrics = event.get("metrics") or {}


def _refused(sample: Sample, status: int, headers: dict[str, str], text: bytes) -> None:
    try:
        error = json.loads(text)["error"]
        reason = str(error.get("code") or error.get("type") or status)
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = str(status)
    sample.outcome, sample.reason = ("refused" if status in (429, 503) else "failed"), f"{status} {reason}"
    wait = headers.get("retry-after", "")
    sample.retry_after = float(wait) if wait.isdigit() else None


def _head(method: str, where: SplitResult, path: str, more: bytes) -> bytes:
    return f"{method} {where.path}{path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n".encode() + more


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    if len(head) > MAX_HEAD:
        raise ValueError("the answer's head is too long")
    first, *lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    return int(first.split(" ")[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    left = int(headers.get("content-length", MAX_LINE))
    while left > 0 and (piece := await reader.read(min(left, 1 << 16))):
        left -= len(piece)
        yield piece
