"""From one form of a request to the next: asked -> waiting -> placed. Pure functions; called by `Scheduler`."""

from __future__ import annotations

import math

import msgspec

from protocol.messages import Admit
from protocol.ticket import Ticket
from scheduler.gate import Entered
from scheduler.placement import Placement
from scheduler.queue import Item


def item_of(entered: Entered, position: int, epoch: int, queued_at: float, deadline: float) -> Item:
    """What waits. Its promise counts from when its gateway got it; a resumption's first token is out already."""
    admit, terms, seen = entered.admit, entered.terms, entered.forecast
    promised_at = math.inf if admit.resumption else queued_at - admit.waited_s + terms.ttft_s
    late_at = math.inf
    if seen is not None and not admit.resumption:
        late_at = promised_at - seen.work.prefill_s if seen.is_trusted else promised_at
    return Item(
        admit,
        position,
        epoch,
        queued_at,
        deadline,
        band=terms.band,
        promised_at=promised_at,
        late_at=late_at,
        service_s=seen.work.prefill_s if seen else 0.0,
        decode_s=seen.work.decode_s if seen else 0.0,
        tokens=seen.work.tokens if seen else float(admit.prompt_len),
        cost=seen.cost if seen else 0.0,
        forecast_wait_s=seen.wait_s if seen else 0.0,
        refuses_late=terms.refuses_late,
        is_appointed=entered.is_appointed,
        degraded=entered.degraded,
    )


def again(admit: Admit, waiting: Item) -> Admit:
    """The same request asked for once more, because an answer was lost: what was taken off it stays off."""
    had = waiting.admit
    return msgspec.structs.replace(
        admit, model=had.model, slo_class=had.slo_class, max_tokens=min(admit.max_tokens, had.max_tokens)
    )


def ticket_of(item: Item, placement: Placement) -> Ticket:
    """The scheduler's decision, as the gateway gets it."""
    prefill = placement.prefill.ref if placement.prefill else None
    admit = item.admit
    if not item.degraded:
        return Ticket(
            admit.request_id, item.epoch, placement.decode.ref, prefill, placement.ttft_s, goes_first=placement.goes_first
        )
    return Ticket(
        admit.request_id,
        item.epoch,
        placement.decode.ref,
        prefill,
        placement.ttft_s,
        degraded=item.degraded,
        slo_class=admit.slo_class,
        max_tokens=admit.max_tokens,
        model=admit.model,
        goes_first=placement.goes_first,
    )
