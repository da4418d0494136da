"""configs/ray/on-premises.yaml for real, on three machines made of namespaces: up, serve, kill a machine, watch it heal, down.

One test, as each step stands on the one before. Minutes: Ray is started on every machine, over ssh.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_node import GCS_PORT, RAY_PORTS, read_env
from tests.machines.cluster_file import ROOT, cluster_file

SCRIPT = ROOT / "tests" / "machines" / "machines.sh"
URL = "http://10.78.0.1:8000"
ARGV = [
    "toy",
    "--prefill",
    "1",
    "--decode",
    "2",
    "--host",
    "10.78.0.1",
    "--port-range",
    "20000-20999",
    "--set",
    "gateway.replicas=2",
]
BACK_WITHIN_S = 6.0
UP_WITHIN_S = 500


def why_not() -> str:
    if os.geteuid() != 0:
        return "it needs root, for network namespaces"
    missing = [
        name
        for name in ("sshd", "ssh", "rsync", "nsenter", "ip", "ss")
        if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server openssh-client rsync iproute2)"
    probe = subprocess.run(["unshare", "--net", "ip", "link", "add", "x", "type", "bridge"], capture_output=True, text=True)
    if probe.returncode:
        return f"namespaces or bridges are not allowed here: {probe.stderr.strip()}"
    return ""


pytestmark = [pytest.mark.more, pytest.mark.timeout(1500)]


def machines(*words: Any) -> str:
    done = subprocess.run(["bash", str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"machines.sh {words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Path("/tmp") / f"tandem-machines-{os.getpid()}"  # not below the home, which the machines have their own of
    shutil.rmtree(made, ignore_errors=True)
    try:
        machines("up", 3, made)
        time.sleep(1)
        yield made
    finally:
        subprocess.run(["bash", str(SCRIPT), "down", str(made)], timeout=60)
        shutil.rmtree(made, ignore_errors=True)


def tandem(folder: Path, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cluster", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def on_head(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A command of ours on the head, with the cluster's secrets."""
    secrets = read_env(folder / ".tandem" / "clusters" / "tandem-on-premises.env")
    words = [f"{name}={value}" for name, value in {**secrets, "RAY_ADDRESS": f"10.78.0.1:{GCS_PORT}", "PYTHONPATH": ROOT}.items()]
    command = [
        "bash",
        str(SCRIPT),
        "run",
        "1",
        str(folder),
        "env",
        *words,
        "RAY_AUTH_MODE=token",
        sys.executable,
        "-m",
        "cluster",
        *argv,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


class Client(threading.Thread):
    """Asks one request after the other until stopped; outcomes with their times."""

    def __init__(self, key: str) -> None:
        super().__init__(daemon=True)
        self.key, self.outcomes, self.over = key, [], threading.Event()  # type: ignore[var-annotated]

    def run(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            problem = ask(self.key)
            self.outcomes.append((began, time.monotonic(), problem))
            time.sleep(0.05)


def ask(key: str) -> str:
    """Empty when it was answered in full."""
    body = json.dumps({"model": "toy", "prompt": [5] * 40, "max_tokens": 8, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{URL}/v1/completions", body, headers), timeout=30) as answer:
            return "" if json.loads(answer.read())["usage"]["completion_tokens"] == 8 else "too short"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read()[:200]!r}"
    except OSError as error:
        return repr(error)


def workers(key: str) -> dict[str, str]:
    """name -> incarnation, of those that live."""
    request = urllib.request.Request(f"{URL}/dashboard/data?once=1", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            rows = json.loads(answer.read())["status"]["workers"]
    except OSError:
        return {}
    return {row["name"]: row["incarnation"] for row in rows if row["alive"]}


def wait_for(condition: Any, seconds: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what} did not come within {seconds:g} s"
        time.sleep(0.5)
    return time.monotonic() - began


def test_up_serve_kill_heal_down(folder: Path) -> None:
    file = str(cluster_file(folder, folder / "id"))
    assert "nothing is in the way" in tandem(folder, "up", file, *ARGV, "--check").stdout
    machines("cut", 3)
    refused = tandem(folder, "up", file, *ARGV, "--check")
    assert refused.returncode == 2
    assert re.search(r"10\.78\.0\.3: no (way|answer)", refused.stderr), refused.stderr
    machines("mend", 3)

    began = time.monotonic()
    done = tandem(folder, "up", file, *ARGV, timeout=UP_WITHIN_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(f"up and ready in {time.monotonic() - began:.0f} s")
    key = read_env(folder / ".tandem" / "clusters" / "tandem-on-premises.env")["TANDEM_GATEWAY_API_KEY"]
    assert key not in done.stdout + done.stderr
    wait_for(lambda: len(workers(key)) == 3, 60, "all workers")
    assert ask(key) == ""
    assert "401" in ask("not the key")
    check_listeners(folder)
    check_doctor(folder)

    before = workers(key)
    client = Client(key)
    client.start()
    time.sleep(3)
    machines("kill", 3, folder)
    killed = time.monotonic()
    wait_for(
        lambda: len([1 for at, _, problem in client.outcomes if at > killed + 1 and not problem]) > 10,
        60,
        "an answer after the kill",
    )
    time.sleep(5)
    late = [
        (at - killed, end - killed, problem) for at, end, problem in client.outcomes if end > killed and (problem or end - at > 2)
    ]
    back_s = max((end for _, end, _ in late), default=0.0)
    num_failed = len([1 for one in late if one[2]])
    print(f"machine 3 killed: {num_failed} of {len(client.outcomes)} requests failed, the last slow one ended after {back_s:.1f} s")
    print(late)

    machines("start", 3, folder)
    healed_s = wait_for(lambda: len(workers(key)) == 3, 400, "the third worker")
    print(f"all workers again {healed_s:.0f} s after the machine came back")
    client.over.set()
    client.join(60)
    assert not [problem for at, _, problem in client.outcomes if at > killed + BACK_WITHIN_S and problem]
    assert len(set(workers(key).values()) - set(before.values())) >= 1, "a new life is a new incarnation"
    assert back_s <= BACK_WITHIN_S * 2, "the last slow one was asked within the first seconds"

    down = tandem(folder, "down", file, timeout=300)
    assert down.returncode == 0, (down.stdout + down.stderr)[-4000:]
    for machine in (1, 2, 3):
        left = machines("run", machine, folder, "ps", "axo", "args")
        assert "raylet" not in left.replace("grep", ""), f"machine {machine}"
        assert "tandem:" not in left


def check_listeners(folder: Path) -> None:
    """Beyond loopback every machine listens where docs/deploy.md says, and nowhere else."""
    allowed = {22, GCS_PORT, 10001, 8000, 44217, 44227, *RAY_PORTS.values(), *range(10002, 11000), *range(20000, 21000)}
    ours: set[tuple[int, int]] = set()
    for machine in (1, 2, 3):
        for line in machines("run", machine, folder, "ss", "-Hltnp").splitlines():
            host, _, port = line.split()[3].rpartition(":")
            if host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"):
                continue
            assert int(port) in allowed, f"machine {machine} listens on {host}:{port}: {line}"
            if "tandem:" in line or 20000 <= int(port) < 21000:
                ours.add((machine, int(port)))
                assert host == f"10.78.0.{machine}", line
    # control of prefill, of two decode workers, two gateways, the scheduler; KV of two decode workers
    assert len([port for _, port in ours if 20000 <= port < 21000]) == 8, ours


def check_doctor(folder: Path) -> None:
    well = on_head(folder, "doctor", "--cluster", "--port-range", "20000-20999")
    assert well.returncode == 0, well.stdout + well.stderr
    assert "10.78.0.2 reaches 10.78.0.3:20" in well.stdout
    assert "10.78.0.3 reaches 10.78.0.2:20" in well.stdout
    assert re.search(r"tdm2 -> decode:1|tdm3 -> decode:0", well.stdout)
    rule = ["ip", "-n", "tdm3", "route", "add", "blackhole", "10.78.0.2"]
    subprocess.run(rule, check=True)
    try:
        cut = on_head(folder, "doctor", "--cluster", "--port-range", "20000-20999")
    finally:
        subprocess.run([word if word != "add" else "del" for word in rule], check=True)
    assert cut.returncode == 1, cut.stdout + cut.stderr
    assert "10.78.0.3 cannot reach 10.78.0.2:20" in cut.stdout, cut.stdout
