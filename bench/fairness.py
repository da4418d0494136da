"""Two equal tenants on one server: what a flood of one does to the other, next to what the other has alone.

    tandem bench fairness
    tandem bench fairness --model toy --seconds 30 --flood 20

Starts `tandem serve` with a tenants file, finds how many requests a second it carries, then plays one tenant at half of its share
(a quarter of that rate), alone first and then beside another one that sends `--flood` times as much. Prints refusals and
TTFT of the first, and their ratio. Load and server share this machine's cores: what the flood's own HTTP costs is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.client import Client, Sample
from bench.load import gaps
from configs.tenants import hash_key

START_S = 180.0
STOP_S = 60.0
REQUEST_S = 60.0  # patience with one request
FILE = """classes:
  standard: {{ttft_s: {ttft_s}, tpot_s: 10, when_late: queue}}
tenants:
  steady: {{api_keys: [{steady}]}}
  flood: {{api_keys: [{flood}]}}
"""


class Shape(NamedTuple):
    """What every request looks like, tokens."""

    model: str
    prompt: int
    output: int


class Seen(NamedTuple):
    """Of one tenant during one phase. TTFT in seconds, of those that were served."""

    sent: int
    ok: int
    refused: int
    failed: int
    p50: float
    p99: float
    queued_p50: float  # of the TTFT, by the server's own word: until it was placed
    placed_p50: float  # and from then on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--flood", type=float, default=20.0, help="so many times the steady tenant's rate (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="requests per second that the server carries; default: measured first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="further arguments of `tandem serve`, after --")


def run(args: argparse.Namespace) -> dict[str, Any]:
    keys = {name: f"sk-{name}-{secrets.token_hex(8)}" for name in ("steady", "flood")}
    shape = Shape(args.model, args.prompt_tokens, args.output_tokens)
    with served(args.model, keys, args.serve) as url:
        result = asyncio.run(measure(url, keys, shape, args.seconds, args.flood, args.rate, args.seed))
    print(told(result))
    return result


def told(result: dict[str, Any]) -> str:
    alone, beside, flood = Seen(**result["alone"]), Seen(**result["beside"]), Seen(**result["flood"])
    rows = [f"carries {result['capacity']:.2f} requests/s; steady sends {result['rate']:.2f}, the flood {result['flood_rate']:.2f}"]
    for name, seen in (("steady, alone", alone), ("steady, beside the flood", beside), ("the flood", flood)):
        rows.append(
            f"{name:<26} {seen.sent:5d} sent {seen.ok:5d} served {seen.refused:5d} refused {seen.failed:3d} failed   "
            f"TTFT p50 {1e3 * seen.p50:8.1f} ms  p99 {1e3 * seen.p99:8.1f} ms   "
            f"(p50 queued {1e3 * seen.queued_p50:.1f}, then {1e3 * seen.placed_p50:.1f})"
        )
    rows.append(f"p99 beside the flood / alone = {result['ratio_p99']:.2f}, p50 {result['ratio_p50']:.2f}")
    return "\n".join(rows)


# ---- the phases ------------------------------------------------------------------------------------------------------


async def measure(
    url: str, keys: dict[str, str], shape: Shape, seconds: float, flood: float, capacity: float | None, seed: int
) -> dict[str, Any]:
    """Capacity, the steady tenant alone, then beside the flood."""
    client = Client(url, keys, timeout_s=REQUEST_S)
    probing_s = max(10.0, seconds / 3)
    _say(f"the server is up; at most {3 + probing_s + 2 * seconds + 4 * REQUEST_S:.0f} s from here")
    await _closed_loop(client, shape, 4, 3.0, seed)  # what is slow the first time
    capacity = capacity or await _closed_loop(client, shape, 16, probing_s, seed + 1)
    rate = capacity / 4
    _say(f"it carries {capacity:.2f} requests/s; the steady tenant alone, {rate:.2f}/s for {seconds:.0f} s")
    alone = await play(client, shape, {"steady": rate}, seconds, seed + 2)
    _say(f"the same beside a flood of {flood * rate:.1f}/s")
    both = await play(client, shape, {"steady": rate, "flood": flood * rate}, seconds, seed + 3)
    before, after = seen(alone["steady"]), seen(both["steady"])
    return {
        "capacity": capacity,
        "rate": rate,
        "flood_rate": flood * rate,
        "alone": before._asdict(),
        "beside": after._asdict(),
        "flood": seen(both["flood"])._asdict(),
        "ratio_p50": after.p50 / max(1e-9, before.p50),
        "ratio_p99": after.p99 / max(1e-9, before.p99),
    }


async def play(client: Client, shape: Shape, rates: dict[str, float], seconds: float, seed: int) -> dict[str, list[Sample]]:
    """Each tenant's Poisson arrivals for so long; those that run at the end are awaited, the flood's are given up."""
    client.origin = time.perf_counter()
    samples: dict[str, list[Sample]] = {name: [] for name in rates}
    running: dict[str, set[asyncio.Task[Sample]]] = {name: set() for name in rates}

    async def tenant(name: str, rate: float) -> None:
        rng, at = random.Random(f"{seed} {name}"), 0.0
        for gap in gaps(rate, 1.0, 1, rng):
            at += gap
            if at >= seconds:
                return
            await asyncio.sleep(max(0.0, at - client.now()))
            sample = Sample(name, at)
            samples[name].append(sample)
            task = asyncio.create_task(client.complete(sample, _body(shape, rng)))
            running[name].add(task)
            task.add_done_callback(running[name].discard)

    await asyncio.gather(*(tenant(name, rate) for name, rate in rates.items()))
    if "steady" in running:
        await asyncio.gather(*running["steady"])
    for task in [task for tasks in running.values() for task in tasks]:
        task.cancel()
    await asyncio.gather(*(task for tasks in running.values() for task in tasks), return_exceptions=True)
    return samples


async def _closed_loop(client: Client, shape: Shape, at_once: int, seconds: float, seed: int) -> float:
    """Requests a second that are served when there is always one more."""
    client.origin, done = time.perf_counter(), 0

    async def one(i: int) -> None:
        nonlocal done
        rng = random.Random(f"{seed} {i}")
        while client.now() < seconds:
            sample = await client.complete(Sample("steady", client.now()), _body(shape, rng))
            done += sample.outcome == "ok" and sample.end <= seconds

    await asyncio.gather(*(one(i) for i in range(at_once)))
    return max(0.1, done / seconds)


def _say(text: str) -> None:
    """Progress, at once: the figures come at the end only."""
    print(text, flush=True)


def _body(shape: Shape, rng: random.Random) -> dict[str, Any]:
    prompt = [rng.randrange(10, 500) for _ in range(shape.prompt)]
    return {"model": shape.model, "prompt": prompt, "max_tokens": shape.output, "temperature": 0.0, "ignore_eos": True}


def seen(samples: list[Sample]) -> Seen:
    found = [sample.outcome for sample in samples if sample.end]
    served = [sample for sample in samples if sample.outcome == "ok" and sample.ttft is not None]
    times = [sample.ttft or 0.0 for sample in served]
    queued = [(sample.metrics.get("queue_time_ms") or 0.0) / 1e3 for sample in served]
    placed = [(sample.metrics.get("prefill_time_ms") or 0.0) / 1e3 for sample in served]
    return Seen(
        len(samples), found.count("ok"), found.count("refused"), found.count("failed"), _at(times, 0.5), _at(times, 0.99),
        _at(queued, 0.5), _at(placed, 0.5),
    )  # fmt: skip


def _at(values: list[float], q: float) -> float:
    """Nearest rank; nan without any."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


# ---- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(model: str, keys: dict[str, str], more: list[str], ttft_s: float = 1.0) -> Iterator[str]:
    """`tandem serve` with the two tenants; its address once it is healthy."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="tandem-fairness-") as folder:
        file, log = Path(folder) / "tenants.yaml", Path(folder) / "log"
        file.write_text(FILE.format(ttft_s=ttft_s, **{name: hash_key(key) for name, key in keys.items()}))
        words = [sys.executable, "-m", "cluster", "serve", model, "--tenants", str(file), "--port", str(port), *more]
        with log.open("wb") as out:
            server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ), start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + START_S
            while not _is_healthy(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server does not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield url
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(STOP_S)
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False
