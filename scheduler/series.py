"""An hour of the cluster as a whole, one point every five seconds: what the dashboard's curves are drawn from. Pure.

A point is closed when its slot is over; rates are divided by the time that really passed, so a late tick makes a longer slot and
not a wrong number. Quantiles of a slot are exact to one bucket of `sla.Histogram`. Fed and read by `cluster/history.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from scheduler.sla import Histogram

STEP_S = 5.0
NUM_POINTS = 720  # an hour
QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
COUNTED = ("requests", "refused", "failed", "goodput")  # added up by `count`, shown as NAME_per_s
FLOWS = ("output_tokens", "input_tokens", "kv_bytes")  # cumulative numbers, shown as NAME_per_s
LEVELS = ("queue", "running", "kv_used_share")  # as they are at the end of the slot
NAMES = (
    *(f"{of}_{name}" for of in ("ttft", "tpot") for name, _ in QUANTILES),
    *(f"{name}_per_s" for name in (*COUNTED, *FLOWS)),
    *LEVELS,
    "attainment",
)


class Series:
    """`count` and `finished` as things happen, `tick` often, `history` and `point` to read."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, tuple[float | None, ...]]] = deque(maxlen=NUM_POINTS)
        self._since: float | None = None
        self._before: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._counts = dict.fromkeys(COUNTED, 0)
        self._judged = 0
        self._ttft, self._tpot = Histogram(), Histogram()

    def count(self, name: str) -> None:
        self._counts[name] += 1

    def judged(self, is_kept: bool) -> None:
        """A request that counts for attainment is over."""
        self._judged += 1
        self._counts["goodput"] += is_kept

    def finished(self, ttft_s: float, tpot_s: float | None) -> None:
        self._ttft.add(ttft_s)
        if tpot_s is not None:
            self._tpot.add(tpot_s)

    def is_due(self, now: float) -> bool:
        return self._since is None or now - self._since >= STEP_S

    def tick(self, levels: Mapping[str, float], flows: Mapping[str, float], now: float, unix: float) -> None:
        """Close the slot if it is over. flows: cumulative; a number that fell (a new life) counts as no flow."""
        if self._since is None:
            self._since, self._before = now, dict(flows)
            return
        elapsed = now - self._since
        if elapsed < STEP_S:
            return
        values: list[float | None] = [h.quantile(q) for h in (self._ttft, self._tpot) for _, q in QUANTILES]
        values += [self._counts[name] / elapsed for name in COUNTED]
        values += [max(0.0, flows[name] - self._before.get(name, 0.0)) / elapsed for name in FLOWS]
        values += [levels[name] for name in LEVELS]
        values.append(self._counts["goodput"] / self._judged if self._judged else None)
        self._points.append((unix, tuple(_short(value) for value in values)))
        self._since, self._before = now, dict(flows)
        self._clear()

    def history(self) -> dict[str, list[Any]]:
        """ "t" (unix seconds, end of each slot) and a list of the same length for each of NAMES."""
        points = list(self._points)
        columns = zip(*(values for _, values in points), strict=True) if points else ((),) * len(NAMES)
        return {"t": [at for at, _ in points], **{name: list(c) for name, c in zip(NAMES, columns, strict=True)}}

    def point(self) -> dict[str, float | None] | None:
        """The newest one; None before there is one."""
        if not self._points:
            return None
        at, values = self._points[-1]
        return {"t": at, **dict(zip(NAMES, values, strict=True))}


def _short(value: float | None) -> float | None:
    """Six digits are more than a curve shows."""
    return None if value is None else float(f"{value:.6g}")
