"""The bounded admission queue, and the order it is served in.

`Order` is all a policy has to say; `Fcfs` is the one that is built. Bounds are in requests, prompt tokens and bytes, because
each of the three alone lets somebody fill the memory. A resumption is never refused: its request was admitted before.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import msgspec

from protocol.messages import Admit

FIXED_NBYTES = 1024  # of one waiting request: its objects here and at its gateway


class Item(msgspec.Struct, frozen=True):
    """One waiting request. position: its place in the order of first arrival, kept over all its attempts."""

    admit: Admit
    position: int
    epoch: int  # which it will be given
    queued_at: float
    deadline: float

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.admit)


def num_bytes(admit: Admit) -> int:
    """What a waiting request holds in memory, here and at its gateway: token ids, hashes, names."""
    hashes = len(admit.prefix_hashes) * (33 + 16)
    return FIXED_NBYTES + 8 * admit.prompt_len + hashes + len(admit.request_id) + len(admit.tenant)


class Order(Protocol):
    """Who is next. A policy may look at everything an Item says; what it learns beyond that it keeps itself."""

    def add(self, item: Item) -> None: ...

    def remove(self, item: Item) -> None: ...

    def __iter__(self) -> Iterator[Item]:
        """First to be served first. Meanwhile the caller adds nothing, and may remove what it was given already."""
        ...


class Fcfs:
    """First come, first served; resumptions, whose clients already read tokens, before everybody else."""

    def __init__(self) -> None:
        self._keys: list[tuple[bool, int, str]] = []
        self._items: dict[str, Item] = {}

    @staticmethod
    def key(item: Item) -> tuple[bool, int, str]:
        return not item.admit.resumption, item.position, item.admit.request_id

    def add(self, item: Item) -> None:
        bisect.insort(self._keys, self.key(item))
        self._items[item.admit.request_id] = item

    def remove(self, item: Item) -> None:
        del self._items[item.admit.request_id]
        del self._keys[bisect.bisect_left(self._keys, self.key(item))]

    def __iter__(self) -> Iterator[Item]:
        for key in tuple(self._keys):
            yield self._items[key[2]]


class Queue:
    """What waits to be placed, with its bounds."""

    def __init__(self, order: Order, max_requests: int, max_tokens: int, max_bytes: int) -> None:
        self.order = order
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.max_bytes = max_bytes
        self.num_tokens = 0
        self.num_bytes = 0
        self.tokens_of: Counter[str] = Counter()  # by tenant
        self._items: dict[str, Item] = {}
        self._deadlines: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._items

    def __iter__(self) -> Iterator[Item]:
        return iter(self.order)

    def get(self, request_id: str) -> Item | None:
        return self._items.get(request_id)

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
        request_id = item.admit.request_id
        assert request_id not in self._items, "a request waits once"
        self._items[request_id] = item
        self.order.add(item)
        self.num_tokens += item.admit.prompt_len
        self.num_bytes += item.num_bytes
        self.tokens_of[item.admit.tenant] += item.admit.prompt_len
        heapq.heappush(self._deadlines, (item.deadline, request_id))
        if len(self._deadlines) > 64 + 2 * len(self._items):  # those that left before their deadline
            self._deadlines = [(i.deadline, i.admit.request_id) for i in self._items.values()]
            heapq.heapify(self._deadlines)

    def remove(self, request_id: str) -> Item | None:
        """Take it out, if it is there."""
        item = self._items.pop(request_id, None)
        if item is None:
            return None
        self.order.remove(item)
        self.num_tokens -= item.admit.prompt_len
        self.num_bytes -= item.num_bytes
        tenant = item.admit.tenant
        self.tokens_of[tenant] -= item.admit.prompt_len
        if self.tokens_of[tenant] <= 0:
            del self.tokens_of[tenant]
        return item

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

    def check_integrity(self) -> None:
        items = list(self._items.values())
        assert {i.admit.request_id for i in self.order} == self._items.keys(), "order and queue hold the same"
        assert self.num_tokens == sum(i.admit.prompt_len for i in items), "tokens are the sum of what waits"
        assert self.num_bytes == sum(i.num_bytes for i in items), "bytes are the sum of what waits"
        assert sum(self.tokens_of.values()) == self.num_tokens, "tenants' tokens are all tokens"
