"""Buckets of a tenant (requests and tokens a minute) and the share of retries: limits by contract, not by load.

A bucket holds a minute's worth. Tokens are charged at the door with input and expected output and set right at the end, so a level
may fall below zero: then the next ones wait until it has recovered. A request of more than a whole bucket passes when it is full.
They begin full again when the scheduler is restarted (truth rule R9).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from configs.tenants import Tenant

MINUTE_S = 60.0
MAX_TENANTS = 10_000
MAX_CHARGES = 131_072
WINDOW_S = 30.0  # in which retries and refusals count
MAX_EVENTS = 4096


class Bucket:
    """`rate` units a second, at most `size` of them saved up."""

    def __init__(self, per_min: float, now: float) -> None:
        self.size = per_min
        self.rate = per_min / MINUTE_S
        self._level = per_min
        self._at = now

    def level(self, now: float) -> float:
        return min(self.size, self._level + max(0.0, now - self._at) * self.rate)

    def take(self, amount: float, now: float) -> None:
        """Also gives back, when the amount is negative."""
        self._level = min(self.size, self.level(now) - amount)
        self._at = max(now, self._at)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much can be taken; 0.0: now."""
        return max(0.0, (min(amount, self.size) - self.level(now)) / self.rate)


class Charge(NamedTuple):
    tenant: str
    tokens: float


class Buckets:
    """All tenants', made when they are first needed."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Bucket] = OrderedDict()
        self._tokens: OrderedDict[str, Bucket] = OrderedDict()
        self._charges: OrderedDict[str, Charge] = OrderedDict()  # request_id -> what it was charged at the door

    def wait(self, name: str, spec: Tenant, tokens: float, now: float) -> tuple[str, float, float]:
        """(which bucket, its limit, seconds until it lets such a request in); seconds are 0.0 when both do now."""
        found = ("", 0.0, 0.0)
        for kind, limit, bucket, amount in (
            ("requests", spec.requests_per_min, self._of(self._requests, name, spec.requests_per_min, now), 1.0),
            ("tokens", spec.tokens_per_min, self._of(self._tokens, name, spec.tokens_per_min, now), tokens),
        ):
            if bucket is not None and limit is not None:
                wait_s = bucket.wait_s(amount, now)
                if wait_s > found[2]:
                    found = kind, limit, wait_s
        return found

    def take(self, name: str, spec: Tenant, tokens: float, now: float, requests: float = 1.0) -> None:
        """Also what an appointment sets aside, and with negative amounts what it gives back."""
        for known, limit, amount in (
            (self._requests, spec.requests_per_min, requests),
            (self._tokens, spec.tokens_per_min, tokens),
        ):
            bucket = self._of(known, name, limit, now)
            if bucket is not None:
                bucket.take(amount, now)

    def remember(self, request_id: str, name: str, tokens: float) -> None:
        self._charges[request_id] = Charge(name, tokens)
        if len(self._charges) > MAX_CHARGES:
            self._charges.popitem(last=False)

    def correct(self, request_id: str, spec: Tenant, tokens: float, now: float, was_served: bool) -> None:
        """It is over and had so many tokens. One that was never served gets its place back, too."""
        charge = self._charges.pop(request_id, None)
        if charge is not None:
            self.take(charge.tenant, spec, tokens - charge.tokens, now, 0.0 if was_served else -1.0)

    def levels(self, now: float) -> dict[str, dict[str, float]]:
        """tenant -> "requests", "tokens" -> what is left; only of those that were asked for lately."""
        found: dict[str, dict[str, float]] = {}
        for kind, known in (("requests", self._requests), ("tokens", self._tokens)):
            for name, bucket in known.items():
                found.setdefault(name, {})[kind] = bucket.level(now)
        return found

    @staticmethod
    def _of(known: OrderedDict[str, Bucket], name: str, limit: float | None, now: float) -> Bucket | None:
        if limit is None:
            return None
        bucket = known.get(name)
        if bucket is None or bucket.size != limit:  # the file has changed: a new contract begins full
            bucket = known[name] = Bucket(limit, now)
            if len(known) > MAX_TENANTS:
                known.popitem(last=False)
        return bucket


class RetryBudget:
    """While requests are refused, clients' own retries are at most a share of what is let in (as gRPC's and Finagle's budgets,
    but at
    the server): otherwise refusing makes the load that it is there to shed."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._admitted: deque[tuple[float, bool]] = deque(maxlen=MAX_EVENTS)
        self._num_retries = 0
        self._refused_at = -WINDOW_S

    def admitted(self, is_retry: bool, now: float) -> None:
        if len(self._admitted) == MAX_EVENTS:
            self._num_retries -= self._admitted[0][1]
        self._admitted.append((now, is_retry))
        self._num_retries += is_retry

    def refused(self, now: float) -> None:
        self._refused_at = now

    def is_spent(self, now: float) -> bool:
        """Whether one more retry would be one too many."""
        while self._admitted and self._admitted[0][0] < now - WINDOW_S:
            self._num_retries -= self._admitted.popleft()[1]
        if now - self._refused_at >= WINDOW_S:
            return False
        return self._num_retries + 1 > max(1.0, self._share * (len(self._admitted) + 1))

    def wait_s(self, now: float) -> float:
        """Seconds until the oldest retry that counts is forgotten."""
        oldest = next((at for at, is_retry in self._admitted if is_retry), now)
        return max(1.0, oldest + WINDOW_S - now)
