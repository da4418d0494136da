"""What Ray itself may lose: Serve's controller, a worker that cannot be constructed, a node with its raylet. Streams are exact."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from models.locate import locate
from tests.system.local import oracle
from tests.system.served import Served, free_port, serve

pytestmark = [pytest.mark.more, pytest.mark.system, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def alive(served: Served) -> dict[str, dict]:
    return {w["incarnation"]: w for w in served.status()["workers"] if w["alive"]}


class Clients:
    """Six of them, who ask and compare until they are told to stop."""

    def __init__(self, served: Served, num_tokens: int = 60, may_break: bool = False) -> None:
        self.num_broken = 0
        self._may_break = may_break
        self.slowest_s = 0.0
        self.num_answers = 0
        self._served, self._num_tokens = served, num_tokens
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(6)

    def _ask(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            prompt = [(number * 31 + count * 7 + j) % 512 for j in range(40)]
            started = time.monotonic()
            try:
                tokens = self._served.complete(prompt, self._num_tokens)
            except (AssertionError, OSError, ValueError, http.client.HTTPException):
                if not self._may_break:
                    raise
                self.num_broken += 1
                time.sleep(1)
                continue
            assert tokens == oracle(prompt, self._num_tokens)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            self.num_answers += 1
            count += 1

    def __enter__(self) -> Clients:
        self._running = [self._pool.submit(self._ask, number) for number in range(6)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._running:
            one.result(timeout=150)


def controller_of(served: Served) -> int:
    found = [p.pid for p in served.processes() if "".join(p.cmdline()[:1]).startswith("ray::ServeController")]
    assert len(found) == 1, found
    return found[0]


def test_serves_controller_killed(tmp_path):
    """No token passes through it: nobody notices, and its successor finds all replicas where they were."""
    sizes = ("--block-size", "8", "--num-gpu-blocks-override", "256", "--max-model-len", "1024")
    with serve(tmp_path, "toy", "--prefill", "2", "--decode", "2", *sizes) as served:
        served.wait(lambda: len(alive(served)) == 4, 120, "four workers")
        before = set(alive(served))
        with Clients(served) as clients:
            time.sleep(2)
            victim = controller_of(served)
            os.kill(victim, signal.SIGKILL)
            back = served.wait(lambda: _has_other_controller(served, victim), 60, "a controller again")
            time.sleep(5)
        assert set(alive(served)) == before, "a worker was replaced though only the controller died"
        decode = next(w for w in served.status()["workers"] if w["name"] == "decode:1")
        os.kill(decode["pid"], signal.SIGKILL)
        served.wait(lambda: len(alive(served)) == 4, 90, "the new controller replaces a killed worker")
    print(f"\ncontroller killed: back after {back:.1f} s, {clients.num_answers} exact, the slowest {clients.slowest_s:.2f} s")


def _has_other_controller(served: Served, victim: int) -> bool:
    with contextlib.suppress(AssertionError, psutil.Error):
        return controller_of(served) != victim
    return False


def test_a_constructor_that_fails_again_and_again(tmp_path):
    """A decode worker's checkpoint is gone when it wants to come back: the other one serves, and when the file is there again, so
    is the worker."""
    model = tmp_path / "model"
    shutil.copytree(locate("bundled", None), model)
    weights = sorted(model.glob("*.safetensors"))
    with serve(tmp_path, str(model), "--prefill", "1", "--decode", "2", "--kv-cache-memory-bytes", "128MiB") as served:
        served.wait(lambda: len(alive(served)) == 3, 120, "three workers")

        def ask(number: int) -> None:
            body = {"model": str(model), "prompt": f"def f{number}(x):", "max_tokens": 8, "temperature": 0}
            status, answer = served.post("/v1/completions", body, 60)
            assert status == 200, answer

        for path in weights:
            path.rename(path.with_suffix(".away"))
        victim = next(w for w in served.status()["workers"] if w["name"] == "decode:1")
        os.kill(victim["pid"], signal.SIGKILL)
        struck = time.monotonic()
        num_asked = 0
        while time.monotonic() - struck < 25:
            ask(num_asked)
            num_asked += 1
            time.sleep(0.2)
        assert len(alive(served)) == 2, "it cannot have come back"
        assert "safetensors" in served.log.read_text(), "nobody was told why it does not start"
        for path in weights:
            path.with_suffix(".away").rename(path)
        back = served.wait(lambda: len(alive(served)) == 3, 120, "the worker is back")
    print(f"\nconstructor fails for 25 s: {num_asked} of {num_asked} answered, back {back:.1f} s after the file was")


class TwoNodes(Served):
    """tests/system/two_nodes.py"""

    def parent_of(self, title: str) -> int:
        pid = self.pid_of(title)
        assert pid is not None, title
        return psutil.Process(pid).ppid()

    @property
    def lost_raylet(self) -> int:
        """Of the second node: it was started after the first one's."""
        return max((p for p in self.processes() if p.name() == "raylet"), key=lambda p: p.create_time()).pid

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()


@contextlib.contextmanager
def two_nodes(folder: Path, *words: str) -> Iterator[TwoNodes]:
    port, log = free_port(), folder / "nodes.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "RAY_"))}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.two_nodes", str(port), *words],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    made = TwoNodes(process, port, log)
    try:
        made.wait(lambda: "ready" in log.read_text(), 200, "ready")
        made.wait(lambda: len(alive(made)) == 4, 120, "four workers")
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


@pytest.mark.parametrize("words", [(), ("scheduler",)], ids=["workers", "and the scheduler"])
def test_a_node_is_lost_with_its_raylet(tmp_path, words):
    """Half of the workers at once: their streams go on with the other half, and a new node gets new workers. Where the gateway was
    there too, the streams that it held break; nothing else does."""
    with two_nodes(tmp_path, *words) as served:
        before = set(alive(served))
        parents = {served.parent_of(f"tandem:{name}") for name in ("decode:0", "decode:1")}
        assert len(parents) == 2, "a decode worker on each node"
        if words:
            assert served.parent_of("tandem:scheduler") == served.lost_raylet
        loses_gateway = served.parent_of("tandem:gateway:0") == served.lost_raylet
        with Clients(served, 200, may_break=loses_gateway) as clients:
            time.sleep(3)
            served.tell("lose")
            noticed = served.wait(lambda: _num_alive(served) == 2, 60, "two workers are gone")
            time.sleep(8)
            served.tell("add")
            back = served.wait(lambda: _num_alive(served) == 4, 120, "four workers again")
            time.sleep(2)
        assert len(set(alive(served)) & before) == 2, "those on the other node stayed"
        served.wait(lambda: all(w["stats"]["num_used_blocks"] == 0 for w in alive(served).values()), 30, "all blocks back")
    print(
        f"\na node lost{' with the scheduler' if words else ''}{' and the gateway' if loses_gateway else ''}: noticed after "
        f"{noticed:.1f} s, four workers {back:.1f} s after another came; {clients.num_answers} exact, {clients.num_broken} broken, "
        f"the slowest {clients.slowest_s:.2f} s"
    )


def _num_alive(served: Served) -> int | None:
    with contextlib.suppress(OSError, KeyError, ValueError):  # for a while there may be no gateway, or no scheduler
        return len(alive(served))
    return None
