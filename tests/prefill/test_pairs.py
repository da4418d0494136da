"""Which transports a pair offers after failures. Pure."""

from __future__ import annotations

from prefill.pairs import FIRST_HOLD_S, MAX_FAILURES, MAX_HOLD_S, Pair


def test_a_transport_that_cannot_be_set_up_is_left_out_for_a_while_that_doubles():
    pair = Pair(("shm", "tcp"))
    assert pair.offered(0.0) == ("shm", "tcp")
    now, hold = 0.0, FIRST_HOLD_S
    for _ in range(4):
        pair.unusable("shm", "cannot be mapped", now)
        assert pair.offered(now) == pair.offered(now + hold - 0.01) == ("tcp",)
        assert not pair.may_improve("tcp", now)
        now += hold
        hold *= 2
        assert pair.offered(now) == ("shm", "tcp")
        assert pair.may_improve("tcp", now)
        assert not pair.may_improve("shm", now)
    assert pair.num_fallbacks == 4
    for _ in range(40):
        pair.unusable("shm", "again", now)
    assert pair.offered(now + MAX_HOLD_S) == ("shm", "tcp"), "never for ever"
    pair.transfer_succeeded("shm")
    pair.unusable("shm", "once more", now)
    assert pair.offered(now + FIRST_HOLD_S) == ("shm", "tcp"), "a success ends the row"


def test_the_only_transport_gets_a_second_chance_at_once_and_then_waits():
    pair = Pair(("shm",))
    pair.unusable("shm", "first", 0.0)
    assert pair.offered(0.0) == ("shm",)
    pair.unusable("shm", "second", 0.0)
    assert pair.offered(0.0) == ()
    assert "shm: second" in pair.reasons()
    assert pair.offered(2 * FIRST_HOLD_S) == ("shm",)


def test_when_nothing_is_left_every_transport_is_named_with_its_reason():
    pair = Pair(("shm", "tcp"))
    for reason in ("one", "two"):
        pair.unusable("shm", reason, 0.0)
        pair.unusable("tcp", f"refused {reason}", 0.0)
    assert pair.offered(0.5) == ()
    assert pair.reasons() == "shm: two; tcp: refused two"
    assert Pair(()).reasons() == "none is offered"


def test_transfers_that_fail_in_a_row_take_a_transport_out():
    pair = Pair(("shm", "tcp"))
    for _ in range(3):  # never in a row
        assert not pair.transfer_failed("shm", "digest", 0.0)
        pair.transfer_succeeded("shm")
    assert [pair.transfer_failed("shm", "digest", 0.0) for _ in range(MAX_FAILURES)] == [False, True]
    assert pair.offered(0.0) == ("tcp",)
    assert [pair.transfer_failed("tcp", "stalled", 0.0) for _ in range(5)] == [False] * 5, "a bad one is better than none"
    assert pair.offered(0.0) == ("tcp",)
    assert pair.num_fallbacks == 1
