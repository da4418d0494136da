"""Seeing that one process on this host is dead: the only thing, besides its own word, that ends a quarantine (truth
rule R2).

Not here: health in general (cluster/). Used by shm.py (is the pool's owner alive?) and by decode/ (is the writer
dead?).
"""

from __future__ import annotations

import functools
import os
import select


@functools.cache
def boot_id() -> str:
    """This boot of this host, as the kernel names it; equal in all containers of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_ticks(pid: int = 0) -> int:
    """When a process started, in clock ticks since boot; with the pid it names one process for ever. 0: no such
    process.

    pid 0: this process.
    """
    try:
        with open(f"/proc/{pid or 'self'}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat[stat.rindex(b")") + 1 :].split()[19])  # field 22; the name in parentheses may hold spaces


class Process:
    """One living process, watched. Made by `observe`. `fileno()` becomes readable when it dies, for
    `loop.add_reader`.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._is_dead = False

    def fileno(self) -> int:
        return self._pidfd

    def is_dead(self) -> bool:
        """True once every thread of it has ended: no store of it can happen any more. A zombie is dead, a stopped one
        is not.
        """
        if not self._is_dead and self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            self._is_dead = bool(poll.poll(0))
        return self._is_dead

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def observe(boot: str, pid: int, ticks: int = 0) -> Process | None:
    """Watch the process that a peer says it is. None: not on this host, not visible from here (another pid namespace),
    or gone.

    `ticks` (0: unchecked) is compared after the pidfd is open, so a recycled pid cannot pass for its predecessor.
    """
    if boot != boot_id() or pid <= 0:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    process = Process(pid, pidfd)
    if (ticks and start_ticks(pid) != ticks) or process.is_dead():
        process.close()
        return None
    return process
