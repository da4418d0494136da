"""Which tenants are about, and who of them has more than its share of what runs. Of each model; bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

RECENT_S = 30.0
MAX_TENANTS = 1024
SMALL_COMPANY = 8
WEIGHED_S = 0.25  # how long a sum of weights holds


class Activity:
    """Of one model."""

    def __init__(self) -> None:
        self._came: OrderedDict[str, float] = OrderedDict()  # tenant -> when its last request came
        self._weights: tuple[float, float] = (-WEIGHED_S, 1.0)  # when they were summed, their sum

    def came(self, tenant: str, now: float) -> None:
        self._came[tenant] = now
        self._came.move_to_end(tenant)
        if len(self._came) > MAX_TENANTS:
            self._came.popitem(last=False)

    def others(self, now: float) -> bool:
        """Whether more than one tenant is about."""
        came = self._came
        while came and came[next(iter(came))] < now - RECENT_S:
            came.popitem(last=False)
        return len(came) > 1

    def is_small_company(self, now: float) -> bool:
        """Few enough are about that each one's share is a good part of the whole."""
        return self.others(now) and len(self._came) <= SMALL_COMPANY

    def share(self, tenant: str, weight: Callable[[str], float], now: float) -> float:
        """Its weight among those who are about."""
        if now - self._weights[0] >= WEIGHED_S:
            self._weights = now, sum(weight(name) for name in self._came)
        return weight(tenant) / max(self._weights[1], 1e-9)
