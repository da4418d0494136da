"""How long requests took, lately: quantiles over a sliding window, per class, in bounded memory.

Exact quantiles of at most `MAX_SAMPLES` requests, the newest of the last `WINDOW_S` seconds. Not the histograms of
/metrics, which count from the start (`cluster/metrics.py`); these are for people: dashboard and `tandem status`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

WINDOW_S = 300.0
MAX_SAMPLES = 2048
MAX_CLASSES = 32  # a client can name a class; beyond so many they are counted together
OTHER = "other"


class Sample(NamedTuple):
    at: float
    ttft_s: float
    tpot_s: float | None  # None with a single token
    e2e_s: float
    queue_s: float


def quantile(ordered: Sequence[float], q: float) -> float:
    """Nearest rank: the smallest value that at least a share q of all are not above. `ordered` is sorted, not empty."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    return {
        "count": len(ordered),
        "mean": sum(ordered) / len(ordered),
        "p50": quantile(ordered, 0.50),
        "p95": quantile(ordered, 0.95),
        "p99": quantile(ordered, 0.99),
    }


class Latencies:
    """Feed it every finished request."""

    window_s = WINDOW_S

    def __init__(self) -> None:
        self._samples: dict[str, deque[Sample]] = {}

    def add(self, slo_class: str, sample: Sample) -> None:
        if not all(math.isfinite(v) and v >= 0 for v in (sample.ttft_s, sample.tpot_s or 0.0, sample.e2e_s)):
            return
        if slo_class not in self._samples and len(self._samples) >= MAX_CLASSES:
            slo_class = OTHER
        self._samples.setdefault(slo_class, deque(maxlen=MAX_SAMPLES)).append(sample)

    def status(self, now: float, ttft_target_s: float, tpot_target_s: float) -> dict[str, Any]:
        """Per class: summaries of ttft_s, tpot_s, e2e_s, queue_s, and the shares that kept the promise.

        A request of one token has no TPOT: it counts for ttft and both, not for tpot.
        """
        out: dict[str, Any] = {}
        for slo_class, samples in list(self._samples.items()):
            while samples and samples[0].at < now - WINDOW_S:
                samples.popleft()
            if not samples:
                del self._samples[slo_class]
                continue
            tpots = [s.tpot_s for s in samples if s.tpot_s is not None]
            kept_ttft = [s.ttft_s <= ttft_target_s for s in samples]
            kept_tpot = [tpot <= tpot_target_s for tpot in tpots] or [True]
            both = [kept and (s.tpot_s is None or s.tpot_s <= tpot_target_s) for kept, s in zip(kept_ttft, samples, strict=True)]
            out[slo_class] = {
                "ttft_s": summary([s.ttft_s for s in samples]),
                "tpot_s": summary(tpots),
                "e2e_s": summary([s.e2e_s for s in samples]),
                "queue_s": summary([s.queue_s for s in samples]),
                "kept": {name: sum(k) / len(k) for name, k in (("ttft", kept_ttft), ("tpot", kept_tpot), ("both", both))},
            }
        return out
