"""What a request may ask for: its class, a promise of its own and its place, within its tenant's rights.

    x-slo-class       one of the tenant's classes; without it, the tenant's own
    x-slo-ttft-ms     a promise of its own, tighter than its class's and no tighter than the tightest class of the tenant
    x-slo-tpot-ms     the same for each further token
    priority          in the body, or x-priority: as vLLM has it, lower comes earlier. It orders a tenant's own requests among
                      themselves, so it takes nothing from another tenant; under --scheduling-policy priority, which knows no
                      tenants, only operators may name one below 0
    x-tandem-retry    above 0: refused before (OpenAI's clients say it by themselves, in x-stainless-retry-count)

What goes beyond a right is refused with 400, the header and the right; nothing is cut silently. Pure; called by `routes.py`, again
when the tenants file changed while the request was on its way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from starlette.datastructures import Headers

from api.backend import InForce
from protocol.errors import InvalidRequest
from protocol.request import Claim

CLASS, TTFT, TPOT, PRIORITY = "x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-priority"
RETRY, STAINLESS_RETRY = "x-tandem-retry", "x-stainless-retry-count"
MAX_PRIORITY = 1000  # either way; enough to tell one's own requests apart


class Judged(NamedTuple):
    """What holds for a request of this tenant."""

    tenant: str
    slo_class: str
    priority: int
    claim: Claim


def judge(headers: Headers, priority: int | None, tenant: str, in_force: InForce, priority_crosses_tenants: bool = False) -> Judged:
    """priority: the body's. Raises InvalidRequest that names the header and the right."""
    rights = in_force.tenants.tenant(tenant)
    allowed = [name for name in rights.allowed_classes if name in in_force.tenants.classes]
    chosen = _one(headers, CLASS) or rights.slo_class
    if chosen not in allowed:
        raise InvalidRequest(f"{CLASS}: {chosen[:60]!r} is none of tenant {tenant}'s classes: {', '.join(allowed)}", param=CLASS)
    promised = in_force.tenants.classes[chosen]
    tightest = [in_force.tenants.classes[name] for name in allowed]
    is_free = not in_force.version  # without a file there is one tenant, who can only take from itself
    claim = Claim(
        ttft_slo_s=_own(headers, TTFT, promised.ttft_s, 0.0 if is_free else min(one.ttft_s for one in tightest), chosen, tenant),
        tpot_slo_s=_own(headers, TPOT, promised.tpot_s, 0.0 if is_free else min(one.tpot_s for one in tightest), chosen, tenant),
        is_retry=_is_retry(headers),
        tenants_version=in_force.version,
    )
    least = 0 if priority_crosses_tenants and in_force.version and not rights.is_operator else -MAX_PRIORITY
    return Judged(tenant, chosen, _priority(headers, priority, least, tenant), claim)


def _one(headers: Headers, name: str) -> str:
    """The header's value, "" without it. Twice is once too often: proxies disagree on which one counts."""
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name} is there {len(values)} times", param=name)
    return values[0].strip() if values else ""


def _own(headers: Headers, name: str, promised_s: float, least_s: float, slo_class: str, tenant: str) -> float | None:
    text = _one(headers, name)
    if not text:
        return None
    try:
        value_s = float(text) / 1e3
    except ValueError:
        value_s = math.nan
    if not 0 < value_s <= 1e9:
        raise InvalidRequest(f"{name}: a number of milliseconds above 0 is needed; got {text[:40]!r}", param=name)
    if value_s > promised_s * (1 + 1e-9):
        raise InvalidRequest(
            f"{name}: {text[:40]} is looser than the {1e3 * promised_s:g} ms of class {slo_class}; leave it away, or choose "
            f"another class ({CLASS})",
            param=name,
        )
    if value_s < least_s * (1 - 1e-9):
        raise InvalidRequest(
            f"{name}: {text[:40]} is beyond the right of tenant {tenant}, whose tightest class promises {1e3 * least_s:g} ms",
            param=name,
        )
    return min(value_s, promised_s)


def _priority(headers: Headers, priority: int | None, least: int, tenant: str) -> int:
    name, text = PRIORITY, _one(headers, PRIORITY)
    if not text and priority is None:
        return 0
    if text:
        try:
            given = int(text)
        except ValueError:
            raise InvalidRequest(f"{name}: an integer is needed; got {text[:40]!r}", param=name) from None
        if priority is not None and priority != given:
            raise InvalidRequest(f"{name} says {given} and the body's priority {priority}", param=name)
    else:
        name, given = "priority", priority or 0
    if abs(given) > MAX_PRIORITY:
        raise InvalidRequest(f"{name}: from -{MAX_PRIORITY} (earlier) to {MAX_PRIORITY} (later); got {str(given)[:40]}", param=name)
    if given < least:
        raise InvalidRequest(
            f"{name}: {given} would be served before other tenants' requests (--scheduling-policy priority); tenant {tenant} "
            f"may name {least} or above",
            param=name,
        )
    return given


def _is_retry(headers: Headers) -> bool:
    text = _one(headers, RETRY)
    if text:
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise InvalidRequest(f"{RETRY}: how often it was refused before, a whole number; got {text[:40]!r}", param=RETRY)
        return int(text) > 0
    told = headers.get(STAINLESS_RETRY, "")  # not ours: what it holds beside a number is nobody's fault here
    return told.isascii() and told.isdigit() and told.strip("0") != ""
