"""Ranks as Ray actors: children of the leader's replica, in the bundles of its placement group, one bundle for each stage.

They end with their leader: it owns them, and each of them watches its connection to it (`rank.py`). Built by `deployments.py`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.group import RankOrder
from cluster.ray_process import begin, on_sigterm
from protocol.errors import WorkerLost
from protocol.parallel import Parallel


class RankActor:
    """One rank but the leader's own. `run` returns when the leader says stop; any other end is the process's."""

    def __init__(self, name: str) -> None:
        begin(name)

    async def run(self, order: RankOrder, secret: bytes) -> None:
        from cluster.rank import serve_rank

        await serve_rank(order, secret, on_sigterm)
        ray.actor.exit_actor()


class StartedActor:
    def __init__(self, actor: Any, running: Any) -> None:
        self._actor = actor
        self._running = running

    async def ended(self) -> str:
        try:
            await self._running
        except ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[0]
        return "it returned"

    def kill(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor)


class RaySpawn:
    """options: what Ray is asked for one rank, beside its place."""

    def __init__(self, parallel: Parallel, secret: bytes, options: dict[str, Any]) -> None:
        self._parallel = parallel
        self._secret = secret
        self._options = options
        group = ray.util.get_current_placement_group()
        if group is None:
            raise WorkerLost("this replica has no placement group for its ranks; deploy with cluster.app:build")
        self._group: PlacementGroup = group

    async def __call__(self, order: RankOrder) -> StartedActor:
        place = PlacementGroupSchedulingStrategy(self._group, self._parallel.pp_rank(order.rank))
        options = {**self._options, "max_restarts": 0, "max_concurrency": 4, "scheduling_strategy": place}
        actor = ray.remote(RankActor).options(**options).remote(order.name)
        return StartedActor(actor, actor.run.remote(order, self._secret))
