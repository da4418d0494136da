"""Who was served how much: weighted virtual token counters, one per band and tenant, over all models.

VTC (Sheng et al., OSDI'24) with charges at placement: (input + 2 * predicted output) / weight, corrected to the true output when
the request ends. The least served of those that wait is next. A tenant that begins to wait again is lifted to the least served of
those that wait (or to the last that did), so idle time earns nothing; it is never lowered.

The bound (docs/decision.md has the proof): for two tenants f, g that wait in one band at the same models,

    |S_f - S_g| <= u + X + Y,  service in tokens over weight

u the largest charge of one request, X what outcomes may still add to one tenant's requests under way (2 * (true - predicted) over
weight,
summed over them), Y what they may take back. X and Y are below 2 / weight times the tokens that the decode pool can hold.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0
MAX_COUNTERS = 20_000  # (band, tenant) pairs; those that were served least and do not wait are forgotten first
MAX_CHARGES = 131_072  # requests whose outcome is awaited


class Listener(Protocol):
    """A band of one model's order."""

    number: int

    def served(self, tenant: str, service: float) -> None: ...


class Charge(NamedTuple):
    """What one request was charged at its first placement. predicted: output tokens of all its choices."""

    band: int
    tenant: str
    weight: float
    predicted: float


class Fairness:
    def __init__(self, max_counters: int = MAX_COUNTERS) -> None:
        self._services: dict[tuple[int, str], float] = {}
        self._listeners: dict[tuple[int, str], list[Listener]] = {}  # of those that wait
        self._waiting: dict[int, dict[str, None]] = {}  # band -> tenants that wait at some model
        self._floor: dict[int, float] = {}  # band -> what the last that waited there had been served
        self._charges: OrderedDict[str, Charge] = OrderedDict()
        self._max_counters = max_counters

    def service(self, band: int, tenant: str) -> float:
        """Tokens over weight."""
        return self._services.get((band, tenant), 0.0)

    def level(self, band: int) -> float:
        """What a tenant that begins to wait now is lifted to."""
        waiting = self._waiting.get(band)
        if not waiting:
            return self._floor.get(band, 0.0)
        return min(self._services[band, tenant] for tenant in waiting)

    def joins(self, listener: Listener, tenant: str) -> None:
        """The tenant begins to wait at one model's band."""
        band = listener.number
        key = band, tenant
        listeners = self._listeners.get(key)
        if listeners is None:
            level = self.level(band)
            self._services[key] = max(self._services.get(key, level), level)
            self._waiting.setdefault(band, {})[tenant] = None
            listeners = self._listeners[key] = []
            if len(self._services) > self._max_counters:
                self._forget()
        listeners.append(listener)

    def leaves(self, listener: Listener, tenant: str) -> None:
        """The last of the tenant's requests has left that model's band."""
        band = listener.number
        listeners = self._listeners[band, tenant]
        listeners.remove(listener)
        if listeners:
            return
        del self._listeners[band, tenant]
        waiting = self._waiting[band]
        del waiting[tenant]
        if not waiting:
            del self._waiting[band]
            self._floor[band] = max(self._floor.get(band, 0.0), self._services[band, tenant])

    def charge(self, request_id: str, band: int, tenant: str, weight: float, prompt_len: int, predicted: float) -> None:
        """It was placed. A request is charged once, however often it is placed: that it had to go on elsewhere is our fault."""
        if request_id in self._charges:
            return
        self._charges[request_id] = Charge(band, tenant, weight, predicted)
        while len(self._charges) > MAX_CHARGES:
            self._charges.popitem(last=False)
        self._add(band, tenant, (INPUT_PRICE * prompt_len + OUTPUT_PRICE * predicted) / weight)

    def correct(self, request_id: str, output_tokens: float) -> float | None:
        """It is over, with so many output tokens in all. Returns by how many tokens the prediction was short; None if unknown."""
        charge = self._charges.pop(request_id, None)
        if charge is None:
            return None
        short = output_tokens - charge.predicted
        self._add(charge.band, charge.tenant, OUTPUT_PRICE * short / charge.weight)
        return short

    def lift(self, band: int, tenant: str) -> None:
        """It waits for a limit of its own (kv_share), not for its turn: meanwhile it saves up nothing."""
        others = [self._services[band, t] for t in self._waiting.get(band, ()) if t != tenant]
        if others and min(others) > self._services.get((band, tenant), 0.0):
            self._add(band, tenant, min(others) - self._services.get((band, tenant), 0.0))

    def lift_to(self, band: int, tenant: str, service: float) -> None:
        """It let one pass that had been served so much, because it floods. Never lowers."""
        short = service - self._services.get((band, tenant), 0.0)
        if short > 0:
            self._add(band, tenant, short)

    def _add(self, band: int, tenant: str, service: float) -> None:
        key = band, tenant
        level = self._services[key] = self._services.get(key, 0.0) + service
        for listener in self._listeners.get(key, ()):
            listener.served(tenant, level)

    def _forget(self) -> None:
        """Those below their band's level lose nothing: it is what they would be lifted to."""
        idle = [(service - self.level(band), band, tenant) for (band, tenant), service in self._services.items()]
        idle = sorted(row for row in idle if (row[1], row[2]) not in self._listeners)
        for _, band, tenant in idle[: len(self._services) - self._max_counters * 3 // 4]:
            del self._services[band, tenant]

    def restore(self, services: dict[tuple[int, str], float]) -> None:
        """What a scheduler before this one had counted (truth rule R9). Never lowers anything."""
        for (band, tenant), service in list(services.items())[: self._max_counters]:
            had = self._services.get((band, tenant), 0.0)
            if service > had:
                self._add(band, tenant, service - had)

    def status(self) -> list[dict[str, Any]]:
        """One row per band and tenant: band tenant service waits."""
        return [
            {"band": band, "tenant": tenant, "service": service, "waits": (band, tenant) in self._listeners}
            for (band, tenant), service in self._services.items()
        ]
