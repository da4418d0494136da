"""The rendered Serve configuration runs: on a Ray with the head and the worker groups of the chart, with the pod's secrets."""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.chart import ROOT, documents, example, needs_helm

pytestmark = [needs_helm, pytest.mark.more, pytest.mark.timeout(600)]
KEY = "k" * 24
VALUES = {"decode": {"replicas": 2}, "gateway": {"replicas": 2}, "scheduler": {"drain_s": 10}}


class Running:
    def __init__(self, process: subprocess.Popen[str], port: int, where: dict[str, str]) -> None:
        self.process, self.port, self.where = process, port, where

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def complete(self, prompt: str = "def add(a, b):", max_tokens: int = 16) -> tuple[int, Any]:
        return self.ask("/v1/completions", {"model": "bundled", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})

    def workers(self) -> Any:
        return self.ask("/dashboard/data?once=1")[1]["status"]["workers"]

    def apply(self, config: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(config) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "applied\n"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TANDEM_"))},
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "TANDEM_GATEWAY_API_KEY": KEY,
        "TANDEM_CLUSTER_SECRET": "s" * 32,
        "TANDEM_TRANSFER_BIND_HOST": "127.0.0.1",  # the pod's address
        "TANDEM_CONTROL_RESOURCE": "tandem_control",
        "TANDEM_SCHEDULER_RESOURCE": "node:__internal_head__",
    }
    command = [sys.executable, "-m", "tests.helm.local_ray", str(port)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(documents(VALUES, example("cpu"))["RayService"]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line == "ready\n", line
        yield Running(process, port, json.loads(process.stdout.readline()))
        process.stdin.close()
        process.wait(120)


def test_it_answers_with_the_pods_key_and_not_without(running: Running) -> None:
    status, answer = running.complete()
    assert (status, answer["usage"]["completion_tokens"]) == (200, 16)
    assert running.ask("/v1/models", key=None)[0] == 401
    expected = ["decode:0", "decode:1", "prefill:0"]
    deadline = time.monotonic() + 60  # ready is as soon as one of them is
    while (names := sorted(row["name"] for row in running.workers() if row["alive"])) != expected:
        assert time.monotonic() < deadline, names
        time.sleep(0.5)


def test_only_the_scheduler_runs_on_the_head(running: Running) -> None:
    ours = {name: node for name, node in running.where.items() if "tandem" in name}
    kinds = {
        kind: [node for name, node in ours.items() if kind in name] for kind in ("scheduler", "#Gateway", "#Decode", "#Prefill")
    }
    assert [len(nodes) for nodes in kinds.values()] == [1, 2, 2, 1], ours
    assert kinds["#Prefill"] == ["prefill-0"]
    assert sorted(kinds["#Decode"]) == ["decode-0", "decode-1"]
    assert kinds["scheduler"] == ["head"]
    assert "head" not in kinds["#Gateway"]


def test_a_new_configuration_under_load_fails_no_request(running: Running) -> None:
    """As KubeRay applies a changed serveConfigV2. Every replica is replaced, two gateways and three workers."""
    changed = documents({**VALUES, "scheduler": {"drain_s": 10, "max_queue_requests": 777}}, example("cpu"))["RayService"]
    stop = threading.Event()
    outcomes: list[tuple[int, str]] = []

    def client(number: int) -> None:
        while not stop.is_set():
            try:
                status, answer = running.complete(f"def f{number}(x):", 24)
                outcomes.append((status, "" if status == 200 else str(answer)[:200]))
            except OSError as error:
                outcomes.append((0, repr(error)))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        time.sleep(3)
        running.apply(yaml.safe_load(changed["spec"]["serveConfigV2"]))
        time.sleep(5)
        stop.set()
        for one in clients:
            one.result(90)
    failed = [outcome for outcome in outcomes if outcome[0] != 200]
    print(f"{len(outcomes)} requests while everything was replaced, {len(failed)} failed")
    assert len(outcomes) > 30
    assert not failed
