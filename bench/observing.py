"""What it costs to be watched: the decode-heavy workload with timelines, a scraper and a dashboard listening, and without them.

Two servers run side by side and are loaded in turn (with, without, without, with ...), so that what else the machine does falls
on both. Shown are throughput and, less sensitive to other load, CPU seconds of all server processes per thousand output tokens.

    --against DIR   "without" is another checkout of this project (one from before all this) instead of switched-off timelines
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.http import WORKLOADS, Workload, _measure

DECODE_HEAVY = next(w for w in WORKLOADS if w.name == "decode-heavy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rounds", type=int, default=6, help="of each kind")
    parser.add_argument("--requests", type=int, default=DECODE_HEAVY.num_requests, help="in a round")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured as what it is")
    parser.add_argument("--vocab", type=int, default=500, help="prompt token ids are below this")


def run(args: argparse.Namespace) -> dict[str, Any]:
    here = Path(__file__).resolve().parents[1]
    off = [] if args.against else ["--set", "gateway.timelines=false"]
    rounds: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    with _server(here, args.model, []) as watched, _server(args.against or here, args.model, off) as bare:
        servers = {"with": watched, "without": bare}
        workload = DECODE_HEAVY._replace(num_requests=args.requests)
        for server in servers.values():
            _round(server, args.model, workload._replace(num_requests=workload.concurrency), args.vocab)  # warms it up
        for i in range(args.rounds):
            for kind in ("with", "without") if i % 2 == 0 else ("without", "with"):
                with _watching(servers[kind].url) if kind == "with" else contextlib.nullcontext():
                    row = _round(servers[kind], args.model, workload, args.vocab)
                rounds[kind].append(row)
                print(f"{kind:<8} {row['tokens_per_s']:8.1f} tokens/s   {row['cpu_s_per_1k']:7.4f} CPU s/1000 tokens", flush=True)
    medians = {kind: {n: statistics.median(row[n] for row in rows) for n in rows[0]} for kind, rows in rounds.items()}
    lost = 1 - medians["with"]["tokens_per_s"] / medians["without"]["tokens_per_s"]
    more = medians["with"]["cpu_s_per_1k"] / medians["without"]["cpu_s_per_1k"] - 1
    print(f"median of {args.rounds}: {100 * lost:+.2f} % less throughput, {100 * more:+.2f} % more CPU per token")
    return {"model": args.model, "rounds": rounds, "medians": medians, "throughput_lost": lost, "cpu_more": more}


class _Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def cpu_s(self) -> float:
        """Of our own processes: workers, gateway, scheduler and the HTTP proxy, not of the rest of Ray."""
        total = 0.0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline()[:1])
                if title.startswith(("tandem:", "ray::ProxyActor")):
                    spent = process.cpu_times()
                    total += spent.user + spent.system
        return total


@contextlib.contextmanager
def _server(checkout: Path, model: str, options: list[str]) -> Iterator[_Server]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "cluster", "serve", model, "--port", str(port), "--kv-cache-memory-bytes", "512MiB", *options]
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = _Server(process, port)
    try:
        deadline = time.monotonic() + 180
        while not _is_healthy(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server in {checkout} did not start (exit status {process.poll()})")
            time.sleep(0.2)
        time.sleep(5)  # the prefill worker joins a little later
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _round(server: _Server, model: str, workload: Workload, vocab: int) -> dict[str, float]:
    before = server.cpu_s()
    row = asyncio.run(_measure(server.url, model, workload, 0, vocab))
    num_tokens = sum(sample["num_tokens"] for sample in row["samples"])
    return {"tokens_per_s": row["output_tokens_per_s"], "cpu_s_per_1k": (server.cpu_s() - before) / num_tokens * 1000}


@contextlib.contextmanager
def _watching(url: str) -> Iterator[None]:
    """A dashboard that listens, and a scrape every five seconds, as prometheus.yml asks for."""
    stop = threading.Event()

    def listen() -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/dashboard/live", timeout=30) as answer:
            while not stop.is_set() and answer.readline():
                pass

    def scrape() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
                answer.read()
            stop.wait(5.0)

    threads = [threading.Thread(target=work, daemon=True) for work in (listen, scrape)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(5)
