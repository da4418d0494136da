"""What the load asks for, from the scheduler's own state: the sizes of pools (`scheduler/sizing.py`), and numbers for new workers.

In the scheduler's process; `sizes.py` asks for it from Serve's, `pools.py` for its roles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from cluster.sizes import deployment_name
from configs.schema import Config
from scheduler.ledger import WorkerState
from scheduler.scheduler import Scheduler
from scheduler.sizing import Bounds, Busy, Kept, PoolSize, Promise, Waiting, decode_need, prefill_need

GIVEN_S = 900.0  # a number given to a worker that has not registered since is free again


class Sizes:
    """In the scheduler's process: what every pool that follows its load should be, and numbers for its workers."""

    def __init__(self, config: Config) -> None:
        scheduler = config.scheduler
        self._config = config
        self._promise = Promise(scheduler.ttft_target_s, scheduler.tpot_target_s)
        self._busy = Busy()
        self._pools: dict[str, PoolSize] = {}  # by deployment
        self._bounds: dict[str, tuple[str, str, Bounds]] = {}  # deployment -> model, role, bounds
        self._given: dict[tuple[str, str, int], float] = {}
        for i, one in enumerate(config.each()):
            for role in one.roles:
                pool = one.pool(role)
                if pool.fewest < pool.most:
                    bounds = Bounds(pool.fewest, pool.most)
                    self._bounds[deployment_name(one, role, i)] = (one.served_name, role, bounds)

    def _pool(self, name: str, bounds: Bounds, present: int) -> PoolSize:
        """It begins with the size that it has: this scheduler may be the successor of another one."""
        if name not in self._pools:
            config = self._config.scheduler
            size = max(bounds.fewest, min(bounds.most, present))
            self._pools[name] = PoolSize(bounds, size, config.scale_up_s, config.scale_down_s)
        return self._pools[name]

    def wanted(self, scheduler: Scheduler, now: float, present: Mapping[str, int]) -> dict[str, int]:
        """Deployment -> replicas, for those whose present size is told."""
        busy = self._busy.look(scheduler.workers.values())
        waiting = waiting_in(scheduler)
        kept = kept_by(scheduler, now)
        found = {}
        for name, (model, role, bounds) in self._bounds.items():
            if name not in present:
                continue
            workers = [w for w in scheduler.workers.values() if w.info.model == model]
            queued, output = waiting.get(model, Waiting()), scheduler.costs.output(model)
            if role == "decode":
                need = decode_need(workers, queued, output, self._promise, kept.tpot)
            else:
                need = prefill_need(workers, queued, output, busy, self._promise, now, kept.ttft)
            found[name] = self._pool(name, bounds, present[name]).observe(need, now)
        return found

    def index_for(self, scheduler: Scheduler, model: str, role: str, proposed: int, now: float) -> int:
        """The proposed number, or the lowest that no worker has or was given."""
        self._given = {key: at for key, at in self._given.items() if now - at < GIVEN_S}
        taken = {_index(w) for w in scheduler.workers.values() if (w.info.model, w.info.role) == (model, role)}
        registered = {(model, role, index) for index in taken}
        self._given = {key: at for key, at in self._given.items() if key not in registered}
        taken |= {index for m, r, index in self._given if (m, r) == (model, role)}
        index = proposed if proposed not in taken else min(set(range(len(taken) + 1)) - taken)
        self._given[model, role, index] = now
        return index


def _index(worker: WorkerState) -> int:
    number = worker.info.name.rsplit(":", 1)[-1]
    return int(number) if number.isdigit() else -1


def waiting_in(scheduler: Scheduler) -> dict[str, Waiting]:
    """What waits to be placed, by model."""
    choices: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for item in scheduler.queue:
        choices[item.admit.model] += item.admit.num_choices
        tokens[item.admit.model] += item.admit.prompt_len
    return {model: Waiting(choices[model], tokens[model]) for model in choices}


def kept_by(scheduler: Scheduler, now: float) -> Kept:
    """The least of all classes."""
    config = scheduler.config
    classes = scheduler.latencies.status(now, config.ttft_target_s, config.tpot_target_s).values()

    def least(shares: Iterable[float | None]) -> float | None:
        return min((share for share in shares if share is not None), default=None)

    return Kept(least(c["kept"].get("ttft") for c in classes), least(c["kept"].get("tpot") for c in classes))
