"""A prefill worker in a process of its own is killed after some chunks: what it had written well is kept, once it is dead and not
before, and the next attempt writes only the rest.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import decode.handover
from cluster.wire import SocketNetwork
from decode.worker import DecodeWorker, Settings
from engine.blocks import BlockPool
from engine.runner import ModelRunner
from kvtransfer.link import make_receivers
from kvtransfer.pool import KVPool
from kvtransfer.receiving import GroupReceivers, RankReceivers
from models.load import load_model
from protocol.messages import Cancel, Prefill, Reserve, TokenFrame
from protocol.ticket import Ticket, WorkerRef
from tests.decode.prefill_child import BLOCK_SIZE, SECRET
from tests.system.local import oracle, request

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [(11 * i) % 500 for i in range(150)]  # 18 full blocks of 8 and 6 tokens


async def until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


class Setup:
    """A decode worker and a gateway's connections here, prefill workers as children."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.children: list[asyncio.subprocess.Process] = []
        self.tokens: dict[int, int] = {}
        self.grants: list = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loaded = load_model("toy")
        layout = loaded.kv_layout(BLOCK_SIZE)
        self.kv = KVPool(layout, 64)
        self.blocks = BlockPool(64, BLOCK_SIZE)
        self.network, self.gateway = SocketNetwork("decode", SECRET), SocketNetwork("gateway", SECRET)
        engine, verify = ThreadPoolExecutor(1, "engine"), ThreadPoolExecutor(1, "verify")
        self.receivers = make_receivers(self.kv, [self.transport], SECRET, incarnation="D")
        ranks = RankReceivers(self.kv, self.receivers, lambda function: loop.run_in_executor(verify, function))
        self.worker = DecodeWorker(
            Settings(incarnation="D", layout=layout, max_model_len=512),
            ModelRunner(loaded, self.kv.tensor, layout),
            self.blocks,
            GroupReceivers(ranks),
            self.network,
            time.monotonic,
            lambda function: loop.run_in_executor(engine, function),
            SECRET,
        )
        await self.worker.start()
        await self.gateway.serve(self.heard, lambda peer: None)
        self.running = asyncio.create_task(self.worker.run())
        self.decode = await self.gateway.connect(self.network.address)

    async def heard(self, peer, message):
        if isinstance(message, TokenFrame):
            for update in message.updates:
                for i, token in enumerate(update.tokens):
                    assert self.tokens.setdefault(update.index + i, token) == token

    async def prefill_worker(self, name: str, step_s: float):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.decode.prefill_child",
            name,
            self.transport,
            str(step_s),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.children.append(child)
        address = (await asyncio.wait_for(child.stdout.readline(), 60)).decode().strip()
        return child, WorkerRef(name, "prefill", address)

    async def attempt(self, wanted, epoch, prefill):
        ticket = Ticket(wanted.request_id, epoch, WorkerRef("D", "decode", self.network.address), prefill)
        grant = await self.decode.call(Reserve(ticket, wanted), 5)
        peer = await self.gateway.connect(prefill.address)
        await peer.call(Prefill(ticket, grant, wanted), 5)
        return grant

    def num_claimed(self):
        return [claims._num_claimed.count(claims._num_rows) for claims in self.worker.handover._claims.values()][-1]

    async def close(self) -> None:
        for child in self.children:
            if child.returncode is None:
                child.kill()
                await child.wait()
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.gateway.close()
        await self.network.close()
        for receiver in self.receivers.values():
            receiver.close()
        self.kv.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_killed_after_some_chunks(transport):
    setup = Setup(transport)
    await setup.start()
    try:
        first, first_ref = await setup.prefill_worker("P1", 0.15)
        _, second_ref = await setup.prefill_worker("P2", 0.0)
        wanted = request(PROMPT, max_tokens=10)
        await setup.attempt(wanted, 1, first_ref)
        await until(lambda: setup.num_claimed() >= 6)
        os.kill(first.pid, signal.SIGSTOP)  # a stopped writer may go on and store: nothing of it is kept
        await asyncio.sleep(0.1)  # what it had said before arrives
        claimed = setup.num_claimed()
        setup.decode.send(Cancel(wanted.request_id, 1))
        if transport == "shm":
            await until(lambda: setup.blocks.num_quarantined > 0)
            await asyncio.sleep(0.5)
            assert setup.blocks.num_quarantined == 19
            assert setup.worker.handover.num_kept_blocks == 0
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: setup.worker.handover.num_kept_blocks == claimed)
        assert setup.blocks.num_used == 0
        grant = await setup.attempt(wanted, 2, second_ref)
        assert grant.num_cached_blocks == claimed >= 6
        await until(lambda: len(setup.tokens) == 10)
        assert [setup.tokens[i] for i in range(10)] == oracle(PROMPT, 10)
        layout = setup.worker.settings.layout
        assert setup.worker.stats().transfer_bytes == (19 - claimed) * layout.block_nbytes
        await until(lambda: setup.worker.is_idle and setup.blocks.num_used == 0)
        setup.worker.check_integrity()
    finally:
        await setup.close()


async def test_the_next_attempt_waits_for_a_death_that_is_about_to_be_seen(monkeypatch):
    """Connections of a killed process break a little before its end is seen: the retry that comes in between still finds the KV."""
    monkeypatch.setattr(decode.handover, "QUARANTINE_S", 10.0)  # on a loaded machine it takes a process long to die
    setup = Setup("shm")
    await setup.start()
    try:
        first, first_ref = await setup.prefill_worker("P1", 0.15)
        _, second_ref = await setup.prefill_worker("P2", 0.0)
        wanted = request(PROMPT, max_tokens=10)
        await setup.attempt(wanted, 1, first_ref)
        await until(lambda: setup.num_claimed() >= 4)
        os.kill(first.pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)
        claimed = setup.num_claimed()
        os.kill(first.pid, signal.SIGKILL)
        grant = await setup.attempt(wanted, 2, second_ref)  # at once, and no Cancel before it
        assert grant.num_cached_blocks == claimed
        await until(lambda: len(setup.tokens) == 10)
        assert [setup.tokens[i] for i in range(10)] == oracle(PROMPT, 10)
    finally:
        await setup.close()
