"""How wrong predictions were lately: quantiles of actual / predicted, over a sliding window in bounded memory."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Any

WINDOW = 256
ENOUGH = 24  # below so many nothing is claimed
LOW, HIGH = 0.1, 10.0


class Residuals:
    """Of one kind of prediction. Ratios are clipped to [0.1, 10]: beyond that something else had happened."""

    def __init__(self, window: int = WINDOW) -> None:
        self._newest: deque[float] = deque()
        self._ordered: list[float] = []
        self._window = window
        self.count = 0

    def observe(self, actual: float, predicted: float) -> None:
        if not (math.isfinite(actual) and math.isfinite(predicted) and actual > 0 and predicted > 0):
            return
        ratio = min(HIGH, max(LOW, actual / predicted))
        self._newest.append(ratio)
        bisect.insort(self._ordered, ratio)
        self.count += 1
        if len(self._newest) > self._window:
            gone = self._newest.popleft()
            del self._ordered[bisect.bisect_left(self._ordered, gone)]

    def quantile(self, q: float) -> float:
        """Of actual / predicted, nearest rank; 1.0 until enough was seen."""
        if len(self._ordered) < ENOUGH:
            return 1.0
        return self._ordered[max(0, math.ceil(q * len(self._ordered)) - 1)]

    def status(self) -> dict[str, Any]:
        """count, mean absolute relative error, and p10, p50, p90 of actual / predicted; None before the first."""
        known = self._ordered
        if not known:
            return {"count": 0, "mape": None, "p10": None, "p50": None, "p90": None}
        at = {name: known[max(0, math.ceil(q * len(known)) - 1)] for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))}
        return {"count": self.count, "mape": sum(abs(r - 1.0) / r for r in known) / len(known), **at}


class Margin:
    """By how much a prediction is to be overestimated so that no more than a share of promises is broken: raised a little by
    each that
    was broken, lowered by each that was kept, in equilibrium where the shares balance (stochastic approximation of a quantile)."""

    STEP = 0.004
    LEAST, MOST = 0.95, 1.3

    def __init__(self, allowed: float = 0.008) -> None:
        self._allowed = allowed
        self.factor = 1.03

    def observe(self, was_kept: bool) -> None:
        change = -self._allowed if was_kept else 1.0 - self._allowed
        self.factor = min(self.MOST, max(self.LEAST, self.factor * (1.0 + self.STEP * change)))
