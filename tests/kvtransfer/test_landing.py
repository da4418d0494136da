"""What is told of landed runs: in few messages, in order, and the newest word on a run last."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvtransfer.landing import Landings
from protocol.kv import KVLayout
from protocol.ticket import Grant, is_authentic

SECRET = b"the cluster's secret"
LAYOUT = KVLayout(num_layers=8, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")


def grant(name="g"):
    return Grant(name, "r", 1, "D1", "P1", tuple(range(9)), 1, 36, LAYOUT, 10.0, (), "")


def digests(byte, count):
    return bytes([byte]) * (16 * count)


@pytest.fixture
def told():
    return []


def landings(told):
    made = Landings(SECRET, lambda grant, landed: told.append(landed))
    made.attach()
    return made


def shapes(told):
    return [(landed.grant_id, landed.row, landed.num_rows, landed.first, landed.count) for landed in told]


async def test_what_piles_up_goes_out_together(told):
    made = landings(told)
    for row in range(5):
        made.add(grant(), row, 1, digests(row, 4))
    assert not told, "said from the event loop only"
    await asyncio.sleep(0)
    assert shapes(told) == [("g", 0, 5, 1, 4)]
    assert told[0].digests == b"".join(digests(row, 4) for row in range(5))
    assert is_authentic(told[0], SECRET)
    made.add(grant(), 5, 1, digests(5, 4))
    await asyncio.sleep(0)
    assert shapes(told)[1:] == [("g", 5, 1, 1, 4)], "and at once when there is time"


async def test_only_neighbouring_rows_of_the_same_blocks_are_joined(told):
    made = landings(told)
    made.add(grant(), 0, 1, digests(0, 4))
    made.add(grant("h"), 0, 1, digests(1, 4))
    made.add(grant(), 1, 1, digests(2, 4))
    made.add(grant(), 3, 1, digests(3, 4))
    made.add(grant(), 4, 5, digests(4, 2))
    made.flush()
    assert shapes(told) == [("g", 0, 2, 1, 4), ("h", 0, 1, 1, 4), ("g", 3, 1, 1, 4), ("g", 4, 1, 5, 2)]


async def test_a_run_that_was_stored_twice_is_told_twice_in_order(told):
    made = landings(told)
    for byte in (1, 2, 3):
        made.add(grant(), 2, 1, digests(byte, 3))
    made.flush()
    assert [landed.digests for landed in told] == [digests(byte, 3) for byte in (1, 2, 3)]
    await asyncio.sleep(0)
    assert len(told) == 3, "nothing is said twice by the flush that was on its way"


async def test_from_many_threads_everything_is_told(told):
    made = landings(told)

    def tell(i: int) -> None:
        for row in range(8):
            made.add(grant(f"g{i}"), row, 1, digests(row, 2))

    threads = [threading.Thread(target=tell, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.flush()
    rows = {(landed.grant_id, landed.row + i) for landed in told for i in range(landed.num_rows)}
    assert rows == {(f"g{i}", row) for i in range(6) for row in range(8)}


def test_without_anybody_who_listens_nothing_is_kept():
    made = Landings(SECRET, lambda *_: pytest.fail("nobody asked"))
    for row in range(5):
        made.add(grant(), row, 1, digests(row, 4))
    made.flush()
