"""How a request is turned away, at the door or later, and who has to make room for whom. Part of `Scheduler`, which alone
calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.errors import Failure, InvalidRequest, TandemError, to_failure
from protocol.messages import Admit
from scheduler import admission
from scheduler.admission import Refusal
from scheduler.gate import Entered
from scheduler.ledger import WorkerState
from scheduler.queue import Item
from scheduler.terms import terms_of

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler

MAX_PUSHED_OUT = 8  # waiting requests that one newcomer may push out of a full queue


class Refusing:
    """See the module."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def fail(self, item: Item, error: TandemError, reason: str | None, now: float) -> tuple[str, Failure]:
        self._scheduler.mint(item)
        self._scheduler.remember_end(item.admit.request_id)
        self._scheduler.gate.dropped(item.admit, self._scheduler.tenants, now)
        if reason is not None:
            self._scheduler.records.reject(reason, item.admit.request_id)
        self._scheduler.explained.note(
            item.admit.request_id, now, "refused", reason=reason or "bug", text=error.message, retry_after_s=error.retry_after
        )
        return item.admit.request_id, to_failure(error)

    # ---- refusing --------------------------------------------------------------------------------------------------

    def enter(self, admit: Admit, now: float, *, judges: bool) -> Entered:
        """Raises what makes waiting useless: nobody to wait for, a promise that cannot be kept, no room to wait in."""
        is_new = not admit.resumption
        try:
            if judges:
                self._refuse_hopeless(admit, now)
            entered = self._scheduler.gate.enter(admit, self._scheduler.tenants, now, judges=judges)
            if is_new:
                self._make_room(entered, now)
        except Refusal as refusal:
            error = refusal.error
            self._scheduler.records.reject(refusal.reason, admit.request_id)
            self._scheduler.explained.note(
                admit.request_id, now, "refused", reason=refusal.reason, text=error.message, retry_after_s=error.retry_after
            )
            raise error from None
        if entered.victim is not None:
            terms = terms_of(self._scheduler.tenants, entered.victim.admit.slo_class, entered.victim.admit)
            self.push_out(
                entered.victim, self._scheduler.gate.late(entered.victim.admit, terms, entered.forecast, "slo_ttft", now), now
            )
        if entered.forecast is not None:
            seen = entered.forecast
            self._scheduler.explained.note(
                admit.request_id, now, "entered", predicted_wait_s=seen.wait_s, predicted_ttft_s=seen.ttft_s,
                waits_for="decode" if seen.is_decode_short else "prefill", degraded=entered.degraded or None,
            )  # fmt: skip
        return entered

    def _refuse_hopeless(self, admit: Admit, now: float) -> None:
        model = admit.model
        if not self.has_decode(model) and now - self.without_since(model) > self._scheduler.config.recovery_s:
            raise Refusal(admission.no_worker(model, self.until_worker(model, now), self._scheduler.draw), "no_worker")
        patience = min(admit.deadline_s, self._scheduler.config.queue_timeout_s)
        rate = self._scheduler.drain_rate.tokens_per_s(now)
        # Twice: an estimate may be wrong, and refusing whom we could have served is worse than letting one wait.
        if rate is not None and self._scheduler.queue.num_tokens > 2 * patience * rate:
            raise Refusal(
                admission.hopeless(self._scheduler.queue.num_tokens / rate, patience, self._scheduler.draw), "would_time_out"
            )

    def _make_room(self, entered: Entered, now: float) -> None:
        """In a full queue: lower bands go first, then the tenant of the same band that fills it most; else Refusal."""
        admit = entered.admit
        for _ in range(MAX_PUSHED_OUT):
            if self._scheduler.queue.overflow(admit) is None:
                return
            victim = None
            if self._scheduler.admission:
                victim = self._scheduler.queue.victim(
                    entered.terms.band, admit.tenant, lambda name: self._scheduler.tenants.tenant(name).weight
                )
            if victim is None:
                break
            drain = self.predicted_drain_s(victim.admit.model, now)
            is_lower = victim.band > entered.terms.band
            self.push_out(victim, admission.pushed_out(victim.admit, is_lower, drain, self._scheduler.draw), now)
        over = self._scheduler.queue.overflow(admit)
        if over is not None:
            self._scheduler.gate.dropped(admit, self._scheduler.tenants, now)
            drain = self.predicted_drain_s(admit.model, now)
            raise Refusal(*admission.overflowing(admit, self._scheduler.queue, over, drain, self._scheduler.draw))

    def push_out(self, victim: Item, refusal: Refusal, now: float) -> None:
        self._scheduler.queue.remove(victim.admit.request_id)
        self._scheduler.decided(self.fail(victim, refusal.error, refusal.reason, now))

    def check_it_can_ever_fit(self, admit: Admit) -> None:
        pool = self._scheduler.pools.get(admit.model)
        if pool is None or pool.largest is None:
            return
        try:
            admission.check_it_fits(admit, pool.largest)
        except InvalidRequest:
            self._scheduler.records.reject("too_long", admit.request_id)
            raise

    def predicted_drain_s(self, model: str, now: float) -> float:
        """Seconds until everything that waits is placed."""
        workers: Sequence[WorkerState] = self._scheduler.pools.get(model, ())
        output = self._scheduler.costs.output(model)
        return admission.drain_s(
            self._scheduler.queue.num_tokens, len(self._scheduler.queue), workers, output, self._scheduler.drain_rate, now
        )

    def has_decode(self, model: str) -> bool:
        pool = self._scheduler.pools.get(model)
        return pool is not None and len(pool.decode) > 0

    def without_since(self, model: str) -> float:
        """Since when no decode worker of the model has been alive; a fresh scheduler gives everybody time to register."""
        assert self._scheduler.started_at is not None, "every door begins with _begin"
        return self._scheduler.last_alive_at.get(model, self._scheduler.started_at)

    def until_worker(self, model: str, now: float) -> float:
        return max(0.0, self._scheduler.records.start_up_s - (now - self.without_since(model)))
