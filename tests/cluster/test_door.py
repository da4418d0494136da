"""When a door to several models opens: after all were ready once, or in time for those that are. Then as long as one is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster import door
from cluster.door import Door
from cluster.loopback import Hub
from configs.load import load
from protocol.errors import WorkerLost


def worker(model: str, age_s: float = 1.0) -> dict[str, Any]:
    return {"role": "decode", "alive": True, "model": model, "stats": {"last_token_age_s": age_s}}


class Watched:
    """A door whose scheduler says what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def nobody() -> str:
            raise WorkerLost("nobody")

        monkeypatch.setattr(door, "STATUS_S", 0.001)
        config = load(env={}, also=["toy"]).config
        self.door = Door(config, Hub().network("g"), nobody, "g", b"s" * 32)
        self.workers: list[dict[str, Any]] = []
        monkeypatch.setattr(self.door, "status", self.status)

    async def status(self) -> dict[str, Any]:
        return {"workers": self.workers}

    async def reason(self, *workers: dict[str, Any]) -> str:
        self.workers = list(workers)
        await asyncio.sleep(0.05)
        return self.door.reason()


async def test_a_door_to_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Watched(monkeypatch)
    watching = asyncio.create_task(made.door._watch())
    try:
        assert [card.id for card in made.door.models()] == ["bundled", "toy"]
        assert await made.reason() == "no decode worker of bundled is alive"
        assert await made.reason(worker("bundled")) == "no decode worker of toy is alive", "the start-up is not over"
        assert "toy has produced" in await made.reason(worker("bundled"), worker("toy", -1.0))
        assert await made.reason(worker("bundled"), worker("toy")) == ""
        assert await made.reason(worker("toy")) == "", "requests for the other one are refused one by one"
        assert await made.reason(worker("toy", 99.0)) != ""
    finally:
        watching.cancel()


async def test_a_gateway_that_starts_while_a_model_is_gone_opens_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "ALL_READY_S", 0.0)
    made = Watched(monkeypatch)
    watching = asyncio.create_task(made.door._watch())
    try:
        assert await made.reason(worker("toy")) == ""
        assert await made.reason() != ""
    finally:
        watching.cancel()
