"""The scheduler as a service: `scheduler.Scheduler` is pure, this gives it a network, a clock and waiting callers.

One per cluster; a named detached Ray actor holds it in production (`deployments.SchedulerActor`), `local.py` in one process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from cluster.metrics import ClusterMetrics
from protocol.errors import Failure, NotFound, TandemError, from_failure
from protocol.messages import (
    Admit,
    AskMetrics,
    AskStatus,
    GatewayBeat,
    Message,
    Metrics,
    Ok,
    Outcome,
    Progress,
    Status,
    Withdraw,
    WorkerBeat,
    WorkerInfo,
    WorkerPhase,
)
from protocol.network import Clock, Network, Peer
from protocol.ticket import Ticket
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

TICK_S = 0.25


class SchedulerService:
    """Callers of Admit wait here until `Scheduler.decisions` names them."""

    def __init__(self, scheduler: Scheduler, network: Network, clock: Clock, metrics: ClusterMetrics) -> None:
        self.scheduler = scheduler
        self._network = network
        self._clock = clock
        self._metrics = metrics
        self._waiting: dict[str, asyncio.Future[Ticket]] = {}
        self._workers: dict[int, str] = {}  # id(peer) -> incarnation: a broken connection is quicker than a missed beat
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        await self._network.close()

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        now = self._clock()
        answer = self._answers.get(type(message))
        if isinstance(message, Admit):
            return await self._admit(message)
        if answer is None:
            raise TandemError(f"the scheduler does not take {type(message).__name__}")
        return answer(self, peer, message, now)

    async def _admit(self, message: Admit) -> Ticket:
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        former = self._waiting.pop(message.request_id, None)
        if former is not None:
            former.cancel()
            self.scheduler.withdraw(message.request_id)
        self.scheduler.submit(message, self._clock())  # raises 429 and 503 at once
        self._waiting[message.request_id] = future
        self._decide()
        try:
            return await future
        finally:
            if self._waiting.get(message.request_id) is future:
                del self._waiting[message.request_id]
                if not future.done() or future.cancelled():
                    self.scheduler.withdraw(message.request_id)

    def _withdraw(self, peer: Peer, message: Withdraw, now: float) -> None:
        future = self._waiting.pop(message.request_id, None)
        if future is not None:
            future.cancel()
        self.scheduler.withdraw(message.request_id)

    def _progress(self, peer: Peer, message: Progress, now: float) -> None:
        self.scheduler.progress(message, now)
        self._decide()

    def _outcome(self, peer: Peer, message: Outcome, now: float) -> None:
        self.scheduler.outcome(message, now)
        self._metrics.observe(message)
        self._decide()

    def _register(self, peer: Peer, message: WorkerInfo, now: float) -> Ok:
        self.scheduler.register(message, now)
        self._workers[id(peer)] = message.incarnation
        self._decide()
        return Ok()

    def _worker_beat(self, peer: Peer, message: WorkerBeat, now: float) -> Ok:
        if not self.scheduler.heartbeat(message, now):
            raise NotFound(f"{message.incarnation} is not registered here; register again")
        self._workers[id(peer)] = message.incarnation
        self._decide()
        return Ok()

    def _phase(self, peer: Peer, message: WorkerPhase, now: float) -> None:
        self.scheduler.phase(message, now)

    def _gateway_beat(self, peer: Peer, message: GatewayBeat, now: float) -> Ok:
        self.scheduler.gateway_beat(message, now)
        return Ok()

    def _status(self, peer: Peer, message: AskStatus, now: float) -> Status:
        return Status(msgspec.json.encode(self.scheduler.status(now)))

    def _metrics_text(self, peer: Peer, message: AskMetrics, now: float) -> Metrics:
        return Metrics(self._metrics.text(self.scheduler.status(now)))

    _answers: dict[type, Callable[..., Message | None]] = {
        Withdraw: _withdraw,
        Progress: _progress,
        Outcome: _outcome,
        WorkerInfo: _register,
        WorkerBeat: _worker_beat,
        WorkerPhase: _phase,
        GatewayBeat: _gateway_beat,
        AskStatus: _status,
        AskMetrics: _metrics_text,
    }

    def on_lost(self, peer: Peer) -> None:
        incarnation = self._workers.pop(id(peer), None)
        if incarnation is not None:
            self.scheduler.worker_lost(incarnation, self._clock())
            self._decide()

    def _decide(self) -> None:
        for decision in self.scheduler.decisions(self._clock()):
            request_id = decision.request_id if isinstance(decision, Ticket) else decision[0]
            future = self._waiting.get(request_id)
            if future is None or future.done():
                continue
            if isinstance(decision, Ticket):
                future.set_result(decision)
            else:
                failure: Failure = decision[1]
                future.set_exception(from_failure(failure))

    async def _tick(self) -> None:
        """Silence counts only while we ourselves were listening: after a stop or starvation of this process everybody gets a
        full period of patience again, or one late tick would declare the whole cluster dead."""
        patience = self.scheduler.config.heartbeat_s * self.scheduler.config.heartbeat_misses
        deaf_until = self._clock()
        while True:
            before = self._clock()
            await asyncio.sleep(TICK_S)
            now = self._clock()
            if now - before > 4 * TICK_S:
                deaf_until = now + patience
            try:
                if now >= deaf_until:
                    self.scheduler.tick(now)
                self._decide()
            except Exception:
                log.exception("a tick of the scheduler failed")
