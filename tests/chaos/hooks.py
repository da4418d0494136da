"""Faults at a chosen moment inside a worker of the fleet: "kill yourself when the second chunk of a prompt is done".

spec["hook"] = {"when": ..., "nth": k, "do": "kill" | "stop" | "wedge", "seconds": ...}. The kth time that `when` comes, it is done,
once in the life of the process. Installed by `roles.py` around methods of the product; nothing of it is in the product.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any


def install(spec: dict[str, Any], worker: Any) -> None:
    hook = spec.get("hook")
    if hook:
        INSTALL[hook["when"]](worker, _Trap(hook))


class _Trap:
    def __init__(self, hook: dict[str, Any]) -> None:
        self._left = hook.get("nth", 1)
        self._do = hook["do"]
        self._seconds = hook.get("seconds", 0.0)

    def __call__(self) -> None:
        self._left -= 1
        if self._left != 0:
            return
        if self._do == "wedge":
            time.sleep(self._seconds)  # on the event loop: nothing else of this process moves
        else:
            os.kill(os.getpid(), signal.SIGKILL if self._do == "kill" else signal.SIGSTOP)


def _around(owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = inner(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def _prefill_chunk(worker: Any, trap: _Trap) -> None:
    """After a chunk of a real prompt was computed (canaries aside), in the engine's thread: its KV is on its way."""
    _around(worker.runner, "run", after=lambda chunks, *rest, **kw: _is_canary(chunks) or trap())


def _is_canary(chunks: Any) -> bool:
    return chunks[0].sequence.request.request_id == "canary"


def _sender(worker: Any, name: str, trap: _Trap) -> None:
    make = worker.connector.rank_sender

    def made(*args: Any) -> Any:
        sender = make(*args)
        _around(sender, name, before=lambda *a, **kw: trap())
        return sender

    worker.connector.rank_sender = made


def _sealed(worker: Any, trap: _Trap) -> None:
    """The KV is verified and its sequences are open; no token of theirs has been computed."""
    _around(worker._sequences, "open", after=lambda *a, **kw: trap())


def _token(worker: Any, trap: _Trap) -> None:
    """Once per sequence and step, on the event loop, before the frame leaves."""
    _around(worker, "_advance", before=lambda *a, **kw: trap())


INSTALL: dict[str, Callable[[Any, _Trap], None]] = {
    "prefill_chunk": _prefill_chunk,
    "push": lambda worker, trap: _sender(worker, "push", trap),
    "finish": lambda worker, trap: _sender(worker, "finish", trap),
    "sealed": _sealed,
    "token": _token,
}
