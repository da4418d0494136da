"""Clients of one gateway: many streams at once, each compared with the toy model's oracle token for token, each interruption timed.

Runs on the gateway's own event loop, in a process of the fleet (`roles.py`) or in a test's. Results are plain numbers, for JSON.
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from typing import Any

from cluster.gateway import Gateway
from models.toy import toy_answer
from protocol.events import Event, Failed, Finished, Tokens
from protocol.request import Request, SamplingParams

MAX_NAMED = 20  # of each kind of violation, in full


class Stream:
    """One request as its client sees it."""

    def __init__(self, request: Request, leaves_after: int | None = None) -> None:
        self.request = request
        self.leaves_after = leaves_after
        self.tokens: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self.terminal: list[Event] = []
        self.faults: list[str] = []  # what is wrong with it, in words
        self._verdict: str | None = None
        self.num_events = 0
        self.began_at = time.monotonic()
        self.first_token_at: float | None = None
        self.longest_silence_s = 0.0
        self.ended_at = 0.0
        self.decode = ""  # the incarnation that decodes it now
        self._heard_at = self.began_at
        self.epochs: list[tuple[int, int]] = []  # (index, epoch) of each event

    def take(self, event: Event) -> None:
        if self.terminal:
            self.faults.append(f"{type(event).__name__} after the terminal event")
        if isinstance(event, Tokens):
            now = time.monotonic()
            self.num_events += 1
            if self.first_token_at is None:
                self.first_token_at = now
            else:
                self.longest_silence_s = max(self.longest_silence_s, now - self._heard_at)
            self._heard_at = now
            mine = self.tokens[event.choice]
            if event.index != len(mine):
                self.faults.append(f"choice {event.choice}: index {event.index} after {len(mine)} tokens")
            mine += event.token_ids
        elif isinstance(event, (Finished, Failed)):
            self.terminal.append(event)
            self.ended_at = time.monotonic()

    @property
    def ttft_s(self) -> float:
        return (self.first_token_at or float("inf")) - self.began_at

    def check(self) -> str:
        """ "" when all is well, else "wrong", "lost" or "failed"; the words are in `faults`."""
        if self._verdict is not None:
            return self._verdict
        wanted = toy_answer(self.request.prompt_token_ids, max((len(t) for t in self.tokens), default=0))
        for choice, tokens in enumerate(self.tokens):
            if tokens != wanted[: len(tokens)]:
                place = next(i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b)
                self.faults.append(f"choice {choice} differs from the oracle at token {place}")
        return self.check_end()

    def check_end(self) -> str:
        """What can be said without an oracle."""
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict

    def _judge(self) -> str:
        sampling = self.request.sampling
        if self.faults:
            return "wrong"
        if self.leaves_after is not None and not self.terminal:
            return ""
        if len(self.terminal) != 1:
            self.faults.append(f"{len(self.terminal)} terminal events")
            return "lost"
        if isinstance(self.terminal[0], Failed):
            self.faults.append(f"failed: {self.terminal[0].failure}")
            return "failed"
        if any(len(tokens) != sampling.max_tokens for tokens in self.tokens):
            self.faults.append(f"finished with {[len(t) for t in self.tokens]} of {sampling.max_tokens} tokens")
            return "lost"
        return ""


class Interruption:
    """A stream that was in flight on a process when a fault hit that process."""

    def __init__(self, fault: dict[str, Any], stream: Stream, epoch: int, was_streaming: bool, at: float) -> None:
        self.fault = fault
        self.stream = stream
        self.epoch = epoch
        self.was_streaming = was_streaming
        self.at = at
        self.continued_at = float("inf")  # SIGCONT
        self.recovery_s: float | None = None
        self.how = ""

    def resolve(self, how: str, now: float) -> None:
        self.how, self.recovery_s = how, now - self.at


class Load:
    def __init__(self, gateway: Gateway, name: str) -> None:
        self.gateway = gateway
        self.name = name
        self._streams: dict[str, Stream] = {}
        self._clients: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._open: dict[str, list[Interruption]] = collections.defaultdict(list)  # by request_id
        self._interruptions: list[Interruption] = []
        self._counts: collections.Counter[str] = collections.Counter()
        self._named: list[dict[str, Any]] = []
        self._longest_silence_s = 0.0
        self._next_id = 0

    # ---- what the fleet tells it to do -------------------------------------------------------------------------------

    def start(self, *, num_streams: int, seed: str, **shape: Any) -> None:
        rng = random.Random(f"{seed}/{self.name.split(':pid')[0]}")
        self._is_draining = False
        for _ in range(num_streams):
            self._clients.append(asyncio.create_task(self._client(random.Random(rng.random()), shape)))

    def mark(self, fault: dict[str, Any]) -> dict[str, int]:
        """Right before a fault: who is in flight on its victim (fault["incarnation"]; none: the scheduler's queue)?"""
        now = time.monotonic()
        num = num_streaming = 0
        for request_id, stream in self._streams.items():
            walk = self.gateway._walks.get(request_id)
            if walk is None or walk.is_complete or not _is_on(walk, fault):
                continue
            streaming = walk.max_delivered > 0
            made = Interruption(fault, stream, walk.epoch, streaming, now)
            self._open[request_id].append(made)  # one that is hit again before it recovered counts for both faults
            self._interruptions.append(made)
            num += 1
            num_streaming += streaming
        return {"interrupted": num, "streaming": num_streaming}

    def continued(self, fault_id: int) -> None:
        now = time.monotonic()
        for made in self._interruptions:
            if made.fault["id"] == fault_id:
                made.continued_at = now

    def waiting(self) -> dict[str, int]:
        """How many streams there are, and how many of them were interrupted and have not had a token since."""
        return {"streams": len(self._streams), "interrupted": len(self._open)}

    async def drain(self, seconds: float) -> dict[str, Any]:
        """No new streams; wait for those that run. What does not end in time is lost."""
        self._is_draining = True
        _, pending = await asyncio.wait(self._clients, timeout=seconds) if self._clients else ((), ())
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=5)
        self._clients = []
        return {"hung": len(pending)}

    def report(self) -> dict[str, Any]:
        return {
            **self._counts,
            "longest_silence_s": self._longest_silence_s,
            "named": self._named[:MAX_NAMED],
            "tables": {
                "walks": len(self.gateway._walks),
                "telling": len(self.gateway._telling),
                "dialing": len(self.gateway._network._dialing),
                "outgoing": len(self.gateway._network._outgoing),
                "connections": len(self.gateway._network._all),
            },
            "interruptions": [
                {
                    "fault": made.fault["id"],
                    "kind": made.fault["kind"],
                    "role": made.fault["role"],
                    "streaming": made.was_streaming,
                    "recovery_s": made.recovery_s,
                    "how": made.how,
                    "request": made.stream.request.request_id,
                }
                for made in self._interruptions
            ],
        }

    # ---- clients -----------------------------------------------------------------------------------------------------

    async def _client(self, rng: random.Random, shape: dict[str, Any]) -> None:
        if shape.get("spread_s"):
            await asyncio.sleep(rng.random() * shape["spread_s"])
        while not self._is_draining:
            self._next_id += 1
            request_id = f"{self.name}-{self._next_id}"
            await self.run(*self.draw(rng, request_id, {k: v for k, v in shape.items() if k != "spread_s"}))

    def draw(self, rng: random.Random, request_id: str, shape: dict[str, Any]) -> tuple[Request, int | None]:
        return draw(rng, request_id, **shape)

    def verdict(self, stream: Stream) -> str:
        return stream.check()

    async def run(self, request: Request, leaves_after: int | None = None) -> Stream:
        """One stream from door to door; its verdict goes into the counts."""
        stream = self._streams[request.request_id] = Stream(request, leaves_after)
        generation = self.gateway.generate(request)
        try:
            async for event in generation:
                now = time.monotonic()
                stream.take(event)
                if isinstance(event, Tokens):
                    self._longest_silence_s = max(self._longest_silence_s, stream.longest_silence_s)
                    self._counts["tokens"] += len(event.token_ids)
                    walk = self.gateway._walks[request.request_id]
                    stream.epochs.append((event.index, walk.epoch))
                    stream.decode = walk.attempt.ticket.decode.incarnation
                    if request.request_id in self._open:
                        self._heard(request.request_id, now)
                if leaves_after is not None and len(stream.tokens[0]) >= leaves_after:
                    break
        finally:
            await generation.aclose()
            del self._streams[request.request_id]
            for made in self._open.pop(request.request_id, ()):
                if not made.how:
                    made.resolve("ended first", time.monotonic())
        self._judge(stream)
        return stream

    def _heard(self, request_id: str, now: float) -> None:
        """A token came: does it end an interruption? What was on the wire before the fault does not."""
        walk = self.gateway._walks[request_id]
        for made in list(self._open[request_id]):
            if walk.epoch > made.epoch:
                made.resolve("placed again", now)
            elif made.fault["role"] == "prefill" and walk.attempt.decode_has_begun:
                made.resolve("handed over already", now)
            elif now > made.continued_at:
                made.resolve("continued", now)
            else:
                continue
            self._open[request_id].remove(made)
        if not self._open[request_id]:
            del self._open[request_id]

    def _judge(self, stream: Stream) -> None:
        verdict = self.verdict(stream)
        self._counts["streams"] += 1
        self._counts["cancelled" if not stream.terminal and not verdict else verdict or "good"] += 1
        if verdict:
            self._named.append({"request": stream.request.request_id, "verdict": verdict, "faults": stream.faults[:3]})


def _is_on(walk: Any, fault: dict[str, Any]) -> bool:
    if fault["role"] == "scheduler":
        return walk.phase.value == "queued"
    if walk.attempt_is_none or walk.phase.value == "queued":
        return False
    attempt = walk.attempt
    if fault["role"] == "decode":
        return bool(attempt.ticket.decode.incarnation == fault["incarnation"])
    prefill = attempt.ticket.prefill
    return prefill is not None and prefill.incarnation == fault["incarnation"] and not attempt.decode_has_begun


def draw(
    rng: random.Random,
    request_id: str,
    *,
    prompt_len: tuple[int, int] = (8, 96),
    max_tokens: tuple[int, int] | int = (100, 300),
    num_prefixes: int = 4,
    choices_rate: float = 0.05,
    leave_rate: float = 0.03,
) -> tuple[Request, int | None]:
    """Half of the prompts share a beginning with others, a few requests ask for two choices, a few clients leave early."""
    prompt = [rng.randrange(512) for _ in range(rng.randint(*prompt_len))]
    if num_prefixes and rng.random() < 0.5:
        shared = random.Random(f"prefix {rng.randrange(num_prefixes)}")
        prompt = [shared.randrange(512) for _ in range(64)] + prompt
    wanted = max_tokens if isinstance(max_tokens, int) else rng.randint(*max_tokens)
    leaves_after = rng.randint(1, wanted) if rng.random() < leave_rate else None
    num_choices = 2 if rng.random() < choices_rate else 1
    sampling = SamplingParams(temperature=0.0, max_tokens=wanted, seed=1, ignore_eos=True, n=num_choices)
    request = Request(request_id=request_id, model="toy", prompt_token_ids=tuple(prompt), sampling=sampling)
    return request, leaves_after
