"""Watches a run's fairness: between tenants that wait in one band, service may differ by no more than the bound of
docs/decision.md.

    |S_f - S_g| <= u + X + Y     service in tokens (input 1, output 2) over weight

u: the largest charge of one request; X, Y: what the outcomes of one tenant's requests under way may still add to its service, or
take back. The scheduler can only bound X and Y by what the decode pool holds; here the true lengths are known, so they are what
they are.
"""

from __future__ import annotations

from scheduler.fairness import INPUT_PRICE, OUTPUT_PRICE
from simulation.cluster import Simulation


class Watch:
    """Give it to a Simulation as `watch`. worst: the largest difference over its bound; 1 is the bound."""

    def __init__(self) -> None:
        self.largest_charge = 0.0
        self.most_added = 0.0  # X: the most that one tenant ever had under way
        self.most_taken = 0.0  # Y
        self.largest_difference = 0.0
        self.worst = 0.0
        self.num_compared = 0
        self._open: dict[str, tuple[str, float]] = {}  # request -> its tenant, what its outcome will add to the service
        self._added: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    @property
    def bound(self) -> float:
        return self.largest_charge + self.most_added + self.most_taken

    def __call__(self, simulation: Simulation) -> None:
        """Asserts the bound. Called after every message to the scheduler."""
        fairness = simulation.scheduler.fairness
        charges = fairness._charges
        for request_id in [r for r in self._open if r not in charges]:
            tenant, rest = self._open.pop(request_id)
            self._count(tenant, -rest, rest)
        for request_id in reversed(charges):
            if request_id in self._open:
                break  # the newest come last
            charge, req = charges[request_id], simulation.open[request_id]
            service = (INPUT_PRICE * req.prompt + OUTPUT_PRICE * charge.predicted) / charge.weight
            self.largest_charge = max(self.largest_charge, service)
            rest = OUTPUT_PRICE * (req.output - charge.predicted) / charge.weight
            self._open[request_id] = charge.tenant, rest
            self._count(charge.tenant, rest, rest)
        self.most_added = max(self.most_added, max(self._added.values(), default=0.0))
        self.most_taken = max(self.most_taken, max(self._taken.values(), default=0.0))
        for band, waiting in fairness._waiting.items():
            if len(waiting) < 2:
                continue
            services = [fairness.service(band, tenant) for tenant in waiting]
            difference = max(services) - min(services)
            self.num_compared += 1
            self.largest_difference = max(self.largest_difference, difference)
            self.worst = max(self.worst, difference / self.bound)
            assert difference <= self.bound + 1e-6, (
                f"at {simulation.now:.3f} s tenants that wait in band {band} differ by {difference:.0f}, "
                f"the bound is {self.bound:.0f}"
            )

    def _count(self, tenant: str, by: float, rest: float) -> None:
        column = self._added if rest >= 0 else self._taken
        column[tenant] = column.get(tenant, 0.0) + (by if rest >= 0 else -by)
