"""`tandem serve` with a tenants file, as a platform team runs it: keys, classes, reloads, Retry-After, a flood, explanations.

One cluster for the whole module, on the toy model; what kills processes comes last.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.client import Client
from bench.fairness import Shape, play, seen
from configs.tenants import hash_key
from tests.system.served import Served, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

SERVER_KEY = "sk-server-0123456789"
NAMES = ("acme", "globex", "steady", "flood", "limited")
FILE = """
classes:
  fast: {{ttft_s: 5, tpot_s: 1, band: 0, when_late: queue}}
  standard: {{ttft_s: 20, tpot_s: 5, band: 1, when_late: queue}}
tenants:
  acme: {{api_keys: [{acme}], class: standard, classes: [fast], weight: {weight}, price: {{input: 1000, output: 2000}}}}
  globex: {{api_keys: [{globex}], class: standard}}
  steady: {{api_keys: [{steady}], class: standard}}
  flood: {{api_keys: [{flood}], class: standard}}
  limited: {{api_keys: [{limited}], class: standard, requests_per_min: 60}}
"""


def key(tenant: str) -> str:
    return SERVER_KEY if tenant == "server" else f"sk-{tenant}-key"


def text(weight: float = 1, **keys: str) -> str:
    digests = {name: hash_key(keys.get(name, key(name))) for name in NAMES}
    return FILE.format(weight=weight, **digests)


class Tenanted:
    """The running server and its file."""

    def __init__(self, served: Served, path: Path) -> None:
        self.served = served
        self.path = path

    def send(
        self, tenant: str, path: str = "/v1/completions", body: dict[str, Any] | None = None, timeout: float = 60.0, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers)."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given |= {"Content-Type": "application/json", "Authorization": f"Bearer {headers.get('token', key(tenant))}"}
        given.pop("token", None)
        data = json.dumps({"prompt": [5, 6, 7], "max_tokens": 4, **(body or {})}).encode() if path.startswith("/v1/") else None
        asked = urllib.request.Request(self.served.url + path, data, given)
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:
                status, raw, found = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            status, raw, found = error.code, error.read(), error.headers
        told = {name.lower(): ", ".join(found.get_all(name) or ()) for name in found}
        with contextlib.suppress(ValueError):
            return status, json.loads(raw), told
        return status, raw.decode(), told

    def file_status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.send("server", "/dashboard/data")[1]["status"].get("tenants_file") or {}
        return status

    def write(self, content: str) -> None:
        """As an editor does it: beside, then renamed."""
        beside = self.path.with_suffix(".new")
        beside.write_text(content)
        beside.replace(self.path)

    def metric(self, name: str, **labels: str) -> float:
        for line in self.served.get("/metrics")[1].decode().splitlines():
            if line.startswith(f"{name}{{") and all(f'{label}="{value}"' in line for label, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no {name} {labels}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenanted]:
    folder = tmp_path_factory.mktemp("tenants")
    path = folder / "tenants.yaml"
    path.write_text(text())
    arguments = ("toy", "--tenants", path.name, "--kv-cache-memory-bytes", "32MiB", "--max-num-seqs", "16")
    arguments += ("--set", "gateway.replicas=2")  # who comes in here and who there goes by the same file
    with serve(folder, *arguments, env={"TANDEM_GATEWAY_API_KEY": SERVER_KEY}) as running:
        yield Tenanted(running, path)


# ---- who and what ----------------------------------------------------------------------------------------------------


def test_each_key_is_a_tenant_and_each_answer_has_one_id(made: Tenanted) -> None:
    for tenant in ("acme", "globex", "server"):
        status, body, headers = made.send(tenant, x_request_id=f"{tenant}-1")
        assert status == 200, body
        assert headers["x-request-id"] == f"{tenant}-1", "once, also behind Serve's proxy"
    assert made.send("nobody")[0] == 401
    assert made.send("acme", "/admin/sla")[0] == 403
    rows = {(row["tenant"], row["class"]): row for row in made.send("server", "/admin/sla")[1]["rows"]}
    assert rows["acme", "standard"]["promise"]["ttft_s"] == 20.0
    assert rows["acme", "standard"]["cost"] == pytest.approx((3 * 1000 + 4 * 2000) / 1e6)
    assert rows["globex", "standard"]["cost"] is None


def test_rights(made: Tenanted) -> None:
    assert made.send("acme", x_slo_class="fast", x_slo_ttft_ms="5000", body={"priority": -2})[0] == 200
    assert made.metric("tandem_requests_total", tenant="acme", **{"class": "fast"}, outcome="finished") == 1
    for headers, param in (({"x_slo_class": "gold"}, "x-slo-class"), ({"x_slo_tpot_ms": "10"}, "x-slo-tpot-ms")):
        status, body, _ = made.send("acme", **headers)
        assert (status, body["error"]["param"]) == (400, param)


def test_a_decision_is_explained_by_the_clients_own_name(made: Tenanted) -> None:
    made.send("acme", x_request_id="why-me", body={"max_tokens": 12})
    deadline = time.monotonic() + 10
    while True:  # its outcome is on its way
        status, found, _ = made.send("server", "/admin/decisions/why-me")
        assert status == 200, found
        if (found["came_true"] or {}).get("kind") == "finished":
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (found["request"]["tenant"], found["request"]["class"], found["request"]["prompt_tokens"]) == ("acme", "standard", 3)
    assert found["promise"] == {"ttft_s": 20.0, "tpot_s": 5.0}
    placed = next(step for step in found["steps"] if step["what"] == "placed")
    assert placed["decode"] == "decode:0"
    assert {one["worker"] for one in found["candidates"]} >= {"decode:0"}
    assert found["came_true"]["output_tokens"] == 12
    assert any("the promise was kept" in line for line in found["words"])
    assert made.send("acme", "/admin/decisions/why-me")[0] == 403
    assert made.send("server", "/admin/decisions/nobody")[0] == 404
    command = [sys.executable, "-m", "cluster", "explain", "why-me", "--url", made.served.url]
    env = {**os.environ, "TANDEM_GATEWAY_API_KEY": SERVER_KEY, "NO_COLOR": "1"}
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    for word in ("why-me", "tenant acme, class standard", "placed", "decode:0", "12 tokens out", "who could have had it"):
        assert word in told.stdout, told.stdout


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_429_says_when_and_it_comes_true(made: Tenanted) -> None:
    """A bucket of one request a second: those that are told to wait, wait, and are admitted at once."""

    def spend(_: int) -> tuple[int, Any, dict[str, str]]:
        return made.send("limited")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(spend, range(75)))
    refused = [(body, headers) for status, body, headers in answers if status != 200]
    assert refused, "a minute's worth is 60"
    for body, headers in refused:
        assert re.fullmatch(r"[1-9][0-9]*", headers["retry-after"])
        assert headers["x-tandem-refusal"] == body["error"]["reason"] == "tenant_requests"
        assert body["error"]["code"] == "rate_limit_exceeded"

    def come_back(pair: tuple[Any, dict[str, str]]) -> bool:
        time.sleep(float(pair[1]["retry-after"]))
        return made.send("limited", x_tandem_retry="1")[0] == 200

    sample = refused[:10]
    with concurrent.futures.ThreadPoolExecutor(len(sample)) as pool:
        kept = list(pool.map(come_back, sample))
    assert sum(kept) >= 0.9 * len(kept), kept
    assert made.send("globex")[0] == 200, "nobody else's bucket"
    assert made.metric("tandem_refusals_total", tenant="limited", reason="tenant_requests") >= len(refused)


def test_a_flood_takes_nothing_from_a_steady_tenant(made: Tenanted) -> None:
    """The strict ratio is `tandem bench fairness`'s to print, on a quiet machine. Here: nothing refused, nothing failed, and
    no wait like the flood's own."""
    client = Client(made.served.url, {name: key(name) for name in ("steady", "flood")}, timeout_s=120.0)
    shape = Shape("toy", 64, 160)
    alone = seen(asyncio.run(play(client, shape, {"steady": 1.0}, 12.0, 1))["steady"])
    both = asyncio.run(play(client, shape, {"steady": 1.0, "flood": 20.0}, 12.0, 2))
    beside, flood = seen(both["steady"]), seen(both["flood"])
    print(f"\nalone {alone}\nbeside {beside}\nflood {flood}")
    assert alone.ok == alone.sent
    assert (beside.refused, beside.failed, beside.ok) == (0, 0, beside.sent)
    assert flood.sent > 100
    assert beside.p50 < alone.p50 + 5.0
    service = {row["tenant"]: row["service"] for row in made.send("server", "/dashboard/data")[1]["status"]["services"]}
    assert service["flood"] > service["steady"]


# ---- reloads ---------------------------------------------------------------------------------------------------------


def test_a_good_file_is_in_force_within_seconds_and_costs_nobody_a_request(made: Tenanted) -> None:
    before = made.file_status()["version"]
    stop, outcomes = time.monotonic() + 6.0, []

    def keep_asking(i: int) -> None:
        while time.monotonic() < stop:
            outcomes.append(made.send("globex", body={"stream": i % 2 == 0, "max_tokens": 8})[0])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, i) for i in range(4)]
        time.sleep(1.0)
        assert made.send("acme", token="sk-acme-new-key")[0] == 401
        made.write(text(weight=3, acme="sk-acme-new-key"))
        made.served.wait(lambda: made.file_status()["version"] != before, 15, "the new file in force")
        made.served.wait(lambda: made.send("acme", token="sk-acme-new-key")[0] == 200, 10, "the new key")
        # At a gateway that has not heard of it yet, too: whom it lets in, the scheduler sends back to be judged again.
        assert {made.send("acme")[0] for _ in range(8)} == {401}, "the old one is worth nothing"
        for one in asking:
            one.result()
    assert outcomes
    assert set(outcomes) == {200}
    status = made.send("server", "/dashboard/data")[1]["status"]
    assert status["tenants"]["acme"]["weight"] == 3.0
    made.write(text())
    made.served.wait(lambda: {made.send("acme")[0] for _ in range(8)} == {200}, 20, "back again, at both gateways")


def test_a_bad_file_is_told_with_its_line_and_the_old_one_stays(made: Tenanted) -> None:
    before = made.file_status()
    assert before["problem"] is None
    made.write(text().replace("  flood:", "  steady:"))
    made.served.wait(lambda: made.file_status()["problem"] is not None, 15, "the problem is seen")
    found = made.file_status()
    assert found["problem"]["line"] == 9
    assert "has 'steady' twice: lines 8 and 9" in found["problem"]["reason"]
    assert (found["version"], found["taken"]) == (before["version"], before["taken"])
    assert made.send("acme")[0] == made.send("flood")[0] == 200
    assert made.metric("tandem_tenants_file_valid") == 0
    made.served.wait(lambda: "tenants.yaml:9: " in made.served.log.read_text(), 10, "it is said where the server was started")
    events = made.send("server", "/dashboard/data")[1]["events"]
    assert any(event["kind"] == "tenants" and ":9: " in event["text"] for event in events)


def test_the_scheduler_dies_while_the_file_is_bad_and_everything_stays_as_it_was(made: Tenanted) -> None:
    """Comes after the test above: the file on disk cannot be used. Gateways give the new scheduler what was in force."""
    before = made.file_status()["version"]
    pid = made.served.pid_of("tandem:scheduler")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            return made.send("acme", timeout=20.0)[0] == 200
        return False

    time.sleep(0.5)
    made.served.wait(is_back, 40, "requests are answered again")
    found = made.file_status()
    assert (found["version"], found["from_gateway"]) == (before, True)
    assert made.send("nobody")[0] == 401
    made.write(text(weight=2))
    made.served.wait(lambda: made.file_status()["problem"] is None, 15, "a good file again")
    assert not made.file_status()["from_gateway"]


def test_a_bad_file_stops_the_command_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(text().replace("weight: 1", "wait: 1"))
    command = [sys.executable, "-m", "cluster", "serve", "toy", "--tenants", str(path), "--port", "8999"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"tenants file {path}:6: tenants.acme has the unknown key 'wait'; did you mean weight?" in done.stderr
    print(f"\nrefused after {time.monotonic() - started:.1f} s")
    checked = subprocess.run(
        [*command[:3], "tenants", "check", str(path)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (checked.returncode, checked.stderr) == (2, done.stderr)
