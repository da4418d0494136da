"""Which tenants are about, and who of them has more than its share of what runs. Of each model; bounded."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

RECENT_S = 30.0
MAX_TENANTS = 1024
SMALL_COMPANY = 8
ASKED_S = 10.0  # over which what a tenant asks for is remembered: e-folding
WEIGHED_S = 0.25  # how long a sum of weights holds


class Activity:
    """Of one model."""

    def __init__(self) -> None:
        self._came: OrderedDict[str, float] = OrderedDict()  # tenant -> when its last request came
        # tenant -> prompt tokens that it asked for, those of ASKED_S ago counted e times less. Instead of making all others
        # less, a new one counts for more, from `_asked_since` on, which is moved now and then.
        self._asked: dict[str, float] = {}
        self._all_asked = 0.0
        self._asked_since = 0.0
        self._weights: tuple[float, float] = (-WEIGHED_S, 1.0)  # when they were summed, their sum

    def came(self, tenant: str, num_tokens: int, now: float) -> None:
        """One of its requests, with a prompt of so many tokens."""
        self._came[tenant] = now
        self._came.move_to_end(tenant)
        if now - self._asked_since > 16 * ASKED_S:
            by = math.exp((self._asked_since - now) / ASKED_S)
            self._asked = {name: had * by for name, had in self._asked.items()}
            self._all_asked = sum(self._asked.values())
            self._asked_since = now
        asked = num_tokens * math.exp((now - self._asked_since) / ASKED_S)
        self._asked[tenant] = self._asked.get(tenant, 0.0) + asked
        self._all_asked += asked
        if len(self._came) > MAX_TENANTS:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        tenant, _ = self._came.popitem(last=False)
        self._all_asked = max(0.0, self._all_asked - self._asked.pop(tenant, 0.0))

    def asks_for(self, tenant: str) -> float:
        """Of all prompt tokens that were asked for lately, its part."""
        return self._asked.get(tenant, 0.0) / self._all_asked if self._all_asked > 0 else 0.0

    def others(self, now: float) -> bool:
        """Whether more than one tenant is about."""
        came = self._came
        while came and came[next(iter(came))] < now - RECENT_S:
            self._forget_oldest()
        return len(came) > 1

    def is_small_company(self, now: float) -> bool:
        """Few enough are about that each one's share is a good part of the whole."""
        return self.others(now) and len(self._came) <= SMALL_COMPANY

    def share(self, tenant: str, weight: Callable[[str], float], now: float) -> float:
        """Its weight among those who are about."""
        if now - self._weights[0] >= WEIGHED_S:
            self._weights = now, sum(weight(name) for name in self._came)
        return weight(tenant) / max(self._weights[1], 1e-9)
