"""The bounded admission queue: what waits, by model, and when its promise can no longer be kept.

`Order` is all a policy has to say (scheduler/order.py has ours); there is one for each model, so that a model whose first in line
waits for room costs the others nothing. Bounds are in requests, prompt tokens and bytes over all models, because each of the
three alone lets somebody fill the memory. A resumption is never refused: its request was admitted before.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import msgspec

from protocol.messages import Admit

FIXED_NBYTES = 1024  # of one waiting request: its objects here and at its gateway


class Item(msgspec.Struct, frozen=True):
    """One waiting request. position: its place in the order of first arrival, kept over all its attempts.

    Times are seconds of the scheduler's clock. promised_at: when its first token is due; late_at: from when on that can no longer
    be kept, by what its prefill (service_s) was predicted to take; both infinite where nothing was promised.
    """

    admit: Admit
    position: int
    epoch: int  # which it will be given
    queued_at: float
    deadline: float
    band: int = 1
    promised_at: float = math.inf
    late_at: float = math.inf
    service_s: float = 0.0
    decode_s: float = 0.0  # predicted seconds that it adds to others' steps
    tokens: float = 0.0  # as fairness will charge them, before weights
    cost: float = 0.0  # its share of the pools: seconds of each over what the pool does a second
    forecast_wait_s: float = 0.0
    refuses_late: bool = False
    is_appointed: bool = False  # it came when it was told to
    degraded: str = ""
    asked: Admit | None = None  # as it was asked for, where something was taken off

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.admit)


def num_bytes(admit: Admit) -> int:
    """What a waiting request holds in memory, here and at its gateway: token ids, hashes, names."""
    hashes = len(admit.prefix_hashes) * (33 + 16)
    return FIXED_NBYTES + 8 * admit.prompt_len + hashes + len(admit.request_id) + len(admit.tenant)


class Order(Protocol):
    """Who is next. A policy may look at everything an Item says; what it learns beyond that it keeps itself.

    What ours have besides, and another one need not: `late(item)`, told when an item's promise cannot be kept any more; and an
    iterator with `skip_tenant()` and `skip_band()`, which leave out the rest of the last item's tenant or band.
    """

    def add(self, item: Item) -> None: ...

    def remove(self, item: Item) -> None: ...

    def __iter__(self) -> Iterator[Item]:
        """First to be served first. Meanwhile the caller adds nothing, and may remove what it was given already."""
        ...


Key = tuple[Any, ...]


class Sorted:
    """Items by a key, in a sorted list: an insertion moves pointers within one block of memory, microseconds for ten thousand."""

    def __init__(self, key: Callable[[Item], Key]) -> None:
        self._key = key
        self._keys: list[Key] = []
        self._items: list[Item] = []

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Item:
        return self._items[i]

    def add(self, item: Item) -> None:
        key = self._key(item)
        i = bisect.bisect_left(self._keys, key)
        self._keys.insert(i, key)
        self._items.insert(i, item)

    def remove(self, item: Item) -> bool:
        """Whether it was there."""
        i = bisect.bisect_left(self._keys, self._key(item))
        if i == len(self._items) or self._items[i].admit.request_id != item.admit.request_id:
            return False
        del self._keys[i], self._items[i]
        return True

    def num_before(self, item: Item) -> int:
        """How many would be served before this item if it joined."""
        return bisect.bisect_left(self._keys, self._key(item))


class ByKey:
    """An order in which the least key is first. An item's key may not change while it waits."""

    def __init__(self, key: Callable[[Item], Key]) -> None:
        self._sorted = Sorted(key)

    def add(self, item: Item) -> None:
        self._sorted.add(item)

    def remove(self, item: Item) -> None:
        self._sorted.remove(item)

    def __iter__(self) -> Iterator[Item]:
        i = 0
        while i < len(self._sorted):
            item = self._sorted[i]
            yield item
            # It may have been taken out meanwhile; then its successor stands in its place.
            i += i < len(self._sorted) and self._sorted[i] is item


def arrival(item: Item) -> Key:
    """Resumptions before everybody else, whose clients read tokens already."""
    return not item.admit.resumption, item.position, item.admit.request_id


def fcfs() -> ByKey:
    """First come, first served."""
    return ByKey(arrival)


class Waiting(NamedTuple):
    """What waits of one tenant in one band of one model."""

    requests: int
    tokens: float  # as fairness will charge them, before weights
    service_s: float  # predicted seconds of prefill
    decode_s: float  # predicted seconds that they will add to others' steps

    def plus(self, item: Item, by: int) -> Waiting:
        return Waiting(
            self.requests + by,
            max(0.0, self.tokens + by * item.tokens),
            max(0.0, self.service_s + by * item.service_s),
            max(0.0, self.decode_s + by * item.decode_s),
        )


NOTHING = Waiting(0, 0.0, 0.0, 0.0)


class Queue:
    """What waits to be placed, with its bounds."""

    def __init__(self, order: Callable[[], Order], max_requests: int, max_tokens: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.max_bytes = max_bytes
        self.num_tokens = 0
        self.num_bytes = 0
        self.tokens_of: Counter[str] = Counter()  # by tenant
        self.orders: dict[str, Order] = {}  # by model; only of those that something waits for
        self.num_of: Counter[str] = Counter()  # requests by model
        self.waiting: dict[tuple[str, int], dict[str, Waiting]] = {}  # model, band -> tenant -> what can still be in time
        self.totals: dict[tuple[str, int], Waiting] = {}  # the same over all tenants
        self._costliest: dict[tuple[str, int, str], list[tuple[float, int, str]]] = {}
        # band, tenant -> what of it may be pushed out, oldest first, and its tokens.
        self.owners: dict[tuple[int, str], dict[str, None]] = {}
        self.owned: Counter[tuple[int, str]] = Counter()
        self._make_order = order
        self._items: dict[str, Item] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._late_at: list[tuple[float, int, str]] = []
        self._late: set[str] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._items

    def __iter__(self) -> Iterator[Item]:
        """Model by model, each in its order."""
        for order in list(self.orders.values()):
            yield from order

    @property
    def oldest_at(self) -> float | None:
        """Since when the one that has waited longest has waited. Looks at all of them."""
        return min((item.queued_at for item in self._items.values()), default=None)

    def get(self, request_id: str) -> Item | None:
        return self._items.get(request_id)

    def victim(self, band: int, tenant: str, share: Callable[[str], float]) -> Item | None:
        """Who is to make room for one of this band and tenant: the newest of the lowest band below it, of the tenant that has most
        there; else of the tenant of its own band that has more than this one. share: weight of a tenant."""
        lower = [owner for owner in self.owners if owner[0] > band]
        if lower:
            lowest = max(owner[0] for owner in lower)
            owners = [owner for owner in lower if owner[0] == lowest]
        else:
            mine = (self.owned[band, tenant] + 1) / share(tenant)
            owners = [o for o in self.owners if o[0] == band and o[1] != tenant and self.owned[o] / share(o[1]) > mine]
        if not owners:
            return None
        most = max(owners, key=lambda owner: (self.owned[owner] / share(owner[1]), owner[1]))
        return self._items[next(reversed(self.owners[most]))]

    def is_late(self, request_id: str) -> bool:
        return request_id in self._late

    def items(self) -> Iterator[Item]:
        """All of them, in no order that means anything."""
        return iter(self._items.values())

    def overflow(self, admit: Admit) -> tuple[str, float] | None:
        """Which bound this request would break, and how full (1.0 = at the bound) the queue would be; None if none.

        An empty queue takes any one request: it would never get in otherwise.
        """
        if not self._items:
            return None
        fills = (
            ("requests", (len(self._items) + 1) / self.max_requests),
            ("tokens", (self.num_tokens + admit.prompt_len) / self.max_tokens),
            ("bytes", (self.num_bytes + num_bytes(admit)) / self.max_bytes),
        )
        name, fill = max(fills, key=lambda pair: pair[1])
        return (name, fill) if fill > 1.0 else None

    def add(self, item: Item) -> None:
        request_id, model = item.admit.request_id, item.admit.model
        assert request_id not in self._items, "a request waits once"
        self._items[request_id] = item
        order = self.orders.get(model)
        if order is None:
            order = self.orders[model] = self._make_order()
        order.add(item)
        self.num_of[model] += 1
        self.num_tokens += item.admit.prompt_len
        self.num_bytes += item.num_bytes
        self.tokens_of[item.admit.tenant] += item.admit.prompt_len
        if not item.admit.resumption:
            owner = item.band, item.admit.tenant
            self.owners.setdefault(owner, {})[request_id] = None
            self.owned[owner] += item.admit.prompt_len
        self._count(item, 1)
        heapq.heappush(self._deadlines, (item.deadline, request_id))
        if item.late_at < math.inf:
            heapq.heappush(self._late_at, (item.late_at, item.position, request_id))
        self._compact()

    def remove(self, request_id: str) -> Item | None:
        """Take it out, if it is there."""
        item = self._items.pop(request_id, None)
        if item is None:
            return None
        model, tenant = item.admit.model, item.admit.tenant
        self.orders[model].remove(item)
        self.num_of[model] -= 1
        if not self.num_of[model]:
            del self.orders[model], self.num_of[model]
        self.num_tokens -= item.admit.prompt_len
        self.num_bytes -= item.num_bytes
        self.tokens_of[tenant] -= item.admit.prompt_len
        if self.tokens_of[tenant] <= 0:
            del self.tokens_of[tenant]
        if not item.admit.resumption:
            owner = item.band, tenant
            self.owned[owner] -= item.admit.prompt_len
            del self.owners[owner][request_id]
            if not self.owners[owner]:
                del self.owners[owner], self.owned[owner]
        if request_id in self._late:
            self._late.remove(request_id)
        else:
            self._count(item, -1)
        return item

    def turn_late(self, now: float) -> list[Item]:
        """Those whose promise has become impossible to keep since the last call. They stay, behind those of their tenant that
        can be in time; what else becomes of them the caller decides."""
        turned = []
        while self._late_at and self._late_at[0][0] <= now:
            late_at, _, request_id = heapq.heappop(self._late_at)
            item = self._items.get(request_id)
            if item is None or item.late_at != late_at or request_id in self._late:
                continue
            self._late.add(request_id)
            self._count(item, -1)
            tell = getattr(self.orders[item.admit.model], "late", None)
            if tell is not None:
                tell(item)
            turned.append(item)
        return turned

    def expired(self, now: float) -> list[Item]:
        """Take out what has waited past its deadline."""
        out = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            item = self.remove(heapq.heappop(self._deadlines)[1])
            assert item is not None, "next_deadline skips those that left"
            out.append(item)
        return out

    def next_deadline(self) -> float | None:
        while self._deadlines:
            deadline, request_id = self._deadlines[0]
            item = self._items.get(request_id)
            if item is not None and item.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def next_late(self) -> float | None:
        """When the next promise becomes impossible to keep."""
        while self._late_at:
            late_at, _, request_id = self._late_at[0]
            item = self._items.get(request_id)
            if item is not None and item.late_at == late_at and request_id not in self._late:
                return late_at
            heapq.heappop(self._late_at)
        return None

    def _count(self, item: Item, by: int) -> None:
        model, band, tenant = key = item.admit.model, item.band, item.admit.tenant
        tenants = self.waiting.setdefault((model, band), {})
        has = tenants.get(tenant, NOTHING).plus(item, by)
        total = self.totals.get((model, band), NOTHING).plus(item, by)
        if by > 0:
            heap = self._costliest.setdefault(key, [])
            heapq.heappush(heap, (-item.cost, item.position, item.admit.request_id))
            if len(heap) > 64 + 4 * has.requests:
                self._costliest[key] = [entry for entry in heap if self._can_be_shed(entry[2])]
                heapq.heapify(self._costliest[key])
        if has.requests:
            tenants[tenant] = has
            self.totals[model, band] = total
            return
        tenants.pop(tenant, None)
        self._costliest.pop(key, None)
        if tenants:
            self.totals[model, band] = total
        else:
            del self.waiting[model, band]
            self.totals.pop((model, band), None)

    def _can_be_shed(self, request_id: str) -> bool:
        item = self._items.get(request_id)
        return item is not None and item.refuses_late and not (item.is_appointed or item.admit.resumption)

    def costliest(self, model: str, band: int, tenant: str) -> Item | None:
        """Of those that are in time and may be refused, the one that takes most of the pools."""
        heap = self._costliest.get((model, band, tenant), [])
        while heap:
            request_id = heap[0][2]
            if self._can_be_shed(request_id) and request_id not in self._late:
                return self._items[request_id]
            heapq.heappop(heap)
        return None

    def _compact(self) -> None:
        """Drop from the heaps those that left before their time."""
        if len(self._deadlines) > 64 + 2 * len(self._items):
            self._deadlines = [(i.deadline, i.admit.request_id) for i in self._items.values()]
            heapq.heapify(self._deadlines)
        if len(self._late_at) > 64 + 2 * len(self._items):
            alive = (i for i in self._items.values() if i.late_at < math.inf and i.admit.request_id not in self._late)
            self._late_at = [(i.late_at, i.position, i.admit.request_id) for i in alive]
            heapq.heapify(self._late_at)

    def check_integrity(self) -> None:
        items = list(self._items.values())
        assert {i.admit.request_id for i in self} == self._items.keys(), "orders and queue hold the same"
        assert self.num_tokens == sum(i.admit.prompt_len for i in items), "tokens are the sum of what waits"
        assert self.num_bytes == sum(i.num_bytes for i in items), "bytes are the sum of what waits"
        assert sum(self.tokens_of.values()) == self.num_tokens, "tenants' tokens are all tokens"
        assert self.num_of.total() == len(items), "models' requests are all requests"
        assert self._late <= self._items.keys(), "who is late waits"
        in_time = sum(w.requests for tenants in self.waiting.values() for w in tenants.values())
        assert in_time == len(items) - len(self._late), "who waits is late or in time"
