"""Pools that follow their load, on Serve's side: its application-level autoscaling policy, which asks the scheduler (`needs.py`).

Serve's own figures are of no use here, as our requests do not pass through its handles. Its controller calls `policy` about ten
times a second and must not be held up, so the scheduler is asked in the background and the last answer holds meanwhile.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from configs.schema import Config

log = logging.getLogger(__name__)

ASK_S = 1.0  # between two questions to the scheduler
STALE_S = 30.0  # an answer that is older says nothing: pools stay as they are
SCHEDULER = ("tandem-scheduler", "tandem")  # name and namespace of the actor; deployments.py has them from here


def deployment_name(config: Config, role: str, number: int = 0) -> str:
    """Of one pool of one model. number: the model's place in `Config.each()`; the first one's pools are just Prefill and Decode."""
    return f"{role.capitalize()}-{config.label}" if number else role.capitalize()


class Asking:
    """The last answer of the scheduler, and the question under way."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.answered_at = float("-inf")
        self._asked_at = float("-inf")
        self._question: Any = None
        self._present: dict[str, int] = {}

    def look(self, now: float, present: dict[str, int]) -> None:
        """present: how many replicas the pools have that somebody asks for just now."""
        self._present |= present
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
                self._question = actor.sizes.remote(dict(self._present)).future()
            except Exception as error:  # not there yet
                log.debug("no scheduler to ask: %s", error)


_asking = Asking()


def policy(contexts: dict[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
    """Serve's application-level autoscaling policy: DeploymentID -> replicas for every pool that has bounds."""
    now = time.monotonic()
    _asking.look(now, {which.name: context.target_num_replicas for which, context in contexts.items()})
    fresh = _asking.sizes if now - _asking.answered_at < STALE_S else {}
    return {which: fresh.get(which.name, context.target_num_replicas) for which, context in contexts.items()}, {}


def pool_policy(context: Any) -> tuple[int, dict[str, Any]]:
    """The same for one deployment, in a Serve application that brings no policy of its own."""
    sizes, state = policy({context.deployment_id: context})
    return sizes[context.deployment_id], state
