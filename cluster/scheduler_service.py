"""The scheduler as a service: `scheduler.Scheduler` is pure, this gives it a network, a clock and waiting callers.

One per cluster; a named detached Ray actor holds it in production (`deployments.SchedulerActor`), `local.py` in one process.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from cluster.history import History
from cluster.metrics import ClusterMetrics
from cluster.pools import Pools
from cluster.tenant_metrics import about_tenants
from cluster.tenants_file import TenantsFile
from configs.tenants import Tenants, TenantsError
from protocol.errors import Failure, NotFound, TandemError, TenantsChanged, from_failure
from protocol.messages import (
    Admit,
    AskHistory,
    AskMetrics,
    AskStatus,
    AskTenants,
    GatewayBeat,
    Message,
    Metrics,
    Notice,
    OfferServices,
    OfferTenants,
    Ok,
    Outcome,
    Progress,
    Status,
    TenantsInForce,
    TenantsVersion,
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
MIN_ALARM_S = 0.004
METRICS_WINDOW_S = 300.0
MAX_SERVICES = 128  # tenants' counters that gateways remember for us
SERVICES_S = 0.5
MAX_GONE = 4096  # requests whose end is remembered, so that an Admit overtaken by it is not queued for nobody
GONE_S = 30.0


class SchedulerService:
    """Callers of Admit wait here until `Scheduler.decisions` names them. tenants_file: None where the cluster has none."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        clock: Clock,
        metrics: ClusterMetrics,
        tenants_file: TenantsFile | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._network = network
        self._clock = clock
        self._metrics = metrics
        self.history = History(scheduler, on_refused=metrics.refused)
        self.tenants_file = tenants_file
        self._waiting: dict[str, asyncio.Future[Ticket]] = {}
        self._workers: dict[Peer, str] = {}  # -> incarnation: a broken connection is quicker than a missed beat
        self._gone: OrderedDict[str, tuple[float, float]] = OrderedDict()  # request_id -> its last epoch, told when
        self._pools = Pools(scheduler, self._workers, lambda *what: self._note(self._role_switched, *what))
        self._ticking: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._life = secrets.token_hex(8)
        self._served: tuple[float, tuple[tuple[int, str, float], ...]] = (-math.inf, ())  # when read, and what

    async def start(self) -> None:
        if self.tenants_file is not None:
            self.tenants_file.on_taken, self.tenants_file.on_refused = self._take_tenants, self._tell_refused
            await self.tenants_file.start()
            self._watching = asyncio.create_task(self.tenants_file.watch())
        await self._network.serve(self.handle, self.on_lost)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        for task in (self._ticking, self._watching):
            if task is not None:
                task.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
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
        self._check_version(message)
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._dismiss(request_id)  # asked again: the answer goes to the last who asked, and it keeps its place in the queue
        self._note(self.history.admitted, message, self._clock())
        try:
            self.scheduler.submit(message, self._clock())  # raises 429 and 503 at once
        except TandemError as error:
            error.reason = self.scheduler.records.reason(request_id)
            self._note(self.history.refused, request_id, error, error.reason or type(error).__name__, self._clock())
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

    def _check_version(self, message: Admit) -> None:
        """A request is judged under one version of the file from end to end. One that waits or ran already keeps what it was
        promised; a new one that was judged under another version than the one in force goes back to be judged again."""
        file = self.tenants_file
        if file is None or message.resumption or message.request_id in self.scheduler.queue:
            return
        if message.tenants_version != file.document().version:
            raise TenantsChanged("the tenants file changed while this request was on its way; send it again", retry_after=1.0)

    def _take_tenants(self, tenants: Tenants) -> None:
        """A new file is in force, for everybody at once: nothing of ours awaits in between."""
        self.scheduler.set_tenants(tenants, self._clock())
        self.history.set_tenants(tenants)
        self._metrics.set_tenants(tenants)
        self._note(self.history.event, "tenants", f"a tenants file with {len(tenants.tenants)} tenants is in force")
        self._decide()

    def _tell_refused(self, error: TenantsError) -> None:
        self._note(self.history.event, "tenants", f"{error.message}; what was in force stays so")

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

    def _gateway_beat(self, peer: Peer, message: GatewayBeat, now: float) -> Ok | TenantsVersion:
        self.scheduler.gateway_beat(message, now)
        if self.tenants_file is None:
            return Ok()
        if now - self._served[0] >= SERVICES_S:  # once for all gateways: there may be thousands of counters
            most = heapq.nlargest(MAX_SERVICES, self.scheduler.fairness.status(), key=lambda row: row["service"])
            self._served = now, tuple((row["band"], row["tenant"], row["service"]) for row in most)
        return TenantsVersion(self.tenants_file.version, self._life, self._served[1])

    def _restore(self, peer: Peer, message: OfferServices, now: float) -> Ok:
        """Counters only rise by it, so two gateways that remember alike add nothing to each other."""
        self.scheduler.fairness.restore({(band, tenant): service for band, tenant, service in message.services})
        return Ok()

    def _tenants(self, peer: Peer, message: AskTenants, now: float) -> TenantsInForce:
        if self.tenants_file is None:
            raise NotFound("this cluster has no tenants file (scheduler.tenants_file)")
        return self.tenants_file.document()

    def _offer(self, peer: Peer, message: OfferTenants, now: float) -> Ok:
        if self.tenants_file is not None:
            self.tenants_file.offer(message.offered)
        return Ok()

    def status(self, now: float) -> dict[str, Any]:
        """The scheduler's view, and what became of the tenants file (None without one)."""
        file = self.tenants_file
        return {**self.scheduler.status(now), "tenants_file": file.status() if file is not None else None}

    def _status(self, peer: Peer, message: AskStatus, now: float) -> Status:
        return Status(msgspec.json.encode(self.status(now)))

    def _history(self, peer: Peer, message: AskHistory, now: float) -> Status:
        document = self.history.answer(message, now)
        if "status" in document:
            file = self.tenants_file.status() if self.tenants_file is not None else None
            document["status"] |= {**about_tenants(self.scheduler, now), "tenants_file": file}
        return Status(msgspec.json.encode(document))

    def _metrics_text(self, peer: Peer, message: AskMetrics, now: float) -> Metrics:
        status = {**self.status(now), **about_tenants(self.scheduler, now)}
        return Metrics(self._metrics.text(status, self.history.sla.rows(METRICS_WINDOW_S, now)))

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
        AskTenants: _tenants,
        OfferTenants: _offer,
        OfferServices: _restore,
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
                error.reason = self.scheduler.records.reason(request_id)
                if error.reason:
                    self._note(self.history.refused, request_id, error, error.reason, self._clock())
                future.set_exception(error)

        self._set_alarm()

    def _set_alarm(self) -> None:
        """What waits for a moment rather than for a message (a prefill worker that will be free) is placed at that moment, not
        at the next tick."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        now = self._clock()
        at = self.scheduler.next_look(now)
        if at is not None and at < now + TICK_S:
            self._alarm = asyncio.get_running_loop().call_later(max(MIN_ALARM_S, at - now), self._ring)

    def _ring(self) -> None:
        try:
            self._decide()
        except Exception:
            log.exception("a decision of the scheduler failed")

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
