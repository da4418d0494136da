"""The ranks of a worker as threads of one process: what `rank.py` and `group.py` do with processes, for `local.py` and tests.

The steps are broadcast and summed as in production, each rank with its own part of the model and its own pool; only how ranks are
called about KV is direct, and a rank's death cannot be tried here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from cluster import assembly
from cluster.assembly import Engine, Others, Parts, RankPart, Shard
from configs.schema import Config
from protocol import rank as rank_messages
from protocol.errors import GroupBroken
from protocol.network import Clock
from protocol.rank import RankMessage

log = logging.getLogger(__name__)


class DirectCaller:
    """kvtransfer's way to a rank that lives in this process; messages go through their wire form all the same."""

    def __init__(self, part: RankPart) -> None:
        self._part = part
        self._sending: set[asyncio.Task[RankMessage | None]] = set()

    async def call(self, message: RankMessage, timeout: float) -> RankMessage:
        answer = await self._part.handle(_copy(message))
        assert answer is not None, f"no answer to {type(message).__name__}"
        return _copy(answer)

    def send(self, message: RankMessage) -> None:
        task = asyncio.ensure_future(self._part.handle(_copy(message)))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


def _copy(message: RankMessage) -> RankMessage:
    return rank_messages.decode(rank_messages.encode(message))


class LocalGroup:
    """All ranks of one worker. `engine` is the leader's; `others` goes into `assembly.build_worker`."""

    def __init__(
        self,
        role: str,
        config: Config,
        incarnation: str,
        clock: Clock,
        compute: assembly.Compute,
        secret: bytes,
        transports: tuple[str, ...],
    ) -> None:
        self.tell: Callable[[RankMessage], None] = lambda message: None  # the worker's ear, once there is a worker
        parallel = config.parallel(role)
        store, group_id = HashStore(), secrets.token_hex(8)

        def load(rank: int) -> Engine:
            shard = Shard(parallel, rank)
            group = assembly.join_group(config, store, group_id, shard)
            loaded = assembly.load(config, None, shard, group)
            num_blocks = config.model.num_blocks_override or assembly.num_blocks(config, role, loaded)
            threads = config.decode.num_threads if role == "decode" else config.prefill.num_threads
            return assembly.build_engine(config, loaded, num_blocks, threads or None, group)

        with ThreadPoolExecutor(parallel.num_ranks) as pool:  # they wait for each other
            engines = list(pool.map(load, range(parallel.num_ranks)))
        self.engine = engines[0]
        self.parts = {
            rank: RankPart(role, Parts(config, engine, incarnation, None, clock, compute, compute, secret), transports, self._tell)
            for rank, engine in enumerate(engines)
            if rank > 0
        }
        callers = {rank: DirectCaller(part) for rank, part in self.parts.items()}
        endpoints = {rank: part.endpoints() for rank, part in self.parts.items()}
        self.others = Others(callers, endpoints)
        self._threads = [
            threading.Thread(target=_follow, args=(part,), name=f"{role}/{rank}", daemon=True) for rank, part in self.parts.items()
        ]
        for thread in self._threads:
            thread.start()

    def _tell(self, message: RankMessage) -> None:
        self.tell(_copy(message))

    def close(self) -> None:
        self.engine.runner.stop()
        for thread in self._threads:
            thread.join(5.0)
            assert not thread.is_alive(), f"{thread.name} does not stop"
        for part in self.parts.values():
            part.close()


def _follow(part: RankPart) -> None:
    try:
        part.follower.run()
    except GroupBroken as error:
        log.warning("%s", error.message)
    except Exception:
        log.exception("a rank's step failed")
