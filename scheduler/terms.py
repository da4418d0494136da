"""What holds for one request: its class's promise, tightened by its own, as one row. Made by `Scheduler.submit`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from configs.tenants import SloClass, Tenants
from protocol.messages import Admit


class Terms(NamedTuple):
    """Seconds to the first token, seconds for each further one; band: strict priority, 0 first."""

    slo_class: str
    band: int
    ttft_s: float
    tpot_s: float
    refuses_late: bool  # what becomes of it when the promise cannot be kept: refused, or served late


def terms_of(tenants: Tenants, slo_class: str, admit: Admit) -> Terms:
    """`slo_class` may be another than the one that was asked for: a demoted request's own times do not hold any more."""
    found: SloClass = tenants.slo_class(slo_class)
    ttft_s, tpot_s = found.ttft_s, found.tpot_s
    if slo_class == admit.slo_class:
        ttft_s = min(ttft_s, admit.ttft_slo_s or ttft_s)
        tpot_s = min(tpot_s, admit.tpot_slo_s or tpot_s)
    return Terms(slo_class, found.band, ttft_s, tpot_s, found.when_late == "refuse")


def promised(admit: Admit, terms: Terms) -> Admit:
    """The same request with its times written into it, so that whoever places it need not know classes."""
    if admit.ttft_slo_s == terms.ttft_s and admit.tpot_slo_s == terms.tpot_s and admit.slo_class == terms.slo_class:
        return admit
    return msgspec.structs.replace(admit, ttft_slo_s=terms.ttft_s, tpot_slo_s=terms.tpot_s, slo_class=terms.slo_class)
