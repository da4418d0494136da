"""Helpers for tests that run the whole walk in one process: a LocalCluster on the toy model, requests, and their oracle."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.local import LocalCluster
from configs.load import load
from models.load import load_model
from models.toy import toy_next_token
from protocol.events import Event, Failed, Finished, Tokens
from protocol.request import Request, SamplingParams

_ids = itertools.count()


@contextlib.asynccontextmanager
async def cluster(transports: tuple[str, ...] = ("memory",), **keys: Any) -> AsyncIterator[LocalCluster]:
    """Keys as `decode__replicas=2`. On leaving: nobody holds anything, and every pool is whole."""
    sets = {
        "model.name": "toy",
        "model.block_size": 8,
        "model.num_blocks_override": 96,
        "model.max_len": 512,
        "scheduler.disaggregation_threshold": 0,
        "prefill.replicas": 1,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    made = LocalCluster(load(flags=sets, env={}).config, load_model(str(sets["model.name"])), encoded=True, transports=transports)
    await made.start()
    try:
        yield made
        await made.settle()
    finally:
        await made.close()


def request(prompt: Sequence[int], **sampling: Any) -> Request:
    defaults = {"temperature": 0.0, "max_tokens": 8, "seed": 1, "ignore_eos": True}
    return Request(
        request_id=f"r{next(_ids)}",
        model="toy",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{**defaults, **sampling}),
    )


def oracle(prompt: Sequence[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(toy_next_token(token_ids))
    return token_ids[len(prompt) :]


async def events_of(made: LocalCluster, wanted: Request) -> list[Event]:
    """All events; exactly one is terminal, and it is the last."""
    events = [event async for event in made.gateway.generate(wanted)]
    terminal = [event for event in events if isinstance(event, (Finished, Failed))]
    assert terminal == events[-1:], f"{len(terminal)} terminal events"
    return events


def tokens_of(events: Sequence[Event], choice: int = 0) -> list[int]:
    """The choice's tokens; their indexes are contiguous."""
    tokens: list[int] = []
    for event in events:
        if isinstance(event, Tokens) and event.choice == choice:
            assert event.index == len(tokens), "token indexes have a gap or a repeat"
            tokens += event.token_ids
    return tokens


async def teach_that_outputs_are_short(made: LocalCluster) -> None:
    """The scheduler then places more than fits, so that somebody is preempted."""
    for i in range(30):
        await events_of(made, request([i, i], max_tokens=1))
