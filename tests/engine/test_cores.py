"""The ledger of a host's cores: who says what, what is believed, and what outlives whom."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.cores import BORROWED_S, NUM_THREADS, PID, Fixed, Ledger, Lending, ledger_path, pin_thread, sweep


class Clock:
    def __init__(self) -> None:
        self.now = 10**9

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += int(1e9 * seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cores"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def alive(pid: int) -> int:
    return 7


@pytest.fixture
def pair(path: Path, clock: Clock) -> Iterator[tuple[Lending, Lending]]:
    """Two workers on four cores, two each."""
    ledgers = [Ledger(path, alive), Ledger(path, alive)]
    first, second = (Lending(ledger, 2, 4, clock_ns=clock) for ledger in ledgers)
    yield first, second
    for ledger in ledgers:
        ledger.close()
    assert not path.exists(), "the last one takes the file along"


def test_idle_cores_go_to_the_other_and_come_back(pair: tuple[Lending, Lending], clock: Clock) -> None:
    first, second = pair
    assert first.take(0.05) == 4
    assert second.take(0.05) == 2, "its own, though the other one still computes on four"
    assert first.take(0.05) == 2
    second.rest()
    assert first.take(0.05) == 4
    first.rest()
    assert second.take(0.05) == 4


def test_what_a_dead_or_stopped_worker_said_is_void_soon(pair: tuple[Lending, Lending], clock: Clock) -> None:
    first, second = pair
    second.take(0.3)
    assert first.take(0.05) == 2
    clock.wait(0.59)
    assert first.take(0.05) == 2
    clock.wait(0.02)
    assert first.take(0.05) == 4
    second.take(10**6)
    clock.wait(5.1)
    assert first.take(0.05) == 4, "nobody is believed for longer than seconds"


def test_a_group_says_what_it_uses_and_borrows_nothing(path: Path, clock: Clock) -> None:
    group = Lending(Ledger(path, alive), 1, 8, can_borrow=False, num_used=4, clock_ns=clock)
    single = Lending(Ledger(path, alive), 1, 8, clock_ns=clock)
    assert group.take(0.1) == 1
    assert single.take(0.1) == 4


def test_more_workers_than_cores_have_one_thread_each(path: Path, clock: Clock) -> None:
    workers = [Lending(Ledger(path, alive), 1, 2, clock_ns=clock) for _ in range(4)]
    assert [worker.take(0.1) for worker in workers] == [2, 1, 1, 1]
    assert [worker.take(0.1) for worker in workers] == [1, 1, 1, 1]


def test_a_slot_of_a_dead_process_is_taken_over(path: Path) -> None:
    first = Ledger(path, alive)
    first.slots[first.number, PID] = 999_999_999
    second = Ledger(path, lambda pid: 0 if pid == 999_999_999 else 7)
    assert second.number == first.number
    assert second.slots[second.number, NUM_THREADS] == 0


def _claim(path: Path, numbers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    numbers.put(Ledger(path, lambda pid: 1).number)


def test_processes_get_different_slots_while_others_hold_theirs(path: Path) -> None:
    mine = Ledger(path, lambda pid: 1)
    context = multiprocessing.get_context("fork")
    numbers = context.Queue()
    children = [context.Process(target=_claim, args=(path, numbers)) for _ in range(3)]
    for child in children:
        child.start()
    taken = {numbers.get(timeout=20) for _ in children}
    for child in children:
        child.join(20)
    assert len(taken | {mine.number}) == 4


def test_ledgers_of_dead_clusters_are_swept(tmp_path: Path) -> None:
    secret = ledger_path(b"one").name
    assert secret != ledger_path(b"two").name
    assert "one" not in secret
    living, dead, other = (tmp_path / f"tandem-cores-{os.getuid()}-{name}" for name in ("a", "b", "c"))
    for file, pid in ((living, 1), (dead, 2)):
        np.array([[pid, 7, 0, 0]], dtype=np.int64).tofile(file)
    other.write_bytes(b"not a ledger")
    sweep(tmp_path, lambda pid: 7 if pid == 1 else 0)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["a", "c"]


def test_a_lock_that_nobody_gives_back_is_an_error_not_a_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("engine.cores.LOCK_S", 0.05)
    Ledger(path, alive)
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="unavailable"):
            Ledger(path, alive)


def test_pinning_keeps_to_cores_that_are_there() -> None:
    before = os.sched_getaffinity(0)
    try:
        assert not pin_thread(len(before), 1)
        assert os.sched_getaffinity(0) == before
        assert pin_thread(len(before) - 1, 1)
        assert os.sched_getaffinity(0) == {max(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_fixed() -> None:
    cores = Fixed(3)
    assert cores.take(1.0) == 3
    cores.rest()
    assert BORROWED_S == 0.1
