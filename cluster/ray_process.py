"""What Ray and Serve do to a process of ours, and how that is undone: its title, its open port, its signals.

Each function leans on an inside of Ray 2.60 that has no public door; tests/system/test_serve.py sees when one moves. Called once,
from the constructors in `deployments.py` and `ray_ranks.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

log = logging.getLogger(__name__)

LOOK_S = 0.5


def begin(name: str) -> None:
    """What every process of ours that Ray started does first: it gets its title, and ends when its raylet does."""
    _set_title(name)
    _go_with_raylet()


def _go_with_raylet() -> None:
    """End this process when the raylet that started it is gone: Ray counts all of its processes as dead then and starts others.

    Left alone they outlive it for as long as nobody asks them for anything of Ray's, and an orphaned scheduler would go on serving
    those who are still connected to it beside its successor.
    """
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(LOOK_S)
        log.error("the raylet that started this process is gone, and so goes this process")
        os._exit(1)

    threading.Thread(target=watch, name="go-with-raylet", daemon=True).start()


def _set_title(name: str) -> None:
    """`tandem:decode:0` in ps and top. Ray would name the process anew around each task: its way of doing so is taken away."""
    ray._raylet.setproctitle(f"tandem:{name}")
    ray._raylet.setproctitle = lambda title: None
    # Ctrl-C in a terminal reaches the whole process group; only the command itself decides what happens then.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def keep_serve_inside() -> None:
    """Serve opens a gRPC server in every replica, on all interfaces, unauthenticated, and it unpickles what arrives.

    Nothing of ours uses it: it is bound to loopback, also where our own sockets have another address. Called from a replica's
    constructor, which runs before Serve opens it.
    """
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, f"127.0.0.1:{address.rsplit(':', 1)[1]}")


def on_sigterm(act: Callable[[], None]) -> None:
    """Call act() on SIGTERM, in the main thread, instead of Ray's own way, which is to exit there and then.

    Ray's handler stays, as only the main thread may set one and constructors of ours run elsewhere; what it calls is replaced.
    """
    from ray._private import worker

    assert hasattr(worker, "raise_sys_exit_with_custom_error_message"), "Ray handles SIGTERM in another way now"

    def instead(*_: Any, **__: Any) -> None:
        act()

    worker.raise_sys_exit_with_custom_error_message = instead
