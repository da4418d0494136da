"""What was promised to each tenant and class, and what was kept: an hour of it, in bounded memory. Pure; times are arguments.

A request is judged in the class whose promise it had in the end, by its own promise where it asked for a tighter one. One that was
degraded out of another class, or cut short, counts as degraded in the row of the class that it asked for.

Requests fall into slots of ten seconds; whole minutes older than ten minutes are merged into one slot each. A slot holds
counts and two histograms with logarithmic buckets, so quantiles over any window are within one bucket (9 %). What was kept is
counted exactly, when a request ends.

Attainment is the share of admitted requests that finished within the promise: a failure breaks it, a client that left does not
count, and a refusal is counted beside it with its reason. Goodput is requests a second that kept the promise. The error budget
of a window is the share of its requests that may break the promise; what is left of it goes from 1 to 0.

Fed and read by `cluster/history.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from protocol.messages import Outcome

SLOT_S = 10.0
MINUTE_S = 60.0
FINE_S = 600.0  # how far back slots stay fine
KEEP_S = 3600.0
MAX_TENANTS = 64
MAX_CLASSES = 8
MAX_REASONS = 32
OTHER = "other"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")

_LEAST = 1e-5  # seconds; everything quicker is in bucket 0
_PER_OCTAVE = 8
_MAX_BUCKET = _PER_OCTAVE * 31  # about six hours


class Promise(msgspec.Struct, frozen=True):
    """Of one class. attainment: the share of requests that is to keep both times."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.99

    def is_kept(self, ttft_s: float, tpot_s: float | None) -> bool:
        """A request of one token has no time per token, and cannot break that part."""
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


class Prices(msgspec.Struct, frozen=True):
    """Money for a million tokens. cached: of prompt tokens from a cache; None: as other prompt tokens."""

    input: float | None = None
    cached: float | None = None
    output: float | None = None

    def cost(self, num_input: int, num_cached: int, num_output: int) -> float | None:
        """None when there are no prices. num_cached of the num_input prompt tokens came from a cache."""
        if self.input is None and self.cached is None and self.output is None:
            return None
        price = self.input or 0.0
        cached = price if self.cached is None else self.cached
        return ((num_input - num_cached) * price + num_cached * cached + num_output * (self.output or 0.0)) / 1e6


class Names:
    """Who may stand in a table or a label: `known`, then the first that come, up to `most`; all others are one, "other".

    A name that is no plain word is among the others too: text of a client never becomes a label by itself.
    """

    def __init__(self, known: Iterable[str] = (), most: int = MAX_TENANTS) -> None:
        self._most = most
        self._names: dict[str, None] = dict.fromkeys(known)

    def of(self, name: str) -> str:
        if name in self._names:
            return name
        if len(self._names) >= self._most or not _NAME.fullmatch(name):
            return OTHER
        self._names[name] = None
        return name


class Histogram:
    """Counts in buckets whose bounds grow by 2 ** (1/8). Sparse."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0

    def add(self, value: float) -> None:
        bucket = 0 if value <= _LEAST else min(_MAX_BUCKET, math.ceil(_PER_OCTAVE * math.log2(value / _LEAST)))
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.count += 1

    def merge(self, other: Histogram) -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count

    def quantile(self, q: float) -> float | None:
        """The middle of the bucket with the nearest-rank quantile; None when empty."""
        rank, seen = max(1, math.ceil(q * self.count)), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return float(_LEAST * 2 ** ((bucket - 0.5) / _PER_OCTAVE)) if bucket else _LEAST
        return None

    def summary(self) -> dict[str, float | None]:
        return {name: self.quantile(q) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


class Cell:
    """One tenant and class during one slot, or the sum of several."""

    def __init__(self) -> None:
        self.ttft = Histogram()
        self.tpot = Histogram()
        self.finished = self.failed = self.cancelled = self.kept = self.degraded = 0
        self.input = self.cached = self.output = 0  # tokens
        self.cost = 0.0  # by the prices of the day
        self.refused: Counter[str] = Counter()

    def merge(self, other: Cell) -> None:
        self.ttft.merge(other.ttft)
        self.tpot.merge(other.tpot)
        for name in ("finished", "failed", "cancelled", "kept", "degraded", "input", "cached", "output", "cost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.refused.items():
            self.refuse(reason, count)

    def refuse(self, reason: str, count: int = 1) -> None:
        self.refused[reason if reason in self.refused or len(self.refused) < MAX_REASONS else OTHER] += count


class _Slots:
    """The slots of one tenant and class: (start, cell), oldest first."""

    def __init__(self) -> None:
        self.fine: deque[tuple[float, Cell]] = deque()
        self.coarse: deque[tuple[float, Cell]] = deque()

    def at(self, now: float) -> Cell:
        start = math.floor(now / SLOT_S) * SLOT_S
        if not self.fine or self.fine[-1][0] < start:
            self.fine.append((start, Cell()))
        return self.fine[-1][1]

    def age(self, now: float) -> None:
        """Merge what became old, drop what is too old."""
        while self.fine and _minute(self.fine[0][0]) + MINUTE_S <= now - FINE_S:
            start, cell = self.fine.popleft()
            if not self.coarse or self.coarse[-1][0] < _minute(start):
                self.coarse.append((_minute(start), Cell()))
            self.coarse[-1][1].merge(cell)
        while self.coarse and self.coarse[0][0] < now - KEEP_S:
            self.coarse.popleft()

    def since(self, start: float) -> Iterator[Cell]:
        for slots in (self.coarse, self.fine):
            yield from (cell for at, cell in slots if at >= start)


def _minute(at: float) -> float:
    return math.floor(at / MINUTE_S) * MINUTE_S


class Sla:
    """Feed it every outcome and every refusal; `rows` is the report. `set_table` brings the tenants file's promises and prices."""

    def __init__(self, promises: Mapping[str, Promise], prices: Prices | None = None, tenants: Iterable[str] = ()) -> None:
        assert promises, "somebody must be promised something"
        self.promises = dict(promises)
        self.prices = prices or Prices()
        self.tenants = Names(tenants, MAX_TENANTS)
        self.classes = Names(promises, MAX_CLASSES)
        self._prices_of: dict[str, Prices] = {}
        self._slots: dict[tuple[str, str], _Slots] = {}
        self._started_at: float | None = None

    def set_table(self, promises: Mapping[str, Promise], prices_of: Mapping[str, Prices], tenants: Iterable[str]) -> None:
        """From now on. What was judged stays judged; classes that are gone keep their promise while the report still shows them.
        prices_of: by tenant; others have the cluster's."""
        shown = {slo_class for _, slo_class in self._slots}
        self.promises = {**promises, **{name: old for name, old in self.promises.items() if name in shown and name not in promises}}
        self.classes = Names(self.promises, max(MAX_CLASSES, len(self.promises)))
        self._prices_of = dict(prices_of)
        known = dict.fromkeys([*tenants, *(tenant for tenant, _ in self._slots)])
        self.tenants = Names(known, max(MAX_TENANTS, len(known)))

    def prices_of(self, tenant: str) -> Prices:
        return self._prices_of.get(tenant, self.prices)

    def key(self, tenant: str, slo_class: str) -> tuple[str, str]:
        """The two labels that stand for them."""
        return self.tenants.of(tenant), self.classes.of(slo_class)

    def promise(self, slo_class: str) -> Promise:
        """A class that nobody promised anything has the first one's."""
        return self.promises.get(slo_class) or next(iter(self.promises.values()))

    def is_kept(self, outcome: Outcome) -> bool:
        return is_kept(outcome, self.promise(self.classes.of(outcome.slo_class)))

    def outcome(self, outcome: Outcome, now: float) -> None:
        """A request that was admitted is over."""
        cell = self._cell(outcome.tenant, outcome.slo_class, now)
        kind = outcome.kind if outcome.kind in ("finished", "cancelled") else "failed"
        setattr(cell, kind, getattr(cell, kind) + 1)
        if outcome.output_tokens > 0:
            cell.input += max(0, outcome.prompt_tokens)
            cell.cached += max(0, outcome.cached_tokens)
            cell.output += outcome.output_tokens
            prices = self.prices_of(self.tenants.of(outcome.tenant))
            cell.cost += prices.cost(max(0, outcome.prompt_tokens), max(0, outcome.cached_tokens), outcome.output_tokens) or 0.0
        tpot_s = tpot_of(outcome)
        if kind == "finished" and math.isfinite(outcome.ttft_s) and math.isfinite(outcome.tpot_s):
            cell.ttft.add(outcome.ttft_s)
            if tpot_s is not None:
                cell.tpot.add(tpot_s)
        cell.kept += self.is_kept(outcome)
        if outcome.degraded:
            self._cell(outcome.tenant, outcome.asked_class or outcome.slo_class, now).degraded += 1

    def refused(self, tenant: str, slo_class: str, reason: str, now: float) -> None:
        self._cell(tenant, slo_class, now).refuse(reason)

    def rows(self, window_s: float, now: float) -> list[dict[str, Any]]:
        """One row per tenant and class that was seen in the window, and one for each promise, seen or not.

        tenant class, ttft tpot (p50 p95 p99, seconds), promise (ttft_s tpot_s attainment), attainment, budget_left, goodput_per_s,
        requests finished failed cancelled degraded, refused (reason -> count), tokens (input cached output), cost (None without
        prices)
        """
        self._begin(now)
        size = SLOT_S if window_s <= FINE_S else MINUTE_S
        since = math.ceil((now - min(window_s, KEEP_S)) / size) * size
        covered_s = max(1.0, now - max(since, self._started_at or 0.0))
        found: list[dict[str, Any]] = []
        for key, slots in sorted(self._slots.items()):
            slots.age(now)
            total, is_empty = Cell(), True
            for cell in slots.since(since):
                total.merge(cell)
                is_empty = False
            if not is_empty:
                found.append(self._row(key, total, covered_s))
        for key in [key for key, slots in self._slots.items() if not slots.fine and not slots.coarse]:
            del self._slots[key]
        return found

    def _row(self, key: tuple[str, str], cell: Cell, covered_s: float) -> dict[str, Any]:
        promise = self.promise(key[1])
        num_judged = cell.finished + cell.failed
        attainment = cell.kept / num_judged if num_judged else None
        return {
            "tenant": key[0],
            "class": key[1],
            "ttft": cell.ttft.summary(),
            "tpot": cell.tpot.summary(),
            "promise": {"ttft_s": promise.ttft_s, "tpot_s": promise.tpot_s, "attainment": promise.attainment},
            "attainment": attainment,
            "budget_left": budget_left(cell.kept, num_judged, promise.attainment),
            "goodput_per_s": cell.kept / covered_s,
            "requests": num_judged + cell.cancelled + sum(cell.refused.values()),
            "finished": cell.finished,
            "failed": cell.failed,
            "cancelled": cell.cancelled,
            "degraded": cell.degraded,
            "refused": dict(cell.refused),
            "tokens": {"input": cell.input, "cached": cell.cached, "output": cell.output},
            "cost": cell.cost if cell.cost or self.prices_of(key[0]).cost(1, 0, 1) is not None else None,
        }

    def _cell(self, tenant: str, slo_class: str, now: float) -> Cell:
        self._begin(now)
        slots = self._slots.setdefault(self.key(tenant, slo_class), _Slots())
        slots.age(now)
        return slots.at(now)

    def _begin(self, now: float) -> None:
        if self._started_at is None:
            self._started_at = now


def is_kept(outcome: Outcome, promise: Promise) -> bool:
    """Whether it finished within its class's promise, and within its own where it has one."""
    own = Promise(
        min(promise.ttft_s, outcome.ttft_slo_s or math.inf), min(promise.tpot_s, outcome.tpot_slo_s or math.inf), promise.attainment
    )
    return outcome.kind == "finished" and own.is_kept(outcome.ttft_s, tpot_of(outcome))


def keeps_ttft(outcome: Outcome, promise: Promise) -> bool:
    """Whether it finished, and its first token came within its class's promise, and within its own where it has one."""
    return outcome.kind == "finished" and outcome.ttft_s <= min(promise.ttft_s, outcome.ttft_slo_s or math.inf)


def tpot_of(outcome: Outcome) -> float | None:
    """Seconds per token after the first; None for a request of one token."""
    return outcome.tpot_s if outcome.output_tokens > 1 and outcome.tpot_s > 0 else None


def budget_left(num_kept: int, num_judged: int, attainment: float) -> float | None:
    """The share of the error budget that is left: 1 nothing broken, 0 all of it or more used. None without requests."""
    if not num_judged:
        return None
    allowed = (1.0 - attainment) * num_judged
    broken = num_judged - num_kept
    return max(0.0, 1.0 - broken / allowed) if allowed > 0 else float(not broken)
