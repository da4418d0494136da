"""Every example runs, as a command in a process of its own, against a real server where it wants one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.served import Served, serve

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"TANDEM_GATEWAY_API_KEY": "sk-all"}
TENANTS = ("--tenants", str(ROOT / "configs/tenants.example.yaml"))
NEEDS_NO_RUN = {
    "connection": "says where the server is",
    "demo": "test_the_demo",
    "record_demo": "drives a browser",
    "train_bundled_model": "takes an hour",
}

pytestmark = [pytest.mark.more, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("examples"), "--kv-cache-memory-bytes", "128MiB", *TENANTS, env=KEYS) as served:
        yield served


def run(name: str, *words: str, url: str = "", seconds: float = 240.0) -> str:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TANDEM_URL": url, "TANDEM_API_KEY": "sk-all", "PYTHONPATH": paths}
    command = [sys.executable, "-m", f"examples.{name}", *words]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_offline() -> None:
    assert run("offline").count("->") == 3


def test_chat_streaming(served: Served) -> None:
    told = run("chat_streaming", url=served.url)
    assert len(told.split("\n\n")[0]) > 10
    assert re.search(r"time_to_first_token_ms +\d", told)


def test_async_client(served: Served) -> None:
    assert "24 answers" in run("async_client", url=served.url)


def test_a_batch_goes_on_where_it_was_stopped(served: Served, tmp_path: Path) -> None:
    lines = []
    for i in range(6):
        body = {"model": "bundled", "max_tokens": 4, "temperature": 0, "prompt": f"def f{i}("}
        lines.append(json.dumps({"custom_id": f"{i}", "url": "/v1/completions", "body": body}))
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(lines[:4]))
    assert run("batch", str(requests), str(answers), url=served.url).startswith("4 asked")
    requests.write_text("\n".join(lines))
    assert run("batch", str(requests), str(answers), url=served.url).startswith("2 asked")
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in found) == [f"{i}" for i in range(6)]
    assert all(line["response"]["choices"][0]["text"] for line in found)


def test_logprobs(served: Served) -> None:
    assert run("logprobs", url=served.url).count("else") == 8


def test_two_tenants_are_told_apart(served: Served) -> None:
    told = run("two_tenants", url=served.url)
    assert re.search(r"acme +3 requests", told)
    assert re.search(r"globex +6 requests", told)


def test_the_sla_report(served: Served) -> None:
    run("logprobs", url=served.url)
    assert re.search(r"default, standard: \d+ requests, [\d.]+% kept", run("sla_report", url=served.url))


def test_the_demo(tmp_path: Path) -> None:
    """A short one: the flood, the kill, every token compared."""
    summary = tmp_path / "summary.json"
    told = run("demo", "--seconds", "45", "--json", str(summary), seconds=400)
    found = json.loads(summary.read_text())
    assert found["wrong"] == found["cut"] == 0
    assert found["delivered"] > 50
    assert found["delivered"] + sum(found["refused"].values()) == found["asked"]
    assert found["resumed"] >= 1
    for word in (
        "dashboard",
        "flood",
        "killing",
        "back",
        "streams delivered",
        "streams resumed",
        "wrong",
        "acme",
        "globex",
        "initech",
    ):
        assert word in told, word


def test_no_example_is_left_out() -> None:
    here = Path(__file__).read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.stem in NEEDS_NO_RUN or f'run("{path.stem}"' in here, path.name
