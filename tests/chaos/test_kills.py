"""A minute of `kill -9` at random processes under load: every stream ends with one terminal event, nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from tests.system.served import serve
from tests.system.test_serve import LONG, terminal_events

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SECONDS, NUM_CLIENTS = 60, 6


def test_a_minute_of_kills(tmp_path):
    rng = random.Random(os.environ.get("TANDEM_CHAOS_SEED", "1"))
    ends: list[list[str]] = []
    with serve(tmp_path, "--prefill", "2", "--decode", "2", "--kv-cache-memory-bytes", "128MiB") as served:

        def alive() -> list[dict]:
            return [worker for worker in served.status()["workers"] if worker["alive"]]

        served.wait(lambda: len(alive()) == 4, 90, "four workers")
        deadline = time.monotonic() + SECONDS

        def client(number: int) -> None:
            while time.monotonic() < deadline:
                body = {"model": "bundled", "prompt": f"# {number} {len(ends)}\n{LONG}", "max_tokens": 100, "stream": True}
                ends.append(terminal_events(served, body))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(NUM_CLIENTS)]
        for thread in clients:
            thread.start()
        num_kills = 0
        while time.monotonic() < deadline - 5:
            time.sleep(rng.uniform(4, 8))
            victim = rng.choice(["prefill:0", "prefill:1", "decode:0", "decode:1", "scheduler"])
            pid = served.pid_of(f"tandem:{victim}")
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                num_kills += 1
        for thread in clients:
            thread.join(180)
            assert not thread.is_alive(), "a stream never ended"
        served.wait(lambda: len(alive()) == 4, 90, "four workers again")
        served.wait(lambda: all(worker["stats"]["num_used_blocks"] == 0 for worker in alive()), 30, "all blocks back")
    assert num_kills > 3
    assert len(ends) > 20
    assert all(len(end) == 1 for end in ends), [end for end in ends if len(end) != 1]
    failed = sum(end == ["error"] for end in ends)
    print(f"{num_kills} kills, {len(ends)} streams, {failed} ended with an error event")
    assert failed <= len(ends) // 20
