"""One worker in a plain process, as `processes.py` starts it: standard input says which. What a Serve replica does, without Ray."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys

import msgspec

from cluster.life import FindScheduler, WorkerLife
from cluster.subprocess_ranks import SubprocessSpawn
from cluster.wire import SocketNetwork
from configs.schema import Config


class WorkerOrder(msgspec.Struct):
    role: str
    index: int
    config: Config
    scheduler: str
    secret: str


async def live(order: WorkerOrder) -> None:
    secret = order.secret.encode()

    async def find() -> str:
        return order.scheduler

    def renew() -> tuple[SocketNetwork, FindScheduler]:
        return SocketNetwork(f"{order.role}:{order.index}", secret), find

    life = WorkerLife(order.role, order.index, order.config, secret, *renew(), SubprocessSpawn(secret), renew)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, life.leave)
    await life.start()
    while not life.is_over:  # Serve's health check
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the test run, however that ends
    asyncio.run(live(msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerOrder)))
