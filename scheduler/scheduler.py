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
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from configs.schema import SchedulerConfig
from configs.tenants import Tenants, without_file
from protocol.errors import DeadlineExceeded, Failure
from protocol.messages import Admit, GatewayBeat, Outcome, Progress, WorkerBeat, WorkerInfo, WorkerPhase
from scheduler import admission
from scheduler.admission import DrainRate
from scheduler.cost import CostBook
from scheduler.explain import Decisions
from scheduler.fairness import Fairness
from scheduler.gate import Gate
from scheduler.joint import Joint
from scheduler.latency import Latencies, Sample
from scheduler.learning import learn_from_beat, learn_from_first_token, learn_from_outcome
from scheduler.ledger import Entry, Ledger, WorkerState
from scheduler.order import make_order
from scheduler.papers import again, item_of
from scheduler.placement import Placer, Rules
from scheduler.placing import LESS, Decision, Placing
from scheduler.prefix_index import Matches, PrefixIndex
from scheduler.queue import Item, Order, Queue
from scheduler.records import Gateway, Records
from scheduler.refusing import Refusing
from scheduler.status import status_of
from scheduler.table import Pool
from scheduler.terms import promised, terms_of

log = logging.getLogger(__name__)

HASH_BLOCK_LEN = 64  # tokens behind one of Admit.prefix_hashes; the gateways hash by the same
MAX_REMEMBERED = 65_536  # requests whose last epoch, or whose end, is remembered, so that a late message changes nothing
MAX_FOUND = 1024  # waiting requests for which is remembered what the prefix index holds
FORGET_FOUND_S = 0.5
MAX_DEAD = 64  # dead workers kept for the status


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
        self.placing = Placing(self)
        self.refusing = Refusing(self)
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
            lambda admit, now: self.placing.shares_with_nobody(admit, now) or self.placing.has_more(admit, now),
            lambda admit, now: self.placing.has_less(admit, LESS, now) or self.placing.asks_less(admit, LESS, now),
        )
        self._read_classes()
        self.drain_rate = DrainRate()
        self.workers: dict[str, WorkerState] = {}  # alive, by incarnation
        self.dead: OrderedDict[str, WorkerState] = OrderedDict()
        self.gateways: dict[str, Gateway] = {}
        self.use_index = enable_prefix_caching
        self._gateway_lease_s = gateway_lease_s
        self.draw = draw
        self._next_position = 0
        self._minted: OrderedDict[str, tuple[int, int]] = OrderedDict()  # request_id -> its last epoch, its position
        # Over -> whether somebody said so; those whose gateway only stopped naming them may turn out to run on.
        self._ended: OrderedDict[str, bool] = OrderedDict()
        self.last_alive_at: dict[str, float] = {}  # model -> when a decode worker of it was last alive
        self.started_at: float | None = None
        self._found: OrderedDict[str, tuple[int, Matches]] = OrderedDict()  # request_id -> index's generation, what was found
        self._forget_found_at = 0.0
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
            self.free(former, now)
        if position == self._next_position:
            self._next_position += 1
        if not is_repeat:
            self.records.count("resumed" if admit.resumption else "submitted")
        self.refusing.check_it_can_ever_fit(admit)
        if waiting is not None and waiting.degraded:
            admit = again(admit, waiting)
        self.explained.asked(admit, now)
        self.placing.came(admit, now)
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
            entered = self.refusing.enter(admit, now, judges=self.admission and not (admit.resumption or is_repeat))
            item = item_of(entered, position, last_epoch + 1, now, deadline)
        self.queue.add(item)
        self.placing.joined.add(item.admit.model)
        return last_epoch + 1

    def set_tenants(self, tenants: Tenants, now: float) -> None:
        """From now on these hold. What waits keeps the promise it was given."""
        self.tenants = tenants
        self._read_classes()
        self.placing.room.update(self.pools)

    def _read_classes(self) -> None:
        classes = self.tenants.classes.values()
        self.joint.tightest_tpot_s = min(one.tpot_s for one in classes)
        bands = {one.band for one in classes}
        self.placing.lowest_band = max(bands) if len(bands) > 1 else None

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
            self.remember_end(request_id)
        if item is not None:
            self.gate.dropped(item.admit, self.tenants, item.queued_at if now is None else now)
        if entry is not None:
            self.free(entry, entry.placed_at if now is None else now)

    def decisions(self, now: float) -> list[Decision]:
        """Everything decided since the last call: tickets in the order of placement, and failures of those that waited
        in vain. Cheap when nothing has changed.
        """
        self._begin(now)
        out = list(self._pending.values())
        self._pending.clear()
        for item in self.queue.turn_late(now):
            self.placing.turned_late(item, now, out)
        for item in self.queue.expired(now):
            waited = now - item.queued_at
            error = DeadlineExceeded(
                f"not placed within {waited:.1f} s (scheduler.queue_timeout_s, or the request's own deadline)",
                retry_after=admission.retry_after(self.refusing.predicted_drain_s(item.admit.model, now), self.draw),
            )
            out.append(self.refusing.fail(item, error, "queue_timeout", now))
        if now >= self._forget_found_at:
            self._found.clear()
            self._forget_found_at = now + FORGET_FOUND_S
        for model in list(self.queue.orders):
            if self.placing.may_place(model, now):
                self.placing.place_waiting(model, now, out)
        self.placing.all_seen()
        return out

    def progress(self, message: Progress, now: float) -> None:
        """The first token is out."""
        entry = self.ledger.entries.get(message.request_id)
        if entry is None or entry.epoch != message.epoch or entry.first_token_at is not None:
            return
        learn_from_first_token(entry, message.prefill_s, now)
        self.explained.first_token(entry.request_id, now - entry.placed_at)
        self.ledger.first_token(entry, now)
        self.placing.prefilled.add(entry.model)

    def outcome(self, message: Outcome, now: float) -> None:
        """The request is over, whichever attempt of it the ledger has. Told once, by the gateway alone."""
        self._begin(now)
        entry = self.ledger.entries.get(message.request_id)
        self.queue.remove(message.request_id)
        self._pending.pop(message.request_id, None)
        self.remember_end(message.request_id)
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
            entry.ended(message.output_tokens)
            self.free(entry, now)

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
        self.placing.room.add(info.model)

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
        self.placing.room.add(worker.info.model)
        return True

    def worker_lost(self, incarnation: str, now: float) -> list[tuple[str, int]]:
        """The worker's connection broke, or it fell silent. Returns the attempts that ended with it."""
        worker = self.workers.pop(incarnation, None)
        if worker is None:
            return []
        if worker.info.role == "decode":
            self.last_alive_at[worker.info.model] = now
        self.pools[worker.info.model].leave(worker)
        self.index.forget(incarnation)
        lost = self.ledger.lose(worker, now)
        self.dead[incarnation] = worker
        self.records.retire(worker)
        while len(self.dead) > MAX_DEAD:
            self.dead.popitem(last=False)
        self.records.count("workers_lost")
        self.placing.room.add(worker.info.model)
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
        look_at = self.next_look(now)
        if look_at is not None:
            times.append(look_at)
        return max(now, min(times)) if times else None

    def next_look(self, now: float) -> float | None:
        """When `decisions` alone has something to do though nothing arrives; None: never. Cheap, whatever the number of workers."""
        times: list[float] = []
        deadline = self.queue.next_deadline()
        if deadline is not None:
            times += [deadline, now if self.placing.has_news else min(self.placing.retry_at.values(), default=deadline)]
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
        for pool in self.pools.values():
            pool.prefill.check_integrity()
            pool.decode.check_integrity()

    def find(self, admit: Admit) -> Mapping[str, int]:
        """What workers are believed to hold of its prompt. Of one that waits this is looked up again only now and then."""
        if not self.use_index or not admit.prefix_hashes:
            return {}
        generation, known = self._found.get(admit.request_id, (-1, None))
        if known is None or generation != self.index.generation:
            known = self.index.match(admit.prefix_hashes)
            self._found[admit.request_id] = self.index.generation, known
            if len(self._found) > MAX_FOUND:
                self._found.popitem(last=False)
        return known

    def revive(self, request_id: str) -> None:
        """It has been placed again, so it is not over."""
        self._ended.pop(request_id, None)

    def decided(self, decision: tuple[str, Failure]) -> None:
        """Outside of `decisions`, which tells it next."""
        self._pending[decision[0]] = decision

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        if self.started_at is None:
            self.started_at = now

    def _note_refusal(self, former: Entry, admit: Admit) -> None:
        """Back without a first token and without blaming its workers: the decode worker had no room."""
        blamed = former.decode.incarnation in admit.excluded or (
            former.prefill is not None and former.prefill.incarnation in admit.excluded
        )
        knew_its_ticket = admit.last_epoch >= former.epoch
        if knew_its_ticket and former.first_token_at is None and not blamed and not former.is_seen:
            former.decode.is_full = True
            self.records.count("reservations_refused")

    def free(self, entry: Entry, now: float) -> None:
        was_full = entry.decode.is_full
        self.ledger.free(entry, now)
        # Taking back a refused placement is no news of room.
        entry.decode.is_full = was_full and not entry.is_seen
        self.placing.room.add(entry.model)

    def _drop_unheld(self, request_id: str, now: float) -> None:
        """No gateway holds it any more."""
        self._pending.pop(request_id, None)
        item, entry = self.queue.remove(request_id), self.ledger.entries.get(request_id)
        if item is None and entry is None:
            return
        self.records.count("abandoned")
        self.remember_end(request_id, was_told=False)
        if entry is not None:
            self.free(entry, now)

    def _is_over(self, request_id: str, epoch: int) -> bool:
        """Not to be adopted from a heartbeat: it has ended, waits to be placed again, or has had a later attempt."""
        if request_id in self._ended or request_id in self.queue:
            return True
        return epoch < self.last_minted(request_id)

    def last_minted(self, request_id: str) -> int:
        return self._minted.get(request_id, (0, 0))[0]

    def remember_end(self, request_id: str, was_told: bool = True) -> None:
        self._ended[request_id] = was_told
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def mint(self, item: Item) -> None:
        """The epoch is given away: the next attempt's is above it, and in the same place of the queue."""
        request_id = item.admit.request_id
        self._minted[request_id] = (max(item.epoch, self.last_minted(request_id)), item.position)
        self._minted.move_to_end(request_id)
        while len(self._minted) > MAX_REMEMBERED:
            self._minted.popitem(last=False)
