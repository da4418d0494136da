"""Every option of `tandem serve` does what it says: from the command line, through the configuration, to what workers really do.

All but the last part runs a whole cluster in this process on the toy model. That an option sets its key, and what a wrong value
is told, is tests/cluster/test_cli.py; what is refused before anything starts is tests/cluster/test_preflight.py.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch

import kvtransfer.group
from cluster import assembly, cli
from cluster.door import Door
from cluster.gateway import Gateway, Limits
from cluster.local import LocalCluster
from cluster.loopback import Hub
from configs.flags import FLAGS
from configs.schema import KEYS, REFUSALS, Config
from configs.tenants import hash_key
from kvtransfer.link import usable
from kvtransfer.pool import KVPool
from models.load import LoadedModel, load_model
from protocol.errors import ConfigError, WorkerLost
from protocol.events import Failed, Finished, Tokens
from protocol.kv import ShmEndpoint, TcpEndpoint
from protocol.parallel import Parallel
from scheduler.scheduler import Scheduler
from tests.system.local import events_of, oracle, request, tokens_of

ROOT = Path(__file__).resolve().parents[2]
# Options win over the file, so each test says on its command line only what it is about.
SMALL = "model: {name: toy, block_size: 8, num_blocks_override: 96, max_len: 512}\nscheduler: {disaggregation_threshold: 0}\n"


def config_of(tmp_path: Path, *argv: str) -> Config:
    """What `tandem serve ARGV` would run, on top of a small toy cluster."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    args = cli.build_parser().parse_args(["serve", "--config", str(file), *argv])
    return cli.resolve(args, {}).config


@pytest.fixture(scope="module")
def toy() -> LoadedModel:
    return load_model("toy")


@pytest.fixture
def start(tmp_path: Path, toy: LoadedModel) -> Any:
    """`async with start("--max-num-seqs", "2") as made:`. On leaving, nobody holds anything and every pool is whole."""

    @contextlib.asynccontextmanager
    async def started(*argv: str) -> AsyncIterator[LocalCluster]:
        config = config_of(tmp_path, *argv)
        made = LocalCluster(config, toy if config.model.name == "toy" else None, encoded=True)
        await made.start()
        try:
            yield made
            await made.settle()
        finally:
            await made.close()

    return started


@contextlib.asynccontextmanager
async def client_of(made: LocalCluster, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP as the gateway's process serves it, in front of this cluster."""

    async def find_scheduler() -> str:
        return "scheduler:0"

    door = Door(made.config, made._hub.network("door"), find_scheduler, "gateway:7", b"secret of the cluster")
    await door.start()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        transport = httpx.ASGITransport(app=door.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem", headers=headers) as client:
            yield client
    finally:
        await door.close()


def steps_of(worker: Any) -> list[list[int]]:
    """From now on: of each step, how many tokens of each sequence were computed."""
    steps: list[list[int]] = []
    run = worker.runner.run

    def recorded(chunks: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append([chunk.num_tokens for chunk in chunks])
        return run(chunks, *args, **kwargs)

    worker.runner.run = recorded
    return steps


def workers(made: LocalCluster, role: str) -> list[Any]:
    found = zip(made.workers, made.status_rows(), strict=True)
    return [worker for worker, row in found if row["role"] == role]


async def several(made: LocalCluster, num: int, prompt_len: int, **sampling: Any) -> list[Any]:
    prompts = [[(7 * i + j) % 512 for j in range(prompt_len)] for i in range(num)]
    results = await asyncio.gather(*(events_of(made, request(prompt, **sampling)) for prompt in prompts))
    for prompt, events in zip(prompts, results, strict=True):
        assert tokens_of(events) == oracle(prompt, sampling.get("max_tokens", 8))
    return results


# ---- the pools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(0, 1), (2, 1), (1, 3)])
async def test_prefill_and_decode_are_numbers_of_workers(start, num_prefill, num_decode):
    async with start("--prefill", str(num_prefill), "--decode", str(num_decode)) as made:
        names = sorted(row["name"] for row in made.status_rows())
        await several(made, 6, 20)
        moved = sum(worker.stats().transfers for worker in workers(made, "decode"))
    assert names == sorted([*(f"prefill:{i}" for i in range(num_prefill)), *(f"decode:{i}" for i in range(num_decode))])
    assert moved == (6 if num_prefill else 0)


async def test_tp_and_pp_are_the_sizes_of_each_pools_workers(start):
    async with start("--prefill-tp", "2", "--prefill-pp", "2", "--decode-tp", "1", "--decode-pp", "3") as made:
        await several(made, 3, 40)
        prefill, decode = workers(made, "prefill")[0], workers(made, "decode")[0]
        assert prefill.runner.group.parallel == Parallel(2, 2)
        assert decode.runner.group.parallel == Parallel(1, 3)
        shapes = [tuple(worker.runner.kv.shape[i] for i in (0, 3)) for worker in (prefill, decode)]
        assert shapes == [(2, 1), (2, 2)]  # (own layers, own KV heads) of four layers of two heads
        assert decode.stats().transfers == 3


@pytest.mark.parametrize("num_prefill", ["0", "1"])
async def test_max_num_seqs_caps_the_decode_batch(start, num_prefill):
    async with start("--max-num-seqs", "2", "--prefill", num_prefill) as made:
        steps = steps_of(workers(made, "decode")[0])
        await several(made, 6, 20, max_tokens=12)
    assert max(map(len, steps)) == 2
    async with start("--max-num-seqs", "6", "--prefill", num_prefill) as made:
        steps = steps_of(workers(made, "decode")[0])
        await several(made, 6, 20, max_tokens=12)
    assert 2 < max(map(len, steps)) <= 6


async def test_max_num_batched_tokens_caps_the_prefill_step(start):
    for limit in (16, 48):
        async with start("--max-num-batched-tokens", str(limit)) as made:
            steps = steps_of(workers(made, "prefill")[0])
            await several(made, 4, 100, max_tokens=2)
        assert max(map(sum, steps)) == limit


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_max_num_batched_tokens_auto_holds_the_promise(start, role):
    """On a model that takes 1 ms a token, by a clock that says so."""
    auto = ("--max-num-batched-tokens", "auto", "--set", "decode.max_num_batched_tokens=auto", "--no-enable-prefix-caching")
    pools = ("--prefill", "0") if role == "decode" else ()
    for limit in (100, 200):
        async with start(*auto, *pools, "--set", f"scheduler.tpot_target_s={limit / 1000}") as made:
            runner = workers(made, role)[0].runner
            now, run = [0.0], runner._compute

            def slow(step, batch, hook, now=now, run=run):
                now[0] += 0.001 * len(step.token_ids)
                return run(step, batch, hook)

            runner._clock, runner._compute = lambda now=now: now[0], slow
            for i in range(4):
                await several(made, 1 + i, 400, max_tokens=1)
            steps = steps_of(workers(made, role)[0])
            await several(made, 5, 410, max_tokens=1)
        assert 0.7 * limit <= max(map(sum, steps)) <= 1.1 * limit, steps


def test_auto_takes_the_strictest_class_of_the_tenants_file(tmp_path):
    file = tmp_path / "tenants.yaml"
    file.write_text(
        "classes:\n  fast: {ttft_s: 9, tpot_s: 0.1}\n  slow: {ttft_s: 9, tpot_s: 7}\ntenants:\n  default: {class: slow}\n"
    )
    config = config_of(tmp_path, "--max-num-batched-tokens", "auto", "--tenants", str(file))
    assert (assembly.max_step_s(config, "prefill"), assembly.max_step_s(config, "decode")) == (0.1, None)
    assert assembly.max_batched_tokens(config, "prefill") == 2048
    with pytest.raises(ConfigError, match="enable_chunked_prefill"):
        config_of(tmp_path, "--set", "decode.max_num_batched_tokens=auto", "--no-enable-chunked-prefill")


async def test_max_num_seqs_of_the_prefill_pool(start):
    async with start("--set", "prefill.max_num_seqs=2", "--max-num-batched-tokens", "400") as made:
        steps = steps_of(workers(made, "prefill")[0])
        await several(made, 6, 20)
    assert max(map(len, steps)) == 2


async def test_a_decode_worker_has_a_token_budget_of_its_own(start):
    async with start("--prefill", "0", "--set", "decode.max_num_batched_tokens=24", "--max-num-seqs", "8") as made:
        steps = steps_of(made.workers[0])
        await several(made, 4, 100, max_tokens=4)
    assert max(map(sum, steps)) == 24


async def test_chunked_prefill_on_and_off(start):
    common = ("--prefill", "0", "--max-model-len", "96", "--max-num-seqs", "8", "--set")
    async with start("--enable-chunked-prefill", *common, "decode.max_num_batched_tokens=16") as made:
        steps = steps_of(made.workers[0])
        await several(made, 1, 70)
    assert steps[:5] == [[16], [16], [16], [16], [6]]
    async with start("--no-enable-chunked-prefill", *common, "decode.max_num_batched_tokens=96") as made:
        steps = steps_of(made.workers[0])
        await several(made, 3, 70)
    prompts = [n for step in steps for n in step if n > 1]
    assert prompts == [70, 70, 70]


async def test_threads_of_each_role(start):
    async with start("--set", "prefill.num_threads=3", "--set", "decode.num_threads=2") as made:
        threads = {row["role"]: worker.runner.num_threads for worker, row in zip(made.workers, made.status_rows(), strict=True)}
    assert threads == {"prefill": 3, "decode": 2}


def test_cores_are_shared_as_asked(tmp_path, monkeypatch):
    """What each way gives a worker on four cores: one prefill, one decode."""
    monkeypatch.setattr(assembly, "_num_cores", lambda: 4)
    monkeypatch.setattr(assembly, "ledger_path", lambda secret: tmp_path / "cores")
    for how, threads in (("shared", 4), ("pinned", 2), ("lend", 2)):
        config = config_of(tmp_path, "--cpu-sharing", how)
        assert assembly.num_threads(config, "decode") == threads
        ledger = assembly.open_ledger(config, b"secret")
        assert (ledger is None) == (how == "shared")
        cores = assembly.cores_of(config, "decode", ledger, "cpu")
        assert (cores is not None) == (how == "lend")
        assert assembly.cores_of(config, "decode", ledger, "cuda") is None
        if cores is not None:
            assert (cores.num_own, cores.take(0.1)) == (2, 4)
        if ledger is not None:
            ledger.close()
    asked = config_of(tmp_path, "--cpu-sharing", "lend", "--set", "decode.num_threads=1")
    ledger = assembly.open_ledger(asked, b"secret")
    cores = assembly.cores_of(asked, "decode", ledger, "cpu")
    assert cores is not None
    assert cores.take(0.1) == 1, "who names a number gets no other"
    group = config_of(tmp_path, "--cpu-sharing", "lend", "--decode-tp", "2")
    cores = assembly.cores_of(group, "decode", ledger, "cpu")
    assert cores is not None
    assert cores.take(0.1) == cores.num_own == 1, "ranks would have to agree"


@pytest.mark.parametrize("preset", ["general", "low-latency", "high-throughput"])
async def test_a_preset_reaches_workers_and_scheduler(start, preset):
    wanted = {"general": (64, 256, 512, 1024), "low-latency": (16, 64, 256, 128), "high-throughput": (256, 1024, 2048, 16384)}
    async with start("--preset", preset) as made:
        decode, prefill = workers(made, "decode")[0].settings, workers(made, "prefill")[0].settings
        queue = made.service.scheduler.config.max_queue_requests
    assert (decode.max_num_seqs, decode.max_num_batched_tokens, prefill.max_num_batched_tokens, queue) == wanted[preset]


# ---- speculation and preemption --------------------------------------------------------------------------------------


async def test_who_guesses_and_how_far(start):
    """ "a b c d" again and again is a prompt that a lookup finds itself in; what is said is what is said without it."""
    for argv, longest in (
        (["--speculative-method", "ngram", "--num-speculative-tokens", "3"], 3),
        (["--speculative-model", "toy", "--num-speculative-tokens", "5"], 5),
        (["--speculative-method", "draft", "--speculative-model", "toy"], 4),
    ):
        async with start(*argv, "--set", "decode.adapt_speculation=false") as made:
            steps = drafts_of(workers(made, "decode")[0])
            await several(made, 3, 40, max_tokens=30)
            repeated = await events_of(made, request([1, 2, 3, 4] * 10, max_tokens=30))
            assert tokens_of(repeated) == oracle([1, 2, 3, 4] * 10, 30)
            stats = workers(made, "decode")[0].stats()
        assert max(map(max, steps), default=0) == (longest if stats.num_drafts else 0)
        assert stats.num_drafts > 0 or "ngram" in argv


async def test_how_many_of_the_last_tokens_are_looked_for(start):
    argv = ["--speculative-method", "ngram", "--prompt-lookup-max", "3", "--prompt-lookup-min", "3"]
    async with start(*argv) as made:
        lookup = workers(made, "decode")[0].drafting.speculator.guesser
        assert (lookup._shortest, lookup._longest) == (3, 3)
    async with start("--speculative-method", "ngram", "--set", "decode.adapt_speculation=false") as made:
        assert workers(made, "decode")[0].drafting.speculator.adapts is False
    async with start() as made:
        assert workers(made, "decode")[0].drafting is None


async def test_preemption_mode(start):
    for argv, swaps in ((["--preemption-mode", "swap"], True), (["--preemption-mode", "recompute"], False), ([], False)):
        async with start(*argv) as made:
            worker = workers(made, "decode")[0]
            assert (worker._sequences._swap is not None) == swaps
            if swaps:  # nobody said how much host memory, so it is as much as the pool
                assert worker.pool.tier.num_slots == worker.pool.num_blocks
            await several(made, 2, 20)


def drafts_of(worker: Any) -> list[list[int]]:
    """From now on: the lengths of each step's drafts."""
    steps: list[list[int]] = []
    run = worker.runner.run

    def recorded(chunks: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append([len(chunk.draft) for chunk in chunks])
        return run(chunks, *args, **kwargs)

    worker.runner.run = recorded
    return steps


# ---- blocks and caches -----------------------------------------------------------------------------------------------


async def test_block_size_and_number_of_blocks(start):
    async with start("--block-size", "4", "--num-gpu-blocks-override", "77") as made:
        for worker in made.workers:
            assert worker.settings.layout.block_size == worker.pool.block_size == 4
            assert worker.pool.num_blocks == 77
        assert made.engines[0].kv.tensor.shape[1] == 77
        assert made.engines[0].kv.tensor.shape[4] == 4
        await several(made, 2, 20)


async def test_kv_cache_memory_bytes_sizes_the_pool(start, toy):
    layout = toy.kv_layout(8)
    budget = 200 * layout.block_nbytes + 5
    async with start("--kv-cache-memory-bytes", str(budget), "--set", "model.num_blocks_override=none") as made:
        assert {worker.pool.num_blocks for worker in made.workers} == {200}


@pytest.mark.parametrize("num_prefill", ["0", "1"])
async def test_prefix_caching_on_and_off(start, num_prefill):
    for flag, expected in (("--enable-prefix-caching", 56), ("--no-enable-prefix-caching", 0)):
        async with start(flag, "--prefill", num_prefill) as made:
            cached = [(await events_of(made, request(range(60))))[-1].usage.cached_tokens for _ in range(3)]
        assert cached[0] == 0
        assert max(cached) == expected


# ---- the model -------------------------------------------------------------------------------------------------------


async def test_max_model_len_refuses_what_is_longer(start):
    async with start("--max-model-len", "64") as made, client_of(made) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        long = await client.post("/v1/completions", json={"model": "toy", "prompt": [1] * 64, "max_tokens": 1})
        greedy = await client.post("/v1/completions", json={"model": "toy", "prompt": [1] * 60, "max_tokens": 5})
        fits = await client.post("/v1/completions", json={"model": "toy", "prompt": [1] * 60, "max_tokens": 4, "ignore_eos": True})
    assert card["max_model_len"] == 64
    assert (long.status_code, greedy.status_code, fits.status_code) == (400, 400, 200)
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert "64" in long.json()["error"]["message"]
    assert fits.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_dtype_of_weights_and_kv(start, dtype):
    async with start("bundled", "--dtype", dtype, "--num-gpu-blocks-override", "64", "--max-model-len", "256") as made:
        assert made.loaded.dtype is getattr(torch, dtype)
        assert {str(engine.kv.tensor.dtype) for engine in made.engines} == {f"torch.{dtype}"}
        prompt = made.tokenizer.encode("def add(a, b):\n    return")
        asked = msgspec.structs.replace(request(prompt, max_tokens=6, logprobs=1), model="bundled")
        events = await events_of(made, asked)
        assert isinstance(events[-1], Finished), events[-1]
    entries = [entry for event in events if isinstance(event, Tokens) for entry in event.logprobs]
    assert len(entries) == 6
    assert all(math.isfinite(entry.logprob) and entry.rank == 1 for entry in entries)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
async def test_quantization_of_weights(start, quantization):
    """Prefilled on one worker, decoded on another; KV stays float32."""
    async with start(
        "bundled", "--quantization", quantization, "--num-gpu-blocks-override", "64", "--max-model-len", "256"
    ) as made:
        assert str(made.loaded.quantization) == quantization
        assert made.loaded.dtype is torch.float32
        prompt = made.tokenizer.encode("def add(a, b):\n    return")
        asked = msgspec.structs.replace(request(prompt, max_tokens=6, logprobs=1), model="bundled")
        events = await events_of(made, asked)
        assert isinstance(events[-1], Finished), events[-1]
    entries = [entry for event in events if isinstance(event, Tokens) for entry in event.logprobs]
    assert len(entries) == 6
    assert all(math.isfinite(entry.logprob) and entry.rank == 1 for entry in entries)


async def test_device_cpu(start):
    async with start("--device", "cpu") as made:
        assert {row["device"] for row in made.status_rows()} == {"cpu"}


async def test_seed_repeats_a_server_and_its_absence_does_not(start):
    async def draws(*argv: str) -> list[list[int]]:
        async with start(*argv) as made:
            asked = [request(range(20), temperature=3.0, seed=None) for _ in range(3)]
            return [tokens_of(await events_of(made, one)) for one in asked]

    first, again, other, free, free_again = [
        await draws(*argv) for argv in (["--seed", "5"], ["--seed", "5"], ["--seed", "6"], [], [])
    ]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 3  # each request has its own
    assert first != other
    assert free != free_again


async def test_chat_template_of_a_file(start, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    asked = {"model": "toy", "messages": [{"role": "user", "content": "hi"}]}
    async with start("--chat-template", str(file)) as made, client_of(made) as client:
        tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
        answer = await client.post("/v1/chat/completions", json={**asked, "max_tokens": 2})
        assert made.tokenizer.decode(tokens, skip_special_tokens=False) == "<user>hi"
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)


async def test_step_log(start, tmp_path):
    """Beside the file that was named, one for each worker (its lines: test_walk_in_one_process.py)."""
    async with start("--step-log", str(tmp_path / "steps.jsonl")) as made, client_of(made) as client:
        asked = {"model": "toy", "prompt": list(range(40)), "max_tokens": 4}
        assert (await client.post("/v1/completions", json=asked)).status_code == 200
    assert "decode-0" in (tmp_path / "steps.decode-0.jsonl").read_text()


# ---- the doors -------------------------------------------------------------------------------------------------------


async def test_served_model_name(start):
    asked = {"prompt": [1, 2, 3], "max_tokens": 1}
    async with start("--served-model-name", "mine") as made, client_of(made) as client:
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        mine = await client.post("/v1/completions", json={"model": "mine", **asked})
        other = await client.post("/v1/completions", json={"model": "toy", **asked})
    assert names == ["mine"]
    assert (mine.status_code, mine.json()["model"]) == (200, "mine")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


async def test_api_key(start):
    asked = {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 1}
    async with start("--api-key", "k3y") as made:
        codes = []
        for key in (None, "wrong", "k3y"):
            async with client_of(made, key) as client:
                codes.append((await client.post("/v1/completions", json=asked)).status_code)
                codes.append((await client.get("/v1/models")).status_code)
                assert (await client.get("/health")).status_code != 401  # a probe has no key
    assert codes == [401, 401, 401, 401, 200, 200]


async def test_tenants(start, tmp_path):
    """Keys, classes and promises of the file, from HTTP through the queue into the report."""
    file = tmp_path / "tenants.yaml"
    file.write_text(
        "classes: {fast: {ttft_s: 30, tpot_s: 9, band: 0}, slow: {ttft_s: 60, tpot_s: 9, band: 1, when_late: queue}}\n"
        f"tenants: {{acme: {{api_keys: [{hash_key('sk-acme')}], class: slow, classes: [fast], price: {{output: 1000000}}}}}}\n"
    )
    asked = {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True}
    async with start("--tenants", str(file)) as made, client_of(made, "sk-acme") as client:
        codes = []
        for headers in ({}, {"x-slo-class": "fast"}, {"x-slo-class": "gold"}, {"authorization": "Bearer wrong"}):
            async with asyncio.timeout(20):
                answer = await client.post("/v1/completions", json=asked, headers=headers)
                while answer.status_code == 503:  # the file is on its way
                    await asyncio.sleep(0.05)
                    answer = await client.post("/v1/completions", json=asked, headers=headers)
            codes.append(answer.status_code)
        await asyncio.sleep(0.1)
        rows = {(row["tenant"], row["class"]): row for row in made.service.history.sla.rows(300, asyncio.get_running_loop().time())}
        decided = made.service.scheduler.explain(next(iter(made.service.history._rows)))
    assert codes == [200, 200, 400, 401]
    assert {key: (row["finished"], row["cost"]) for key, row in rows.items()} == {
        ("acme", "slow"): (1, pytest.approx(3.0)),
        ("acme", "fast"): (1, pytest.approx(3.0)),
    }
    assert rows["acme", "fast"]["promise"]["ttft_s"] == 30.0
    assert decided["request"]["class"] == "slow"


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "slo"])
async def test_scheduling_policy(start, policy):
    """Who is next, of two that wait: by arrival, or by the priority that the later one asked for."""
    async with start("--scheduling-policy", policy, "--prefill", "0", "--max-num-seqs", "1") as made:
        slow(made.workers[0])
        ended: list[str] = []

        async def one(name: str, priority: int) -> None:
            wanted = msgspec.structs.replace(request(range(20), max_tokens=6), priority=priority)
            await events_of(made, wanted)
            ended.append(name)

        tasks = [asyncio.create_task(one("running", 0))]
        while not made.service.scheduler.ledger.entries:
            await asyncio.sleep(0.005)
        for name, priority in (("ordinary", 0), ("urgent", -5)):
            tasks.append(asyncio.create_task(one(name, priority)))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
    assert ended[1:] == (["ordinary", "urgent"] if policy == "fcfs" else ["urgent", "ordinary"])


async def test_max_body_bytes(start):
    async with start("--set", "gateway.max_body_bytes=2KiB") as made, client_of(made) as client:
        answer = await client.post("/v1/completions", json={"model": "toy", "prompt": "x" * 3000})
    assert answer.status_code == 413


# ---- transfer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "endpoint"), [("tcp", TcpEndpoint), ("shm", ShmEndpoint)])
async def test_kv_transport(start, monkeypatch, name, endpoint):
    seen = []
    make_sender = kvtransfer.group.make_sender
    monkeypatch.setattr(kvtransfer.group, "make_sender", lambda end, *a, **k: seen.append(end) or make_sender(end, *a, **k))
    async with start("--kv-transport", name) as made:
        await several(made, 3, 50)
        stats = workers(made, "decode")[0].stats()
        block_nbytes = made.engines[0].layout.block_nbytes
    assert [type(end) for end in seen] == [endpoint]
    assert stats.transfers == 3
    assert stats.transfer_bytes == 3 * 7 * block_nbytes  # 50 tokens in blocks of 8


async def test_bind_host_and_port_range_say_where_kv_is_taken(start, monkeypatch):
    seen = []
    make_sender = kvtransfer.group.make_sender
    monkeypatch.setattr(kvtransfer.group, "make_sender", lambda end, *a, **k: seen.append(end) or make_sender(end, *a, **k))
    where = ("--bind-host", "127.0.0.0/8", "--port-range", "28740-28749")
    async with start("--kv-transport", "tcp", "--decode", "2", *where) as made:
        await several(made, 4, 50)
    assert {end.host for end in seen} == {"127.0.0.1"}
    assert len({end.port for end in seen}) == 2
    assert all(28740 <= end.port <= 28749 for end in seen)


def test_auto_prefers_shared_memory(tmp_path, toy):
    pool = KVPool(toy.kv_layout(8), 1)
    assert usable(assembly.transports_of(config_of(tmp_path)), pool) == ("shm", "tcp")
    pool.close()
    assert assembly.transports_of(config_of(tmp_path, "--kv-transport", "tcp")) == ("tcp",)


# ---- deadlines -------------------------------------------------------------------------------------------------------


async def test_request_timeout_ends_a_request_and_its_work(start):
    async with start("--set", "gateway.request_timeout_s=0.3") as made:
        for worker in made.workers:
            slow(worker)
        began = time.monotonic()
        events = await events_of(made, request(range(20), max_tokens=400))
        took = time.monotonic() - began
        assert isinstance(events[-1], Failed)
        assert (events[-1].failure.kind, events[-1].failure.param) == ("DeadlineExceeded", "gateway.request_timeout_s")
        tokens = tokens_of(events)
        assert 0 < len(tokens) < 400  # what was delivered before stays delivered
        assert tokens == oracle(list(range(20)), len(tokens))
        assert 0.25 < took < 3.0
        await made.settle()


async def test_request_timeout_counts_the_queue_too(start):
    async with start("--set", "gateway.request_timeout_s=0.6", "--num-gpu-blocks-override", "30", "--prefill", "0") as made:
        slow(made.workers[0])
        ends = await asyncio.gather(*(events_of(made, request(range(i, i + 100), max_tokens=120)) for i in range(3)))
        assert [end[-1].failure.kind for end in ends] == ["DeadlineExceeded"] * 3
        assert any(len(end) == 1 for end in ends)  # one at least never ran
        await made.settle()
        assert made.service.scheduler.status(asyncio.get_running_loop().time())["in_flight"]["total"] == 0


@pytest.mark.parametrize(("key", "num_quick_steps"), [("prefill_timeout_s", 0), ("token_timeout_s", 4)])
async def test_silence_of_a_worker_is_bounded_and_another_takes_over(start, key, num_quick_steps):
    async with start("--prefill", "0", "--decode", "2", "--set", f"gateway.{key}=0.3") as made:
        stuck: list[Any] = []
        for worker in made.workers:
            get_stuck(worker, num_quick_steps, stuck)
        began = time.monotonic()
        events = await events_of(made, request(range(20), max_tokens=12))
        took = time.monotonic() - began
    assert len(stuck) == 1
    assert 0.25 < took < 2.0
    assert tokens_of(events) == oracle(list(range(20)), 12)
    assert events[-1].usage.num_resumptions == (1 if num_quick_steps else 0)


def get_stuck(worker: Any, num_quick_steps: int, stuck: list[Any]) -> None:
    """The first worker that has done so many steps says nothing for a while."""
    compute, steps = worker._compute, []

    async def maybe_stuck(function: Any) -> Any:
        steps.append(1)
        if not stuck and len(steps) > num_quick_steps:
            stuck.append(worker)
            await asyncio.sleep(1.5)
        return await compute(function)

    worker._compute = maybe_stuck


async def test_heartbeats_that_are_missed(start, tmp_path):
    config = config_of(tmp_path, "--set", "scheduler.heartbeat_s=0.5", "--set", "scheduler.heartbeat_misses=4")
    async with start() as made:
        info = made._agents[0].info
    scheduler = Scheduler(config.scheduler)
    scheduler.register(info, 0.0)
    for now, is_alive in ((1.9, True), (2.1, False)):
        scheduler.tick(now)
        assert [row["alive"] for row in scheduler.status(now)["workers"]] in ([[True]] if is_alive else [[False], []])


def slow(worker: Any) -> None:
    run = worker.runner.run

    def later(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return run(*args, **kwargs)

    worker.runner.run = later


async def test_recovery_timeout_bounds_the_search_for_a_scheduler():
    async def find_scheduler() -> str:
        raise WorkerLost("nobody")

    clock = asyncio.get_running_loop().time
    gateway = Gateway("g", Hub(True).network("g"), find_scheduler, lambda _: None, clock, Limits(recovery_timeout_s=0.3))
    began = clock()
    events = [event async for event in gateway.generate(request([1, 2]))]
    assert 0.3 <= clock() - began < 2.0
    assert events[-1].failure.kind == "WorkerLost"
    assert "no scheduler for 0.3 s" in events[-1].failure.message


# ---- nothing is decoration -------------------------------------------------------------------------------------------


def test_every_option_has_a_test_here_or_a_refusal():
    text = Path(__file__).read_text() + (ROOT / "tests/cluster/test_preflight.py").read_text()
    text += (ROOT / "tests/engine/test_memory.py").read_text() + (ROOT / "tests/system/test_serve_flags.py").read_text()
    text += (ROOT / "tests/system/test_host_tier.py").read_text()
    names = {flag.flag: (flag.flag, flag.key.replace(".", "__")) for flag in FLAGS if flag.key not in REFUSALS}
    untested = [flag for flag, ways in names.items() if not any(way in text for way in ways)]
    assert not untested


def test_every_key_is_read_somewhere():
    """An attribute of that name is read outside configs/; keys with one value only say so when another is given."""
    read = set()
    for folder in ("api", "cluster", "decode", "engine", "kvtransfer", "models", "prefill", "scheduler"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add((ast.unparse(node.value).rsplit(".", 1)[-1].lstrip("_"), node.attr))
    if ("decode", "speculation") in read:  # likewise, of who guesses
        read.add(("decode", "speculative_method"))
    if ("config", "parallel") in read:  # what configs/ itself makes of tp and pp
        read |= {(role, name) for role in ("prefill", "decode") for name in ("tp", "pp")}
    for attribute, keys in (("fewest", ["min_replicas"]), ("most", ["max_replicas"])):  # likewise, of a pool of either role
        if ("pool", attribute) in read:
            read |= {(role, name) for role in ("prefill", "decode") for name in keys}
    read |= {(role, name) for holder, name in read if holder == "pool(role)" for role in ("prefill", "decode")}
    ignored = [
        key
        for key in KEYS
        if key not in REFUSALS and not {(key.split(".")[0], key.split(".")[1]), ("config", key.split(".")[1])} & read
    ]
    assert not ignored
