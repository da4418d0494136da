"""A process that imports the product once and forks every role of a fleet: a restart costs milliseconds instead of imports.

Speaks JSON lines with `fleet.py` over stdin and stdout: a spec comes in, {"pid": ...} goes out, {"exit": pid, "status": ...} when
a child ends. One thread only, also after torch is imported, or forking would copy locks that nobody holds any more. All children
die with this process, and this one with the test that started it (PR_SET_PDEATHSIG): nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def fork(spec: dict[str, Any], main: Any) -> None:
    me = os.getpid()
    pid = os.fork()
    if pid:
        say({"pid": pid, "ticket": spec["ticket"]})
        return
    status = 1
    try:
        die_with_parent(me)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        os.closerange(3, 256)
        main(spec)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            say({"exit": pid, "status": os.waitstatus_to_exitcode(status)})


def run(parent: int) -> None:
    die_with_parent(parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.chaos.roles import main  # all imports happen here, once

    num_threads = len(os.listdir("/proc/self/task"))
    assert num_threads == 1, f"importing the product started {num_threads - 1} threads; forking is not safe"
    gc.collect()
    gc.freeze()
    signals, wakeup = os.pipe()
    os.set_blocking(signals, False)
    os.set_blocking(wakeup, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup)
    say({"ready": os.getpid()})
    pending = b""
    while True:
        readable, _, _ = select.select([0, signals], [], [])
        if signals in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(signals, 4096)
            reap()
        if 0 in readable:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                fork(json.loads(line), main)


if __name__ == "__main__":
    run(int(sys.argv[1]))
