"""The scheduler: admits, orders and places every request, and knows what runs where. Start reading at `submit`.

Pure: no sockets, no Ray, no clock; whoever drives it passes `now`, seconds of one monotonic clock. It never waits:
`submit` takes or refuses, `decisions` says what was decided since, `tick` notices silence. Driven by
`cluster/scheduler_service.py` in production and by tests and simulations under a virtual clock.

    submit ──> queue ──> decisions: Ticket ──> progress (first token) ──> outcome
                 ^            │ refused, failed, worker gone: submit again, resumption, at its old position
                 └────────────┘
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from configs.schema import SchedulerConfig
from configs.tenants import Tenants, without_file
from protocol.errors import DeadlineExceeded, Failure, InternalError, InvalidRequest, TandemError, to_failure
from protocol.messages import Admit, GatewayBeat, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerPhase
from protocol.ticket import Ticket
from scheduler import admission
from scheduler.activity import Activity
from scheduler.admission import DrainRate, Refusal
from scheduler.cost import CostBook
from scheduler.explain import Decisions
from scheduler.fairness import Fairness
from scheduler.gate import Entered, Gate
from scheduler.joint import Joint
from scheduler.latency import Latencies, Sample
from scheduler.learning import learn_from_beat, learn_from_first_token, learn_from_outcome
from scheduler.ledger import Entry, Ledger, WorkerState
from scheduler.order import make_order
from scheduler.papers import again, item_of, ticket_of
from scheduler.placement import Blocked, Placement, Placer, Refused, Rules
from scheduler.prefix_index import Matches, PrefixIndex
from scheduler.queue import Item, Order, Queue
from scheduler.records import Gateway, Records
from scheduler.status import status_of
from scheduler.table import Pool
from scheduler.terms import promised, terms_of

log = logging.getLogger(__name__)

HASH_BLOCK_LEN = 64  # tokens behind one of Admit.prefix_hashes; the gateways hash by the same
MAX_REMEMBERED = 65_536  # requests whose last epoch, or whose end, is remembered, so that a late message changes nothing
MAX_PUSHED_OUT = 8  # waiting requests that one newcomer may push out of a full queue
MAX_OVERTAKERS = 3  # smaller requests that are tried when the first of its tenant finds no decode room
MAX_FOUND = 4096  # waiting requests for which is remembered what the prefix index holds
FORGET_FOUND_S = 0.5
MIN_RETRY_S = 0.002
MAX_DEAD = 64  # dead workers kept for the status
RETRY_S = 0.25  # how soon time alone may make room (predicted ends)

NOBODY = Pool()

Decision = Ticket | tuple[str, Failure]


def _may_overtake(item: Item, blocked: Item) -> bool:
    """Of the same tenant and band, so that nobody else is served out of turn. Who is overtaken is refused when it gets late, and
    the time it is then given is its own."""
    return item.admit.tenant == blocked.admit.tenant and item.band == blocked.band and not item.admit.resumption


class Scheduler:
    """See the module.

    tenants: classes and tenants; None: one of each. placer: who serves a request. order: makes one for each model's queue; None: as
    config.policy says. admission: whether promises, buckets and retries refuse anybody; without it only full queues do. draw: a
    source of jitter in [0, 1).
    """

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        enable_prefix_caching: bool = True,
        hash_block_len: int = HASH_BLOCK_LEN,
        max_prefix_hashes: int = 200_000,
        gateway_lease_s: float = 10.0,
        tenants: Tenants | None = None,
        placer: Placer | None = None,
        order: Callable[[], Order] | None = None,
        admission: bool = True,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.config = config or SchedulerConfig()
        config = self.config
        self.tenants = tenants or without_file(config.ttft_target_s, config.tpot_target_s, config.attainment_target)
        self.rules = Rules(
            disaggregation_threshold=self.config.disaggregation_threshold,
            tpot_target_s=self.config.tpot_target_s,
            max_prefill_queue_s=max(1.0, self.config.ttft_target_s),
            hash_block_len=hash_block_len,
        )
        bounds = (self.config.max_queue_requests, self.config.max_queue_tokens, self.config.max_queue_bytes)
        self.fairness = Fairness()
        self.pools: dict[str, Pool] = {}  # by model
        self.queue = Queue(order or make_order(config.policy, self.fairness), *bounds)
        self.ledger = Ledger()
        self.costs = CostBook()
        self.index = PrefixIndex(max_prefix_hashes)
        self.latencies = Latencies()
        self.records = Records()
        self.explained = Decisions(config.max_decisions)
        self.joint = Joint(self.rules, config.max_deflected_share)
        self.placer: Placer = placer or self.joint
        self.admission = admission
        shares = self.fairness if order is None and config.policy in ("fair", "slo") else None
        self.gate = Gate(
            self.queue,
            self.pools,
            self.costs,
            shares,
            self.rules,
            self.find,
            config.retry_budget,
            draw,
            lambda admit, now: self._shares_with_nobody(admit, now) or self._has_more(admit, now),
        )
        self._read_classes()
        self.drain_rate = DrainRate()
        self.workers: dict[str, WorkerState] = {}  # alive, by incarnation
        self.dead: OrderedDict[str, WorkerState] = OrderedDict()
        self.gateways: dict[str, Gateway] = {}
        self._use_index = enable_prefix_caching
        self._gateway_lease_s = gateway_lease_s
        self._draw = draw
        self._next_position = 0
        self._minted: OrderedDict[str, tuple[int, int]] = OrderedDict()  # request_id -> its last epoch, its position
        # Over -> whether somebody said so; those whose gateway only stopped naming them may turn out to run on.
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self._last_alive_at: dict[str, float] = {}  # model -> when a decode worker of it was last alive
        self._started_at: float | None = None
        self._retry_at: dict[str, float] = {}  # by model: when time alone may make room
        self._blocked: dict[str, tuple[str, bool]] = {}  # by model: the first in line, whether it waits for decode room
        self._room: set[str] = set()  # models whose decode workers, or anything else but prefill queues, have news
        self._prefilled: set[str] = set()  # models whose prefill queues have become shorter
        self._joined: set[str] = set()  # models that something new waits for
        self._found: OrderedDict[str, tuple[int, Matches]] = OrderedDict()  # request_id -> index's generation, what was found
        self._forget_found_at = 0.0
        self._active: dict[str, Activity] = {}  # by model
        self._pending: dict[str, Decision] = {}  # decided outside of `decisions`: those that had to make room

    # ---- requests --------------------------------------------------------------------------------------------------

    def submit(self, admit: Admit, now: float) -> int:
        """Take a request, or one that has to be placed again, into the queue. Returns the epoch of its next attempt.

        Raises Overloaded, NoWorker (503) or TenantOverLimit (429) with a computed retry_after, and InvalidRequest for
        what no worker's pool could ever hold. The answer comes out of `decisions`, once.
        """
        self._begin(now)
        request_id = admit.request_id
        former, waiting = self.ledger.entries.get(request_id), self.queue.remove(request_id)
        self._pending.pop(request_id, None)
        last_epoch, position = self._minted.get(request_id, (0, self._next_position))
        last_epoch = max(last_epoch, admit.last_epoch)
        # Asked again, because an answer was lost or is late: a place in the queue and a deadline are kept, and nothing is refused.
        is_repeat = waiting is not None or (former is not None and former.epoch > admit.last_epoch)
        if waiting is not None:
            position = waiting.position
        if former is not None:
            last_epoch = max(last_epoch, former.epoch)  # it may have been adopted, minted by a scheduler before this one
            self._note_refusal(former, admit)
            self._free(former, now)
        if position == self._next_position:
            self._next_position += 1
        if not is_repeat:
            self.records.count("resumed" if admit.resumption else "submitted")
        self._check_it_can_ever_fit(admit)
        if waiting is not None and waiting.degraded:
            admit = again(admit, waiting)
        self.explained.asked(admit, now)
        self._active.setdefault(admit.model, Activity()).came(admit.tenant, now)
        deadline = now + min(admit.deadline_s, self.config.queue_timeout_s)
        if waiting is not None:
            deadline = min(waiting.deadline, deadline)
            item = msgspec.structs.replace(
                waiting,
                admit=promised(admit, terms_of(self.tenants, admit.slo_class, admit)),
                epoch=last_epoch + 1,
                deadline=deadline,
            )
        else:
            entered = self._enter(admit, now, judges=self.admission and not (admit.resumption or is_repeat))
            item = item_of(entered, position, last_epoch + 1, now, deadline)
        self.queue.add(item)
        self._joined.add(item.admit.model)
        return last_epoch + 1

    def set_tenants(self, tenants: Tenants, now: float) -> None:
        """From now on these hold. What waits keeps the promise it was given."""
        self.tenants = tenants
        self._read_classes()
        self._room.update(self.pools)

    def _read_classes(self) -> None:
        self.joint.tightest_tpot_s = min(one.tpot_s for one in self.tenants.classes.values())

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Why this request got what it got, ready for JSON; None for one that is not remembered."""
        return self.explained.explain(request_id)

    def withdraw(self, request_id: str, now: float | None = None) -> None:
        """Nobody waits for it any more: out of the queue, and out of the ledger if its ticket was under way."""
        item = self.queue.remove(request_id)
        entry = self.ledger.entries.get(request_id)
        self._pending.pop(request_id, None)
        if item is not None or entry is not None:
            self.records.count("withdrawn")
            self._remember_end(request_id)
        if item is not None:
            self.gate.dropped(item.admit, self.tenants, item.queued_at if now is None else now)
        if entry is not None:
            self._free(entry, entry.placed_at if now is None else now)

    def decisions(self, now: float) -> list[Decision]:
        """Everything decided since the last call: tickets in the order of placement, and failures of those that waited
        in vain. Cheap when nothing has changed.
        """
        self._begin(now)
        out = list(self._pending.values())
        self._pending.clear()
        for item in self.queue.turn_late(now):
            self._turned_late(item, now, out)
        for item in self.queue.expired(now):
            waited = now - item.queued_at
            error = DeadlineExceeded(
                f"not placed within {waited:.1f} s (scheduler.queue_timeout_s, or the request's own deadline)",
                retry_after=admission.retry_after(self.predicted_drain_s(item.admit.model, now), self._draw),
            )
            out.append(self._fail(item, error, "queue_timeout", now))
        if now >= self._forget_found_at:
            self._found.clear()
            self._forget_found_at = now + FORGET_FOUND_S
        for model in list(self.queue.orders):
            if self._may_place(model, now):
                self._decide_model(model, now, out)
        for news in (self._room, self._prefilled, self._joined):
            news.clear()
        return out

    def progress(self, message: Progress, now: float) -> None:
        """The first token is out."""
        entry = self.ledger.entries.get(message.request_id)
        if entry is None or entry.epoch != message.epoch or entry.first_token_at is not None:
            return
        learn_from_first_token(entry, message.prefill_s, now)
        self.explained.first_token(entry.request_id, now - entry.placed_at)
        self.ledger.first_token(entry, now)
        self._prefilled.add(entry.model)

    def outcome(self, message: Outcome, now: float) -> None:
        """The request is over, whichever attempt of it the ledger has. Told once, by the gateway alone."""
        self._begin(now)
        entry = self.ledger.entries.get(message.request_id)
        self.queue.remove(message.request_id)
        self._pending.pop(message.request_id, None)
        self._remember_end(message.request_id)
        self.fairness.correct(message.request_id, max(0, message.output_tokens))
        self.gate.outcome(message, self.tenants, now)
        self.explained.ended(message, now)
        kind = message.kind if message.kind in ("finished", "failed", "cancelled") else "failed"
        if not message.was_refused:  # a refusal was counted among the rejections when it was decided
            self.records.count(kind)
            self.records.count_tokens(message)
        if kind == "finished":
            has_tpot = message.output_tokens > 1 and message.tpot_s > 0
            sample = Sample(now, message.ttft_s, message.tpot_s if has_tpot else None, message.e2e_s, message.queue_s)
            self.latencies.add(message.slo_class, sample)
        if entry is not None:
            if kind == "finished":
                self.costs.output(entry.model).observe(message.output_tokens / entry.num_choices, entry.tenant)
                learn_from_outcome(entry, message, now)
            self._free(entry, now)

    # ---- workers ---------------------------------------------------------------------------------------------------

    def register(self, info: WorkerInfo, now: float) -> None:
        """A worker is ready, or speaks to this scheduler for the first time. What it runs already, its beats tell."""
        self._begin(now)
        known = self.workers.get(info.incarnation)
        if known is not None:
            known.last_beat_at = now
            return
        self.dead.pop(info.incarnation, None)
        cost = self.costs.of(info.model, info.device.split(":")[0], info.role, info.parallel)
        worker = WorkerState(info, cost, now, self.index.bit(info.incarnation))
        self.workers[info.incarnation] = worker
        self.pools.setdefault(info.model, Pool()).join(worker)
        self.records.registered(info)
        self._room.add(info.model)

    def phase(self, message: WorkerPhase, now: float) -> None:
        """How far a worker's start-up is; kept for whoever prints it."""
        self._begin(now)
        self.records.phase(message)

    def heartbeat(self, beat: WorkerBeat, now: float) -> bool:
        """True when this incarnation is known. False: register again; what it runs comes with the next beat."""
        worker = self.workers.get(beat.incarnation)
        if worker is None:
            return False
        before = worker.stats
        adopted = self.ledger.beat(worker, beat, now, self._is_over)
        self.records.count("adopted", len(adopted))
        learn_from_beat(worker, before, beat.stats, now)
        self._room.add(worker.info.model)
        return True

    def worker_lost(self, incarnation: str, now: float) -> list[tuple[str, int]]:
        """The worker's connection broke, or it fell silent. Returns the attempts that ended with it."""
        worker = self.workers.pop(incarnation, None)
        if worker is None:
            return []
        if worker.info.role == "decode":
            self._last_alive_at[worker.info.model] = now
        self.pools[worker.info.model].leave(worker)
        self.index.forget(incarnation)
        lost = self.ledger.lose(worker, now)
        self.dead[incarnation] = worker
        self.records.retire(worker)
        while len(self.dead) > MAX_DEAD:
            self.dead.popitem(last=False)
        self.records.count("workers_lost")
        self._room.add(worker.info.model)
        return [(entry.request_id, entry.epoch) for entry in lost]

    # ---- gateways --------------------------------------------------------------------------------------------------

    def gateway_beat(self, beat: GatewayBeat, now: float) -> None:
        """A gateway is alive. What it held and no longer names is over: its outcome got lost."""
        self._begin(now)
        gateway = self.gateways.setdefault(beat.gateway_id, Gateway(beat.gateway_id))
        gateway.last_beat_at = now
        held = {request_id for request_id, _ in beat.in_flight}
        for request_id in gateway.held - held:
            self._drop_unheld(request_id, now)
        gateway.held = held
        for request_id in held:
            if self._ended.get(request_id) is False:
                del self._ended[request_id]  # omitted once, or by another of the same name: a heartbeat adopts it again
            entry = self.ledger.entries.get(request_id)
            if entry is not None:
                entry.gateway_id = beat.gateway_id

    # ---- time ------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[tuple[str, int]]:
        """Notice who fell silent. Returns the attempts that ended with workers lost just now."""
        self._begin(now)
        patience = self.config.heartbeat_s * self.config.heartbeat_misses
        silent = [w.incarnation for w in self.workers.values() if now - w.last_beat_at > patience]
        affected = [attempt for incarnation in silent for attempt in self.worker_lost(incarnation, now)]
        for gateway in [g for g in self.gateways.values() if now - g.last_beat_at > self._gateway_lease_s]:
            del self.gateways[gateway.gateway_id]
            self.records.count("gateways_lost")
            for request_id in gateway.held:
                self._drop_unheld(request_id, now)
        return affected

    def next_wakeup(self, now: float) -> float | None:
        """When `tick` and `decisions` have something to do though nothing arrives; None: never."""
        patience = self.config.heartbeat_s * self.config.heartbeat_misses
        times = [w.last_beat_at + patience for w in self.workers.values()]
        times += [g.last_beat_at + self._gateway_lease_s for g in self.gateways.values()]
        deadline = self.queue.next_deadline()
        if deadline is not None:
            has_news = self._room or self._prefilled or self._joined
            times += [deadline, now if has_news else min(self._retry_at.values(), default=deadline)]
        late_at = self.queue.next_late()
        if late_at is not None:
            times.append(late_at)
        if self._pending:
            times.append(now)
        return max(now, min(times)) if times else None

    def status(self, now: float) -> dict[str, Any]:
        """The cluster as the scheduler sees it, ready for JSON: see `scheduler.status.status_of` for every field."""
        self._begin(now)
        return status_of(self, now)

    def check_integrity(self) -> None:
        """Raises AssertionError when a sum is not what its parts say."""
        self.queue.check_integrity()
        self.ledger.check_integrity(list(self.workers.values()))

    # ---- placing ---------------------------------------------------------------------------------------------------

    def _may_place(self, model: str, now: float) -> bool:
        """Whether anything has happened since the first in line found no room that may have made some."""
        blocked = self._blocked.get(model)
        if blocked is None:
            return model in self._room or model in self._prefilled or model in self._joined or now >= self._retry_at.get(model, now)
        request_id, waits_for_decode = blocked
        if model in self._room or now >= self._retry_at.get(model, now) or (not waits_for_decode and model in self._prefilled):
            return True
        first = next(iter(self.queue.orders[model]), None)
        return first is not None and first.admit.request_id != request_id

    def _decide_model(self, model: str, now: float, out: list[Decision]) -> None:
        """Place what can be placed of one model, in its order."""
        pool = self.pools.get(model)
        self._tell_pressure(model, pool)
        self._blocked.pop(model, None)
        self._retry_at.pop(model, None)
        walk = iter(self.queue.orders[model])
        blocked: Item | None = None  # who waits for decode room; smaller ones of its own tenant may go before it
        num_overtakers = 0
        for item in walk:
            if blocked is not None:
                if not _may_overtake(item, blocked) or num_overtakers >= MAX_OVERTAKERS:
                    break
                if item.cost > 0.9 * blocked.cost:
                    continue
                num_overtakers += 1
            was_backlog = self.queue.num_of[model] > 1
            if self._has_its_share(item, pool):
                skip_tenant = getattr(walk, "skip_tenant", None)
                if skip_tenant is not None:
                    skip_tenant()
                self.fairness.lift(item.band, item.admit.tenant)
                self._retry_at[model] = now + RETRY_S
                continue
            self._tell_tenant(item, now)
            decision = self._try(item, now, was_backlog)
            if isinstance(decision, Blocked):
                self._retry_at[model] = now + RETRY_S
                if decision is Blocked.NO_ROOM:  # none of another tenant overtakes
                    waits_for_decode = self.placer is not self.joint or self.joint.waits_for_decode
                    if blocked is None:
                        self.gate.decode_is_short[model] = waits_for_decode
                        self._blocked[model] = item.admit.request_id, waits_for_decode and self.placer is self.joint
                    if not waits_for_decode:
                        self._retry_at[model] = now + min(RETRY_S, max(MIN_RETRY_S, self.joint.free_in_s))
                    if not waits_for_decode or not item.refuses_late or item.is_appointed or item.admit.resumption:
                        break
                    blocked = item
            else:
                self.queue.remove(item.admit.request_id)
                out.append(decision)

    def _has_its_share(self, item: Item, pool: Pool | None) -> bool:
        """Whether its tenant holds as much KV as it may (kv_share); one request it may always have."""
        share = self.tenants.tenant(item.admit.tenant).kv_share
        if share >= 1.0 or pool is None or item.admit.resumption:
            return False
        held = self.ledger.held.get((item.admit.model, item.admit.tenant), 0)
        return held > 0 and held >= share * pool.decode.num_blocks.sum()

    def _tell_tenant(self, item: Item, now: float) -> None:
        """What the default placer has to know of its tenant: whether it has more than its share while others are about."""
        self.joint.has_others = not self._shares_with_nobody(item.admit, now)
        self.joint.leaves_room = self.joint.has_others and not item.admit.resumption and self._has_more(item.admit, now)

    def _shares_with_nobody(self, admit: Admit, now: float) -> bool:
        activity = self._active.get(admit.model)
        return activity is None or not activity.others(now)

    def _has_more(self, admit: Admit, now: float) -> bool:
        """Whether its tenant holds more of the model's KV blocks than its share among those who are about."""
        activity, held = self._active.get(admit.model), self.ledger.held
        if activity is None:
            return False
        return activity.has_more(
            admit.tenant, lambda name: held.get((admit.model, name), 0), lambda name: self.tenants.tenant(name).weight, now
        )

    def _tell_pressure(self, model: str, pool: Pool | None) -> None:
        """What the default placer has to know of the queue."""
        num_prefills = max(1, len(pool.prefill) if pool else 0)
        self.joint.pressure = (self.queue.num_of[model] - 1) / num_prefills
        service_s = sum(sums.service_s for (of, _), sums in self.queue.totals.items() if of == model)
        self.joint.backlog_s = service_s / num_prefills

    def find(self, admit: Admit) -> Mapping[str, int]:
        """What workers are believed to hold of its prompt. Of one that waits this is looked up again only now and then."""
        if not self._use_index or not admit.prefix_hashes:
            return {}
        generation, known = self._found.get(admit.request_id, (-1, None))
        if known is None or generation != self.index.generation:
            known = self.index.match(admit.prefix_hashes)
            self._found[admit.request_id] = self.index.generation, known
            if len(self._found) > MAX_FOUND:
                self._found.popitem(last=False)
        return known

    def _try(self, item: Item, now: float, was_backlog: bool) -> Decision | Blocked:
        """One item's decision. A bug of ours fails this item alone: the others' turn comes all the same."""
        try:
            return self._decide(item, now, was_backlog)
        except Exception:
            log.exception("while placing request %s", item.admit.request_id)
            self.queue.remove(item.admit.request_id)
            entry = self.ledger.entries.get(item.admit.request_id)
            if entry is not None:
                self._free(entry, now)
            error = InternalError("the scheduler could not place this request; its log has the details")
            if item.admit.last_epoch == 0:
                self.records.count("failed")  # its outcome will look like a refusal's, which counts no failure
            return self._fail(item, error, None, now)

    def _decide(self, item: Item, now: float, was_backlog: bool) -> Decision | Blocked:
        admit = item.admit
        pool = self.pools.get(admit.model) or NOBODY
        found = self.placer.place(admit, pool, self.costs.output(admit.model), self.find(admit), item.queued_at, now)
        if found is Blocked.NO_WORKER:
            if now - max(self._without_since(admit.model), item.queued_at) > self.config.recovery_s:
                error = admission.no_worker(admit.model, self._until_worker(admit.model, now), self._draw)
                return self._fail(item, error, "no_worker", now)
            return found
        if isinstance(found, Blocked):
            return found
        if isinstance(found, Refused):
            return self._fail(item, found.error, "placer", now)
        if item.refuses_late and self.admission and self._comes_too_late(item, found, now):
            terms = terms_of(self.tenants, admit.slo_class, admit)
            return self._fail(item, self.gate.late(admit, terms, None, "slo_ttft", now).error, "slo_ttft", now)
        return self._book(item, found, now, was_backlog)

    @staticmethod
    def _comes_too_late(item: Item, placement: Placement, now: float) -> bool:
        """Its prefill would be spent on a promise that is broken by then."""
        worker = placement.prefill or placement.decode
        ratio = min(2.0, worker.cost.ttft_error.quantile(0.5))
        return not item.admit.resumption and now + placement.ttft_s * ratio > item.promised_at

    def _turned_late(self, item: Item, now: float, out: list[Decision]) -> None:
        """Its promise cannot be kept any more: what its class says."""
        if not (item.refuses_late and self.admission) or item.admit.resumption:
            return
        self.queue.remove(item.admit.request_id)
        helped = self.gate.demoted(item, self.tenants, now)
        if helped is not None:
            other = item_of(helped, item.position, item.epoch, item.queued_at, item.deadline)
            self.queue.add(other)
            self.explained.note(item.admit.request_id, now, "degraded", degraded=helped.degraded)
            self._joined.add(other.admit.model)
            return
        terms = terms_of(self.tenants, item.admit.slo_class, item.admit)
        out.append(self._fail(item, self.gate.late(item.admit, terms, None, "slo_ttft", now).error, "slo_ttft", now))

    def _book(self, item: Item, placement: Placement, now: float, was_backlog: bool) -> Ticket:
        admit = item.admit
        former = self.ledger.entries.get(admit.request_id)
        if former is not None:
            self._free(former, now)
        assert item.epoch > self._last_minted(admit.request_id), "epochs only grow"
        self._mint(item)
        self._ended.pop(admit.request_id, None)
        self.drain_rate.placed(admit.prompt_len, now, was_backlog)
        self.gate.placed(item, now, was_backlog)
        entry = Entry(
            request_id=admit.request_id,
            epoch=item.epoch,
            model=admit.model,
            prompt_len=admit.prompt_len,
            num_choices=admit.num_choices,
            expected_output=placement.expected_output,
            placed_at=now,
            decode=placement.decode,
            prefill=placement.prefill,
            cached=placement.cached,
            prefill_s=placement.prefill_s,
            tenant=admit.tenant,
            tpot_limit=placement.tpot_limit,
            ttft_s=placement.ttft_s,
            tpot_s=placement.tpot_s,
        )
        self.ledger.book(entry, now)
        if self._use_index:
            self.index.insert(placement.decode.incarnation, admit.prefix_hashes)
            if placement.prefill is not None:
                self.index.insert(placement.prefill.incarnation, admit.prefix_hashes)
        weight = self.tenants.tenant(admit.tenant).weight
        predicted = placement.expected_output * admit.num_choices
        self.fairness.charge(admit.request_id, item.band, admit.tenant, weight, admit.prompt_len, predicted)
        self.records.count("placed")
        self.records.count("placed_disaggregated" if placement.prefill else "placed_local")
        is_joint = self.placer is self.joint
        self.explained.note(
            admit.request_id, now, "placed", epoch=item.epoch, decode=placement.decode.info.name,
            prefill=placement.prefill.info.name if placement.prefill else None, waited_s=now - item.queued_at,
            ttft_s=placement.ttft_s, tpot_s=placement.tpot_s or None, cached_tokens=placement.cached,
            expected_output_tokens=placement.expected_output,
        )  # fmt: skip
        if is_joint:
            self.explained.saw(admit.request_id, self.joint.candidates())
        return ticket_of(item, placement)

    def _fail(self, item: Item, error: TandemError, reason: str | None, now: float) -> tuple[str, Failure]:
        self._mint(item)
        self._remember_end(item.admit.request_id)
        self.gate.dropped(item.admit, self.tenants, now)
        if reason is not None:
            self.records.reject(reason, item.admit.request_id)
        self.explained.note(
            item.admit.request_id, now, "refused", reason=reason or "bug", text=error.message, retry_after_s=error.retry_after
        )
        return item.admit.request_id, to_failure(error)

    # ---- refusing --------------------------------------------------------------------------------------------------

    def _enter(self, admit: Admit, now: float, *, judges: bool) -> Entered:
        """Raises what makes waiting useless: nobody to wait for, a promise that cannot be kept, no room to wait in."""
        is_new = not admit.resumption
        try:
            if judges:
                self._refuse_hopeless(admit, now)
            entered = self.gate.enter(admit, self.tenants, now, judges=judges)
            if is_new:
                self._make_room(entered, now)
        except Refusal as refusal:
            error = refusal.error
            self.records.reject(refusal.reason, admit.request_id)
            self.explained.note(
                admit.request_id, now, "refused", reason=refusal.reason, text=error.message, retry_after_s=error.retry_after
            )
            raise error from None
        if entered.victim is not None:
            terms = terms_of(self.tenants, entered.victim.admit.slo_class, entered.victim.admit)
            self._push_out(entered.victim, self.gate.late(entered.victim.admit, terms, entered.forecast, "slo_ttft", now), now)
        if entered.forecast is not None:
            seen = entered.forecast
            self.explained.note(
                admit.request_id, now, "entered", predicted_wait_s=seen.wait_s, predicted_ttft_s=seen.ttft_s,
                waits_for="decode" if seen.is_decode_short else "prefill", degraded=entered.degraded or None,
            )  # fmt: skip
        return entered

    def _refuse_hopeless(self, admit: Admit, now: float) -> None:
        model = admit.model
        if not self._has_decode(model) and now - self._without_since(model) > self.config.recovery_s:
            raise Refusal(admission.no_worker(model, self._until_worker(model, now), self._draw), "no_worker")
        patience = min(admit.deadline_s, self.config.queue_timeout_s)
        rate = self.drain_rate.tokens_per_s(now)
        # Twice: an estimate may be wrong, and refusing whom we could have served is worse than letting one wait.
        if rate is not None and self.queue.num_tokens > 2 * patience * rate:
            raise Refusal(admission.hopeless(self.queue.num_tokens / rate, patience, self._draw), "would_time_out")

    def _make_room(self, entered: Entered, now: float) -> None:
        """In a full queue: lower bands go first, then the tenant of the same band that fills it most; else Refusal."""
        admit = entered.admit
        for _ in range(MAX_PUSHED_OUT):
            if self.queue.overflow(admit) is None:
                return
            victim = None
            if self.admission:
                victim = self.queue.victim(entered.terms.band, admit.tenant, lambda name: self.tenants.tenant(name).weight)
            if victim is None:
                break
            drain = self.predicted_drain_s(victim.admit.model, now)
            is_lower = victim.band > entered.terms.band
            self._push_out(victim, admission.pushed_out(victim.admit, is_lower, drain, self._draw), now)
        over = self.queue.overflow(admit)
        if over is not None:
            self.gate.dropped(admit, self.tenants, now)
            drain = self.predicted_drain_s(admit.model, now)
            raise Refusal(*admission.overflowing(admit, self.queue, over, drain, self._draw))

    def _push_out(self, victim: Item, refusal: Refusal, now: float) -> None:
        self.queue.remove(victim.admit.request_id)
        self._pending[victim.admit.request_id] = self._fail(victim, refusal.error, refusal.reason, now)

    def _check_it_can_ever_fit(self, admit: Admit) -> None:
        pool = self.pools.get(admit.model)
        if pool is None or pool.largest is None:
            return
        try:
            admission.check_it_fits(admit, pool.largest)
        except InvalidRequest:
            self.records.reject("too_long", admit.request_id)
            raise

    def predicted_drain_s(self, model: str, now: float) -> float:
        """Seconds until everything that waits is placed."""
        workers: Sequence[WorkerState] = self.pools.get(model, ())
        output = self.costs.output(model)
        return admission.drain_s(self.queue.num_tokens, len(self.queue), workers, output, self.drain_rate, now)

    def _has_decode(self, model: str) -> bool:
        pool = self.pools.get(model)
        return pool is not None and len(pool.decode) > 0

    def _without_since(self, model: str) -> float:
        """Since when no decode worker of the model has been alive; a fresh scheduler gives everybody time to register."""
        assert self._started_at is not None, "every door begins with _begin"
        return self._last_alive_at.get(model, self._started_at)

    def _until_worker(self, model: str, now: float) -> float:
        return max(0.0, self.records.start_up_s - (now - self._without_since(model)))

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        if self._started_at is None:
            self._started_at = now

    def _note_refusal(self, former: Entry, admit: Admit) -> None:
        """Back without a first token and without blaming its workers: the decode worker had no room."""
        blamed = former.decode.incarnation in admit.excluded or (
            former.prefill is not None and former.prefill.incarnation in admit.excluded
        )
        knew_its_ticket = admit.last_epoch >= former.epoch
        if knew_its_ticket and former.first_token_at is None and not blamed and not former.is_seen:
            former.decode.is_full = True
            self.records.count("reservations_refused")

    def _free(self, entry: Entry, now: float) -> None:
        was_full = entry.decode.is_full
        self.ledger.free(entry, now)
        # Taking back a refused placement is no news of room.
        entry.decode.is_full = was_full and not entry.is_seen
        self._room.add(entry.model)

    def _drop_unheld(self, request_id: str, now: float) -> None:
        """No gateway holds it any more."""
        self._pending.pop(request_id, None)
        item, entry = self.queue.remove(request_id), self.ledger.entries.get(request_id)
        if item is None and entry is None:
            return
        self.records.count("abandoned")
        self._remember_end(request_id, was_told=False)
        if entry is not None:
            self._free(entry, now)

    def _is_over(self, request_id: str, epoch: int) -> bool:
        """Not to be adopted from a heartbeat: it has ended, waits to be placed again, or has had a later attempt."""
        if request_id in self._ended or request_id in self.queue:
            return True
        return epoch < self._last_minted(request_id)

    def _last_minted(self, request_id: str) -> int:
        return self._minted.get(request_id, (0, 0))[0]

    def _remember_end(self, request_id: str, was_told: bool = True) -> None:
        self._ended[request_id] = was_told
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def _mint(self, item: Item) -> None:
        """The epoch is given away: the next attempt's is above it, and in the same place of the queue."""
        request_id = item.admit.request_id
        self._minted[request_id] = (max(item.epoch, self._last_minted(request_id)), item.position)
        self._minted.move_to_end(request_id)
        while len(self._minted) > MAX_REMEMBERED:
            self._minted.popitem(last=False)
