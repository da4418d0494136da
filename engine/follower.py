"""What a rank other than the leader does all its life: wait for the leader's next step and do its own part of it.

Called by the process of such a rank (cluster/) in its engine thread, and by tests in a thread of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.runner import ModelRunner, OnLayer
from engine.step import Idle, Pairs, Stop

Pushes = tuple[tuple[str, Pairs], ...]


class Follower:
    """make_on_layer(pushes): the hook for a step's pushes; it is called with own layer numbers, as in ModelRunner.run. None
    where this rank sends nothing (decode)."""

    def __init__(self, runner: ModelRunner, make_on_layer: Callable[[Pushes], OnLayer] | None = None) -> None:
        assert runner.group is not None, "a rank follows the leader of its group"
        assert not runner.group.is_leader, "the leader follows nobody"
        self._runner = runner
        self._group = runner.group
        self._make_on_layer = make_on_layer

    def run(self) -> None:
        """Until the leader says stop. Raises GroupBroken when the leader or another rank is lost or silent for longer than the
        group's deadline, and whatever goes wrong in a step here. Either way this rank has left, and the others' waits end."""
        try:
            while True:
                message = self._group.receive()
                if isinstance(message, Stop):
                    return
                if isinstance(message, Idle):
                    continue
                pushes = message.extras.pushes
                on_layer = self._make_on_layer(pushes) if pushes and self._make_on_layer is not None else None
                self._runner.follow(message, on_layer)
        finally:
            self._group.close()
