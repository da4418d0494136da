"""A class that may degrade, through the whole product in one process: from the door's forecast to the header and the report."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.door import Door
from cluster.local import LocalCluster
from configs.tenants import hash_key
from scheduler.gate import Gate
from tests.system.local import cluster, oracle

FILE = f"""
classes:
  fast: {{ttft_s: 30, tpot_s: 9, band: 0, degrade_max_tokens: 4, degrade_to_class: slow}}
  slow: {{ttft_s: 60, tpot_s: 9, band: 1}}
tenants:
  acme: {{api_keys: [{hash_key("sk-acme")}], class: fast}}
"""
PROMPT = list(range(40))
ASKED = {"model": "toy", "prompt": PROMPT, "max_tokens": 10, "min_tokens": 6, "temperature": 0, "ignore_eos": True}


@contextlib.asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[tuple[LocalCluster, httpx.AsyncClient]]:
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    async with cluster(scheduler__tenants_file=str(path)) as made:

        async def find() -> str:
            return "scheduler:0"

        door = Door(made.config, made._hub.network("door"), find, "gateway:7", b"secret of the cluster")
        await door.start()
        while door._tenants.is_missing:
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app=door.app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://t", headers={"Authorization": "Bearer sk-acme"}
        ) as client:
            yield made, client
        await door.close()


def too_late_unless(monkeypatch: pytest.MonkeyPatch, helps: Any) -> None:
    """The door's forecast says that the first token comes too late, unless `helps(admit, terms)`."""
    monkeypatch.setattr(Gate, "_missed", lambda self, admit, terms, seen, appointed: "" if helps(admit, terms) else "slo_ttft")


@pytest.mark.parametrize(
    ("helps", "header", "num_tokens", "slo_class"),
    [
        (lambda admit, terms: admit.max_tokens <= 4, "max_tokens=4", 4, "fast"),
        (lambda admit, terms: terms.slo_class == "slow", "class=slow", 10, "slow"),
    ],
)
async def test_a_degraded_answer_is_what_its_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helps: Any, header: str, num_tokens: int, slo_class: str
) -> None:
    too_late_unless(monkeypatch, helps)
    async with served(tmp_path) as (made, client):
        whole = await client.post("/v1/completions", json={**ASKED, "return_token_ids": True}, headers={"x-request-id": "one"})
        stream = await client.post("/v1/completions", json={**ASKED, "stream": True, "stream_options": {"include_usage": True}})
        await asyncio.sleep(0.1)
        now = asyncio.get_running_loop().time()
        rows = {row["class"]: row for row in made.service.history.sla.rows(300, now)}
        decision = made.service.history.decision("one")
    assert whole.status_code == stream.status_code == 200, whole.text
    body = whole.json()
    assert whole.headers["x-tandem-degraded"] == stream.headers["x-tandem-degraded"] == body["metrics"]["degraded"] == header
    assert body["choices"][0]["token_ids"] == oracle(PROMPT, num_tokens), "shorter, and the same tokens"
    assert body["choices"][0]["finish_reason"] == "length"
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["usage"]["completion_tokens"] == num_tokens
    assert (rows[slo_class]["finished"], rows["fast"]["degraded"]) == (2, 2)
    assert any(header in line for line in decision["words"]), decision["words"]


async def test_what_nothing_helps_is_refused_with_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_late_unless(monkeypatch, lambda admit, terms: False)
    async with served(tmp_path) as (made, client):
        for stream in (False, True):
            answer = await client.post(
                "/v1/completions", json={**ASKED, "stream": stream}, headers={"x-request-id": f"no-{stream}"}
            )
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-tandem-refusal"] == "slo_ttft"
        assert any("refused" in line for line in made.service.history.decision("no-True")["words"])
