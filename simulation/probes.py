"""When a refused client could first have been let in: asks the door again and again, without changing anything behind it.

First feasible for a client is the first time at which its promise could be kept, with everybody before it who was told an earlier
time: to displace those would only break another promise. Given to a Simulation as `watch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from simulation.cluster import Simulation
from simulation.requests import Req

EVERY_S = 0.25  # between two looks
MAX_OPEN = 200  # probes at once; of more refusals every now and then one is taken


class Probe(NamedTuple):
    req: Req
    refused_at: float
    told_at: float  # when it may come back


class Probes:
    def __init__(self) -> None:
        self.waits: list[tuple[float, float]] = []  # (told, first feasible), seconds
        self._open: list[Probe] = []
        self._seen: set[tuple[int, int]] = set()
        self._looked_at = 0.0

    def __call__(self, simulation: Simulation) -> None:
        now = simulation.now
        for req in simulation.newly_refused:
            key = req.index, req.num_retries
            if key not in self._seen and len(self._open) < MAX_OPEN:
                self._seen.add(key)
                self._open.append(Probe(req, now, now + req.waited))
        simulation.newly_refused.clear()
        if now - self._looked_at < EVERY_S or not self._open:
            return
        self._looked_at = now
        left = []
        for probe in self._open:
            if would_admit(simulation, probe):
                self.waits.append((probe.told_at - probe.refused_at, max(EVERY_S, now - probe.refused_at)))
            else:
                left.append(probe)
        self._open = left

    def figures(self) -> dict[str, Any]:
        if not self.waits:
            return {"probed": 0, "median_feasible_s": 0.0, "median_told_of_probed_s": 0.0, "ratio": 0.0}
        told, feasible = (sorted(column) for column in zip(*self.waits, strict=True))
        middle = len(told) // 2
        return {
            "probed": len(told),
            "median_feasible_s": feasible[middle],
            "median_told_of_probed_s": told[middle],
            "ratio": told[middle] / feasible[middle],
        }


def would_admit(simulation: Simulation, probe: Probe) -> bool:
    scheduler = simulation.scheduler
    return scheduler.gate.would_admit(probe.req.admit, scheduler.tenants, simulation.now, before=probe.told_at)
