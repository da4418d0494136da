"""A gateway in the test's own process, in front of a fleet: tests can look at its walks and ask for single streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from cluster.door import limits_of
from cluster.gateway import Gateway
from cluster.wire import SocketNetwork
from models.locate import locate
from protocol.request import Request, SamplingParams
from tests.chaos.fleet import Fleet, make_config
from tests.chaos.load import Load, Stream

_ids = itertools.count()


class Door:
    """gateway, and the streams that go through it; `verdicts` of all that ended must stay empty of everything but ""."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.load = Load(gateway, "door")
        self._rng = random.Random(5)

    def request(self, prompt_len: int = 100, max_tokens: int = 40, **sampling: Any) -> Request:
        prompt = tuple(self._rng.randrange(512) for _ in range(prompt_len))
        wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "seed": 1, "ignore_eos": True, **sampling})
        return Request(request_id=f"door-{next(_ids)}", model="toy", prompt_token_ids=prompt, sampling=wanted)

    def begin(self, num_streams: int, **shape: Any) -> list[asyncio.Task[Stream]]:
        return [asyncio.create_task(self.load.run(self.request(**shape))) for _ in range(num_streams)]

    def is_streaming(self, num_streams: int) -> bool:
        """So many are under way, and each has had a few tokens."""
        under_way = self.load._streams.values()
        return len(under_way) == num_streams and all(stream.num_events > 3 for stream in under_way)

    async def streams(self, num_streams: int, seconds: float = 60.0, **shape: Any) -> list[Stream]:
        """So many at once; each is exact and ends well, or this raises."""
        return await exact(self.begin(num_streams, **shape), seconds)


async def exact(streaming: list[asyncio.Task[Stream]], seconds: float = 60.0) -> list[Stream]:
    """Wait for streams that run already; each equals the oracle, whole, with one terminal event."""
    async with asyncio.timeout(seconds):
        streams = await asyncio.gather(*streaming)
    bad = [(s.request.request_id, verdict, s.faults) for s in streams if (verdict := s.check())]
    assert not bad, bad
    return list(streams)


@contextlib.asynccontextmanager
async def door(fleet: Fleet) -> AsyncIterator[Door]:
    network = SocketNetwork("door", fleet.secret)
    tokenizer = Tokenizer(locate("toy", None), None)
    gateway = Gateway(
        "door",
        network,
        fleet.find_scheduler,
        lambda request: Detokenizer.for_request(tokenizer, request),
        time.monotonic,
        limits_of(fleet.config),
    )
    await gateway.start()
    try:
        yield Door(gateway)
    finally:
        await gateway.close()


STEPS: dict[str, dict[str, Any]] = {"decode": {"min_step_s": 0.02}, "prefill": {"min_step_s": 0.01}}


@contextlib.asynccontextmanager
async def fleet_and_door(
    folder: Path, prefill: int, decode: int, specs: dict[str, dict[str, Any]] | None = None, gateways: int = 0, **keys: Any
) -> AsyncIterator[tuple[Fleet, Door]]:
    """On leaving: every living worker idle with all its blocks, no process left."""
    merged = {role: {**STEPS.get(role, {}), **(specs or {}).get(role, {})} for role in {*STEPS, *(specs or {})}}
    fleet = Fleet(folder, make_config(**keys), {"gateway": gateways, "prefill": prefill, "decode": decode}, merged)
    async with fleet, door(fleet) as opened:
        yield fleet, opened
        await fleet.settle()
    assert not fleet.survivors()


async def until(condition: Any, seconds: float, what: str) -> float:
    """The seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - started
