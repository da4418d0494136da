"""The nccl transport without NCCL: a communicator of queues under the real lane, receiver, deadlines and fallback."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time

import numpy as np
import pytest
import torch

from kvtransfer import nccl_receiver, tcp_frames
from kvtransfer.arrivals import Arrivals
from kvtransfer.device import DeviceView
from kvtransfer.layout import Place
from kvtransfer.nccl import RECEIVER, SENDER, Pipe
from kvtransfer.nccl_lane import NcclLane
from kvtransfer.nccl_receiver import NcclReceiver
from kvtransfer.outbox import Outbox
from kvtransfer.outgoing import LinkBroken
from kvtransfer.tcp import TcpReceiver
from kvtransfer.tcp_lane import TcpLane
from protocol.errors import HandshakeRefused, TransferFailed, Unsupported
from protocol.kv import LANESUM, NcclEndpoint
from tests.kvtransfer.test_device import OnDevice

TIMEOUT_S = 0.5  # where a test waits for it; elsewhere a busy machine must not reach it


class Wires:
    """Makes communicators that pass tensors on. stall_after: the n-th send never ends, as when the peer's NIC is gone."""

    def __init__(self) -> None:
        self.stall_after: int | None = None
        self.never_made = False
        self.num_sent = 0
        self.num_aborted = 0
        self.spoil = False
        self._queues: dict[bytes, queue.SimpleQueue] = {}
        self._ids = itertools.count()

    def unique_id(self) -> bytes:
        return next(self._ids).to_bytes(128, "big")

    def make(self, unique_id: bytes, rank: int, device: torch.device) -> Wire:
        assert len(unique_id) == 128
        assert rank in (SENDER, RECEIVER)
        while self.never_made:
            time.sleep(0.01)
        return Wire(self, self._queues.setdefault(unique_id, queue.SimpleQueue()))


class Wire:
    def __init__(self, wires: Wires, passed: queue.SimpleQueue) -> None:
        self._wires = wires
        self._passed = passed
        self._aborted = threading.Event()

    def send(self, data: torch.Tensor) -> None:
        self._wires.num_sent += 1
        if self._wires.stall_after is not None and self._wires.num_sent > self._wires.stall_after:
            self._aborted.wait(20)
            raise RuntimeError("NCCL_ERROR_UNHANDLED: aborted")
        copy = data.clone()
        if self._wires.spoil:
            copy.view(torch.uint8).view(-1)[3] ^= 1
        self._passed.put(copy)

    def receive(self, data: torch.Tensor) -> None:
        while not self._aborted.is_set():
            try:
                data.copy_(self._passed.get(timeout=0.01))
                return
            except queue.Empty:
                continue
        raise RuntimeError("NCCL_ERROR_UNHANDLED: aborted")

    def abort(self) -> None:
        self._wires.num_aborted += 1
        self._aborted.set()


class Ends:
    """Both ends of the transport over a `Pair`'s pools, with a tcp receiver to fall back to."""

    def __init__(self, pair) -> None:
        self.pair = pair
        self.wires = Wires()
        self.tcp = TcpReceiver(pair.target, pair.secret, "D1", stall_timeout_s=10.0)
        self.receiver = NcclReceiver(
            pair.target,
            pair.secret,
            "D1",
            timeout_s=20.0,
            make=self.wires.make,
            unique_id=self.wires.unique_id,
            uuid="GPU-D",
        )
        self.timeout_s = 20.0
        self.senders: list[Outbox] = []
        self.lanes: list[NcclLane] = []

    def hurry(self) -> None:
        self.timeout_s = self.receiver.timeout_s = TIMEOUT_S

    @property
    def endpoint(self) -> NcclEndpoint:
        return self.receiver.endpoint()

    def sender(self, *, uuid: str = "GPU-P", falls_back: bool = True, secret: bytes | None = None, life: str = "D1") -> Outbox:
        secret = secret or self.pair.secret
        source = OnDevice(self.pair.source)

        def tcp() -> TcpLane:
            return TcpLane(self.tcp.endpoint(), self.pair.layout, secret, "P1", "D1", digest=LANESUM, stall_timeout_s=10.0)

        lane = NcclLane(
            self.endpoint,
            source,
            secret,
            "P1",
            life,
            uuid,
            tcp if falls_back else None,
            connect_timeout_s=5.0,
            timeout_s=self.timeout_s,
            make=self.wires.make,
        )
        sender = Outbox(lane, source)
        self.lanes.append(lane)
        self.senders.append(sender)
        return sender

    def expect(self, **changes):
        grant = self.pair.grant(endpoints=(self.endpoint,), **changes)
        arrivals = Arrivals(grant, Place(self.pair.layout))
        self.receiver.expect(grant, arrivals)
        self.tcp.expect(grant, arrivals)
        return grant, arrivals

    async def send(self, sender: Outbox, grant, timeout: float = 20.0) -> bytes:
        sender.open(grant, self.endpoint)
        self.pair.push_all(sender, grant)
        return await sender.finish(grant.grant_id, timeout)

    def landed(self, grant) -> bytes:
        """Lane sums of what lies in the target's blocks."""
        return DeviceView(self.pair.target.tensor, self.pair.layout, None, LANESUM).lane_sums(grant.block_ids[1:])

    def close(self) -> None:
        self.wires.never_made = False
        for sender in self.senders:
            sender.close()
        self.receiver.close()
        self.tcp.close()


@pytest.fixture
def ends(pair, monkeypatch):
    # Over the fallback the pool counts as a GPU's as well: papers keep their kind.
    monkeypatch.setattr("kvtransfer.tcp.view_of", lambda pool, area, kind: DeviceView(pool.tensor, pool.layout, area, kind))
    made = Ends(pair)
    yield made
    made.close()


async def test_a_transfer_lands_and_its_digests_are_of_what_landed(ends):
    sender = ends.sender()
    await sender.ready(20.0)
    grant, arrivals = ends.expect()
    before = ends.pair.target.runs.copy()
    digests = await ends.send(sender, grant)
    assert ends.receiver.forget(grant.grant_id) is True
    assert ends.pair.is_equal(grant)
    assert digests == ends.landed(grant) == arrivals.digests
    assert arrivals.is_complete
    untouched = [block for block in range(ends.pair.target.num_blocks) if block not in grant.block_ids[1:]]
    assert np.array_equal(ends.pair.target.runs[:, untouched], before[:, untouched])
    assert ends.wires.num_sent == 2, "one frame for each layer"
    assert not ends.lanes[0].has_fallen_back


async def test_bytes_that_change_on_the_wire_are_in_no_digest(ends):
    sender = ends.sender()
    ends.wires.spoil = True
    grant, arrivals = ends.expect()
    digests = await ends.send(sender, grant)
    assert digests != arrivals.digests
    assert arrivals.digests == ends.landed(grant)


async def test_many_frames_per_layer(ends, monkeypatch):
    monkeypatch.setattr("kvtransfer.nccl.FRAME_NBYTES", 2 * ends.pair.layout.run_nbytes + 5)
    sender = ends.sender()
    grant, _ = ends.expect(blocks=(9, 3, 4, 1, 14, 2, 0), num_cached=1)
    assert await ends.send(sender, grant) == ends.landed(grant)
    assert ends.wires.num_sent == 6
    assert ends.pair.is_equal(grant)


@pytest.mark.parametrize("stall_after", [0, 1, 2])
async def test_a_stall_is_aborted_at_its_deadline_and_the_transfer_goes_over_tcp(ends, stall_after):
    """Also the transfer that was under way, from its beginning; and all later ones without another try."""
    ends.hurry()
    sender = ends.sender()
    await sender.ready(20.0)
    ends.wires.stall_after = stall_after
    grant, arrivals = ends.expect(blocks=(9, 3, 4), num_cached=1)
    started = time.monotonic()
    digests = await ends.send(sender, grant)
    took = time.monotonic() - started
    if stall_after < 2:
        assert took > TIMEOUT_S * 0.9
        assert ends.lanes[0].has_fallen_back
        assert ends.wires.num_aborted >= 1
    assert ends.pair.is_equal(grant)
    assert digests == ends.landed(grant) == arrivals.digests
    ends.pair.refill()
    num_sent = ends.wires.num_sent
    grant, _ = ends.expect(blocks=(1, 12, 6), num_cached=1)
    assert await ends.send(sender, grant) == ends.landed(grant)
    assert ends.pair.is_equal(grant)
    if stall_after < 2:
        assert ends.wires.num_sent == num_sent, "nobody tries NCCL again"


async def test_without_a_fallback_the_transfer_fails_at_the_deadline(ends):
    ends.hurry()
    sender = ends.sender(falls_back=False)
    await sender.ready(20.0)
    ends.wires.stall_after = 0
    grant, _ = ends.expect()
    with pytest.raises(TransferFailed, match="broke twice"):
        await ends.send(sender, grant, 30.0)
    await asyncio.wait_for(sender.abort(grant.grant_id), 5.0)


async def test_a_receiver_that_dies_breaks_the_link(ends):
    sender = ends.sender()
    await sender.ready(20.0)
    ends.receiver.close()
    grant, _ = ends.expect()
    assert await ends.send(sender, grant) == ends.landed(grant)
    assert ends.lanes[0].has_fallen_back


async def test_one_gpu_cannot_be_both_ends(ends):
    sender = ends.sender(uuid="GPU-D")
    with pytest.raises(HandshakeRefused, match="both workers are on GPU GPU-D"):
        await sender.ready(20.0)


async def test_strangers_are_refused(ends):
    with pytest.raises(HandshakeRefused, match="secret"):
        await ends.sender(secret=b"another").ready(5.0)
    with pytest.raises(HandshakeRefused, match="you meant D0"):
        await ends.sender(life="D0").ready(5.0)


async def test_a_communicator_that_is_never_made_ends_the_handshake(ends):
    ends.hurry()
    ends.wires.never_made = True
    started = time.monotonic()
    with pytest.raises(HandshakeRefused, match="making the communicator took longer than 0.5 s"):
        await ends.sender().ready(20.0)
    assert time.monotonic() - started < 15


async def test_a_forgotten_grant_takes_no_byte(ends):
    sender = ends.sender()
    grant, _ = ends.expect()
    before = ends.pair.target.runs.copy()
    assert ends.receiver.forget(grant.grant_id)
    with pytest.raises(TransferFailed, match="unknown there, expired, cancelled or used"):
        await ends.send(sender, grant)
    assert np.array_equal(ends.pair.target.runs, before)
    await sender.abort(grant.grant_id)
    grant, _ = ends.expect()  # the communicator stayed in step
    assert await ends.send(sender, grant) == ends.landed(grant)
    assert not ends.lanes[0].has_fallen_back


async def test_a_grant_of_another_writer_takes_no_byte(ends):
    sender = ends.sender()
    grant, _ = ends.expect(prefill_incarnation="P2")
    before = ends.pair.target.runs.copy()
    with pytest.raises(TransferFailed, match="names another prefill incarnation"):
        await ends.send(sender, grant)
    assert np.array_equal(ends.pair.target.runs, before)


@pytest.mark.parametrize(
    ("layer", "indexes"), [(2, (1, 2)), (0, (0, 1)), (0, (2, 3)), (0, (2, 2))], ids=["layer", "cached", "beyond", "twice"]
)
def test_frames_outside_of_the_grant_are_thrown_away(ends, layer, indexes):
    """The receiver's own look at a frame, whatever a sender says."""
    grant, arrivals = ends.expect()
    connection = nccl_receiver._Connection.__new__(nccl_receiver._Connection)
    connection.peer, connection.rank = "P1", 0
    connection._hello = tcp_frames.Hello("P1", "D1", ends.pair.layout)
    connection._view = DeviceView(ends.pair.target.tensor, ends.pair.layout, None, LANESUM)
    inflow = nccl_receiver.Inflow(grant, arrivals)
    assert connection._why_not(inflow, layer, indexes) is tcp_frames.Reason.OUTSIDE
    assert connection._why_not(inflow, 1, (1, 2)) is None
    assert connection._why_not(None, 1, (1, 2)) is tcp_frames.Reason.NOT_LIVE


def test_it_needs_a_gpu(pair):
    with pytest.raises(Unsupported, match="nccl: it needs a KV pool on a GPU"):
        NcclReceiver(pair.target, pair.secret, "D1")


# ---- the pipe ----------------------------------------------------------------------------------------------------------


class Slow:
    def __init__(self) -> None:
        self.aborted = threading.Event()

    def send(self, data: torch.Tensor) -> None:
        if not self.aborted.wait(20):
            raise AssertionError("nobody aborted it")
        raise RuntimeError("NCCL_ERROR_UNHANDLED")

    receive = send

    def abort(self) -> None:
        self.aborted.set()


def test_a_late_operation_is_aborted_and_the_pipe_is_broken_for_good():
    slow = Slow()
    pipe = Pipe(lambda: slow, 0.2, "test")
    pipe.ready()
    started = time.monotonic()
    with pytest.raises(LinkBroken, match=r"nccl: sending took longer than 0\.2 s"):
        pipe.send(torch.zeros(1))
    assert 0.15 < time.monotonic() - started < 2
    assert slow.aborted.is_set()
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="sending took longer"):
        pipe.receive(torch.zeros(1))
    assert time.monotonic() - started < 0.1


def test_a_communicator_that_comes_too_late_is_aborted():
    slow, go = Slow(), threading.Event()

    def make():
        go.wait(10)
        return slow

    pipe = Pipe(make, 0.1, "test")
    with pytest.raises(LinkBroken, match="making the communicator"):
        pipe.ready()
    go.set()
    assert slow.aborted.wait(5)


def test_an_error_breaks_the_pipe_with_its_own_words():
    class Broken(Slow):
        def send(self, data):
            raise RuntimeError("NCCL_ERROR_SYSTEM: no route")

    pipe = Pipe(Broken, 5.0, "test")
    with pytest.raises(LinkBroken, match="nccl: sending: NCCL_ERROR_SYSTEM: no route"):
        pipe.send(torch.zeros(1))
    assert pipe.is_broken


def test_abort_from_another_thread_ends_what_waits():
    slow = Slow()
    pipe = Pipe(lambda: slow, 10.0, "test")
    pipe.ready()
    threading.Timer(0.1, lambda: pipe.abort("closed here")).start()
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="closed here"):
        pipe.receive(torch.zeros(1))
    assert time.monotonic() - started < 2
