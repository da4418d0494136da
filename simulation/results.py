"""What became of every request, and the figures of a run: goodput, attainment, percentiles, waste, per tenant and per class.

Every offered request has exactly one end (`End`). A request is good when it finished and kept both promises that it came with;
one of a single token has no TPOT to miss. Written by `cluster.py`, read by everybody who prints.
"""

from __future__ import annotations

import enum
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scheduler.latency import quantile

SHARES = (0.5, 0.9, 0.95, 0.99)


class End(enum.IntEnum):
    """finished; refused: 429 or 503 at the door, and for good; timed_out: not placed in its time; failed: ended badly elsewhere;
    cut: the run was stopped before it ended."""

    FINISHED = 0
    REFUSED = 1
    TIMED_OUT = 2
    FAILED = 3
    CUT = 4


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """mean, p50, p90, p95, p99 by nearest rank; None without values."""
    if not values:
        return {"mean": None, **{f"p{100 * share:g}": None for share in SHARES}}
    ordered = sorted(values)
    return {"mean": sum(ordered) / len(ordered), **{f"p{100 * share:g}": quantile(ordered, share) for share in SHARES}}


class Results:
    """Columns, a row per request in the order of their ends."""

    def __init__(self) -> None:
        self.index = array("q")
        self.end = array("b")
        self.offered_at = array("d")
        self.ttft_s = array("d")  # -1: no first token
        self.tpot_s = array("d")  # -1: no second one
        self.e2e_s = array("d")
        self.is_good = array("b")
        self.prefill_tokens = array("q")
        self.recomputed = array("q")
        self.tenant = array("l")
        self.cls = array("l")
        self.tenants: dict[str, int] = {}  # name -> number in the column
        self.classes: dict[str, int] = {}
        self.rejections: Counter[str] = Counter()
        self.retries: list[tuple[float, float, bool]] = []  # (refused at, advised wait, was admitted at once when it came back)
        self.num_offered = 0
        self.num_good = 0
        self.num_missed = 0

    def add(
        self, index: int, end: End, tenant: str, cls: str, offered_at: float, ttft_s: float, tpot_s: float, e2e_s: float,
        is_good: bool, prefill_tokens: int, recomputed: int,
    ) -> None:  # fmt: skip
        self.index.append(index)
        self.end.append(end)
        self.tenant.append(self.tenants.setdefault(tenant, len(self.tenants)))
        self.cls.append(self.classes.setdefault(cls, len(self.classes)))
        self.offered_at.append(offered_at)
        self.ttft_s.append(ttft_s)
        self.tpot_s.append(tpot_s)
        self.e2e_s.append(e2e_s)
        self.is_good.append(is_good)
        self.prefill_tokens.append(prefill_tokens)
        self.recomputed.append(recomputed)
        if is_good:
            self.num_good += 1
        else:
            self.num_missed += 1

    def summary(self, duration_s: float) -> dict[str, Any]:
        """duration_s: over which requests were offered; rates are per second of it."""
        every = range(len(self.end))
        found = self._part(every, duration_s)
        found["rejections"] = dict(self.rejections)
        by_tenant, by_class = _groups(self.tenant), _groups(self.cls)
        found["tenants"] = {name: self._part(by_tenant.get(i, []), duration_s) for name, i in self.tenants.items()}
        found["classes"] = {name: self._part(by_class.get(i, []), duration_s) for name, i in self.classes.items()}
        return found

    def _part(self, rows: Sequence[int], duration_s: float) -> dict[str, Any]:
        ends = Counter(self.end[i] for i in rows)
        good = sum(self.is_good[i] for i in rows)
        duration = max(duration_s, 1e-9)
        missed = sum(self.prefill_tokens[i] for i in rows if not self.is_good[i] and self.end[i] == End.FINISHED)
        lost = sum(self.prefill_tokens[i] for i in rows if self.end[i] not in (End.FINISHED, End.CUT))
        again = sum(self.recomputed[i] for i in rows if self.is_good[i])
        computed = sum(self.prefill_tokens[i] for i in rows)
        return {
            "offered": len(rows),
            "finished": ends[End.FINISHED],
            "good": good,
            "rejected": ends[End.REFUSED],
            "timed_out": ends[End.TIMED_OUT],
            "failed": ends[End.FAILED],
            "cut": ends[End.CUT],
            "offered_rps": len(rows) / duration,
            "goodput_rps": good / duration,
            "attainment": good / len(rows) if rows else None,
            "attainment_of_finished": good / ends[End.FINISHED] if ends[End.FINISHED] else None,
            "ttft_s": percentiles([t for i in rows if (t := self.ttft_s[i]) >= 0]),
            "tpot_s": percentiles([t for i in rows if (t := self.tpot_s[i]) >= 0]),
            "e2e_s": percentiles([self.e2e_s[i] for i in rows if self.end[i] == End.FINISHED]),
            "prefill_tokens": computed,
            "wasted_prefill_fraction": (missed + lost + again) / computed if computed else 0.0,
            "wasted": {"missed": missed, "lost": lost, "recomputed": again},
        }


def _groups(column: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, value in enumerate(column):
        found.setdefault(value, []).append(i)
    return found
