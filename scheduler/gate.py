"""The door: who is let into the queue, with what taken off, and who is told when to come back. Start reading at `enter`.

In order: the retries' budget, the tenant's buckets, its promise (`scheduler.forecast`). A promise that cannot be kept is first
helped
by refusing the costliest of its own tenant that still waits, if that is worse than the newcomer (Moore and Hodgson's rule for the
fewest late jobs: earliest deadline first, and drop the longest when one gets late), then by what its class allows to be taken off
(another model, fewer tokens, another class), and then refused. Whoever is refused gets an appointment (`scheduler.appointments`).
Called by `scheduler.Scheduler` only; knows queue, pools and costs, and changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from configs.tenants import Tenants
from protocol.errors import TenantOverLimit
from protocol.messages import Admit, Outcome
from scheduler import admission
from scheduler.admission import Refusal
from scheduler.appointments import GRACE_S, Appointment, Appointments, mark_of
from scheduler.buckets import Buckets, RetryBudget
from scheduler.cost import CostBook
from scheduler.fairness import Fairness
from scheduler.forecast import Forecast, forecast, has_workers, work_ahead, work_of
from scheduler.pace import Pace
from scheduler.placement import Rules
from scheduler.price import Price
from scheduler.queue import NOTHING, Item, Queue
from scheduler.residuals import Residuals
from scheduler.table import Pool
from scheduler.terms import Terms, promised, terms_of
from scheduler.view import View

SHORT = 0.15  # of the promised TTFT: who would wait longer comes at a time when not everybody can be served
SPARE = 1.15  # how much more than its work lies between two appointments: newcomers get something, too, and estimates err
MAX_MODELS = 256  # whose pace is remembered


class Entered(NamedTuple):
    """How a request is let in. victim: who waits, and is to be refused for it."""

    admit: Admit
    terms: Terms
    forecast: Forecast | None
    degraded: str = ""
    is_appointed: bool = False
    victim: Item | None = None


class Gate:
    def __init__(
        self,
        queue: Queue,
        pools: Mapping[str, Pool],
        costs: CostBook,
        fairness: Fairness | None,
        rules: Rules,
        find: Callable[[Admit], Mapping[str, int]],
        retry_budget: float,
        draw: Callable[[], float],
        has_more: Callable[[Admit, float], bool],
        has_less: Callable[[Admit, float], bool],
    ) -> None:
        """fairness None: the order is not by tenants' shares. find: what the prefix index holds of a prompt. has_more: whether a
        request's tenant has more than its share, or nobody to share with; has_less: whether it has well less."""
        self._has_more = has_more
        self._has_less = has_less
        self._queue = queue
        self._pools = pools
        self._costs = costs
        self._fairness = fairness
        self._rules = rules
        self._find = find
        self._draw = draw
        self.buckets = Buckets()
        self.appointments = Appointments()
        self.retries = RetryBudget(retry_budget)
        self.paces: dict[str, Pace] = {}
        self.decode_is_short: dict[str, bool] = {}  # model -> whether its first in line last waited for decode room
        self.wait_error = Residuals()
        self.prices: dict[str, Price] = {}  # by model

    # ---- in --------------------------------------------------------------------------------------------------------

    def enter(self, admit: Admit, tenants: Tenants, now: float, *, judges: bool) -> Entered:
        """Raises Refusal. judges False: promises, buckets and retries refuse nobody."""
        terms = terms_of(tenants, admit.slo_class, admit)
        if not judges:
            admit = promised(admit, terms)
            return Entered(admit, terms, None)
        self._lose(tenants, now)
        kept = self.appointments.keep(admit, now)
        if kept is None and admit.is_retry and self.retries.is_spent(now):
            error = TenantOverLimit(
                "too many of those who come now were refused just before (scheduler.retry_budget); come back when told to",
                param="scheduler.retry_budget",
                retry_after=admission.retry_after(self.retries.wait_s(now), self._draw),
            )
            raise Refusal(error, "retry_budget")
        tokens = self._bucket_tokens(admit)
        spec = tenants.tenant(admit.tenant)
        has_paid = kept is not None and kept.tokens > 0
        if not has_paid:
            self._check_buckets(admit, tenants, terms, tokens, now)
        entered = self._keep_promise(admit, tenants, terms, kept is not None, now)
        if kept is not None and has_paid:  # it was set aside when it was told to come now
            self.buckets.take(admit.tenant, spec, tokens - kept.tokens, now, 0.0)
        else:
            self.buckets.take(admit.tenant, spec, tokens, now)
        self.buckets.remember(admit.request_id, admit.tenant, tokens)
        self.retries.admitted(admit.is_retry, now)
        return entered

    def _bucket_tokens(self, admit: Admit) -> float:
        expected = self._costs.output(admit.model).of_tenant(admit.tenant).expected(admit.max_tokens)
        return admit.prompt_len + admit.num_choices * expected

    def _check_buckets(self, admit: Admit, tenants: Tenants, terms: Terms, tokens: float, now: float) -> None:
        spec = tenants.tenant(admit.tenant)
        kind, limit, wait_s = self.buckets.wait(admit.tenant, spec, tokens, now)
        if wait_s <= 0:
            return
        # What this client will need is taken now, so that the next one is told a later time, and nobody takes it meanwhile.
        self.buckets.take(admit.tenant, spec, tokens, now)
        after = self._appoint(admit, terms, wait_s, 0.0, 0.0, tokens, now)
        text = f"tenant {admit.tenant} has used up its {limit:g} {kind} a minute"
        error = TenantOverLimit(f"{text}; this request fits in {wait_s:.1f} s", param=f"{kind}_per_min", retry_after=after)
        raise Refusal(error, f"tenant_{kind}")

    def outcome(self, outcome: Outcome, tenants: Tenants, now: float) -> None:
        """Buckets are set right: what it really had, or nothing."""
        was_served = outcome.output_tokens > 0 or outcome.kind == "finished"
        tokens = float(max(0, outcome.prompt_tokens) + max(0, outcome.output_tokens)) if was_served else 0.0
        self.buckets.correct(outcome.request_id, tenants.tenant(outcome.tenant), tokens, now, was_served)

    def dropped(self, admit: Admit, tenants: Tenants, now: float) -> None:
        """It was let in, and nobody will serve it."""
        self.buckets.correct(admit.request_id, tenants.tenant(admit.tenant), 0.0, now, False)

    # ---- promises --------------------------------------------------------------------------------------------------

    def _keep_promise(self, admit: Admit, tenants: Tenants, terms: Terms, is_appointed: bool, now: float) -> Entered:
        mine = promised(admit, terms)
        if not has_workers(self._pools.get(admit.model)):
            return Entered(mine, terms, None, is_appointed=is_appointed)
        # Before one that comes when told stand only those whose time was before its own.
        seen = self.forecast(mine, tenants, terms, now, before=now if is_appointed else None)
        reason = self._missed(mine, terms, seen, is_appointed)
        if reason == "slo_ttft" and self._is_next(admit, terms, now, seen.alone_s, self._left(mine, terms)):
            reason = ""  # others' backlog is no reason to refuse it
        is_short = seen.queue_s > SHORT * self._left(mine, terms)
        price = self.prices.setdefault(admit.model, Price())
        price.asked(seen.cost, is_short)
        if not reason and is_short and not is_appointed and seen.is_trusted and terms.refuses_late:
            costs_too_much = price.is_too_much(seen.cost) and self._has_more(admit, now) and not self._has_less(admit, now)
            reason = "slo_ttft" if costs_too_much else ""
        if not reason:
            return Entered(mine, terms, seen, is_appointed=is_appointed)
        victim = self._queue.costliest(admit.model, terms.band, admit.tenant) if reason == "slo_ttft" else None
        if victim is not None and seen.alone_s <= self._left(mine, terms) and victim.cost > seen.cost:
            return Entered(mine, terms, seen, is_appointed=is_appointed, victim=victim)
        degraded = self._degrade(admit, tenants, terms, now)
        if degraded is not None:
            return degraded._replace(is_appointed=is_appointed)
        raise self.late(mine, terms, seen, reason, now)

    def _is_next(self, admit: Admit, terms: Terms, now: float, alone_s: float, left: float) -> bool:
        """Whether its tenant has well less than its share, and little waiting: then it is served before all others, in time."""
        own = self._queue.waiting.get((admit.model, terms.band), {}).get(admit.tenant, NOTHING)
        return alone_s * (1 + own.requests) <= left and self._has_less(admit, now)

    def would_admit(self, admit: Admit, tenants: Tenants, now: float, before: float | None = None) -> bool:
        """Whether its promise would be kept if it came now; changes nothing. before: appointments made for later do not count."""
        terms = terms_of(tenants, admit.slo_class, admit)
        mine = promised(admit, terms)
        if self.buckets.wait(admit.tenant, tenants.tenant(admit.tenant), self._bucket_tokens(admit), now)[2] > 0:
            return False
        if not has_workers(self._pools.get(admit.model)):
            return True
        seen = self.forecast(mine, tenants, terms, now, before)
        return not self._missed(mine, terms, seen, self.appointments.has(admit, now))

    def forecast(self, admit: Admit, tenants: Tenants, terms: Terms, now: float, before: float | None = None) -> Forecast:
        """`admit` has its promise in it. before: appointments made for later do not count."""
        view = self._view(admit, now)
        work = work_of(view)
        ahead = work_ahead(
            self._queue,
            self._fairness,
            admit.model,
            terms.band,
            admit.tenant,
            lambda name: tenants.tenant(name).weight,
            work.tokens,
        )
        until = now + terms.ttft_s if before is None else min(before, now + terms.ttft_s)
        appointed = self.appointments.work_s(admit.model, terms.band, admit.tenant, until)
        is_short = self.decode_is_short.get(admit.model, False)
        price = self.prices.setdefault(admit.model, Price())
        return forecast(view, terms, ahead, appointed, self._pace(admit.model), self.wait_error, is_short, price)

    def _view(self, admit: Admit, now: float) -> View:
        return View(admit, self._pools[admit.model], self._costs.output(admit.model), self._find(admit), self._rules, now)

    @staticmethod
    def _left(admit: Admit, terms: Terms) -> float:
        return terms.ttft_s - admit.waited_s

    def _missed(self, admit: Admit, terms: Terms, seen: Forecast, is_appointed: bool) -> str:
        """Which promise will be missed, as the counters name it; "" for none, or for a class that is served late."""
        if not terms.refuses_late or not seen.is_trusted:
            return ""
        if not seen.can_keep_tpot:
            return "slo_tpot"
        # Who comes when told was promised this time: the estimate itself has to be wrong before it is broken.
        ttft_s = seen.wait_s * 0.5 + seen.service_s if is_appointed else seen.ttft_s
        if ttft_s <= self._left(admit, terms):
            return ""
        return "slo_ttft"

    def _degrade(self, admit: Admit, tenants: Tenants, terms: Terms, now: float) -> Entered | None:
        """What its class allows to be taken off, the least first, where that makes a promise hold again."""
        spec = tenants.slo_class(terms.slo_class)
        model = spec.degrade_to_model
        allowed = tenants.tenant(admit.tenant).models
        may_change = not admit.keeps_model and (allowed is None or model in allowed)
        if model and may_change and model != admit.model and has_workers(self._pools.get(model)):
            found = self._try(msgspec.structs.replace(admit, model=model), tenants, terms, f"model={model}", now)
            if found is not None:
                return found
        most = spec.degrade_max_tokens
        if most is not None and most < admit.max_tokens:
            found = self._try(msgspec.structs.replace(admit, max_tokens=most), tenants, terms, f"max_tokens={most}", now)
            if found is not None:
                return found
        other = spec.degrade_to_class
        if other is not None and other in tenants.classes and other != terms.slo_class:
            return self._try(admit, tenants, terms_of(tenants, other, admit), f"class={other}", now)
        return None

    def _try(self, admit: Admit, tenants: Tenants, terms: Terms, degraded: str, now: float) -> Entered | None:
        mine = promised(admit, terms)
        seen = self.forecast(mine, tenants, terms, now)
        if self._missed(mine, terms, seen, False):
            return None
        return Entered(mine, terms, seen, degraded)

    def demoted(self, item: Item, tenants: Tenants, now: float) -> Entered | None:
        """A waiting request has become late: what its class still allows to be done for it."""
        if not has_workers(self._pools.get(item.admit.model)):
            return None
        terms = terms_of(tenants, item.admit.slo_class, item.admit)
        waited = msgspec.structs.replace(item.admit, waited_s=item.admit.waited_s + now - item.queued_at)
        found = self._degrade(waited, tenants, terms, now)
        if found is None:
            return None
        return found._replace(admit=msgspec.structs.replace(found.admit, waited_s=item.admit.waited_s))

    # ---- out -------------------------------------------------------------------------------------------------------

    def late(self, admit: Admit, terms: Terms, seen: Forecast | None, reason: str, now: float) -> Refusal:
        """Its promise cannot be kept, with the time at which such a request's can."""
        self.retries.refused(now)
        if seen is None:
            error = TenantOverLimit(
                f"its first token could not be had in {terms.ttft_s:g} s any more (class {terms.slo_class})",
                retry_after=admission.retry_after(terms.ttft_s, self._draw),
            )
            return Refusal(error, reason)
        left = self._left(admit, terms)
        if reason == "slo_tpot":
            text = f"no decode worker can give a token every {1e3 * terms.tpot_s:g} ms"
        elif seen.alone_s > left:
            text = f"its prompt of {admit.prompt_len} tokens alone takes {seen.alone_s:.2f} s of the {left:g} s to its first token"
        else:
            text = f"its first token is expected in {seen.ttft_s:.2f} s, and {left:g} s are promised"
        excess = max(0.0, seen.ttft_s - left)
        after = self._appoint(admit, terms, excess, seen.short_s, seen.pace, 0.0, now)
        return Refusal(TenantOverLimit(f"{text} (class {terms.slo_class})", retry_after=after), reason)

    def _appoint(self, admit: Admit, terms: Terms, wait_s: float, work_s: float, pace: float, tokens: float, now: float) -> float:
        """Seconds until this client's own time. Jitter is upwards and no larger than what lies between two of them."""
        earliest = now + max(admission.MIN_RETRY_S, wait_s)
        takes_s = SPARE * work_s / pace if pace > 0 else 0.0
        at = self.appointments.first_free(admit.model, terms.band, earliest) if takes_s else earliest
        after = min(admission.MAX_RETRY_S, at - now)
        slot = now + after
        at = slot + min(admission.JITTER * after, takes_s + 0.02 * after) * self._draw()
        until = at + GRACE_S + 0.25 * after
        mark = mark_of(admit)
        self.appointments.make(Appointment(at, until, admit.model, terms.band, work_s, admit.tenant, tokens, mark, slot, takes_s))
        return at - now

    def _lose(self, tenants: Tenants, now: float) -> None:
        """Who did not come when told: what was set aside goes back."""
        for appointment in self.appointments.lost(now):
            if appointment.tokens:
                spec = tenants.tenant(appointment.tenant)
                self.buckets.take(appointment.tenant, spec, -appointment.tokens, now, -1.0)

    # ---- what happens ----------------------------------------------------------------------------------------------

    def placed(self, item: Item, now: float, was_backlog: bool) -> None:
        self._pace(item.admit.model).placed(item.service_s, item.decode_s, now, was_backlog)
        waited = now - item.queued_at
        if item.forecast_wait_s > 0.0 and item.forecast_wait_s > 0.02 * (item.admit.ttft_slo_s or 1.0):
            self.wait_error.observe(max(1e-6, waited), item.forecast_wait_s)

    def status(self, now: float) -> dict[str, Any]:
        """See `scheduler.status.status_of`."""
        return {
            "wait": self.wait_error.status(),
            "appointments": len(self.appointments),
            "show_rate": self.appointments.show_rate,
            "prices": {model: price.level for model, price in self.prices.items()},
        }

    def _pace(self, model: str) -> Pace:
        pace = self.paces.get(model)
        if pace is None:
            if len(self.paces) >= MAX_MODELS:
                self.paces.pop(next(iter(self.paces)))
            pace = self.paces[model] = Pace()
        return pace
