"""A thousand spoilt transfers: none is ever taken for good unless its bytes are good, and the receiver lives on."""

from __future__ import annotations

import random

import pytest

from kvtransfer.digest import verify
from kvtransfer.faults import Fault, FaultyLane
from protocol.errors import TandemError, TransferFailed
from tests.faultproxy import FaultProxy, cut_at, flip_at

STREAM_NBYTES = 1547  # what one transfer sends to the decode worker: hello, two frames of two runs, a fence

ANSWERS_NBYTES = 273  # greeting, welcome, LANDED


async def outcome(pair, sender, grant, name, endpoint=None) -> str:
    """ "refused" by finish or by verification, or "good"; asserts that good means good."""
    try:
        digests = await pair.send(sender, grant, name, endpoint, timeout=2.0)
    except TandemError:
        pair.receiver(name).forget(grant.grant_id)
        return "refused"
    if not pair.is_verified(grant, digests, name):
        return "refused"
    assert pair.is_equal(grant), "wrong bytes were verified as good"
    return "good"


async def assert_alive(pair, name):
    sender = pair.sender(name)
    grant = pair.grant()
    assert await outcome(pair, sender, grant, name) == "good", "the receiver is worse off than before"
    sender.close()


@pytest.mark.parametrize("name", ["shm", "tcp", "memory"])
@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.value)
def test_spoilt_stores(pair, run, name, fault):
    """The lane spoils what was hashed: 100 transfers of each kind over each transport."""

    async def scenario():
        rng = random.Random(f"{name} {fault}")
        lanes = []

        def tamper(lane):
            lanes.append(FaultyLane(lane, lambda: fault if rng.random() < 0.5 else None, rng))
            return lanes[-1]

        sender = pair.sender(name, tamper=tamper)
        for _ in range(100):
            pair.refill()
            grant = pair.grant()
            before = lanes[0].applied
            result = await outcome(pair, sender, grant, name)
            spoilt = lanes[0].applied > before and fault is not Fault.DUPLICATE
            assert result == ("refused" if spoilt else "good")
        assert lanes[0].applied > 50
        await assert_alive(pair, name)

    run(scenario())


def test_the_length_of_the_stream(pair, run):
    """What the flips below take for granted."""
    lengths = {True: 0, False: 0}

    def count(connection, is_to_target, offset, data):
        lengths[is_to_target] += len(data)
        return data

    proxy = FaultProxy(pair.receiver("tcp").endpoint(), count)
    sender = pair.sender("tcp", endpoint=proxy.endpoint)
    assert run(outcome(pair, sender, pair.grant(endpoints=(proxy.endpoint,)), "tcp", proxy.endpoint)) == "good"
    proxy.close()
    assert lengths == {True: STREAM_NBYTES, False: ANSWERS_NBYTES}


def test_one_thousand_flips_of_a_tcp_stream(pair, run):
    """Every byte of the stream is hit about once, by a proxy in between: hand-shake, headers, tables, payload,
    fence.
    """

    async def scenario():
        rng = random.Random(20)
        endpoint = pair.receiver("tcp").endpoint()
        results = {"good": 0, "refused": 0}
        for place in rng.sample(range(STREAM_NBYTES), 1000):
            pair.refill()
            proxy = FaultProxy(endpoint, flip_at(place, rng.randrange(8)))
            sender = pair.sender("tcp", endpoint=proxy.endpoint, connect_timeout_s=0.3)
            grant = pair.grant(endpoints=(proxy.endpoint,))
            results[await outcome(pair, sender, grant, "tcp", proxy.endpoint)] += 1
            sender.close()
            proxy.close()
        await assert_alive(pair, "tcp")
        assert results["refused"] > 500, "most of the stream is payload"
        assert results["good"] > 100, "damage to headers is noticed at once and the transfer is sent again"

    run(scenario(), timeout=60.0)


def test_flips_of_the_answers(pair, run):
    async def scenario():
        rng = random.Random(21)
        endpoint = pair.receiver("tcp").endpoint()
        for place in rng.sample(range(ANSWERS_NBYTES), 60):
            pair.refill()
            proxy = FaultProxy(endpoint, flip_at(place, rng.randrange(8), is_to_target=False))
            sender = pair.sender("tcp", endpoint=proxy.endpoint, connect_timeout_s=0.3)
            await outcome(pair, sender, pair.grant(endpoints=(proxy.endpoint,)), "tcp", proxy.endpoint)
            sender.close()
            proxy.close()
        await assert_alive(pair, "tcp")

    run(scenario())


def test_a_stream_cut_anywhere_is_sent_again_once(pair, run):
    async def scenario():
        endpoint = pair.receiver("tcp").endpoint()
        for place in range(1, STREAM_NBYTES, 97):
            pair.refill()
            proxy = FaultProxy(endpoint, cut_at(place))
            sender = pair.sender("tcp", endpoint=proxy.endpoint)
            grant = pair.grant(endpoints=(proxy.endpoint,))
            assert await outcome(pair, sender, grant, "tcp", proxy.endpoint) == "good", f"cut after byte {place}"
            sender.close()
            proxy.close()
        proxy = FaultProxy(endpoint, cut_at(900, every_connection=True))
        sender = pair.sender("tcp", endpoint=proxy.endpoint)
        grant = pair.grant(endpoints=(proxy.endpoint,))
        with pytest.raises(TransferFailed, match="broke twice"):
            await pair.send(sender, grant, "tcp", proxy.endpoint)
        proxy.close()
        await assert_alive(pair, "tcp")

    run(scenario())


def test_spoilt_digests(pair, run):
    async def scenario():
        sender = pair.sender("memory")
        grant = pair.grant()
        digests = await pair.send(sender, grant, "memory")
        for place in range(len(digests)):
            spoilt = bytearray(digests)
            spoilt[place] ^= 1
            (bad,) = verify(pair.target, grant, pair.manifest(grant, bytes(spoilt)))
            assert bad == (place // 32, 1 + place // 16 % 2), "it names the run"
        for wrong in (digests[:-1], digests + b"\0", b""):
            with pytest.raises(TransferFailed, match="do not fit"):
                verify(pair.target, grant, pair.manifest(grant, wrong))

    run(scenario())
