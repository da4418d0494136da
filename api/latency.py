"""What this gateway's clients have seen lately: TTFT and TPOT of the last requests, for the dashboard.

Not the scheduler's ledger and not /metrics: a window in memory, gone with the process.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from protocol.events import Failed, Finished
from protocol.network import Clock

WINDOW_S = 300.0
MAX_REQUESTS = 10_000
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


class LatencyWindow:
    """The last WINDOW_S seconds of finished requests. TPOT only of those with at least two tokens of a choice."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS)  # (when, seconds)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS)
        self._failed: deque[float] = deque(maxlen=MAX_REQUESTS)

    def observe(self, event: Finished | Failed, num_choices: int) -> None:
        now = self._clock()
        if isinstance(event, Failed):
            self._failed.append(now)
            return
        self._ttft.append((now, event.timing.ttft_s))
        num_gaps = event.usage.completion_tokens - num_choices
        if num_gaps > 0:
            self._tpot.append((now, event.timing.decode_s * num_choices / num_gaps))

    def summary(self, promise_ttft_s: float, promise_tpot_s: float) -> dict[str, Any]:
        """Quantiles in seconds (None: nothing measured), and the share of requests that kept each promise."""
        oldest = self._clock() - WINDOW_S
        for queue in (self._ttft, self._tpot):
            while queue and queue[0][0] < oldest:
                queue.popleft()
        while self._failed and self._failed[0] < oldest:
            self._failed.popleft()
        return {
            "window_s": WINDOW_S,
            "num_finished": len(self._ttft),
            "num_failed": len(self._failed),
            "ttft": _describe([seconds for _, seconds in self._ttft], promise_ttft_s),
            "tpot": _describe([seconds for _, seconds in self._tpot], promise_tpot_s),
        }


def _describe(values: list[float], promise: float) -> dict[str, Any]:
    values.sort()
    last = len(values) - 1
    found: dict[str, Any] = {name: values[round(q * last)] if values else None for name, q in QUANTILES.items()}
    found["promise"] = promise
    found["kept"] = sum(value <= promise for value in values) / len(values) if values else None
    return found
