"""Groups of two ranks in one node: each rank has one layer, and they talk over a connection in virtual time.

The product's own GroupReceivers, GroupSender, RankReceivers and RankTransfers work on them. A rank's death is its group's
(cluster/group.py sees to that), so both live and die with one node; and the runner, which in production broadcasts its steps, works
here on the memory of both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from kvtransfer.layout import Place, rank_layout
from kvtransfer.pool import KVPool
from protocol.errors import DeadlineExceeded, Failure, TandemError, from_failure, to_failure
from protocol.parallel import Parallel
from protocol.rank import RankMessage, decode, encode
from tests.faults.model import LAYOUT
from tests.faults.virtual_loop import Node
from tests.faults.wire import Wires

PAIR = Parallel(pp_size=2)
STALL_S = 2.5  # longest silence that does not end a group

Handle = Callable[[RankMessage], Awaitable[RankMessage | None]]


def place(parallel: Parallel, rank: int) -> Place:
    return Place(LAYOUT, parallel, rank)


def part(kv: KVPool, parallel: Parallel, rank: int) -> Any:
    """One rank's pool: its layers of a pool of all of them."""
    layout = rank_layout(LAYOUT, parallel, rank)
    runs = kv.runs[rank * layout.num_layers : (rank + 1) * layout.num_layers]
    nbytes = kv.num_blocks * layout.block_nbytes
    return SimpleNamespace(layout=layout, runs=runs, num_blocks=kv.num_blocks, is_on_gpu=False, nbytes=nbytes)


class RankWire:
    """A `RankCaller` to another rank of this node's group; what is said either way arrives in order. is_slow(): one of the two is
    busy, for a time below that after which the group would give it up. on_told: what the rank sends by itself."""

    def __init__(
        self,
        wires: Wires,
        node: Node,
        rng: random.Random,
        is_slow: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        self.handle: Handle
        self.on_told: Callable[[RankMessage], None]
        self._wires = wires
        self._node = node
        self._rng = rng
        self._is_slow = is_slow
        self._report = report
        self._arrives_at = {"there": 0.0, "back": 0.0}

    async def call(self, message: RankMessage, timeout: float) -> RankMessage:
        answered: asyncio.Future[RankMessage] = asyncio.get_running_loop().create_future()
        self._later("there", self._serve, encode(message), answered)
        try:
            async with asyncio.timeout(timeout):
                answer = await answered
        except TimeoutError:
            raise DeadlineExceeded(f"a rank did not answer {type(message).__name__} within {timeout:g} s") from None
        if isinstance(answer, Failure):
            raise from_failure(answer)
        return answer

    def send(self, message: RankMessage) -> None:
        self._later("there", self._serve, encode(message), None)

    def tell(self, message: RankMessage) -> None:
        """Rank -> leader."""
        self._later("back", self.on_told, decode(encode(message)))

    def _later(self, way: str, act: Callable[..., object], *args: Any) -> None:
        delay = self._wires.delay() + (self._rng.uniform(0.0, STALL_S) if self._is_slow() else 0.0)
        when = self._arrives_at[way] = max(self._arrives_at[way], self._wires.loop.now + delay)
        self._node.at(when, act, *args)

    def _serve(self, body: bytes, answered: asyncio.Future[RankMessage] | None) -> None:
        self._node.task(self._served(body, answered))

    async def _served(self, body: bytes, answered: asyncio.Future[RankMessage] | None) -> None:
        answer: RankMessage | None
        try:
            answer = await self.handle(decode(body))
        except TandemError as error:
            answer = to_failure(error)
        except Exception as error:
            self._report(f"a rank of {self._node.name} failed to answer {decode(body)}: {error!r}")
            answer = to_failure(error)
        if answered is not None:
            assert answer is not None, decode(body)
            self._later("back", lambda: answered.done() or answered.set_result(answer))
