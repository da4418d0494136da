"""How fast a model's queue is served: what was placed a second while something waited, or, before that is known, what pools can do.

Work is counted twice, by what it takes of either resource: seconds of prefill, and seconds of decoding (output tokens times
what each
adds to a step). A prefill worker gives one second a second; a decode worker what its promise leaves beside a step's own cost.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from scheduler.table import DECODE_DRIFT, TAKES, Pool

WINDOW_S = 20.0
ENOUGH = 12  # placements, before what was measured counts
MIN_SPAN_S = 0.5
MAX_GAP_S = 2.0  # between two placements: whoever waited then did not wait for the pace
LEAST, MOST = 0.6, 1.3  # of what pools can do: what was measured is believed so far


class Pace:
    """Of one model."""

    def __init__(self) -> None:
        self._placed: deque[tuple[float, float, float]] = deque(maxlen=2048)
        self._prefill_s = 0.0
        self._decode_s = 0.0

    def placed(self, prefill_s: float, decode_s: float, now: float, was_backlog: bool) -> None:
        """was_backlog: something waited behind it, so that this is as fast as it goes."""
        if not was_backlog or (self._placed and now - self._placed[-1][0] > MAX_GAP_S):
            self._placed.clear()
            self._prefill_s = self._decode_s = 0.0
        if not was_backlog:
            return
        if len(self._placed) == self._placed.maxlen:
            self._forget()
        self._placed.append((now, prefill_s, decode_s))
        self._prefill_s += prefill_s
        self._decode_s += decode_s

    def _forget(self) -> None:
        _, prefill_s, decode_s = self._placed.popleft()
        self._prefill_s -= prefill_s
        self._decode_s -= decode_s

    def measured(self, now: float) -> tuple[float, float] | None:
        """Seconds of prefill and of decoding that were placed a second; None while too little was seen."""
        while self._placed and self._placed[0][0] < now - WINDOW_S:
            self._forget()
        if len(self._placed) < ENOUGH:
            return None
        span = now - self._placed[0][0]
        if span < MIN_SPAN_S:
            return None
        return max(1e-9, self._prefill_s) / span, max(1e-9, self._decode_s) / span


def pace_of(pace: Pace, can_do: tuple[float, float], now: float) -> tuple[float, float]:
    """What was measured, as far as it can be. Else few placements, because few were let in, would let in fewer."""
    measured = pace.measured(now)
    if measured is None:
        return can_do
    prefill, decode = (max(LEAST * can, min(MOST * can, got)) for got, can in zip(measured, can_do, strict=True))
    return prefill, decode


def predicted(pool: Pool, tpot_s: float) -> tuple[float, float]:
    """The same, as the pools' sizes and the cost models say. tpot_s: the promise that decode workers are filled up to."""
    pool.refresh()
    rows = pool.decode
    takes = rows.live[TAKES] > 0
    a, *_ = rows.theta(lambda cost: cost.decode.theta)
    decode = float((np.maximum(0.05, 1.0 - a * rows.live[DECODE_DRIFT] / tpot_s) * takes).sum())
    if len(pool.prefill):
        prefill = float((pool.prefill.live[TAKES] > 0).sum())
    else:
        prefill = 0.5 * float(takes.sum())  # beside decoding
    return max(0.1, prefill), max(0.05, decode)
