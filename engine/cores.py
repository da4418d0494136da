"""Who computes on this host's cores right now: a ledger in shared memory from which each worker takes threads for its next step.

One small file for each host and cluster, a slot for each worker, written by nobody else. A worker says before each step until when
it will be busy, and on how many threads; what is said is void when its time is over, so whoever is dead or stopped is soon as if
it were idle. `Lending` gives a worker its own share of the cores, and those that nobody has a claim on at the moment. Nothing
is locked: two that look at the same moment may both take a core, for one step.

Groups of several ranks say what they use and borrow nothing: their ranks would have to agree before each step. Made by
`cluster/life.py`, asked by the loops of prefill/worker.py and decode/worker.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

NUM_SLOTS = 128
FIELDS = PID, START_TICKS, NUM_THREADS, BUSY_UNTIL_NS = range(4)
PREFIX = "tandem-cores-"
BORROWED_S = 0.1  # the longest step on borrowed cores that is planned: so long may their owner have to wait
CLAIM_S = 0.25  # between two words of a busy worker, if its steps are shorter
MAX_CLAIM_S = 5.0
LOCK_S = 2.0


class Cores(Protocol):
    """How many threads a worker's next step may use."""

    num_own: int

    def take(self, expected_s: float) -> int:
        """Before a step that should take so long."""
        ...

    def rest(self) -> None:
        """There is no work for now."""
        ...


class Fixed:
    """Always the same number, whoever else computes."""

    def __init__(self, num_threads: int) -> None:
        self.num_own = num_threads

    def take(self, expected_s: float) -> int:
        return self.num_own

    def rest(self) -> None:
        pass


def _lock(handle: int) -> None:
    """Held only while a slot is chosen, so nobody waits long for it. Raises OSError."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Ledger:
    """The file, mapped, and this process's slot in it. Raises OSError where no such file can be made."""

    def __init__(self, path: Path, starts: Callable[[int], int]) -> None:
        """starts: when the process of a pid began, 0 if there is none (kvtransfer.process.start_ticks)."""
        self.path = path
        size = NUM_SLOTS * len(FIELDS) * 8
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(handle)
            os.ftruncate(handle, size)
            self._map = mmap.mmap(handle, size)
            self.slots = np.frombuffer(self._map, dtype=np.int64).reshape(NUM_SLOTS, len(FIELDS))
            self.number = self._choose(starts)
            self.slots[self.number] = (os.getpid(), starts(os.getpid()), 0, 0)
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # said aloud: the mapping keeps a handle of its own to the same lock
            os.close(handle)

    def _choose(self, starts: Callable[[int], int]) -> int:
        for number, (pid, began, _, _) in enumerate(self.slots.tolist()):
            if pid == 0 or starts(pid) != began:
                return number
        raise OSError(f"all {NUM_SLOTS} slots of {self.path} belong to living workers")

    def write(self, num_threads: int, until_ns: int) -> None:
        slot = self.slots[self.number]
        slot[NUM_THREADS] = num_threads
        slot[BUSY_UNTIL_NS] = until_ns

    def used_by_others(self, now_ns: int) -> int:
        """Threads of all workers that are busy at this moment."""
        busy = self.slots[:, BUSY_UNTIL_NS] > now_ns
        busy[self.number] = False
        return int(self.slots[busy, NUM_THREADS].sum())

    def close(self) -> None:
        """Leave; the last one takes the file along."""
        self.slots[self.number] = 0
        if not self.slots[:, PID].any():
            self.path.unlink(missing_ok=True)


class Lending:
    """num_own threads always, and idle cores of others. num_cores: of this host, for this cluster.

    can_borrow: False for the leader of a group, which only says how many threads (num_used) its ranks are busy on.
    """

    def __init__(
        self,
        ledger: Ledger,
        num_own: int,
        num_cores: int,
        *,
        can_borrow: bool = True,
        num_used: int = 0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.num_own = num_own
        self._ledger = ledger
        self._num_cores = num_cores
        self._can_borrow = can_borrow
        self._num_used = num_used
        self._clock_ns = clock_ns

    def take(self, expected_s: float) -> int:
        now = self._clock_ns()
        threads = self.num_own
        if self._can_borrow:
            threads = max(self.num_own, self._num_cores - self._ledger.used_by_others(now))
        until = now + int(1e9 * min(MAX_CLAIM_S, max(CLAIM_S, 2 * expected_s)))
        self._ledger.write(self._num_used or threads, until)
        return threads

    def rest(self) -> None:
        self._ledger.write(0, 0)


def ledger_path(secret: bytes) -> Path:
    """Of the cluster that has this secret, on this host. Files that dead clusters left are removed on the way."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    return folder / f"{PREFIX}{os.getuid()}-{hashlib.sha256(b'cores' + secret).hexdigest()[:16]}"


def sweep(folder: Path, starts: Callable[[int], int]) -> None:
    """Remove ledgers of ours in which no slot belongs to a living process."""
    for path in folder.glob(f"{PREFIX}{os.getuid()}-*"):
        with contextlib.suppress(OSError, ValueError):
            slots = np.fromfile(path, dtype=np.int64).reshape(-1, len(FIELDS)).tolist()
            if slots and not any(pid and starts(pid) == began for pid, began, _, _ in slots):
                path.unlink()


def pin_thread(number: int, num_threads: int) -> bool:
    """Keep the calling thread, and threads that it starts from now on, on the cores of the number-th worker of this host. False,
    and nothing done, where there are not so many."""
    cores = sorted(os.sched_getaffinity(0))
    own = cores[number * num_threads : (number + 1) * num_threads]
    if len(own) < num_threads:
        return False
    os.sched_setaffinity(0, own)
    return True
