"""The scheduler as a service: `scheduler.Scheduler` is pure, this gives it a network, a clock and waiting callers.

One per cluster; a named detached Ray actor holds it in production (`deployments.SchedulerActor`), `local.py` in one process.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from cluster.history import History
from cluster.metrics import ClusterMetrics
from cluster.pools import Pools
from protocol.errors import Failure, NotFound, TandemError, from_failure
from protocol.messages import (
    Admit,
    AskHistory,
    AskMetrics,
    AskStatus,
    GatewayBeat,
    Message,
    Metrics,
    Notice,
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
METRICS_WINDOW_S = 300.0
MAX_GONE = 4096  # requests whose end is remembered, so that an Admit overtaken by it is not queued for nobody
GONE_S = 30.0
REFUSALS = {"DeadlineExceeded": "queue_timeout", "NoWorker": "no_worker"}  # of those that waited, by what they were told


class SchedulerService:
    """Callers of Admit wait here until `Scheduler.decisions` names them."""

    def __init__(self, scheduler: Scheduler, network: Network, clock: Clock, metrics: ClusterMetrics) -> None:
        self.scheduler = scheduler
        self._network = network
        self._clock = clock
        self._metrics = metrics
        self.history = History(scheduler, on_refused=metrics.refused)
        self._waiting: dict[str, asyncio.Future[Ticket]] = {}
        self._workers: dict[Peer, str] = {}  # -> incarnation: a broken connection is quicker than a missed beat
        self._gone: OrderedDict[str, tuple[float, float]] = OrderedDict()  # request_id -> its last epoch, told when
        self._pools = Pools(scheduler, self._workers, lambda *what: self._note(self._role_switched, *what))
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._pools.close()
        await self._network.close()

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        now = self._clock()
        answer = self._answers.get(type(message))
        if isinstance(message, Admit):
            return await self._admit(message)
        if isinstance(message, Notice):
            return await self._pools.notice(message)
        if answer is None:
            raise TandemError(f"the scheduler does not take {type(message).__name__}")
        return answer(self, peer, message, now)

    async def _admit(self, message: Admit) -> Ticket:
        request_id = message.request_id
        self._refuse_gone(message)
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._dismiss(request_id)  # asked again: the answer goes to the last who asked, and it keeps its place in the queue
        self._note(self.history.admitted, message, self._clock())
        try:
            self.scheduler.submit(message, self._clock())  # raises 429 and 503 at once
        except TandemError as error:
            self._note(self.history.refused, request_id, error, self.scheduler.records.last_rejection, self._clock())
            raise
        self._waiting[request_id] = future
        try:
            self._decide()
            return await future
        except BaseException:
            # Its caller was cancelled, perhaps with a ticket that nobody will read; a failed request is nowhere any more.
            if self._waiting.get(request_id) is future:
                self.scheduler.withdraw(request_id, self._clock())
            raise
        finally:
            if self._waiting.get(request_id) is future:
                del self._waiting[request_id]

    def _refuse_gone(self, message: Admit) -> None:
        """A call is a task of its own, so the Withdraw and Outcome that were sent after an Admit may be handled before it."""
        last_epoch, told_at = self._gone.get(message.request_id, (-1.0, -math.inf))
        if message.last_epoch <= last_epoch and self._clock() - told_at < GONE_S:
            raise TandemError(f"{message.request_id} was withdrawn before it was admitted")

    def _dismiss(self, request_id: str) -> None:
        """Whoever waits for this request's ticket waits no more."""
        future = self._waiting.pop(request_id, None)
        if future is not None:
            future.cancel()

    def _remember_gone(self, request_id: str, last_epoch: float, now: float) -> None:
        known, _ = self._gone.pop(request_id, (last_epoch, now))
        self._gone[request_id] = max(known, last_epoch), now
        while len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)

    def _withdraw(self, peer: Peer, message: Withdraw, now: float) -> None:
        self._remember_gone(message.request_id, math.inf, now)  # nobody admits again what was withdrawn
        self._dismiss(message.request_id)
        self.scheduler.withdraw(message.request_id, now)

    def _progress(self, peer: Peer, message: Progress, now: float) -> None:
        self.scheduler.progress(message, now)
        self._note(self.history.progress, message, now)
        self._decide()

    def _outcome(self, peer: Peer, message: Outcome, now: float) -> None:
        self._remember_gone(message.request_id, message.epoch, now)
        self._dismiss(message.request_id)
        self.scheduler.outcome(message, now)
        self._metrics.observe(message)
        self._note(self.history.ended, message, now)
        self._decide()

    def _register(self, peer: Peer, message: WorkerInfo, now: float) -> Ok:
        self.scheduler.register(message, now)
        self._workers[peer] = message.incarnation
        self._note(self.history.tick, now)
        self._decide()
        return Ok()

    def _worker_beat(self, peer: Peer, message: WorkerBeat, now: float) -> Ok:
        if not self.scheduler.heartbeat(message, now):
            self._note(self.history.unknown_beat, message.incarnation)
            raise NotFound(f"{message.incarnation} is not registered here; register again")
        self._workers[peer] = message.incarnation
        self._note(self.history.beat, self.scheduler.workers[message.incarnation], now)
        self._decide()
        return Ok()

    def _phase(self, peer: Peer, message: WorkerPhase, now: float) -> None:
        self.scheduler.phase(message, now)

    def _gateway_beat(self, peer: Peer, message: GatewayBeat, now: float) -> Ok:
        self.scheduler.gateway_beat(message, now)
        return Ok()

    def _status(self, peer: Peer, message: AskStatus, now: float) -> Status:
        return Status(msgspec.json.encode(self.scheduler.status(now)))

    def _history(self, peer: Peer, message: AskHistory, now: float) -> Status:
        return Status(msgspec.json.encode(self.history.answer(message, now)))

    def _metrics_text(self, peer: Peer, message: AskMetrics, now: float) -> Metrics:
        return Metrics(self._metrics.text(self.scheduler.status(now), self.history.sla.rows(METRICS_WINDOW_S, now)))

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
        AskHistory: _history,
    }

    def _note(self, note: Callable[..., None], *what: Any) -> None:
        """Tell the history. It is there for people: a bug of it may cost them a row, never somebody's answer."""
        try:
            note(*what)
        except Exception:
            log.exception("the history could not take %s", note.__name__)

    def _role_switched(self, name: str, was: str, role: str) -> None:
        self.history.event("role_switch", f"{name} leaves the {was} pool for the {role} pool, which is short", worker=name)

    def on_lost(self, peer: Peer) -> None:
        incarnation = self._workers.pop(peer, None)
        # A worker that saw its connection break first may have come back over another one already.
        if incarnation is not None and incarnation not in self._workers.values():
            self.scheduler.worker_lost(incarnation, self._clock())
            self._note(self.history.tick, self._clock())
            self._decide()

    def _decide(self) -> None:
        for decision in self.scheduler.decisions(self._clock()):
            request_id = decision.request_id if isinstance(decision, Ticket) else decision[0]
            future = self._waiting.get(request_id)
            if future is None or future.done():
                if isinstance(decision, Ticket):
                    self.scheduler.withdraw(request_id, self._clock())
                continue
            if isinstance(decision, Ticket):
                self._note(self.history.placed, decision, self._clock())
                future.set_result(decision)
            else:
                failure: Failure = decision[1]
                error = from_failure(failure)
                if failure.kind in REFUSALS:
                    self._note(self.history.refused, request_id, error, REFUSALS[failure.kind], self._clock())
                future.set_exception(error)

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
                self._pools.tick(now)
                self._note(self.history.tick, now)
            except Exception:
                log.exception("a tick of the scheduler failed")
