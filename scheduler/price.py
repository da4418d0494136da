"""What a request may cost while not everybody can be served: overload refuses the costliest first.

As many promises as possible are kept by refusing those that take most (Moore and Hodgson); among the few that wait at one
moment that
is a weak choice, so the choice is made over time: a quantile of what requests cost lately, lowered by each that comes while waits
are long and raised by each that does not.
"""

from __future__ import annotations

import bisect
from collections import deque

WINDOW = 512
ENOUGH = 64
DOWN, UP = 0.01, 0.005
LEAST = 0.5  # beyond that it is not a matter of who is costly


class Price:
    """Of one model."""

    def __init__(self) -> None:
        self.level = 1.0  # share of requests that may come in
        self._newest: deque[float] = deque()
        self._ordered: list[float] = []

    def asked(self, cost: float, is_short: bool) -> None:
        """One more came. is_short: it would wait for a good part of what it was promised."""
        self.level = max(LEAST, self.level - DOWN) if is_short else min(1.0, self.level + UP)
        self._newest.append(cost)
        bisect.insort(self._ordered, cost)
        if len(self._newest) > WINDOW:
            del self._ordered[bisect.bisect_left(self._ordered, self._newest.popleft())]

    def rank(self, cost: float) -> float:
        """The share of requests that cost less."""
        if len(self._ordered) < ENOUGH:
            return 1.0
        return bisect.bisect_left(self._ordered, cost) / len(self._ordered)

    def is_too_much(self, cost: float) -> bool:
        if self.level >= 1.0 or len(self._ordered) < ENOUGH:
            return False
        return bisect.bisect_left(self._ordered, cost) >= self.level * len(self._ordered)
