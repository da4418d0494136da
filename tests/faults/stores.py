"""KV between two nodes' pools in virtual time: a `Sender` at the writer, a `Receiver` at the decode worker.

mapped    the writer stores into memory that it maps. Nobody can refuse a store: it lands whenever the writer's thread gets to
          it, also seconds after its grant is over, freezes with a stopped writer and goes on with it, and never lands after
          the writer's death. `forget` says False.
refusing  bytes travel like TCP's and the decode worker stores them itself, if their grant is still expected: they may arrive
          after their writer's death, wait while the way is cut, and are refused when late. `forget` says True.

As in kvtransfer/outbox.py, a sender's thread reads and hashes a run only when it gets to it, so a source block that was given
back too early is seen with what its next owner wrote. Flips, misdirected and repeated stores happen after the hashing.
Each landing is checked: a store into a block that its grant does not hold is reported, whether or not it does harm (R2).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvtransfer.digest import run_digest
from kvtransfer.handoff import DIGEST_NBYTES, InboundPhase
from kvtransfer.layout import num_used_slots, partial_index, tail_spans
from kvtransfer.pool import KVPool
from kvtransfer.transport import Pair, TransferStats
from protocol.errors import DeadlineExceeded, TandemError, TransferFailed
from protocol.kv import KVEndpoint, MemoryEndpoint
from protocol.ticket import Grant
from tests.faults.virtual_loop import Node
from tests.faults.wire import Wires


class Damage:
    """What happens to stores. Probabilities are per push and layer."""

    def __init__(self) -> None:
        self.delay_s = 0.002  # mean of what one store takes
        self.slow = 0.0  # a store takes up to slow_s more
        self.slow_s = 0.0
        self.flip = 0.0
        self.misdirect = 0.0
        self.repeat = 0.0
        self.lose = 0.0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class Memory:
    """The pools that can be stored into, by endpoint. `holds(receiver, grant, block)`: see `Receiver.check`."""

    def __init__(self, wires: Wires, rng: random.Random, report: Callable[[str], None]) -> None:
        self.wires = wires
        self.rng = rng
        self.report = report
        self.damage = Damage()
        self.receivers: dict[int, VirtualReceiver] = {}
        self.num_stores = 0
        self.num_late = 0  # into blocks in quarantine
        self.num_refused = 0
        self.num_damaged = 0

    def receiver(self, node: Node, pool: KVPool, *, can_refuse: bool) -> VirtualReceiver:
        made = VirtualReceiver(self, node, pool, MemoryEndpoint(len(self.receivers) + 1), can_refuse)
        self.receivers[made.endpoint().pool_id] = made
        return made

    def sender(self, node: Node, pool: KVPool, endpoint: KVEndpoint) -> VirtualSender:
        assert isinstance(endpoint, MemoryEndpoint)
        return VirtualSender(self, node, pool, self.receivers[endpoint.pool_id])


class VirtualReceiver:
    """See `kvtransfer.transport.Receiver`."""

    def __init__(self, memory: Memory, node: Node, pool: KVPool, endpoint: MemoryEndpoint, can_refuse: bool) -> None:
        self.node = node
        self.pool = pool
        self.can_refuse = can_refuse
        self.worker: Any = None  # the decode worker, to check against
        self._memory = memory
        self._endpoint = endpoint
        self._live: dict[str, Grant] = {}

    def endpoint(self) -> MemoryEndpoint:
        return self._endpoint

    def expect(self, grant: Grant) -> None:
        self._live[grant.grant_id] = grant

    def forget(self, grant_id: str) -> bool:
        self._live.pop(grant_id, None)
        return self.can_refuse

    def close(self) -> None:
        self._live.clear()

    def is_live(self, grant: Grant) -> bool:
        return self._live.get(grant.grant_id) == grant

    def land(self, grant: Grant, layer: int, index: int, data: np.ndarray) -> None:
        memory = self._memory
        memory.num_stores += 1
        block = grant.block_ids[index]
        if not self.node.is_dead:
            self._check(grant, block)
        self.pool.runs[layer, block] = data

    def _check(self, grant: Grant, block: int) -> None:
        """R2: this grant holds the block, in use or in quarantine, and its writer has not given its word that it stopped."""
        inbound = self.worker.handover._inbound
        phase = inbound.phase(grant.grant_id)
        self._memory.num_late += phase is InboundPhase.QUARANTINED
        if phase not in (InboundPhase.RESERVED, InboundPhase.QUARANTINED):
            state = self.worker.pool.state(block).value
            what = phase.value if phase is not None else "over"
            self._memory.report(f"a store into block {block} ({state}) of {self.node.name}, but {grant.grant_id} is {what}")


class _Job(NamedTuple):
    """pairs None: a fence, whose future ends when everything before it has landed."""

    transfer: _Transfer
    layer: int = 0
    pairs: tuple[Pair, ...] | None = None


class _Transfer:
    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.num_written = len(grant.block_ids) - grant.num_cached_blocks
        self.digests: dict[tuple[int, int], bytes] = {}  # (layer, index into block_ids)
        self.failure: TandemError | None = None
        self.done: asyncio.Future[None] | None = None

    def fail(self, error: TandemError) -> None:
        self.failure = self.failure or error
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


class _Nothing:
    """A sender's `open` may be awaited or not."""

    def __await__(self):  # type: ignore[no-untyped-def]
        return iter(())


class VirtualSender:
    """See `kvtransfer.transport.Sender`; its task is the sender's thread."""

    def __init__(self, memory: Memory, node: Node, pool: KVPool, receiver: VirtualReceiver) -> None:
        self.stats = TransferStats()
        self._memory = memory
        self._node = node
        self._pool = pool
        self._receiver = receiver
        self._transfers: dict[str, _Transfer] = {}
        self._jobs: deque[_Job] = deque()
        self._working_on: _Transfer | None = None
        self._idle: asyncio.Future[None] | None = None  # ends when the job under way is over
        self._wake: asyncio.Future[None] | None = None
        self._is_closed = False
        self._thread = node.task(self._run())

    def open(self, grant: Grant, endpoint: KVEndpoint | None = None) -> _Nothing:
        assert grant.grant_id not in self._transfers, f"grant {grant.grant_id} is open already"
        transfer = self._transfers[grant.grant_id] = _Transfer(grant)
        if self._is_closed:
            transfer.fail(TransferFailed("the KV sender is closed"))
        return _Nothing()

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        transfer = self._transfers.get(grant_id)
        if transfer is None or transfer.failure is not None:
            return False
        for _, index in pairs:
            assert transfer.grant.num_cached_blocks <= index < len(transfer.grant.block_ids), f"push to index {index}"
        self._post(_Job(transfer, layer, tuple(pairs)))
        return True

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        transfer = self._transfers.get(grant_id)
        if transfer is None:
            raise TransferFailed(f"no transfer of grant {grant_id} is open")
        transfer.done = asyncio.get_running_loop().create_future()
        if transfer.failure is None:
            self._post(_Job(transfer))
            try:
                async with asyncio.timeout(timeout):
                    await transfer.done
            except TimeoutError:
                transfer.fail(DeadlineExceeded(f"KV of grant {grant_id} had not landed after {timeout:g} s (transfer.timeout_s)"))
        if transfer.failure is not None:
            raise transfer.failure
        self._transfers.pop(grant_id, None)
        layout, first = transfer.grant.layout, transfer.grant.num_cached_blocks
        return b"".join(
            transfer.digests[layer, first + i] for layer in range(layout.num_layers) for i in range(transfer.num_written)
        )

    async def abort(self, grant_id: str) -> None:
        transfer = self._transfers.pop(grant_id, None)
        if transfer is not None:
            transfer.fail(TransferFailed(f"grant {grant_id} was aborted"))
            self._jobs = deque(job for job in self._jobs if job.transfer is not transfer)
        while self._working_on is not None and self._working_on.grant.grant_id == grant_id:
            await self._until_idle()

    def close(self) -> None:
        self._is_closed = True
        for transfer in self._transfers.values():
            transfer.fail(TransferFailed("the KV sender was closed"))
        self._jobs.clear()
        self._kick()

    async def _until_idle(self) -> None:
        if self._idle is None:
            self._idle = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._idle)

    def _post(self, job: _Job) -> None:
        self._jobs.append(job)
        self._kick()

    def _kick(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # ---- the sender's thread ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_closed or self._jobs:
            if not self._jobs:
                self._wake = loop.create_future()
                await self._wake
                continue
            job = self._jobs.popleft()
            if job.transfer.failure is not None:
                continue
            self._working_on = job.transfer
            try:
                if job.pairs is None:
                    self._fence(job.transfer)
                else:
                    await self._store(job.transfer, job.layer, job.pairs)
            finally:
                self._working_on = None
                idle, self._idle = self._idle, None
                if idle is not None and not idle.done():
                    idle.set_result(None)

    def _fence(self, transfer: _Transfer) -> None:
        missing = transfer.num_written * transfer.grant.layout.num_layers - len(transfer.digests)
        if missing:
            transfer.fail(TransferFailed(f"{missing} runs of grant {transfer.grant.grant_id} were never pushed"))
        elif transfer.done is not None and not transfer.done.done():
            transfer.done.set_result(None)

    def _delay(self) -> float:
        damage, rng = self._memory.damage, self._memory.rng
        delay = damage.delay_s * rng.uniform(0.2, 2.0)
        if damage.slow and rng.random() < damage.slow:
            delay += damage.slow_s * rng.random()
        return delay

    async def _store(self, transfer: _Transfer, layer: int, pairs: tuple[Pair, ...]) -> None:
        await asyncio.sleep(self._delay())
        pieces = [(index, self._hashed(transfer, layer, block, index)) for block, index in pairs]
        if self._memory.wires.on_event is not None:
            self._memory.wires.on_event("store", self._node, self._receiver.node)
        await asyncio.sleep(self._delay())  # between reading and writing: here a stopped writer is at its most dangerous
        pieces = self._spoil(pieces)
        if self._receiver.can_refuse:
            await self._over_the_wire(transfer, layer, pieces)
        else:
            for index, data in pieces:
                self._receiver.land(transfer.grant, layer, index, data)

    async def _over_the_wire(self, transfer: _Transfer, layer: int, pieces: list[tuple[int, np.ndarray]]) -> None:
        """The other end stores, or refuses; TCP waits while a way is cut, and an acknowledgement has to come back."""
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        receiver, wires = self._receiver, self._memory.wires

        def deliver() -> None:
            if receiver.node.is_dead:
                return
            if wires.is_cut(self._node, receiver.node):
                wires.later(0.2, deliver)
                return
            receiver.node.soon(store)

        def store() -> None:
            is_live = receiver.is_live(transfer.grant)
            if is_live:
                for index, data in pieces:
                    receiver.land(transfer.grant, layer, index, data)
            self._memory.num_refused += not is_live
            acknowledge(is_live)

        def acknowledge(is_live: bool) -> None:
            if wires.is_cut(receiver.node, self._node):
                wires.later(0.2, acknowledge, is_live)
            elif not stored.done():
                stored.set_result(is_live)

        wires.later(wires.delay(), deliver)
        if receiver.node.is_dead:
            transfer.fail(TransferFailed("the KV connection broke"))
            return
        try:
            async with asyncio.timeout(5.0):  # kvtransfer's stall_timeout_s
                if not await stored:
                    transfer.fail(
                        TransferFailed(f"the decode worker refuses grant {transfer.grant.grant_id}: it is unknown or over")
                    )
        except TimeoutError:
            transfer.fail(TransferFailed("the KV connection stalled"))

    def _hashed(self, transfer: _Transfer, layer: int, block: int, index: int) -> np.ndarray:
        grant = transfer.grant
        data = self._pool.runs[layer, block].copy()
        if index == partial_index(grant):
            for span in tail_spans(grant.layout, num_used_slots(grant.layout, grant.num_tokens, index)):
                data[span.start : span.end] = 0
        digest = run_digest(data.data)
        assert len(digest) == DIGEST_NBYTES
        transfer.digests[layer, index] = digest
        return data

    def _spoil(self, pieces: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        damage, rng = self._memory.damage, self._memory.rng
        before = self._memory.num_damaged
        if damage.flip and rng.random() < damage.flip:
            index, data = rng.choice(pieces)
            data[rng.randrange(data.size)] ^= 1 << rng.randrange(8)
            self._memory.num_damaged += 1
        if damage.misdirect and len(pieces) > 1 and rng.random() < damage.misdirect:
            (first, one), (second, other), *rest = pieces
            pieces = [(first, other), (second, one), *rest]
            self._memory.num_damaged += 1
        if damage.repeat and rng.random() < damage.repeat:
            pieces = [*pieces, rng.choice(pieces)]
        if damage.lose and rng.random() < damage.lose:
            pieces = pieces[:-1]
            self._memory.num_damaged += 1
        if self._memory.num_damaged > before:
            self._memory.wires.log(self._node, "   a store was damaged")
        return pieces
