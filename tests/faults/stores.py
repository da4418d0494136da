"""KV between two nodes' pools in virtual time: a `RouteSender` at the writer, a `Receiver` at the decode worker.

mapped    the writer stores into memory that it maps. Nobody can refuse a store: it lands whenever the writer's thread gets to
          it, also seconds after its grant is over, freezes with a stopped writer and goes on with it, and never lands after
          the writer's death. `forget` says False. What has landed is hashed when a `Landed` says so. Mapping may fail.
refusing  bytes travel like TCP's and the decode worker stores and hashes them itself, if their grant is still expected: they
          may arrive after their writer's death, wait while the way is cut, and are refused when late. `forget` says True.
          A `Landed` is sent when the writer's kernel has taken them, so it may well be ahead of them.

Transfers, digests, papers and everything above are the product's own (outgoing.py, ranks.py, landing.py, receiving.py); only the
lane and the threads are ours. As in kvtransfer/outbox.py, a sender's thread reads and hashes a run only when it gets to it, so a
source block that was given back too early is seen with what its next owner wrote. Flips, misdirected, torn and repeated stores
happen after the hashing. Each landing is checked: a store into a block that its grant does not hold is reported, whether or not
it does harm (R2).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvtransfer.arrivals import Arrivals
from kvtransfer.handoff import InboundPhase
from kvtransfer.outgoing import Source, Transfer, never_pushed, tell_stored
from kvtransfer.transport import OnStored, Pair, TransferStats
from kvtransfer.view import View
from protocol.errors import DeadlineExceeded, HandshakeRefused, TransferFailed
from protocol.kv import KVEndpoint, ShmEndpoint, TcpEndpoint
from protocol.ticket import Grant
from tests.faults.virtual_loop import Node
from tests.faults.wire import Wires

STALL_S = 5.0  # kvtransfer's stall_timeout_s
AGAIN_S = 0.2  # TCP sends again what a cut way swallowed
Run = tuple[int, np.ndarray]  # (index into block_ids, bytes [run_nbytes])


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
        self.tear = 0.0  # the writer's thread is held up amid a store
        self.unmappable = 0.0  # of mapping a pool

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class Memory:
    """The pools that can be stored into, by endpoint."""

    def __init__(self, wires: Wires, rng: random.Random, report: Callable[[str], None]) -> None:
        self.wires = wires
        self.rng = rng
        self.report = report
        self.damage = Damage()
        self.receivers: dict[KVEndpoint, VirtualReceiver] = {}
        self.num_stores = 0
        self.num_late = 0  # into blocks in quarantine
        self.num_refused = 0
        self.num_damaged = 0

    def receiver(self, machine: Any, pool: Any, *, can_refuse: bool) -> VirtualReceiver:
        """machine: of the decode worker, with its node and (later) its worker. pool: of one rank, a KVPool or like one."""
        node = machine.node
        number = len(self.receivers) + 1
        endpoint = TcpEndpoint(node.name, number) if can_refuse else ShmEndpoint(node.host, number, number, number, pool.nbytes)
        made = self.receivers[endpoint] = VirtualReceiver(self, machine, pool, endpoint, can_refuse)
        return made

    def sender(self, node: Node, source: Source, endpoint: KVEndpoint, on_stored: OnStored | None = None) -> VirtualSender:
        """Raises HandshakeRefused when the memory cannot be mapped."""
        receiver = self.receivers[endpoint]
        if not receiver.can_refuse:
            if node.host != receiver.node.host or receiver.node.is_dead:
                raise HandshakeRefused(f"shm: process {endpoint} is not visible from {node.name}")
            if self.damage.unmappable and self.rng.random() < self.damage.unmappable:
                raise HandshakeRefused("shm: cannot open the pool: Permission denied")
        return VirtualSender(self, node, source, receiver, on_stored)


class VirtualReceiver:
    """See `kvtransfer.transport.Receiver`."""

    def __init__(self, memory: Memory, machine: Any, pool: Any, endpoint: KVEndpoint, can_refuse: bool) -> None:
        self.node: Node = machine.node
        self.pool = pool
        self.can_refuse = can_refuse
        self._machine = machine
        self._memory = memory
        self._endpoint = endpoint
        self._live: dict[str, tuple[Grant, Arrivals | None]] = {}

    def endpoint(self) -> KVEndpoint:
        return self._endpoint

    def expect(self, grant: Grant, arrivals: Arrivals | None = None) -> None:
        self._live[grant.grant_id] = grant, arrivals

    def forget(self, grant_id: str) -> bool:
        self._live.pop(grant_id, None)
        return self.can_refuse

    def close(self) -> None:
        self._live.clear()

    def land(self, grant: Grant, view: View, layer: int, runs: Sequence[Run]) -> None:
        memory = self._memory
        memory.num_stores += len(runs)
        for index, data in runs:
            block = grant.block_ids[index]
            if not self.node.is_dead:
                self._check(grant, block)
            view.write(layer, (block,), data[None])

    def take(self, grant: Grant, source: Source, view: View, layer: int, runs: Sequence[Run]) -> bool:
        """What has come over the wire is stored and hashed here, if it is still wanted."""
        live, arrivals = self._live.get(grant.grant_id, (None, None))
        if live != grant:
            self._memory.num_refused += 1
            return False
        if arrivals is not None:
            row = arrivals.first_row(source.route.source) + layer
            arrivals.forget(row, [index for index, _ in runs])
        self.land(grant, view, layer, runs)
        if arrivals is not None:
            for index, _ in runs:
                arrivals.put(row, index, view.digests(layer, (grant.block_ids[index],)))
        return True

    def _check(self, grant: Grant, block: int) -> None:
        """R2: this grant holds the block, in use or in quarantine, and its writer has not given its word that it stopped."""
        worker = self._machine.worker
        inbound = worker.handover._inbound
        phase = inbound.phase(grant.grant_id)
        self._memory.num_late += phase is InboundPhase.QUARANTINED
        if phase not in (InboundPhase.RESERVED, InboundPhase.QUARANTINED):
            state = worker.pool.state(block).value
            what = phase.value if phase is not None else "over"
            self._memory.report(f"a store into block {block} ({state}) of {self.node.name}, but {grant.grant_id} is {what}")


class _Job(NamedTuple):
    """pairs None: a fence, which is over when everything before it has landed."""

    transfer: Transfer
    layer: int = 0
    pairs: tuple[Pair, ...] | None = None


class VirtualSender:
    """See `kvtransfer.transport.RouteSender`; its task is the sender's thread."""

    def __init__(
        self, memory: Memory, node: Node, source: Source, receiver: VirtualReceiver, on_stored: OnStored | None = None
    ) -> None:
        self.stats = TransferStats()
        self._memory = memory
        self._node = node
        self._source = source
        self._receiver = receiver
        self._on_stored = on_stored
        self._view = View(receiver.pool.runs, receiver.pool.layout, source.route.target_area)
        self._transfers: dict[str, Transfer] = {}
        self._jobs: deque[_Job] = deque()
        self._working_on: Transfer | None = None
        self._idle: asyncio.Future[None] | None = None  # ends when the job under way is over
        self._wake: asyncio.Future[None] | None = None
        self._is_closed = False
        self._thread = node.task(self._run())

    async def ready(self, timeout: float) -> None:
        """Mapped memory is there at once; a connection takes a round trip, and both processes."""
        if not self._receiver.can_refuse:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._round_trip(lambda: True)
        except TimeoutError:
            raise HandshakeRefused(f"{self._receiver.endpoint()} was not reached within {timeout:g} s") from None
        if self._receiver.node.is_dead:
            raise HandshakeRefused(f"{self._receiver.endpoint()}: connection refused")

    def open(self, grant: Grant, endpoint: KVEndpoint) -> None:
        self._source.check_grant(grant, endpoint, self._receiver.endpoint(), self._receiver.pool.num_blocks)
        assert grant.grant_id not in self._transfers, f"grant {grant.grant_id} is open already"
        transfer = self._transfers[grant.grant_id] = Transfer(grant, self._source)
        if self._is_closed:
            transfer.fail(TransferFailed("the KV sender is closed"))

    def push(self, grant_id: str, layer: int, pairs: Sequence[Pair]) -> bool:
        transfer = self._transfers.get(grant_id)
        if transfer is None or transfer.failure is not None:
            return False
        transfer.check_push(layer, pairs)
        self._post(_Job(transfer, layer, tuple(pairs)))
        return True

    async def finish(self, grant_id: str, timeout: float) -> bytes:
        transfer = self._transfers.get(grant_id)
        if transfer is None:
            raise TransferFailed(f"no transfer of grant {grant_id} is open")
        future = transfer.wanted()
        if not transfer.is_over:
            self._post(_Job(transfer))
        try:
            async with asyncio.timeout(timeout):
                digests = await asyncio.wrap_future(future)
        except TimeoutError:
            error = DeadlineExceeded(f"KV of grant {grant_id} had not landed after {timeout:g} s (transfer.timeout_s)")
            transfer.fail(error)
            raise error from None
        self._transfers.pop(grant_id, None)
        return digests

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

    def _fence(self, transfer: Transfer) -> None:
        """Over the wire each store was waited for, so here as there everything has landed."""
        if transfer.num_missing:
            transfer.fail(never_pushed(transfer))
        elif self._receiver.node.is_dead:
            transfer.fail(TransferFailed("the decode worker is dead"))
        else:
            transfer.landed(transfer.num_runs)

    def _delay(self) -> float:
        damage, rng = self._memory.damage, self._memory.rng
        delay = damage.delay_s * rng.uniform(0.2, 2.0)
        if damage.slow and rng.random() < damage.slow:
            delay += damage.slow_s * rng.random()
        return delay

    async def _store(self, transfer: Transfer, layer: int, pairs: tuple[Pair, ...]) -> None:
        await asyncio.sleep(self._delay())
        runs = [
            (first + i, data[i].copy()) for first, data in transfer.prepare(layer, pairs) for i in range(len(data))
        ]  # hashed as they are read
        if self._memory.wires.on_event is not None:
            self._memory.wires.on_event("store", self._node, self._receiver.node)
        await asyncio.sleep(self._delay())  # between reading and writing: here a stopped writer is at its most dangerous
        runs = self._spoil(runs)
        if self._receiver.can_refuse:
            self._tell(transfer, layer, pairs)
            await self._over_the_wire(transfer, layer, runs)
            return
        damage, rng = self._memory.damage, self._memory.rng
        if runs and damage.tear and rng.random() < damage.tear:
            (index, data), rest = runs[0], runs[1:]
            torn = self._view.read(layer, transfer.grant.block_ids[index], 1)[0].copy()
            torn[: len(data) // 2] = data[: len(data) // 2]
            self._receiver.land(transfer.grant, self._view, layer, [(index, torn), *rest])
            await asyncio.sleep(self._delay())
        self._receiver.land(transfer.grant, self._view, layer, runs)
        self._tell(transfer, layer, pairs)

    def _tell(self, transfer: Transfer, layer: int, pairs: tuple[Pair, ...]) -> None:
        if self._on_stored is not None:
            tell_stored(self._on_stored, transfer, layer, pairs)

    async def _over_the_wire(self, transfer: Transfer, layer: int, runs: list[Run]) -> None:
        """The other end stores, or refuses, and an acknowledgement has to come back."""
        try:
            async with asyncio.timeout(STALL_S):
                is_stored = await self._round_trip(
                    lambda: self._receiver.take(transfer.grant, self._source, self._view, layer, runs)
                )
        except TimeoutError:
            transfer.fail(TransferFailed("the KV connection stalled"))
            return
        if is_stored is None:
            transfer.fail(TransferFailed("the KV connection broke"))
        elif not is_stored:
            grant_id = transfer.grant.grant_id
            transfer.fail(TransferFailed(f"the decode worker refuses grant {grant_id}: it is unknown or over"))

    async def _round_trip(self, act: Callable[[], bool]) -> bool | None:
        """What `act` says in the receiver's process; None: that is dead. TCP waits while a way is cut."""
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        receiver, wires = self._receiver, self._memory.wires

        def deliver() -> None:
            if receiver.node.is_dead:
                return
            if wires.is_cut(self._node, receiver.node):
                wires.later(AGAIN_S, deliver)
                return
            receiver.node.soon(lambda: answer(act()))

        def answer(said: bool) -> None:
            if wires.is_cut(receiver.node, self._node):
                wires.later(AGAIN_S, answer, said)
            elif not answered.done():
                answered.set_result(said)

        wires.later(wires.delay(), deliver)
        return None if receiver.node.is_dead else await answered

    def _spoil(self, runs: list[Run]) -> list[Run]:
        damage, rng = self._memory.damage, self._memory.rng
        before = self._memory.num_damaged
        if damage.flip and rng.random() < damage.flip:
            index, data = rng.choice(runs)
            data[rng.randrange(data.size)] ^= 1 << rng.randrange(8)
            self._memory.num_damaged += 1
        if damage.misdirect and len(runs) > 1 and rng.random() < damage.misdirect:
            (first, one), (second, other), *rest = runs
            runs = [(first, other), (second, one), *rest]
            self._memory.num_damaged += 1
        if damage.repeat and rng.random() < damage.repeat:
            runs = [*runs, rng.choice(runs)]
        if damage.lose and rng.random() < damage.lose:
            runs = runs[:-1]
            self._memory.num_damaged += 1
        if self._memory.num_damaged > before:
            self._memory.wires.log(self._node, "   a store was damaged")
        return runs

