"""Pools that follow their load: what `scheduler/sizing.py` wants, asked by Serve's application-level autoscaling policy.

Serve's own figures are of no use here, as our requests do not pass through its handles. Its controller calls `policy` about ten
times a second and must not be held up, so the scheduler is asked in the background and the last answer holds meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from configs.schema import Config
from scheduler.sizing import Bounds, Busy, Kept, PoolSize, Promise, Waiting, decode_need, prefill_need

if TYPE_CHECKING:
    from scheduler.ledger import WorkerState
    from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

ASK_S = 1.0  # between two questions to the scheduler
STALE_S = 30.0  # an answer that is older says nothing: pools stay as they are
GIVEN_S = 900.0  # a number given to a worker that has not registered since is free again
SCHEDULER = ("tandem-scheduler", "tandem")  # name and namespace of the actor; deployments.py has them from here


def deployment_name(config: Config, role: str, number: int = 0) -> str:
    """Of one pool of one model. number: the model's place in `Config.each()`; the first one's pools are just Prefill and Decode."""
    return f"{role.capitalize()}-{config.label}" if number else role.capitalize()


class Sizes:
    """In the scheduler's process: what every pool that follows its load should be, and numbers for its workers."""

    def __init__(self, config: Config) -> None:
        scheduler = config.scheduler
        self._config = config
        self._promise = Promise(scheduler.ttft_target_s, scheduler.tpot_target_s)
        self._busy = Busy()
        self._pools: dict[tuple[str, str], PoolSize] = {}  # (model, role)
        self._names: dict[tuple[str, str], str] = {}
        self._given: dict[tuple[str, str, int], float] = {}
        for i, one in enumerate(config.each()):
            for role in one.roles:
                pool = one.pool(role)
                if pool.fewest < pool.most:
                    key = (one.served_name, role)
                    bounds = Bounds(pool.fewest, pool.most)
                    self._pools[key] = PoolSize(bounds, pool.replicas, scheduler.scale_up_s, scheduler.scale_down_s)
                    self._names[key] = deployment_name(one, role, i)

    def wanted(self, scheduler: Scheduler, now: float) -> dict[str, int]:
        """Deployment -> replicas."""
        busy = self._busy.look(scheduler.workers.values())
        waiting = waiting_in(scheduler)
        kept = kept_by(scheduler, now)
        found = {}
        for (model, role), pool in self._pools.items():
            workers = [w for w in scheduler.workers.values() if w.info.model == model]
            queued, output = waiting.get(model, Waiting()), scheduler.costs.output(model)
            if role == "decode":
                need = decode_need(workers, queued, output, self._promise, kept.tpot)
            else:
                need = prefill_need(workers, queued, output, busy, self._promise, now, kept.ttft)
            found[self._names[model, role]] = pool.observe(need, now)
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


# ---- in Serve's controller -------------------------------------------------------------------------------------------


class Asking:
    """The last answer of the scheduler, and the question under way."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.answered_at = float("-inf")
        self._asked_at = float("-inf")
        self._question: Any = None

    def look(self, now: float) -> None:
        if self._question is not None:
            if self._question.done():
                try:
                    self.sizes, self.answered_at = self._question.result(), now
                except Exception as error:  # the scheduler restarts; its successor is asked next
                    log.info("the scheduler did not say how large the pools should be: %s", error)
                self._question = None
            elif now - self._asked_at > STALE_S:
                self._question = None
        if self._question is None and now - self._asked_at >= ASK_S:
            import ray

            self._asked_at = now
            try:
                actor = ray.get_actor(SCHEDULER[0], namespace=SCHEDULER[1])
                self._question = actor.sizes.remote().future()
            except Exception as error:  # not there yet
                log.debug("no scheduler to ask: %s", error)


_asking = Asking()


def policy(contexts: dict[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
    """Serve's application-level autoscaling policy: DeploymentID -> replicas for every pool that has bounds."""
    now = time.monotonic()
    _asking.look(now)
    fresh = _asking.sizes if now - _asking.answered_at < STALE_S else {}
    return {which: fresh.get(which.name, context.target_num_replicas) for which, context in contexts.items()}, {}
