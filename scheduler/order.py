"""The order of a model's queue: `--scheduling-policy fcfs | priority | fair | slo`, each one the one before and a stage more.

    fcfs      first come, first served
    priority  lower bands first; within a band lower priorities, then who came first
    fair      lower bands first; between a band's tenants whoever was served least (`scheduler.fairness`)
    slo       the same; within a tenant the earliest deadline, those whose promise is lost behind all others

Everywhere resumptions, whose clients already read tokens, come before everybody else. Earliest deadline first is optimal as long
as all deadlines can be kept and the worst when they cannot, since it then serves those that are just being lost; so lost ones
go behind, and overload costs those it must cost and no others (feasible EDF). Called by `scheduler.queue.Queue`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from scheduler.fairness import Fairness
from scheduler.queue import Item, Key, Order, Sorted, arrival, fcfs


def _by_arrival(item: Item) -> Key:
    return item.admit.priority, item.position, item.admit.request_id


def _by_deadline(item: Item) -> Key:
    return item.admit.priority, item.promised_at, item.position, item.admit.request_id


class Line:
    """What waits of one tenant in one band: those that can be in time, then the others."""

    def __init__(self, key: Callable[[Item], Key]) -> None:
        self.in_time = Sorted(key)
        self.late = Sorted(_by_arrival)

    def __len__(self) -> int:
        return len(self.in_time) + len(self.late)

    def __getitem__(self, i: int) -> Item:
        first = len(self.in_time)
        return self.in_time[i] if i < first else self.late[i - first]

    def remove(self, item: Item) -> None:
        if not self.in_time.remove(item):
            self.late.remove(item)

    def turn_late(self, item: Item) -> None:
        if self.in_time.remove(item):
            self.late.add(item)


class Band:
    """One band's lines, by tenant, and the tenants by what they were served."""

    def __init__(self, number: int, fairness: Fairness | None, key: Callable[[Item], Key]) -> None:
        self.number = number
        self.lines: dict[str, Line] = {}
        self._fairness = fairness
        self._key = key
        # (service, tenant). An entry whose service is not the tenant's any more is dropped when it comes up.
        self._heap: list[tuple[float, str]] = []

    def group(self, item: Item) -> str:
        return item.admit.tenant if self._fairness is not None else ""

    def service(self, tenant: str) -> float:
        return self._fairness.service(self.number, tenant) if self._fairness is not None else 0.0

    def served(self, tenant: str, service: float) -> None:
        """The tenant's service has changed; `Fairness` tells this to every band where it waits."""
        heapq.heappush(self._heap, (service, tenant))
        if len(self._heap) > 64 + 4 * len(self.lines):
            self._heap = [(self.service(t), t) for t in self.lines]
            heapq.heapify(self._heap)

    def add(self, item: Item) -> None:
        tenant = self.group(item)
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = Line(self._key)
            if self._fairness is not None:
                self._fairness.joins(self, tenant)
            self.served(tenant, self.service(tenant))
        line.in_time.add(item)

    def remove(self, item: Item) -> None:
        tenant = self.group(item)
        line = self.lines[tenant]
        line.remove(item)
        if not len(line):
            del self.lines[tenant]
            if self._fairness is not None:
                self._fairness.leaves(self, tenant)

    def least_served(self) -> str:
        """The tenant whose turn it is."""
        while True:
            service, tenant = self._heap[0]
            if tenant in self.lines and self.service(tenant) == service:
                return tenant
            heapq.heappop(self._heap)


class Banded:
    """Priority, fair and slo: see the module. `fairness` None: a band has one line for all its tenants."""

    def __init__(self, fairness: Fairness | None, by_deadline: bool) -> None:
        self._fairness = fairness
        self._by_deadline = by_deadline
        self.resumptions = Sorted(arrival)
        self.bands: dict[int, Band] = {}

    def add(self, item: Item) -> None:
        if item.admit.resumption:
            self.resumptions.add(item)
            return
        band = self.bands.get(item.band)
        if band is None:
            key = _by_deadline if self._by_deadline else _by_arrival
            band = self.bands[item.band] = Band(item.band, self._fairness, key)
        band.add(item)

    def remove(self, item: Item) -> None:
        if item.admit.resumption:
            self.resumptions.remove(item)
            return
        band = self.bands[item.band]
        band.remove(item)
        if not band.lines:
            del self.bands[item.band]

    def late(self, item: Item) -> None:
        if self._by_deadline and not item.admit.resumption:
            band = self.bands[item.band]
            band.lines[band.group(item)].turn_late(item)

    def num_before(self, item: Item) -> int:
        """How many of its own tenant and band would be served before this item if it joined."""
        band = self.bands.get(item.band)
        line = band.lines.get(band.group(item)) if band is not None else None
        return line.in_time.num_before(item) if line is not None else 0

    def __iter__(self) -> Walk:
        return Walk(self)


class Walk:
    """One pass over a `Banded`. Each step costs a look at a heap's top, as long as what was given is taken out; the first that
    stays costs a copy of that band's tenants."""

    def __init__(self, order: Banded) -> None:
        self._order = order
        self._last: Item | None = None
        self._passed = 0  # resumptions that stay
        self._bands = sorted(order.bands)
        self._band: Band | None = None
        self._at: dict[str, int] = {}  # in this band: how many of a tenant's stay
        self._left: list[tuple[float, str]] | None = None  # in this band: tenants to come, once one has stayed
        self._tenant = ""

    def __iter__(self) -> Iterator[Item]:
        return self

    def skip_tenant(self) -> None:
        """Nothing more of the last item's tenant in its band."""
        if self._band is not None and self._tenant in self._band.lines:
            self._at[self._tenant] = len(self._band.lines[self._tenant])

    def skip_band(self) -> None:
        """Nothing more of the last item's band."""
        if self._band is not None:
            self._band, self._left, self._last = None, None, None

    def __next__(self) -> Item:
        resumptions = self._order.resumptions
        if self._band is None and self._passed < len(resumptions):
            if self._last is not None and resumptions[self._passed] is self._last:
                self._passed += 1
            if self._passed < len(resumptions):
                self._last = resumptions[self._passed]
                return self._last
        while True:
            if self._band is None:
                if not self._bands:
                    raise StopIteration
                band = self._order.bands.get(self._bands.pop(0))
                if band is None:
                    continue
                self._passed = len(resumptions)
                self._band, self._at, self._left, self._last = band, {}, None, None
            item = self._next_of(self._band)
            if item is not None:
                self._last = item
                return item
            self._band = None

    def _next_of(self, band: Band) -> Item | None:
        line = band.lines.get(self._tenant) if self._last is not None else None
        at = self._at.get(self._tenant, 0)
        if line is not None and at < len(line) and line[at] is self._last:
            self._at[self._tenant] = at + 1
        if self._at and self._left is None:
            self._left = [(band.service(tenant), tenant) for tenant in band.lines]
            heapq.heapify(self._left)
        elif self._left is not None and line is not None:
            heapq.heappush(self._left, (band.service(self._tenant), self._tenant))
        if self._left is None:
            if not band.lines:
                return None
            self._tenant = band.least_served()
            return band.lines[self._tenant][0]
        while self._left:
            _, tenant = heapq.heappop(self._left)
            at, rest = self._at.get(tenant, 0), band.lines.get(tenant)
            if rest is not None and at < len(rest):
                self._tenant = tenant
                return rest[at]
        return None


def make_order(policy: str, fairness: Fairness) -> Callable[[], Order]:
    """What makes one order for each model's queue. Tenants' services are shared by all of them."""
    if policy == "fcfs":
        return fcfs
    return lambda: Banded(fairness if policy != "priority" else None, by_deadline=policy == "slo")
