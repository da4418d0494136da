"""Real vLLM as the overflow server, serving the bundled model too: its greedy tokens are ours, also when it takes over half-way.

TANDEM_VLLM_URL names one that runs (up to and with /v1; `vllm serve models/bundled --served-model-name m --dtype float32`); where
vLLM is installed and nothing is named, one is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.local import LocalCluster
from configs.load import load
from models.load import load_model
from protocol.events import Finished, Tokens
from protocol.request import Request, SamplingParams
from tests.system.local import events_of, tokens_of
from tests.system.served import free_port
from tests.system.test_overflow_in_one_process import stop_native

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]
PROMPTS = ["def parse_arguments(argv):\n    ", "import os\nimport sys\n\n\nclass Reader:\n", "What does the prefill worker do?"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    named = os.environ.get("TANDEM_VLLM_URL")
    if named:
        yield named
        return
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, and TANDEM_VLLM_URL names no server")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "models" / "bundled")]
    command += ["--served-model-name", "m", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--max-model-len", "1024", "--enforce-eager"], stdout=out, stderr=out)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200:
                    break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@contextlib.asynccontextmanager
async def cluster(url: str) -> AsyncIterator[LocalCluster]:
    sets = {"model.name": "bundled", "model.num_blocks_override": 256, "prefill.replicas": 0, "scheduler.heartbeat_s": 0.1}
    made = LocalCluster(load(flags=sets, env={}, overflow=[f"{url},model=m,max_len=1024"]).config, load_model("bundled"))
    await made.start()
    try:
        yield made
        await made.settle()
    finally:
        await made.close()


def request(made: LocalCluster, text: str, number: int, max_tokens: int = 40) -> Request:
    return Request(
        request_id=f"v{number}",
        model="bundled",
        prompt_token_ids=tuple(made.tokenizer.encode(text)),
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1),
        eos_token_ids=made.tokenizer.eos_token_ids,
    )


async def test_its_greedy_tokens_are_ours(url: str) -> None:
    async with cluster(url) as made:
        (life,) = made.overflow
        assert not life.worker.is_draining, life.worker.why_down
        assert life.worker._upstream.speaks_ids is True  # type: ignore[attr-defined]
        life.worker.is_draining = True
        life.agent.beat_now()  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
        ours = [await events_of(made, request(made, text, i)) for i, text in enumerate(PROMPTS)]
        life.worker.is_draining = False
        life.agent.beat_now()  # type: ignore[union-attr]
        stop_native(made)
        await asyncio.sleep(0.1)
        generated = life.worker.stats().generation_tokens
        theirs = await asyncio.gather(*(events_of(made, request(made, text, 10 + i)) for i, text in enumerate(PROMPTS)))
        for mine, other in zip(ours, theirs, strict=True):
            assert isinstance(other[-1], Finished), other[-1]
            assert tokens_of(other) == tokens_of(mine)
            assert finish(other) == finish(mine)
        assert life.worker.stats().generation_tokens - generated == sum(len(tokens_of(events)) for events in theirs)


async def test_it_takes_over_half_way_and_hands_back(url: str) -> None:
    async with cluster(url) as made:
        (life,) = made.overflow
        whole = tokens_of(await events_of(made, request(made, PROMPTS[0], 20, 60)))
        stop_native(made)
        await asyncio.sleep(0.1)
        events, wanted = [], msgspec.structs.replace(request(made, PROMPTS[0], 21, 60))
        async for event in made.gateway.generate(wanted):
            events.append(event)
            if isinstance(event, Tokens) and event.index == 20:
                stop_native(made, False)
                await life.worker.drain(0.0)
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.num_resumptions == 1
        assert tokens_of(events) == whole


def finish(events: list) -> str | None:
    return [event for event in events if isinstance(event, Tokens)][-1].finish_reason
