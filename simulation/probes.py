"""When a refused client could first have come in: the reference that advised waits are compared with.

First feasible, for everybody together and not for each alone: whoever was refused stands in one line, in the order of the refusals,
and the line is served by what first-time requests leave of the capacity (in prompt tokens a second, as measured at the 90 % line).
A single client could slip in earlier through any gap, but all of them have the same gaps. Given to a Simulation as `watch`.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from simulation.cluster import Simulation

EVERY_S = 0.25  # between two looks
MAX_LINE = 100_000


class Refused(NamedTuple):
    at: float
    wait_s: float  # as told
    tokens: int


class Probes:
    """capacity: prompt tokens a second. patience_s: so much more than the capacity may be admitted for a moment (a promise's
    time)."""

    def __init__(self, capacity: float, patience_s: float) -> None:
        self.waits: list[tuple[float, float]] = []  # (told, first feasible), seconds
        self._capacity = capacity
        self._patience_s = patience_s
        self._line: deque[Refused] = deque(maxlen=MAX_LINE)
        self._seen: set[int] = set()
        self._spare = self._owed = 0.0
        self._looked_at = 0.0
        self._fresh = 0

    def __call__(self, simulation: Simulation) -> None:
        now = simulation.now
        while simulation.newly_refused:
            req = simulation.newly_refused.popleft()
            if req.index not in self._seen:  # of its refusals the first: the others wait in the line already
                self._seen.add(req.index)
                self._line.append(Refused(now, req.waited, req.prompt))
        elapsed = now - self._looked_at
        if elapsed < EVERY_S:
            return
        fresh, self._fresh = simulation.fresh_tokens - self._fresh, simulation.fresh_tokens
        self._looked_at = now
        self._spare += self._capacity * elapsed - fresh
        # Below: what the last of the line still owes, and what newcomers may be ahead for a moment.
        self._spare = max(self._spare, -self._owed - self._capacity * self._patience_s)
        while self._line and self._spare > 0:
            first = self._line.popleft()
            self._spare -= first.tokens
            self._owed = float(first.tokens)
            self.waits.append((first.wait_s, max(EVERY_S, now - first.at)))
        self._spare = min(self._spare, self._capacity * EVERY_S)  # what nobody uses is gone

    def figures(self) -> dict[str, Any]:
        if not self.waits:
            return {"probed": 0, "median_feasible_s": 0.0, "median_told_of_probed_s": 0.0, "ratio": 0.0}
        told, feasible = (sorted(column) for column in zip(*self.waits, strict=True))
        middle = len(told) // 2
        return {
            "probed": len(told),
            "median_feasible_s": feasible[middle],
            "median_told_of_probed_s": told[middle],
            "ratio": told[middle] / feasible[middle],
        }
