"""What a request that comes now may expect: how long it will wait, its first token, its pace. Admission decides by it.

wait    what is served before it, in its order, over the pace at which its model is served
TTFT    the wait, then the best prefill worker's queue and its own prefill; the p90 of how wrong each was lately on top
pace    whether some decode worker keeps its promise, and everybody's there, when its prefill ends
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scheduler.cost import TRUSTED_AFTER
from scheduler.fairness import INPUT_PRICE, OUTPUT_PRICE, Fairness
from scheduler.pace import Pace, pace_of, predicted
from scheduler.price import Price
from scheduler.queue import NOTHING, Queue, Waiting
from scheduler.residuals import Residuals
from scheduler.table import Pool
from scheduler.terms import Terms
from scheduler.view import View

QUANTILE = 0.9
MAX_COMPARED = 512  # tenants whose shares are weighed one by one


class Work(NamedTuple):
    """What one request takes. tokens: as fairness charges them, before weights."""

    prefill_s: float
    decode_s: float
    tokens: float


class Forecast(NamedTuple):
    """Seconds from now. is_decode_short: decode room, not prefill, is what it would wait for."""

    work: Work
    wait_s: float
    service_s: float  # to the first token, once it is its turn
    ttft_s: float  # p90
    alone_s: float  # p90 of its prefill on an idle worker
    can_keep_tpot: bool  # some decode worker could, with nobody else on it
    is_decode_short: bool
    pace: float  # seconds of work of the resource that is short, a second
    is_trusted: bool
    cost: float  # its share of the pools: its work over what each pool does a second, summed
    queue_s: float  # the wait of one that nobody's place may be taken by

    @property
    def short_s(self) -> float:
        """Its work of that resource."""
        return self.work.decode_s if self.is_decode_short else self.work.prefill_s


def work_of(view: View) -> Work:
    """What it will take, by the model's first kind of worker."""
    admit, pool = view.admit, view.pool
    rows = pool.prefill if len(pool.prefill) else pool.decode
    prefill_s = decode_s = 0.0
    if len(rows):
        cached = view.cached(rows)
        best = int(np.max(cached)) if isinstance(cached, np.ndarray) else 0
        prefill_s = rows.costs[0].prefill_s(admit.prompt_len, best)
    if len(pool.decode):
        _, b, c = pool.decode.costs[0].decode.theta
        decode_s = admit.num_choices * view.expected * (c + b * (admit.prompt_len + view.expected / 2) / 1e3)
    return Work(prefill_s, decode_s, INPUT_PRICE * admit.prompt_len + OUTPUT_PRICE * view.expected * admit.num_choices)


def work_ahead(
    queue: Queue,
    fairness: Fairness | None,
    model: str,
    band: int,
    tenant: str,
    weight_of: Callable[[str], float],
    tokens: float,
) -> Waiting:
    """What of the queue is served before a request of this tenant that joins now, after its own tenant's.

    fairness None: everything in its band. Else, while its tenant is served what it has waiting and this request (x tokens over
    weight), another one is served until it has drawn level: min(what it has, (S_own + x - S_other) * its weight).
    """
    requests, total_tokens, prefill_s, decode_s = 0.0, 0.0, 0.0, 0.0
    for (of, its_band), sums in queue.totals.items():
        if of == model and its_band < band:
            requests += sums.requests
            total_tokens += sums.tokens
            prefill_s += sums.service_s
            decode_s += sums.decode_s
    waiting = queue.waiting.get((model, band), {})
    own = waiting.get(tenant, NOTHING)
    if fairness is None or len(waiting) > MAX_COMPARED:
        shares = [(queue.totals.get((model, band), NOTHING), 1.0)]
    else:
        level = max(fairness.service(band, tenant), fairness.level(band)) + (own.tokens + tokens) / weight_of(tenant)
        shares = [(own, 1.0)]
        for other, has in waiting.items():
            if other != tenant and has.tokens > 0:
                due = (level - fairness.service(band, other)) * weight_of(other)
                if due > 0:
                    shares.append((has, min(1.0, due / has.tokens)))
    for has, share in shares:
        requests += share * has.requests
        total_tokens += share * has.tokens
        prefill_s += share * has.service_s
        decode_s += share * has.decode_s
    return Waiting(round(requests), total_tokens, prefill_s, decode_s)


def forecast(
    view: View,
    terms: Terms,
    ahead: Waiting,
    appointed_s: float,
    pace: Pace,
    wait_error: Residuals,
    decode_is_short: bool,
    price: Price,
) -> Forecast:
    """appointed_s: seconds of work that others have been promised before it. decode_is_short: who waits now waits for decode
    room."""
    admit, pool, now = view.admit, view.pool, view.now
    work = work_of(view)
    rows = pool.decode
    usable = view.usable(rows)
    found, its = None, pool.prefill
    if len(its) and not admit.local_prefill:
        found = view.prefills(its, view.usable(its))
        if not np.isfinite(found.ttft_s).any():
            found = None
    if found is None:
        its = rows
        found = view.local(rows, usable)
    best = int(found.ttft_s.argmin())
    model = its.workers[best].cost
    service_s = float(found.ttft_s[best])
    decodes = view.decodes(rows, usable, service_s)
    keeps = bool(decodes.keeps.any())
    margin = view.margin(rows)
    alone_tpot = min(c.decode_s(admit.num_choices, admit.num_choices * (admit.prompt_len + 1)) for c in rows.costs) * margin
    can_do = predicted(pool, terms.tpot_s)
    cost = work.prefill_s / can_do[0] + work.decode_s / can_do[1]
    prefill_pace, decode_pace = pace_of(pace, can_do, now)
    is_short = not keeps or (decode_is_short and ahead.requests > 0)
    if is_short:
        speed = decode_pace
        queue_s = (ahead.decode_s + appointed_s) / speed
        # Those that take less go before those that find no room, so of what waits only so much stands before it.
        wait_s = queue_s * price.rank(cost) + (0.0 if keeps else work.decode_s / speed)
    else:
        speed = prefill_pace
        wait_s = queue_s = (ahead.service_s + appointed_s) / speed
    ratio = max(0.5, min(4.0, model.ttft_error.quantile(QUANTILE)))
    waits = max(0.5, min(4.0, wait_error.quantile(QUANTILE)))
    return Forecast(
        work,
        wait_s,
        service_s,
        wait_s * waits + service_s * ratio,
        float(found.work_s[best]) * ratio,
        alone_tpot <= view.limit(),
        is_short,
        speed,
        model.prefill.num_observations >= TRUSTED_AFTER and all(c.decode.num_observations >= TRUSTED_AFTER for c in rows.costs),
        cost,
        queue_s,
    )


def has_workers(pool: Pool | None) -> bool:
    """Somebody who can decode is there to be asked."""
    return pool is not None and any(w.takes_work for w in pool.decode.workers)
