"""Who of the queue is placed now: walks each model's order, asks the placer, books. Part of `Scheduler`, which alone calls it.

A model whose first in line found no room is looked at again only when something has happened that may have made some.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from protocol.errors import Failure, InternalError
from protocol.messages import Admit
from protocol.ticket import Ticket
from scheduler import admission
from scheduler.activity import Activity
from scheduler.joint import Circumstances
from scheduler.ledger import Entry
from scheduler.order import Banded
from scheduler.papers import item_of, ticket_of
from scheduler.placement import Blocked, Placement, Refused
from scheduler.queue import Item
from scheduler.table import Pool
from scheduler.terms import terms_of

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler

log = logging.getLogger("scheduler.scheduler")

RETRY_S = 0.25  # how soon time alone may make room (predicted ends)
MIN_RETRY_S = 0.002
MAX_OVERTAKERS = 3  # smaller requests that are tried when the first of its tenant finds no decode room
MUCH = 1.4  # times its share: above that a tenant asks for much more
LESS = 0.7  # of its share: below that a tenant has well less
MAX_SEEN = 16  # of its tenant's that are looked at for that
NOBODY = Pool()

Decision = Ticket | tuple[str, Failure]


def _may_overtake(item: Item, blocked: Item) -> bool:
    """Of the same tenant and band, so that nobody else is served out of turn. Who is overtaken is refused when it gets late, and
    the time it is then given is its own."""
    return item.admit.tenant == blocked.admit.tenant and item.band == blocked.band and not item.admit.resumption


def _may_be_overtaken(item: Item) -> bool:
    return item.refuses_late and not item.is_appointed and not item.admit.resumption


def _skip_tenant(walk: Iterator[Item]) -> None:
    """Leave out the rest of the last item's tenant, where the order knows tenants."""
    skip_tenant = getattr(walk, "skip_tenant", None)
    if skip_tenant is not None:
        skip_tenant()


class Load(NamedTuple):
    """Of one model's queue, for each of its prefill workers."""

    pressure: float  # requests
    backlog_s: float  # seconds of prefill


class Placing:
    """See the module."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.retry_at: dict[str, float] = {}  # by model: when time alone may make room
        self.room: set[str] = set()  # models whose decode workers, or anything else but prefill queues, have news
        self.prefilled: set[str] = set()  # models whose prefill queues have become shorter
        self.joined: set[str] = set()  # models that something new waits for
        self._blocked: dict[str, tuple[str, bool]] = {}  # by model: the first in line, whether it waits for decode room
        self._active: dict[str, Activity] = {}  # by model
        self.lowest_band: int | None = None  # None: there is but one

    @property
    def _is_joint(self) -> bool:
        """Whether the placer is our own."""
        return self._scheduler.placer is self._scheduler.joint

    @property
    def has_news(self) -> bool:
        return bool(self.room or self.prefilled or self.joined)

    def all_seen(self) -> None:
        """What has happened has been looked at."""
        self.room.clear()
        self.prefilled.clear()
        self.joined.clear()

    def came(self, admit: Admit, now: float) -> None:
        """Somebody asked for a model; it exists only if a worker of it has been there."""
        if admit.model in self._scheduler.pools:
            self._active.setdefault(admit.model, Activity()).came(admit.tenant, admit.prompt_len, now)

    def may_place(self, model: str, now: float) -> bool:
        """Whether anything has happened since the first in line found no room that may have made some."""
        blocked = self._blocked.get(model)
        if blocked is None:
            return model in self.room or model in self.prefilled or model in self.joined or now >= self.retry_at.get(model, now)
        request_id, waits_for_decode = blocked
        if model in self.room or now >= self.retry_at.get(model, now) or (not waits_for_decode and model in self.prefilled):
            return True
        first = next(iter(self._scheduler.queue.orders[model]), None)
        return first is not None and first.admit.request_id != request_id

    def place_waiting(self, model: str, now: float, out: list[Decision]) -> None:
        """Place what can be placed of one model, in its order."""
        pool = self._scheduler.pools.get(model)
        load, joint = self._load(model), self._scheduler.joint
        self._blocked.pop(model, None)
        self.retry_at.pop(model, None)
        walk = iter(self._scheduler.queue.orders[model])
        blocked: Item | None = None  # who waits for decode room; smaller ones of its own tenant may go before it
        skipped: list[Item] = []  # first ones of tenants that flood, whom those that ask for less need not wait for
        num_overtakers = num_seen = 0
        for item in walk:
            if blocked is not None:
                num_seen += 1
                if not _may_overtake(item, blocked) or num_overtakers >= MAX_OVERTAKERS or num_seen > MAX_SEEN:
                    break
                if item.cost > 0.9 * blocked.cost:
                    continue
                num_overtakers += 1
            if skipped:
                num_seen += 1
                if num_seen > MAX_SEEN or item.band != skipped[0].band:
                    break
                if not self.asks_less(item.admit, LESS, now):
                    skipped.append(item)
                    _skip_tenant(walk)
                    continue
            was_backlog = self._scheduler.queue.num_of[model] > 1
            service = self._scheduler.fairness.service(item.band, item.admit.tenant)
            if self._has_its_share(item, pool):
                _skip_tenant(walk)
                self._scheduler.fairness.lift(item.band, item.admit.tenant)
                self.retry_at[model] = now + RETRY_S
                continue
            joint.circumstances = self._circumstances(item, load, now)
            decision = self._try(item, now, was_backlog)
            if isinstance(decision, Blocked):
                self.retry_at[model] = now + RETRY_S
                if decision is Blocked.NO_ROOM and self._is_held_back(item, now):
                    skipped.append(item)
                    _skip_tenant(walk)
                    self.retry_at[model] = now + max(MIN_RETRY_S, min(RETRY_S, joint.free_in_s))
                    continue
                if decision is Blocked.NO_ROOM:  # none of another tenant overtakes
                    waits_for_decode = not self._is_joint or joint.waits_for_decode
                    if blocked is None:
                        self._scheduler.gate.decode_is_short[model] = waits_for_decode
                        self._blocked[model] = item.admit.request_id, waits_for_decode and self._is_joint
                    if not waits_for_decode:
                        self.retry_at[model] = now + min(RETRY_S, max(MIN_RETRY_S, joint.free_in_s))
                    if not (waits_for_decode and joint.lacks_size) or not _may_be_overtaken(item):
                        break
                    blocked = item
            else:
                self._scheduler.queue.remove(item.admit.request_id)
                out.append(decision)
                # Whom it has passed is as if it had been served as far as this one: so the order among all stays that of services.
                for other in skipped:
                    self._scheduler.fairness.lift_to(other.band, other.admit.tenant, service)

    def _is_held_back(self, item: Item, now: float) -> bool:
        """Whether who was blocked just now may wait only because its tenant asks for too much: then it is no reason for those to
        wait who ask for less than their share."""
        scheduler = self._scheduler
        if not self._is_joint or item.admit.resumption or not isinstance(scheduler.queue.orders.get(item.admit.model), Banded):
            return False
        return scheduler.joint.circumstances.keeps_short and self.asks_more(item.admit, now)

    def _has_its_share(self, item: Item, pool: Pool | None) -> bool:
        """Whether its tenant holds as much KV as it may (kv_share); one request it may always have."""
        share = self._scheduler.tenants.tenant(item.admit.tenant).kv_share
        if share >= 1.0 or pool is None or item.admit.resumption:
            return False
        held = self._scheduler.ledger.held.get((item.admit.model, item.admit.tenant), 0)
        return held > 0 and held >= share * pool.decode.num_blocks.sum()

    def _circumstances(self, item: Item, load: Load, now: float) -> Circumstances:
        """What the default placer has to know of queue and tenants."""
        admit, activity = item.admit, self._active.get(item.admit.model)
        has_others = not self.shares_with_nobody(admit, now)
        is_few = activity is not None and activity.is_small_company(now)
        may_leave = has_others and not admit.resumption
        leaves_room = may_leave and (self.has_more(admit, now) or (is_few and self.asks_more(admit, now)))
        return Circumstances(
            pressure=load.pressure,
            backlog_s=load.backlog_s,
            prefers_spot=item.band == self.lowest_band,
            has_others=has_others,
            leaves_room=leaves_room,
            goes_first=has_others and not admit.resumption and self.asks_less(admit, LESS, now),
            keeps_short=leaves_room and is_few,
        )

    def shares_with_nobody(self, admit: Admit, now: float) -> bool:
        activity = self._active.get(admit.model)
        return activity is None or not activity.others(now)

    def has_more(self, admit: Admit, now: float) -> bool:
        """Whether its tenant holds more of the model's KV blocks than its share among those who are about."""
        shares = self._shares(admit, now)
        return shares is not None and shares[0] > shares[1]

    def has_less(self, admit: Admit, part: float, now: float) -> bool:
        """Whether it holds less than this part of its share."""
        shares = self._shares(admit, now)
        return shares is not None and shares[0] < part * shares[1]

    def asks_less(self, admit: Admit, part: float, now: float) -> bool:
        """Whether it asks for less than this part of its share of all that is asked for. What it holds says little of a tenant that
        asks seldom beside one whose requests are mostly refused."""
        activity = self._active.get(admit.model)
        if activity is None or not activity.others(now):
            return False
        share = activity.share(admit.tenant, lambda name: self._scheduler.tenants.tenant(name).weight, now)
        return activity.asks_for(admit.tenant) < part * share

    def asks_more(self, admit: Admit, now: float) -> bool:
        """Whether it asks for much more than its share of all that is asked for: it floods."""
        return self._shares(admit, now) is not None and not self.asks_less(admit, MUCH, now)

    def _shares(self, admit: Admit, now: float) -> tuple[float, float] | None:
        """KV blocks that its tenant holds, and its share of all that is held; None while nobody else is about."""
        activity, model, ledger = self._active.get(admit.model), admit.model, self._scheduler.ledger
        if activity is None or not activity.others(now):
            return None
        share = activity.share(admit.tenant, lambda name: self._scheduler.tenants.tenant(name).weight, now)
        return ledger.held.get((model, admit.tenant), 0), share * ledger.total_held.get(model, 0)

    def _load(self, model: str) -> Load:
        queue, pool = self._scheduler.queue, self._scheduler.pools.get(model)
        num_prefills = max(1, len(pool.prefill) if pool else 0)
        service_s = sum(sums.service_s for (of, _), sums in queue.totals.items() if of == model)
        return Load((queue.num_of[model] - 1) / num_prefills, service_s / num_prefills)

    def _try(self, item: Item, now: float, was_backlog: bool) -> Decision | Blocked:
        """One item's decision. A bug of ours fails this item alone: the others' turn comes all the same."""
        try:
            return self._decide(item, now, was_backlog)
        except Exception:
            log.exception("while placing request %s", item.admit.request_id)
            self._scheduler.queue.remove(item.admit.request_id)
            entry = self._scheduler.ledger.entries.get(item.admit.request_id)
            if entry is not None:
                self._scheduler.free(entry, now)
            error = InternalError("the scheduler could not place this request; its log has the details")
            if item.admit.last_epoch == 0:
                self._scheduler.records.count("failed")  # its outcome will look like a refusal's, which counts no failure
            return self._scheduler.refusing.fail(item, error, None, now)

    def _decide(self, item: Item, now: float, was_backlog: bool) -> Decision | Blocked:
        admit = item.admit
        pool = self._scheduler.pools.get(admit.model) or NOBODY
        found = self._scheduler.placer.place(
            admit, pool, self._scheduler.costs.output(admit.model), self._scheduler.find(admit), item.queued_at, now
        )
        if found is Blocked.NO_WORKER:
            if now - max(self._scheduler.refusing.without_since(admit.model), item.queued_at) > self._scheduler.config.recovery_s:
                error = admission.no_worker(
                    admit.model, self._scheduler.refusing.until_worker(admit.model, now), self._scheduler.draw
                )
                return self._scheduler.refusing.fail(item, error, "no_worker", now)
            return found
        if isinstance(found, Blocked):
            return found
        if isinstance(found, Refused):
            return self._scheduler.refusing.fail(item, found.error, "placer", now)
        if item.refuses_late and self._scheduler.admission and self._comes_too_late(item, found, now):
            return self._fail_late(item, now)
        return self._book(item, found, now, was_backlog)

    @staticmethod
    def _comes_too_late(item: Item, placement: Placement, now: float) -> bool:
        """Its prefill would be spent on a promise that is broken by then."""
        worker = placement.prefill or placement.decode
        ratio = min(2.0, worker.cost.ttft_error.quantile(0.5))
        return not item.admit.resumption and now + placement.ttft_s * ratio > item.promised_at

    def turned_late(self, item: Item, now: float, out: list[Decision]) -> None:
        """Its promise cannot be kept any more: what its class says."""
        if not (item.refuses_late and self._scheduler.admission) or item.admit.resumption:
            return
        self._scheduler.queue.remove(item.admit.request_id)
        helped = self._scheduler.gate.demoted(item, self._scheduler.tenants, now)
        if helped is not None:
            other = item_of(helped, item.position, item.epoch, item.queued_at, item.deadline)
            self._scheduler.queue.add(other)
            self._scheduler.explained.note(item.admit.request_id, now, "degraded", degraded=helped.degraded)
            self.joined.add(other.admit.model)
            return
        out.append(self._fail_late(item, now))

    def _fail_late(self, item: Item, now: float) -> tuple[str, Failure]:
        terms = terms_of(self._scheduler.tenants, item.admit.slo_class, item.admit)
        error = self._scheduler.gate.late(item.admit, terms, None, "slo_ttft", now).error
        return self._scheduler.refusing.fail(item, error, "slo_ttft", now)

    def _book(self, item: Item, placement: Placement, now: float, was_backlog: bool) -> Ticket:
        admit = item.admit
        former = self._scheduler.ledger.entries.get(admit.request_id)
        if former is not None:
            self._scheduler.free(former, now)
        assert item.epoch > self._scheduler.last_minted(admit.request_id), "epochs only grow"
        self._scheduler.mint(item)
        self._scheduler.revive(admit.request_id)
        self._scheduler.drain_rate.placed(admit.prompt_len, now, was_backlog)
        self._scheduler.gate.placed(item, now, was_backlog)
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
            max_tokens=admit.max_tokens,
            goes_first=placement.goes_first and placement.prefill is not None,
        )
        self._scheduler.ledger.book(entry, now)
        spec = self._scheduler.tenants.tenant(admit.tenant)
        if self._scheduler.use_index:
            both = [worker.incarnation for worker in (placement.decode, placement.prefill) if worker is not None]
            self._scheduler.index.insert(both, admit.prefix_hashes, admit.tenant, spec.cache_share)
        predicted = placement.expected_output * admit.num_choices
        self._scheduler.fairness.charge(admit.request_id, item.band, admit.tenant, spec.weight, admit.prompt_len, predicted)
        self._scheduler.records.count("placed")
        self._scheduler.records.count("placed_disaggregated" if placement.prefill else "placed_local")
        self._scheduler.explained.note(
            admit.request_id, now, "placed", epoch=item.epoch, decode=placement.decode.info.name,
            prefill=placement.prefill.info.name if placement.prefill else None, waited_s=now - item.queued_at,
            ttft_s=placement.ttft_s, tpot_s=placement.tpot_s or None, cached_tokens=placement.cached,
            expected_output_tokens=placement.expected_output,
        )  # fmt: skip
        if self._is_joint:
            self._scheduler.explained.saw(admit.request_id, self._scheduler.joint.candidates())
        return ticket_of(item, placement)
