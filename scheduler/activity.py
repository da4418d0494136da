"""Which tenants are about, and who of them has more than its share of what runs. Of each model; bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

RECENT_S = 30.0
MAX_TENANTS = 1024


class Activity:
    """Of one model."""

    def __init__(self) -> None:
        self._came: OrderedDict[str, float] = OrderedDict()  # tenant -> when its last request came

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

    def has_more(self, tenant: str, held: Callable[[str], int], weight: Callable[[str], float], now: float) -> bool:
        """Whether it holds more than its share by weight of what is held by those who are about. held: KV blocks of a tenant."""
        if not self.others(now):
            return False
        total = sum(held(name) for name in self._came)
        share = weight(tenant) / sum(weight(name) for name in self._came)
        return held(tenant) > share * total
