"""Ranks as plain child processes: for a group without Ray (tests, one host). Under Serve they are actors, see `ray_ranks.py`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from cluster.group import RankOrder

ROOT = Path(__file__).resolve().parents[1]


class StartedSubprocess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    async def ended(self) -> str:
        status = await self._process.wait()
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        if self._process.returncode is None:  # not reaped yet, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class SubprocessSpawn:
    """The child dies with us, however we die (PR_SET_PDEATHSIG, `rank.py`), and gets the secret through its standard input."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.started: list[StartedSubprocess] = []

    async def __call__(self, order: RankOrder) -> StartedSubprocess:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cluster.rank", f"tandem:{order.name}"),  # `ps` shows the last one
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n" + self._secret.hex().encode() + b"\n")
        process.stdin.close()
        started = StartedSubprocess(process)
        self.started.append(started)
        return started
