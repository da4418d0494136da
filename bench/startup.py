"""From the command to the first answer: `make serve`, or `tandem serve`, started again and again.

Each run starts the command, asks for a short completion until one comes, and stops it by Ctrl-C. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--runs", type=int, default=5)
    parser.add_argument("--command", default="make serve ARGS='--port {port}'", help="{port} is filled in")
    parser.add_argument("--timeout", type=float, default=300.0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    samples = []
    for i in range(args.runs):
        first_answer, stopped = _once(args.command, args.timeout)
        samples.append({"first_answer_s": first_answer, "stop_s": stopped})
        print(f"run {i + 1}: first answer after {first_answer:.1f} s, stopped in {stopped:.1f} s", flush=True)
    answers = [sample["first_answer_s"] for sample in samples]
    print(f"median {statistics.median(answers):.1f} s (min {min(answers):.1f}, max {max(answers):.1f}) over {len(answers)} runs")
    return {"command": args.command, "samples": samples, "median_s": statistics.median(answers)}


def _once(command: str, timeout: float) -> tuple[float, float]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = shlex.split(command.format(port=port))
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not _answers(port):
            if process.poll() is not None or time.monotonic() - started > timeout:
                raise SystemExit(f"{command!r} did not answer (exit status {process.poll()})")
            time.sleep(0.05)
        answered = time.monotonic()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    return answered - started, time.monotonic() - answered


def _answers(port: int) -> bool:
    url = f"http://127.0.0.1:{port}/v1"
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=1) as answer:
            model = json.loads(answer.read())["data"][0]["id"]
        body = json.dumps({"model": model, "prompt": "def ", "max_tokens": 4}).encode()
        asked = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return bool(json.loads(answer.read())["choices"][0]["text"])
    except (OSError, urllib.error.URLError, KeyError, ValueError):
        return False
