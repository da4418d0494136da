"""What all transports promise: the bytes, only the bytes, digests in Manifest order, and who may write where."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import xxhash

from kvtransfer.digest import verify
from kvtransfer.outbox import Outbox
from kvtransfer.outgoing import LinkBroken, Source
from protocol.errors import DeadlineExceeded, HandshakeRefused, TransferFailed
from protocol.kv import TcpEndpoint

NAMES = ["memory", "shm", "tcp"]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_arrive_and_nothing_else_changes(pair, run, name):
    sender = pair.sender(name)
    grant = pair.grant()
    before = pair.target.runs.copy()
    digests = run(pair.send(sender, grant, name))
    assert pair.is_verified(grant, digests, name)
    assert pair.is_equal(grant)
    untouched = [block for block in range(16) if block not in (3, 4)]
    assert np.array_equal(before[:, untouched], pair.target.runs[:, untouched]), "only the written blocks changed"
    assert sender.stats.transfers == 1
    assert sender.stats.nbytes == 2 * pair.layout.num_layers * pair.layout.run_nbytes
    assert sender.stats.failed == 0
    assert sender.stats.seconds > 0


@pytest.mark.parametrize("name", NAMES)
def test_digests_are_in_manifest_order(pair, run, name):
    grant_blocks = tuple(range(10, 3, -1))  # descending: nothing is contiguous at the target
    sender = pair.sender(name)
    grant = pair.grant(grant_blocks, num_cached=2, num_tokens=28)
    digests = run(pair.send(sender, grant, name))
    expected = b"".join(xxhash.xxh3_128_digest(pair.target.run(layer, block)) for layer in range(2) for block in grant_blocks[2:])
    assert digests == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_a_block_held_before_is_not_shipped(pair, run, name):
    """The unused end of the last block is zero at the target, whatever lay there at the source, and untouched at the
    source.
    """
    sender = pair.sender(name)
    grant = pair.grant((9, 3, 4), num_cached=1, num_tokens=9)  # one token in the last block
    source_before = pair.source.runs.copy()
    digests = run(pair.send(sender, grant, name))
    assert pair.is_verified(grant, digests, name)
    shape = (2, 2, 2, 4, 16)  # [layer, K/V, head, slot, bytes]
    arrived = pair.target.runs[:, 4].reshape(shape)
    assert not arrived[:, :, :, 1:].any(), "old bytes of the source block were shipped"
    assert np.array_equal(arrived[:, :, :, :1], pair.source.runs[:, 6].reshape(shape)[:, :, :, :1])
    assert np.array_equal(source_before, pair.source.runs), "the sender wrote into the engine's blocks"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_never_pushed_fails(pair, run, name):
    async def scenario():
        sender = pair.sender(name)
        grant = pair.grant()
        pair.receiver(name).expect(grant)
        sender.open(grant, pair.receiver(name).endpoint())
        sender.push(grant.grant_id, 0, pair.pairs(grant))
        sender.push(grant.grant_id, 1, pair.pairs(grant)[:1])
        with pytest.raises(TransferFailed, match="1 of 4 runs .* never pushed"):
            await sender.finish(grant.grant_id, 2.0)
        await sender.abort(grant.grant_id)
        assert sender.stats.failed == 1

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_pushing_again_replaces(pair, run, name):
    """A chunk that ends inside a block pushes it twice; what counts is what it holds in the end."""

    async def scenario():
        sender = pair.sender(name)
        grant = pair.grant()
        pair.receiver(name).expect(grant)
        sender.open(grant, pair.receiver(name).endpoint())
        pair.push_all(sender, grant)
        await asyncio.sleep(0.1)
        pair.source.runs[:] ^= 0xFF
        pair.push_all(sender, grant)
        digests = await sender.finish(grant.grant_id, 2.0)
        assert pair.is_verified(grant, digests, name)
        assert pair.is_equal(grant)

    run(scenario())


@pytest.mark.parametrize("name", NAMES)
def test_after_abort_nothing_is_stored(pair, run, name):
    async def scenario():
        sender = pair.sender(name)
        for _ in range(20):
            grant = pair.grant()
            pair.receiver(name).expect(grant)
            sender.open(grant, pair.receiver(name).endpoint())
            for _ in range(20):
                pair.push_all(sender, grant)
            await sender.abort(grant.grant_id)
            pair.target.runs[:] = 0  # the blocks belong to somebody else now
            assert not sender.push(grant.grant_id, 0, pair.pairs(grant)), "push of an aborted grant says so"
            await asyncio.sleep(0.002)
            assert not pair.target.runs.any(), "a store after abort() returned"
            await sender.abort(grant.grant_id)  # again: nothing to do

    run(scenario())


@pytest.mark.parametrize("name", ["memory", "tcp"])
def test_a_receiver_that_can_refuse_does(pair, run, name):
    async def scenario():
        sender = pair.sender(name)
        receiver = pair.receiver(name)
        never, gone, others = pair.grant(), pair.grant(), pair.grant(prefill_incarnation="P2")
        receiver.expect(gone)
        receiver.expect(others)
        assert receiver.forget(gone.grant_id) is True
        before = pair.target.runs.copy()
        for grant, why in ((never, "unknown"), (gone, "over|expired"), (others, "P2|another prefill incarnation")):
            sender.open(grant, receiver.endpoint())
            pair.push_all(sender, grant)
            with pytest.raises(TransferFailed, match=why):
                await sender.finish(grant.grant_id, 2.0)
            await sender.abort(grant.grant_id)
        assert np.array_equal(before, pair.target.runs), "a refused store changed the pool"
        grant = pair.grant()
        digests = await pair.send(sender, grant, name)
        assert pair.is_verified(grant, digests, name), "the link works on after refusals"

    run(scenario())


def test_shm_cannot_refuse_and_says_so(pair):
    grant = pair.grant()
    pair.receiver("shm").expect(grant)
    assert pair.receiver("shm").forget(grant.grant_id) is False


@pytest.mark.parametrize("name", NAMES)
def test_open_checks_papers(pair, name):
    sender = pair.sender(name)
    receiver = pair.receiver(name)
    endpoint = receiver.endpoint()
    with pytest.raises(HandshakeRefused, match="names the endpoints"):
        sender.open(pair.grant(endpoints=()), endpoint)
    with pytest.raises(HandshakeRefused, match="this sender writes to"):
        sender.open(pair.grant(), TcpEndpoint("127.0.0.1", 1))
    other = type(pair.layout)(2, 2, 4, 8, "float32", "m")
    with pytest.raises(HandshakeRefused, match="block_size: 4 here, 8 there"):
        sender.open(pair.grant(layout=other), endpoint)
    if name != "tcp":  # the tcp receiver itself knows its blocks; a mapped pool must not be left
        with pytest.raises(HandshakeRefused, match=r"blocks 3\.\.16, the peer's pool has 16"):
            sender.open(pair.grant((9, 3, 16)), endpoint)


@pytest.mark.parametrize("name", NAMES)
def test_many_transfers_at_once(pair, run, name):
    """Interleaved layer by layer, as a prefill batch pushes them."""

    async def scenario():
        sender = pair.sender(name)
        grants = [pair.grant((2 * i, 2 * i + 1), num_cached=0, num_tokens=8) for i in range(8)]
        for grant in grants:
            pair.receiver(name).expect(grant)
            sender.open(grant, pair.receiver(name).endpoint())
        for layer in range(2):
            for i, grant in enumerate(grants):
                assert sender.push(grant.grant_id, layer, [(2 * i, 0), (2 * i + 1, 1)])
        results = await asyncio.gather(*(sender.finish(grant.grant_id, 5.0) for grant in grants))
        for i, (grant, digests) in enumerate(zip(grants, results, strict=True)):
            assert not verify(pair.target, grant, pair.manifest(grant, digests))
            assert np.array_equal(pair.source.runs[:, 2 * i], pair.target.runs[:, 2 * i])

    run(scenario())


def test_close_fails_what_is_open(pair, run):
    async def scenario():
        for name in NAMES:
            sender = pair.sender(name)
            grant = pair.grant()
            sender.open(grant, pair.receiver(name).endpoint())
            sender.close()
            sender.close()
            with pytest.raises(TransferFailed, match="closed"):
                await sender.finish(grant.grant_id, 1.0)
            await sender.abort(grant.grant_id)

    run(scenario())


class StuckLane:
    """A lane whose store stands still until told otherwise."""

    num_blocks = None

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.may_go = threading.Event()
        self.num_stored = 0
        self.error: Exception | None = None

    def attach(self, on_broken):
        pass

    def warm(self):
        pass

    def is_broken(self):
        return False

    def reset(self):
        pass

    def interrupt(self):
        pass

    def close(self):
        pass

    def store(self, transfer, layer, pieces):
        self.may_go.wait(5.0)
        self.num_stored += len(list(pieces)) > 0
        if self.error is not None:
            raise self.error

    def fence(self, transfer):
        transfer.landed(transfer.num_runs)


def test_a_full_queue_fails_the_transfer_and_not_the_engine(pair, run):
    async def scenario():
        pair.receiver("tcp")
        lane = StuckLane(pair.receiver("tcp").endpoint())
        sender = Outbox(lane, Source(pair.source), max_queued=3, push_timeout_s=0.1)
        grant = pair.grant()
        sender.open(grant, lane.endpoint)
        started = time.monotonic()
        accepted = [sender.push(grant.grant_id, 0, pair.pairs(grant)) for _ in range(10)]
        waited = time.monotonic() - started
        assert accepted[:3] == [True] * 3
        assert accepted[-1] is False
        assert waited < 0.5, "only the first push that found no room waited"
        with pytest.raises(TransferFailed, match="too slow"):
            await sender.finish(grant.grant_id, 1.0)
        lane.may_go.set()
        await sender.abort(grant.grant_id)
        assert lane.num_stored <= 1, "queued pushes of an aborted transfer are dropped"
        sender.close()

    run(scenario())


def test_finish_has_a_deadline_and_abort_waits_for_the_store_under_way(pair, run):
    async def scenario():
        lane = StuckLane(pair.receiver("tcp").endpoint())
        sender = Outbox(lane, Source(pair.source))
        grant = pair.grant()
        sender.open(grant, lane.endpoint)
        pair.push_all(sender, grant)
        with pytest.raises(DeadlineExceeded, match="0.1 s"):
            await sender.finish(grant.grant_id, 0.1)
        aborting = asyncio.create_task(sender.abort(grant.grant_id))
        await asyncio.sleep(0.1)
        assert not aborting.done(), "abort() returned while a store was under way"
        lane.may_go.set()
        await asyncio.wait_for(aborting, 2.0)
        assert lane.num_stored == 1
        sender.close()

    run(scenario())


def test_an_unforeseen_error_ends_one_transfer_and_not_the_thread(pair, run):
    async def scenario():
        lane = StuckLane(pair.receiver("tcp").endpoint())
        lane.may_go.set()
        lane.error = ZeroDivisionError("a bug")
        sender = Outbox(lane, Source(pair.source))
        bad, good = pair.grant(), pair.grant()
        sender.open(bad, lane.endpoint)
        sender.push(bad.grant_id, 0, pair.pairs(bad))
        await asyncio.sleep(0.1)
        lane.error = None
        sender.open(good, lane.endpoint)
        pair.push_all(sender, good)
        assert len(await sender.finish(good.grant_id, 2.0)) == 64
        with pytest.raises(Exception, match="KV sender failed"):
            await sender.finish(bad.grant_id, 2.0)
        lane.error = LinkBroken("cut")
        worse = pair.grant()
        sender.open(worse, lane.endpoint)
        sender.push(worse.grant_id, 0, pair.pairs(worse))
        with pytest.raises(TransferFailed, match="broke twice"):
            await sender.finish(worse.grant_id, 2.0)
        sender.close()

    run(scenario())


def test_an_unforeseen_error_while_sending_again_ends_one_transfer_and_not_the_thread(pair, run):
    """A new link needs descriptors and threads, and there may be none just then."""

    async def scenario():
        lane = StuckLane(pair.receiver("tcp").endpoint())
        lane.may_go.set()
        lane.error = LinkBroken("cut")
        sender = Outbox(lane, Source(pair.source))
        lane.reset = lambda: setattr(lane, "error", RuntimeError("can't start new thread"))
        bad, good = pair.grant(), pair.grant()
        sender.open(bad, lane.endpoint)
        sender.push(bad.grant_id, 0, pair.pairs(bad))
        with pytest.raises(Exception, match="KV sender failed"):
            await sender.finish(bad.grant_id, 2.0)
        await asyncio.wait_for(sender.abort(bad.grant_id), 2.0)
        lane.error = None
        sender.open(good, lane.endpoint)
        pair.push_all(sender, good)
        assert len(await sender.finish(good.grant_id, 2.0)) == 64
        sender.close()

    run(scenario())


def test_every_abort_of_a_grant_waits_for_the_store_under_way(pair, run):
    """A second caller, one that comes after the first gave up waiting, one after finish() failed: none returns early."""
    lane = StuckLane(pair.receiver("shm").endpoint())
    outbox = Outbox(lane, Source(pair.source))
    grant = pair.grant()

    async def scenario():
        outbox.open(grant, lane.endpoint)
        pair.push_all(outbox, grant)
        finishing = asyncio.create_task(outbox.finish(grant.grant_id, 5.0))
        await asyncio.sleep(0.1)
        first = asyncio.create_task(outbox.abort(grant.grant_id))
        await asyncio.sleep(0.02)
        with pytest.raises(TransferFailed, match="aborted"):
            await finishing
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        others = [asyncio.create_task(outbox.abort(grant.grant_id)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(other.done() for other in others)
        lane.may_go.set()
        await asyncio.wait_for(asyncio.gather(*others), 2.0)
        assert lane.num_stored == 1, "nothing was stored after the abort began"
        await asyncio.wait_for(outbox.abort(grant.grant_id), 1.0)
        assert not outbox._stopping

    run(scenario())
    outbox.close()
