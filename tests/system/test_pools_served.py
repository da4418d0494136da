"""Pools of the real cluster: two models that share it, pools that follow their load, a worker whose machine is taken away."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.fake_openai import FakeServer
from tests.system.local import oracle
from tests.system.served import Served, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
# What one model's traffic must leave alone in the other's workers.
COUNTERS = ("num_used_blocks", "num_cached_blocks", "prefix_queries", "prefix_hits", "prompt_tokens", "generation_tokens")
CODE = "def parse_arguments(argv):\n    parser = argparse.ArgumentParser()\n    parser.add_argument('--name{}')\n" * 3


def counters(served: Served, model: str) -> dict[str, dict[str, int]]:
    return {name: {c: w["stats"][c] for c in COUNTERS} for name, w in served.alive().items() if w["model"] == model}


def complete(served: Served, body: dict[str, Any]) -> list[int]:
    status, answer = served.post("/v1/completions", {"temperature": 0, "return_token_ids": True, **body}, timeout=120)
    assert status == 200, answer
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def toy(served: Served, i: int, num_tokens: int = 40) -> None:
    prompt = [(i * 7 + k * 3) % 200 + 1 for k in range(120)]
    body = {"model": "toy", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
    assert complete(served, body) == oracle(prompt, num_tokens)


def bundled(served: Served, i: int) -> list[int]:
    return complete(served, {"model": "bundled", "prompt": CODE.replace("{}", str(i)), "max_tokens": 24})


# ---- two models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "models.yaml").write_text("also:\n  - toy\nmodel: {name: bundled, kv_cache_bytes: 64MiB}\nscheduler: {drain_s: 5}\n")
    with serve(folder, "--config", "models.yaml", patience_s=180) as running:
        running.wait(lambda: len(running.alive()) == 4, 60, "four workers")
        yield running


def test_both_are_named_and_a_third_is_not_found(two: Served) -> None:
    cards = json.loads(two.get("/v1/models")[1])["data"]
    assert [card["id"] for card in cards] == ["bundled", "toy"]
    assert set(two.alive()) == {"bundled/prefill:0", "bundled/decode:0", "toy/prefill:0", "toy/decode:0"}
    status, answer = two.post("/v1/completions", {"model": "third", "prompt": "x"})
    assert status == 404
    assert "served: bundled, toy" in answer["error"]["message"]
    text = [two.post("/tokenize", {"model": name, "prompt": "def f(): pass"})[1]["tokens"] for name in ("bundled", "toy")]
    assert text[0] != text[1], "each has its own tokenizer"
    assert "and toy from" in two.log.read_text()


def test_two_models_share_a_cluster_and_neither_touches_the_others_blocks(two: Served) -> None:
    alone = [bundled(two, i) for i in range(12)]
    two.wait(lambda: counters(two, "bundled")["bundled/decode:0"]["num_used_blocks"] == 0, 20, "bundled is idle")
    time.sleep(1.5)  # a heartbeat
    before = counters(two, "bundled")
    assert sum(c["num_cached_blocks"] for c in before.values()) > 0, "there is something to evict"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: toy(two, i), range(32)))
    time.sleep(1.5)
    assert counters(two, "bundled") == before
    of_toy = counters(two, "toy")
    assert sum(c["generation_tokens"] for c in of_toy.values()) >= 32 * 40
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(toy, two, 100 + i) for i in range(24)]
        together = list(pool.map(lambda i: bundled(two, i), range(12)))
        for one in waiting:
            one.result()
    assert together == alone, "the tokens are those of a cluster of its own"
    had = sum(c["prefix_hits"] for c in before.values())
    hits: Callable[[], int] = lambda: sum(c["prefix_hits"] for c in counters(two, "bundled").values())  # noqa: E731
    two.wait(lambda: hits() > had, 20, "hits: what it had cached was still there")  # a heartbeat tells


@pytest.mark.more
def test_a_notice_to_the_only_decode_worker_of_a_model_loses_nothing(two: Served) -> None:
    """Over HTTP; what does not end within the drain waits for the worker that Serve starts in its place."""
    before = two.alive()["toy/decode:0"]["incarnation"]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(toy, two, 300 + i, 2500) for i in range(6)]
        two.wait(lambda: two.alive()["toy/decode:0"]["ledger"]["decoding"] == 6, 30, "six streams")
        assert two.post("/admin/workers/nobody/notice", {"seconds": 1})[0] == 404
        assert two.post("/admin/workers/toy/decode:0/notice", {"seconds": "soon"})[0] == 400
        status, answer = two.post("/admin/workers/toy/decode:0/notice", {"seconds": 1})
        assert (status, answer) == (202, {"workers": ["toy/decode:0"], "seconds": 1})
        for stream in streams:
            stream.result()
    two.wait(lambda: two.alive().get("toy/decode:0", {}).get("incarnation", before) != before, 60, "another one in its place")
    assert two.status()["counters"].get("failed", 0) == 0
    assert two.status()["counters"].get("resumed", 0) >= 1


# ---- overflow --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """In a thread of its own, because this test's own waits."""
    loop, server = asyncio.new_event_loop(), FakeServer()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    yield server
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.mark.more
def test_a_burst_spills_over_to_another_server(tmp_path: Path, fake: FakeServer) -> None:
    own = ("--prefill", "0", "--kv-cache-memory-bytes", "64MiB", "--max-num-seqs", "1", "--set", "scheduler.ttft_target_s=0.4")
    with serve(tmp_path, "toy", *own, "--overflow", f"{fake.url},model=m,max_num_seqs=4", patience_s=180) as running:
        running.wait(lambda: set(running.alive()) == {"decode:0", "overflow:0"}, 60, "both")
        toy(running, 1)
        assert len(fake.bodies) == 1, "a look at it, and nothing else"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: toy(running, i, 300), range(16)))
        assert 1 < len(fake.bodies) < 17
        assert running.alive()["decode:0"]["stats"]["generation_tokens"] > 0
        assert running.status()["counters"].get("failed", 0) == 0
        assert f"overflow to {fake.url}" in running.log.read_text()


# ---- pools that follow their load --------------------------------------------------------------------------------------


class Load:
    """So many clients, each with one request after the other, until it is told to end; every token of every answer is compared."""

    def __init__(self, served: Served) -> None:
        self.num_done = 0
        self.failures: list[str] = []
        self._served = served
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self, num_clients: int, num_tokens: int) -> None:
        for client in range(num_clients):
            thread = threading.Thread(target=self._client, args=(client, num_tokens))
            thread.start()
            self._threads.append(thread)

    def _client(self, client: int, num_tokens: int) -> None:
        i = 0
        while not self._is_over.is_set():
            i += 1
            try:
                toy(self._served, client * 1000 + i, num_tokens)
                self.num_done += 1
            except Exception as error:  # an HTTP error, a broken stream, a wrong token
                self.failures.append(f"{type(error).__name__}: {str(error)[:300]}")

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.more
def test_a_pool_goes_from_one_to_three_and_back_under_a_step_load(tmp_path: Path) -> None:
    keys = ["scheduler.scale_up_s=2", "scheduler.scale_down_s=12", "scheduler.drain_s=10", "decode.max_replicas=3"]
    sets = [part for key in keys for part in ("--set", key)]
    with serve(tmp_path, "toy", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "64MiB", *sets, patience_s=180) as running:
        decoding: Callable[[], list[str]] = lambda: sorted(n for n in running.alive() if n.startswith("decode"))  # noqa: E731
        light, heavy = Load(running), Load(running)
        light.run(1, 100)
        running.wait(lambda: light.num_done > 5, 30, "the light load")
        assert decoding() == ["decode:0"]
        heavy.run(20, 300)
        up_s = running.wait(lambda: len(decoding()) == 3, 90, "three decode workers")
        assert len(set(decoding())) == 3

        def all_work() -> bool:
            found = [worker["ledger"] for name, worker in running.alive().items() if name.startswith("decode")]
            return all(ledger["decoding"] + ledger["prefilling"] for ledger in found)

        running.wait(all_work, 30, "each of the three has something to do")
        pid = running.pid_of("tandem:scheduler")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        running.wait(lambda: len(decoding()) == 3, 30, "everybody known to the scheduler's successor")
        time.sleep(5)
        assert len(decoding()) == 3, "whose first idea of the pool is not one worker"
        heavy.end()
        down_s = running.wait(lambda: len(decoding()) == 1, 120, "one decode worker again")
        time.sleep(2)
        light.end()
        print(f"\n1 -> 3 in {up_s:.1f} s, 3 -> 1 in {down_s:.1f} s; {heavy.num_done} + {light.num_done} requests")
        assert not heavy.failures + light.failures
        counted = running.status()["counters"]
        assert counted.get("failed", 0) == counted.get("rejected", 0) == 0
        assert heavy.num_done > 20
        serves = json.loads(urllib.request.urlopen(f"{running.url}/v1/models").read())
        assert serves["data"][0]["id"] == "toy"


# ---- a change of role --------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_a_worker_changes_its_role_under_serve(tmp_path: Path) -> None:
    """Two prefill workers and many long answers: one of them decodes, in the same process, and no answer is the worse for it."""
    keys = ["switch_roles=true", "scale_up_s=2", "switch_cooldown_s=5", "drain_s=5"]
    sets = [part for key in keys for part in ("--set", f"scheduler.{key}")]
    own = ("--prefill", "2", "--kv-cache-memory-bytes", "64MiB", "--max-num-seqs", "4")
    with serve(tmp_path, "toy", *own, *sets, patience_s=180) as running:
        running.wait(lambda: len(running.alive()) == 3, 60, "three workers")
        before = {name: w["pid"] for name, w in running.alive().items()}
        load = Load(running)
        load.run(12, 300)
        roles: Callable[[], list[str]] = lambda: [w["role"] for w in running.alive().values()]  # noqa: E731
        took_s = running.wait(lambda: roles().count("decode") == 2, 90, "a second decode worker")
        time.sleep(3)
        load.end()
        (name,) = running.alive().keys() - before.keys()
        print(f"\n{name} after {took_s:.1f} s")
        assert running.alive()[name]["pid"] in before.values()
        assert running.alive()[name]["stats"]["generation_tokens"] > 0
        assert not load.failures
        assert running.status()["counters"].get("failed", 0) == 0
        events = json.loads(running.get("/dashboard/data?once=1")[1])["events"]
        assert "role_switch" in [event["kind"] for event in events]
