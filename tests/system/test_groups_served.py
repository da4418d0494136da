"""Workers of several ranks under Serve: `tandem serve --prefill-tp 2 --decode-tp 2`, a rank that dies in mid-stream, scale-in."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.local import oracle
from tests.system.served import Served, free_port, serve

pytestmark = [pytest.mark.more, pytest.mark.system, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("groups")
    keys = ("--max-model-len", "1024", "--block-size", "8", "--num-gpu-blocks-override", "256")
    sets = ("--set", "scheduler.disaggregation_threshold=0")
    with serve(folder, "toy", "--prefill-tp", "2", "--decode-tp", "2", *keys, *sets, patience_s=400) as running:
        running.wait(lambda: len(running.alive()) == 2, 120, "both workers")
        yield running


def test_each_rank_is_a_process_with_a_name_and_all_is_told(served):
    names = ("prefill:0", "prefill:0/1", "decode:0", "decode:0/1")
    pids = {name: served.pid_of(f"tandem:{name}") for name in names}
    assert None not in pids.values()
    assert len(set(pids.values())) == 4
    for role in ("prefill", "decode"):
        row = served.alive()[f"{role}:0"]
        assert (row["tp"], row["pp"]) == (2, 1)
        assert row["rank_pids"] == [pids[f"{role}:0"], pids[f"{role}:0/1"]]
    tandem = str(Path(sys.executable).with_name("tandem"))
    shown = subprocess.run([tandem, "status", "--url", served.url], capture_output=True, text=True, timeout=60).stdout
    assert "2 x 1" in shown
    assert f"{pids['decode:0']} {pids['decode:0/1']}" in shown
    metrics = served.get("/metrics")[1].decode()
    assert f'pid="{pids["decode:0/1"]}"' in metrics
    assert "2 prefill" not in served.log.read_text()
    assert "1 prefill of 2 x 1 (tp x pp) ranks" in served.log.read_text()


def test_nothing_listens_beyond_loopback(served):
    for process in [psutil.Process(served.process.pid), *served.processes()]:
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.cmdline(), connection.laddr)


def test_kv_travels_between_the_groups(served):
    prompts = [[(7 * i + j) % 512 for j in range(90)] for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: served.complete(prompt, 16), prompts))
    assert answers == [oracle(prompt, 16) for prompt in prompts]
    served.wait(lambda: served.alive()["decode:0"]["stats"]["transfers"] >= 6, 10, "six transfers")


@pytest.mark.parametrize(("victim", "number"), [("decode:0/1", signal.SIGKILL), ("decode:0", signal.SIGSTOP)])
def test_a_rank_that_dies_in_mid_stream_costs_no_token(served, victim, number):
    """There is one decode worker: its streams wait until the group is back, and then go on where they were."""
    before = served.alive()["decode:0"]
    prompts = [[(5 * i + j) % 512 for j in range(40)] for i in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(served.complete, prompt, 600) for prompt in prompts]
        served.wait(lambda: served.status()["in_flight"]["decoding"] == 3, 30, "three streams")
        pid = served.pid_of(f"tandem:{victim}")
        assert pid is not None
        os.kill(pid, number)
        struck = time.monotonic()
        served.wait(lambda: not any(map(psutil.pid_exists, before["rank_pids"])), 8, "the group is gone")
        gone = time.monotonic() - struck
        served.wait(lambda: served.alive().get("decode:0", before)["incarnation"] != before["incarnation"], 120, "it is back")
        back = time.monotonic() - struck
        assert [stream.result(timeout=150) for stream in running] == [oracle(prompt, 600) for prompt in prompts]
    print(f"\n{number.name} to {victim} under Serve: the group was gone after {gone:.1f} s and back after {back:.1f} s")
    names = ["".join(process.cmdline()[:1]).strip() for process in served.processes()]
    assert sorted(name for name in names if name.startswith("tandem:decode")) == ["tandem:decode:0", "tandem:decode:0/1"]


def test_a_rank_that_gets_sigterm_lets_its_group_drain(served):
    """What runs ends, what comes waits for the next life of the group; the state "draining" is seen at once."""
    before = served.alive()["decode:0"]
    prompts = [[(3 * i + j) % 512 for j in range(40)] for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        first = [pool.submit(served.complete, prompt, 200) for prompt in prompts[:3]]
        served.wait(lambda: served.status()["in_flight"]["decoding"] == 3, 30, "three streams")
        os.kill(served.pid_of("tandem:decode:0/1"), signal.SIGTERM)
        told = served.wait(lambda: served.alive().get("decode:0", {}).get("state") != "ready", 5, "draining")
        later = [pool.submit(served.complete, prompt, 20) for prompt in prompts[3:]]
        served.wait(lambda: served.alive().get("decode:0", before)["incarnation"] != before["incarnation"], 120, "it is back")
        assert [stream.result(timeout=150) for stream in first] == [oracle(prompt, 200) for prompt in prompts[:3]]
        assert [stream.result(timeout=150) for stream in later] == [oracle(prompt, 20) for prompt in prompts[3:]]
    assert not any(map(psutil.pid_exists, before["rank_pids"]))
    assert served.status()["counters"].get("failed", 0) == 0
    print(f"\nSIGTERM to decode:0/1 under Serve: known after {told:.1f} s")


def test_ctrl_c_stops_every_rank(served):
    children = served.processes()
    assert served.stop() == 0
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left, left


# ---- scale-in --------------------------------------------------------------------------------------------------------


class Scaled(Served):
    """tests/system/scaled.py: a Serve whose deployments can be scaled."""

    def scale(self, name: str, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name} {number}\n".encode())
        self.process.stdin.flush()


@contextlib.contextmanager
def scalable(folder: Path) -> Iterator[Scaled]:
    port, log = free_port(), folder / "scaled.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "RAY_"))}
    with log.open("wb") as out:
        command = [sys.executable, "-m", "tests.system.scaled", str(port)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    made = Scaled(process, port, log)
    try:
        made.wait(made.is_healthy, 400, "healthy")
        made.wait(lambda: len(made.alive()) == 4, 120, "four workers")
        yield made
    finally:
        children = made.processes()
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()


def test_scale_in_under_load_costs_no_request(tmp_path):
    """Both pools go from two workers to one while clients go on asking: every answer is whole and right, and who stays, stays."""
    with scalable(tmp_path) as served:
        stop = threading.Event()
        slowest = [0.0]

        def client(number: int) -> int:
            count = 0
            while not stop.is_set():
                prompt = [(number * 31 + count * 7 + j) % 512 for j in range(40)]
                started = time.monotonic()
                assert served.complete(prompt, 60) == oracle(prompt, 60)
                slowest[0] = max(slowest[0], time.monotonic() - started)
                count += 1
            return count

        before = {w["incarnation"] for w in served.alive().values()}
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(client, number) for number in range(6)]
            try:
                time.sleep(3)
                for name in ("Decode", "Prefill"):
                    served.scale(name, 1)
                    role = name.lower()
                    served.wait(lambda role=role: sum(w["role"] == role for w in served.alive().values()) == 1, 90, f"one {role}")
                    time.sleep(2)
            finally:
                stop.set()
            counts = [one.result(timeout=120) for one in clients]
        status = served.status()
        print(f"\nscale-in: {sum(counts)} requests, none failed, the slowest took {slowest[0]:.1f} s; {status['counters']}")
        assert {w["incarnation"] for w in served.alive().values()} < before
        assert status["counters"].get("failed", 0) == 0
