"""`tandem serve` as a user starts it: a real command, real processes, a real port. Shared by the system tests and by chaos."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Served:
    """One running `tandem serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, body: dict[str, Any], timeout: float = 60.0) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def status(self) -> dict[str, Any]:
        return json.loads(self.get("/dashboard/data?once=1")[1])["status"]

    def alive(self) -> dict[str, dict[str, Any]]:
        """Workers that live, by name."""
        return {worker["name"]: worker for worker in self.status()["workers"] if worker["alive"]}

    def complete(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Token ids of a greedy completion of the toy model; any error is an error of the test."""
        body = {"model": "toy", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        status, answer = self.post("/v1/completions", {**body, "return_token_ids": True}, 150)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    def is_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/health", 2.0)[0] == 200
        return False

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def pid_of(self, title: str) -> int | None:
        """The process whose title is `tandem:decode:0`, say."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] == [title]:
                    return process.pid
        return None

    def wait(self, condition: Any, seconds: float, what: str) -> float:
        """Until condition() is true; the seconds it took."""
        started = time.monotonic()
        while not condition():
            assert self.process.poll() is None, f"tandem serve ended with {self.process.returncode}:\n{self.tail()}"
            assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}\n{self.tail()}"
            time.sleep(0.1)
        return time.monotonic() - started

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def stop(self, seconds: float = 60.0) -> int:
        """Ctrl-C, as a terminal sends it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serve(
    folder: Path, *args: str, env: dict[str, str] | None = None, ready: bool = True, patience_s: float = 120
) -> Iterator[Served]:
    """Start `tandem serve ARGS` and, by default, wait until /health says 200."""
    port = free_port()
    log = folder / f"serve-{port}.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "RAY_"))}
    command = [str(Path(sys.executable).with_name("tandem")), "serve", *args, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment, **(env or {})},
            start_new_session=True,
        )
    served = Served(process, port, log)
    children: list[psutil.Process] = []
    try:
        if ready:
            served.wait(served.is_healthy, patience_s, "healthy")
        yield served
        children = served.processes()
        if process.poll() is None:
            served.stop()
    finally:
        children = children or served.processes()
        if process.poll() is None:
            process.kill()
            process.wait()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
