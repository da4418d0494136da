"""The process of a rank that is not the leader: joins its group, loads its part of the model, and then follows.

Its engine thread does each step that the leader broadcasts (engine/follower.py); its event loop does what the leader asks about KV.
It decides nothing, speaks to nobody but its leader and the KV ranks of other workers, and ends with its leader. Run as a Ray actor
(`ray_ranks.py`) or as `python -m cluster.rank` (`subprocess_ranks.py`), whose standard input says which rank it is.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from cluster.group import RANKS, SLOW_PULSE, START_TIMEOUT_S, RankOrder, config_here, end_process, quicken
from cluster.life import GOING_S, end_at_once, import_engine, this_process
from cluster.wire import SocketNetwork
from kvtransfer.process import observe
from protocol.errors import Failure, GroupBroken, TandemError, to_failure
from protocol.network import Peer
from protocol.rank import RankFailed, RankHello, RankLeave, RankLoaded, RankPool, RankReady, RankSetup

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


class RankProcess:
    """See the module. `await run()` returns when the leader says stop; every other end is the end of the process."""

    def __init__(self, order: RankOrder, secret: bytes) -> None:
        self._order = order
        self._secret = secret
        self._loop = asyncio.get_running_loop()
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._verify_thread = ThreadPoolExecutor(1, "verify")
        self._network = SocketNetwork(order.name, secret, codec=RANKS, pulse=SLOW_PULSE)
        self._leader: Any = None
        self._leader_process: Any = None
        self._part: Any = None  # assembly.RankPart, once it is built
        self._is_leaving = False

    async def run(self) -> None:
        assembly = await self._in_engine_thread(import_engine)  # first: it may hold up the event loop, which must answer then
        self._network.answer(self._handle, self._on_lost)
        self._leader = await self._network.connect(self._order.leader)
        try:
            await self._start(assembly)
        except Exception as error:
            await self._fail(error)
        quicken(self._leader)
        try:
            await self._in_engine_thread(self._part.follower.run)
        except GroupBroken as error:
            self._end(error.message)
        except Exception as error:
            log.exception("a step failed")
            self._end(f"a step failed: {type(error).__name__}: {error}")
        self._is_leaving = True
        self._part.close()
        await self._network.close()

    async def _start(self, assembly: Any) -> None:
        order = self._order
        setup = await self._leader.call(RankHello(order.rank, order.group_id, this_process()), START_TIMEOUT_S)
        assert isinstance(setup, RankSetup)
        config = config_here(setup.config_json)
        self._leader_process = observe(setup.leader.boot_id, setup.leader.pid, setup.leader.start_ticks)
        shard = assembly.Shard(setup.parallel, order.rank)

        def join_and_load() -> Any:
            store = assembly.join_store(setup.store_host, setup.store_port)
            group = assembly.join_group(config, store, order.group_id, shard)
            loaded = assembly.load(config, None, shard, group)
            return group, loaded, assembly.num_blocks(config, setup.role, loaded)

        group, loaded, room = await self._in_engine_thread(join_and_load)
        pool = await self._leader.call(RankLoaded(order.rank, room, loaded.model_hash), START_TIMEOUT_S)
        assert isinstance(pool, RankPool)

        def build() -> Any:
            threads = assembly.num_threads(config, setup.role)
            return assembly.build_engine(config, loaded, pool.num_blocks, threads, group)

        engine = await self._in_engine_thread(build)
        computes = (self._in_engine_thread, self._in_verify_thread)
        parts = assembly.Parts(config, engine, setup.incarnation, None, time.monotonic, *computes, self._secret)
        self._part = assembly.RankPart(setup.role, parts, setup.transports, self._leader.send)
        await self._leader.call(RankReady(order.rank, self._part.endpoints()), START_TIMEOUT_S)

    async def _handle(self, peer: Peer, message: Any) -> Any:
        if self._part is None:
            raise TandemError(f"{self._order.name} is not ready for {type(message).__name__}")
        return await self._part.handle(message)

    def leave(self) -> None:
        """Somebody wants this process gone: the leader hears of it, and the group drains as one. From any thread."""
        self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        if self._leader is None or self._part is None:
            self._end("it was asked to go while it was starting")
        self._leader.send(RankLeave(self._order.rank))

    def _on_lost(self, peer: Any) -> None:
        if not self._is_leaving:
            self._end(f"the connection to its leader: {peer.closed_because}")

    async def _fail(self, error: Exception) -> None:
        """It cannot start. The leader says so to whoever reads."""
        log.error("%s cannot start", self._order.name, exc_info=error)
        text = f"rank {self._order.rank}: {type(error).__name__}: {error}"
        failure = to_failure(error) if isinstance(error, TandemError) else Failure("InternalError", text)
        self._leader.send(RankFailed(self._order.rank, failure))
        await asyncio.sleep(GOING_S)
        self._end(text)

    def _end(self, reason: str) -> None:
        """One rank's death is the group's: a leader that is stopped rather than dead would come back as a ghost, and until Serve's
        health checks have given it up nobody would start another."""
        if self._leader_process is not None:
            end_process(self._leader_process)
        end_at_once(f"{self._order.name} ends: {reason}")

    async def _in_verify_thread(self, function: Callable[[], Any]) -> Any:
        return await self._loop.run_in_executor(self._verify_thread, function)

    async def _in_engine_thread(self, function: Callable[[], Any]) -> Any:
        return await self._loop.run_in_executor(self._engine_thread, function)


async def serve_rank(order: RankOrder, secret: bytes, on_sigterm: Callable[[Callable[[], None]], None]) -> None:
    """One rank's whole life, in the process of whoever calls."""
    process = RankProcess(order, secret)
    on_sigterm(process.leave)
    await process.run()


def main() -> None:
    """`python -m cluster.rank TITLE`, with the order and the secret on two lines of standard input."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankOrder)
    secret = bytes.fromhex(sys.stdin.buffer.readline().decode())
    if os.getppid() != parent:  # it died before we could say that we want to die with it
        end_at_once(f"{order.name} ends: who started it is gone")
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def on_sigterm(act: Callable[[], None]) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, act)

    asyncio.run(serve_rank(order, secret, on_sigterm))


if __name__ == "__main__":
    main()
