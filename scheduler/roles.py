"""When a worker should change its role: one pool is short for long while the other could spare a worker.

Short is `scheduler/sizing.py`'s: what the load asks for, in workers, over the workers there are. A worker changes when its own
pool would still be well below its capacity without it and the other pool has been above its own, without a break, for
`patience_s`; the gap between `SHORT` and `SPARE` is the hysteresis. One at a time: nothing is decided while somebody of the model
drains, nor within `cooldown_s` of the last change. Never the last worker of a role. Pure; the clock is an argument. Asked by
`cluster/pools.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scheduler.ledger import WorkerState

SHORT = 1.0  # need over workers, from which on a pool is short
SPARE = 0.7  # below which, counted without the worker that would leave, it can spare one


class Switch(NamedTuple):
    incarnation: str
    role: str  # that it takes on


class Roles:
    """Of one model. Call `decide` about once a second."""

    def __init__(self, patience_s: float, cooldown_s: float) -> None:
        self._patience_s = patience_s
        self._cooldown_s = cooldown_s
        self._since: dict[str, float] = {}  # role -> since when it has been short while the other could spare a worker
        self._last_at = float("-inf")

    def decide(self, workers: Sequence[WorkerState], needs: dict[str, float], now: float) -> Switch | None:
        """workers: of the model, alive. needs: role -> workers' worth of load."""
        pools = {role: [w for w in workers if w.info.role == role and not w.info.is_overflow] for role in ("prefill", "decode")}
        if now - self._last_at < self._cooldown_s or any(not w.takes_work for pool in pools.values() for w in pool):
            self._since.clear()
            return None
        for role, giver in (("prefill", "decode"), ("decode", "prefill")):
            if not self._is_due(role, len(pools[role]), len(pools[giver]), needs[role], needs[giver], now):
                continue
            leaving = min(pools[giver], key=_load)
            self._since.clear()
            self._last_at = now
            return Switch(leaving.incarnation, role)
        return None

    def _is_due(self, role: str, num_here: int, num_there: int, need_here: float, need_there: float, now: float) -> bool:
        is_short = num_here >= 1 and need_here > SHORT * num_here
        can_spare = num_there >= 2 and need_there < SPARE * (num_there - 1)
        if not (is_short and can_spare):
            self._since.pop(role, None)
            return False
        return now - self._since.setdefault(role, now) >= self._patience_s


def _load(worker: WorkerState) -> tuple[int, int, str]:
    """Who has least to hand over."""
    return len(worker.entries) + len(worker.prefills), worker.blocks_at_end, worker.incarnation
