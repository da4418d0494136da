"""What the scheduler's process tells workers: that their machine goes away, and that they are needed in the other role.

Beside `scheduler_service.py`, which knows the connections and calls `tick`; decisions about roles are `scheduler/roles.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from cluster.needs import kept_by, waiting_in
from protocol.errors import NotFound, TandemError
from protocol.messages import Leave, Message, Notice, Noticed, SwitchRole
from protocol.network import Peer
from scheduler.roles import Roles, Switch
from scheduler.scheduler import Scheduler
from scheduler.sizing import Busy, Promise, Waiting, decode_need, prefill_need

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
LOOK_S = 1.0  # between two looks at the balance of roles


class Pools:
    """peers: the connection of each worker, and its incarnation. on_switch(worker's name, its role so far, its next one)."""

    def __init__(self, scheduler: Scheduler, peers: Mapping[Peer, str], on_switch: Callable[[str, str, str], None]) -> None:
        self._scheduler = scheduler
        self._peers = peers
        self._on_switch = on_switch
        self._busy = Busy()
        self._roles: dict[str, Roles] = {}  # by model
        self._looked_at = float("-inf")
        self._telling: set[asyncio.Task[None]] = set()

    async def notice(self, message: Notice) -> Noticed:
        """Raises NotFound when there is no such worker or host, and what the last worker that could not be told did."""
        workers = [w for w in self._scheduler.workers.values() if message.worker in (w.info.name, w.info.host)]
        if not workers:
            known = ", ".join(sorted(w.info.name for w in self._scheduler.workers.values())) or "nobody"
            raise NotFound(f"no worker or host is called {message.worker[:100]!r}; alive: {known[:1000]}", param="worker")
        answers = await asyncio.gather(
            *(self._call(w.incarnation, Leave(message.seconds)) for w in workers), return_exceptions=True
        )
        told = [w.info.name for w, answer in zip(workers, answers, strict=True) if not isinstance(answer, BaseException)]
        if not told:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        return Noticed(tuple(told))

    async def _call(self, incarnation: str, message: Message) -> None:
        peer = next((peer for peer, who in self._peers.items() if who == incarnation), None)
        if peer is None:
            raise NotFound(f"{incarnation} is not connected")
        await peer.call(message, CALL_TIMEOUT_S)

    def tick(self, now: float) -> None:
        """Look at the balance of roles of each model, if the configuration lets them change."""
        config = self._scheduler.config
        if not config.switch_roles or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        workers = list(self._scheduler.workers.values())
        busy, waiting, kept = self._busy.look(workers), waiting_in(self._scheduler), kept_by(self._scheduler, now)
        promise = Promise(config.ttft_target_s, config.tpot_target_s)
        for model in {w.info.model for w in workers}:
            here = [w for w in workers if w.info.model == model]
            queued, output = waiting.get(model, Waiting()), self._scheduler.costs.output(model)
            needs = {
                "decode": decode_need(here, queued, output, promise, kept.tpot),
                "prefill": prefill_need(here, queued, output, busy, promise, now, kept.ttft),
            }
            roles = self._roles.setdefault(model, Roles(config.scale_up_s, config.switch_cooldown_s))
            switch = roles.decide(here, needs, now)
            if switch is not None:
                self._tell(switch)

    def _tell(self, switch: Switch) -> None:
        worker = self._scheduler.workers[switch.incarnation].info

        async def tell() -> None:
            try:
                await self._call(switch.incarnation, SwitchRole(switch.incarnation, switch.role))
            except TandemError as error:
                log.warning("%s stays a %s worker: %s", worker.name, worker.role, error.message)
            else:
                log.info("%s becomes a %s worker", worker.name, switch.role)
                self._on_switch(worker.name, worker.role, switch.role)

        task = asyncio.create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def close(self) -> None:
        for task in self._telling:
            task.cancel()
