"""A cluster of real worker processes without Ray: scheduler and gateway in the test's own loop, workers and their ranks beside it.

Quick to start, so that deaths can be tried one by one; `served.py` has the whole thing under Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from api.detokenize import Detokenizer
from api.tokenizer import Tokenizer
from cluster.gateway import Gateway, Limits
from cluster.metrics import ClusterMetrics
from cluster.scheduler_service import SchedulerService
from cluster.wire import SocketNetwork
from configs.load import load
from models.locate import locate
from protocol.messages import WorkerPhase
from scheduler.scheduler import Scheduler
from tests.system.worker_process import WorkerOrder

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a secret of the tests, 32 bytes.."


class ProcessCluster:
    """`gateway` is asked; `workers` are the processes, by name. Who dies is started again, as Serve would."""

    def __init__(self, **keys: Any) -> None:
        sets = {
            "model.name": "toy",
            "model.block_size": 8,
            "model.num_blocks_override": 256,
            "model.max_len": 1024,
            "scheduler.disaggregation_threshold": 0,
            **{name.replace("__", "."): value for name, value in keys.items()},
        }
        self.config = load(flags=sets, env={}).config
        self.workers: dict[str, asyncio.subprocess.Process] = {}
        self.ended: list[tuple[str, int, float]] = []  # name, exit status, when
        self._tokenizer = Tokenizer(locate("toy"), None)
        self._keeping: list[asyncio.Task[None]] = []
        self._is_closing = False

    async def start(self) -> None:
        network = SocketNetwork("scheduler", SECRET.encode())
        self.service = SchedulerService(Scheduler(self.config.scheduler), network, time.monotonic, ClusterMetrics("toy"))
        await self.service.start()
        address = network.address

        async def find() -> str:
            return address

        self.gateway = Gateway(
            "gateway:0:test",
            SocketNetwork("gateway", SECRET.encode()),
            find,
            lambda request: Detokenizer.for_request(self._tokenizer, request),
            time.monotonic,
            Limits(lease_s=5.0),
        )
        await self.gateway.start()
        for role, count in (("decode", self.config.decode.replicas), ("prefill", self.config.prefill.replicas)):
            for index in range(count):
                self._keeping.append(asyncio.create_task(self._keep(role, index, address)))
        await self.until(lambda: len(self.alive()) == self.config.num_workers, 90, "every worker")

    async def _keep(self, role: str, index: int, scheduler: str) -> None:
        name = f"{role}:{index}"
        order = msgspec.json.encode(WorkerOrder(role, index, self.config, scheduler, SECRET))
        while not self._is_closing:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.system.worker_process", name),
                stdin=asyncio.subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            self.workers[name] = process
            await process.communicate(order)
            assert process.returncode is not None
            self.ended.append((name, process.returncode, time.monotonic()))

    # ---- looking -----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return self.service.scheduler.status(time.monotonic())

    def alive(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.status()["workers"] if row["alive"]}

    def phases(self) -> list[WorkerPhase]:
        return [phase for told in self.service.scheduler.records.phases.values() for phase in told]

    async def until(self, condition: Any, seconds: float, what: str) -> float:
        """The seconds it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}; {self.ended} {self.phases()[-3:]}"
            await asyncio.sleep(0.01)
        return time.monotonic() - started

    async def close(self) -> None:
        self._is_closing = True
        everybody = [p for worker in self.workers.values() for p in family(worker.pid)]
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
        _, left = await asyncio.to_thread(psutil.wait_procs, everybody, 15)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for task in self._keeping:
            task.cancel()
        await self.gateway.close()
        await self.service.close()
        assert not left, f"still there after SIGTERM: {left}"


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def is_there(pid: int) -> bool:
    """Neither gone nor a zombie."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.asynccontextmanager
async def processes(**keys: Any) -> AsyncIterator[ProcessCluster]:
    made = ProcessCluster(**keys)
    await made.start()
    try:
        yield made
    finally:
        await made.close()
