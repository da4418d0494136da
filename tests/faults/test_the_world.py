"""The world of the fault tests itself: virtual time, stopped and dead nodes, the network, late stores."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest

from kvtransfer.arrivals import Arrivals
from kvtransfer.handoff import InboundPhase
from kvtransfer.layout import Place
from kvtransfer.outgoing import Source
from kvtransfer.pool import KVPool
from protocol.errors import DeadlineExceeded, HandshakeRefused, TransferFailed, WorkerLost
from protocol.messages import GatewayBeat, Ok, WriterDone
from protocol.ticket import Grant
from tests.faults.model import LAYOUT
from tests.faults.stores import Memory
from tests.faults.virtual_loop import Hang, Node, VirtualLoop
from tests.faults.wire import VirtualNetwork, Wires

BEAT = GatewayBeat("g", ())


class World:
    def __init__(self) -> None:
        self.loop = VirtualLoop(max_time=1000.0)
        self.wires = Wires(self.loop, random.Random(1))
        self.problems: list[str] = []
        self.memory = Memory(self.wires, random.Random(2), self.problems.append)

    def node(self, name: str) -> Node:
        return Node(self.loop, name)

    async def serving(self, name: str) -> SimpleNamespace:
        """A node that answers calls with Ok, and remembers sends and lost peers."""
        node = self.node(name)
        network = VirtualNetwork(self.wires, node, name, lambda story, error: self.problems.append(story))
        made = SimpleNamespace(node=node, network=network, got=[], lost=[], answers=True)

        async def handle(peer, message):
            made.got.append(message)
            if not made.answers:
                await asyncio.sleep(100.0)
            return Ok() if isinstance(message, GatewayBeat) else None

        await network.serve(handle, made.lost.append)
        return made


def run(test):
    world = World()
    result = world.loop.run(test(world))
    assert not world.loop.errors
    world.loop.close()
    return result


def test_time_jumps_to_the_next_timer():
    async def go(world):
        seen = []
        for delay in (3.0, 1.0, 2.0):
            world.loop.call_later(delay, lambda d=delay: seen.append((d, world.loop.time())))
        await asyncio.sleep(500.0)
        assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.Event().wait()
        assert world.loop.time() == 505.0

    run(go)


@pytest.mark.parametrize(
    ("main", "says"),
    [
        (lambda: asyncio.Event().wait(), "nothing is ready"),
        (lambda: asyncio.sleep(2000.0), "were not enough"),
        (lambda: _spin(), "handles"),
    ],
    ids=["deadlock", "too long", "spinning"],
)
def test_a_hang_is_told_with_what_is_pending(main, says):
    async def go(world):
        world.node("sleeper").task(asyncio.Event().wait())
        await main()

    with pytest.raises(Hang, match=says) as error:
        run(go)
    assert "sleeper (up): Event.wait" in str(error.value)


async def _spin():
    while True:
        await asyncio.sleep(0)


def test_a_stopped_node_executes_nothing_and_then_everything():
    async def go(world):
        node, ran = world.node("n"), []

        async def tick():
            while True:
                ran.append(world.loop.time())
                await asyncio.sleep(1.0)

        task = node.task(tick())
        await asyncio.sleep(2.5)
        node.stop()
        node.soon(ran.append, "soon")
        woken = world.loop.create_future()
        node.task(_append(ran, woken))
        woken.set_result("woken")
        await asyncio.sleep(10.0)
        assert ran == [0.0, 1.0, 2.0]
        node.resume()
        await asyncio.sleep(0.0)
        await asyncio.sleep(1.6)
        assert ran[3:] == ["soon", "woken", 12.5, 13.5]
        task.cancel()

    run(go)


async def _append(ran, future):
    ran.append(await future)


def test_a_dead_node_executes_nothing_ever_again():
    async def go(world):
        node, ran = world.node("n"), []

        async def tick():
            try:
                while True:
                    ran.append(world.loop.time())
                    await asyncio.sleep(1.0)
            finally:
                ran.append("finally")

        task = node.task(tick())
        await asyncio.sleep(1.5)
        node.kill()
        task.cancel()
        await asyncio.sleep(10.0)
        assert ran == [0.0, 1.0]

    run(go)


def test_calls_and_sends_in_order_and_a_lost_answer():
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        peer = await a.network.connect("b")
        assert await a.network.connect("b") is peer
        assert await peer.call(BEAT, 1.0) == Ok()
        for i in range(20):
            peer.send(WriterDone(str(i)))
        await asyncio.sleep(0.1)
        assert [m.grant_id for m in b.got[1:]] == [str(i) for i in range(20)]
        world.wires.weather.vanish = 1.0
        with pytest.raises(DeadlineExceeded):
            await peer.call(BEAT, 1.0)

    run(go)


def test_a_message_in_flight_arrives_though_its_sender_stopped():
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        peer = await a.network.connect("b")
        a.node.context.run(peer.send, WriterDone("last"))
        a.node.stop()
        await asyncio.sleep(0.1)
        assert b.got == [WriterDone("last")]

    run(go)


@pytest.mark.parametrize("how", ["told", "dark", "stopped", "cut"])
def test_how_a_peers_end_is_noticed(how):
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        peer = await a.network.connect("b")
        if how in ("told", "dark"):
            b.node.kill()
            world.wires.die(b.node, is_told=how == "told")
        elif how == "stopped":
            b.node.stop()
            world.wires.review()
        else:
            world.wires.cut(b.node, a.node)
        call = asyncio.create_task(peer.call(BEAT, 60.0))
        await asyncio.sleep(2.9)
        assert peer.is_closed == (how == "told")
        await asyncio.sleep(1.2)
        assert peer.is_closed
        assert a.lost == [peer]
        with pytest.raises(WorkerLost):
            await call
        if how == "stopped":  # the zombie handles what came before it learns that nobody is there
            assert not b.got
            b.node.resume()
            world.wires.review()
            await asyncio.sleep(0.1)
            assert b.got == [BEAT]
            assert len(b.lost) == 1

    run(go)


def test_who_was_stopped_does_not_take_its_own_silence_for_the_others():
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        peer = await a.network.connect("b")
        a.node.stop()
        world.wires.cut(b.node, a.node)
        await asyncio.sleep(2.0)
        world.wires.heal(b.node, a.node)
        await asyncio.sleep(0.9)
        a.node.resume()
        world.wires.review()
        await asyncio.sleep(5.0)
        assert not peer.is_closed

    run(go)


def test_what_was_written_during_a_cut_arrives_after_it():
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        peer = await a.network.connect("b")
        world.wires.cut(a.node, b.node)
        peer.send(WriterDone("1"))
        await asyncio.sleep(2.0)
        assert not b.got
        world.wires.heal(a.node, b.node)
        await asyncio.sleep(1.0)
        assert b.got == [WriterDone("1")]

    run(go)


def test_nobody_there_nobody_answering_and_a_successor():
    async def go(world):
        a, b = await world.serving("a"), await world.serving("b")
        with pytest.raises(WorkerLost, match="refused"):
            await a.network.connect("c")
        b.node.stop()
        with pytest.raises(WorkerLost, match="TimeoutError"):
            await a.network.connect("b")
        b.node.kill()
        world.wires.die(b.node, is_told=False)
        again = await world.serving("b")
        peer = await a.network.connect("b")
        assert await peer.call(BEAT, 1.0) == Ok()
        assert again.got
        assert not b.got

    run(go)


def test_a_descriptor_that_becomes_readable():
    async def go(world):
        told = []
        world.loop.add_reader(7, told.append, "dead")
        world.loop.readable(7)
        world.loop.readable(8)
        await asyncio.sleep(0.1)
        assert told == ["dead"]
        assert world.loop.remove_reader(7)
        world.loop.readable(7)
        await asyncio.sleep(0.1)
        assert told == ["dead"]

    run(go)


@pytest.mark.parametrize("how", ["dead", "cut", "unmappable", "another host"])
def test_an_endpoint_that_is_not_reached(how):
    async def go(world):
        can_refuse = how in ("dead", "cut")
        pair = _pair(world, can_refuse)
        assert await pair.sender.ready(1.0) is None
        if how == "dead":
            pair.reader.node.kill()
        elif how == "cut":
            world.wires.cut(pair.reader.node, pair.writer)
        elif how == "unmappable":
            world.memory.damage.unmappable = 1.0
        else:
            pair.writer.host = "elsewhere"
        with pytest.raises(HandshakeRefused):
            await world.memory.sender(pair.writer, Source(pair.source), pair.receiver.endpoint()).ready(1.0)

    run(go)


# ---- stores ----------------------------------------------------------------------------------------------------------


class _Machine:
    """A decode worker as its receivers see it."""

    def __init__(self, node) -> None:
        self.node = node
        self.phase = InboundPhase.RESERVED
        self.worker = SimpleNamespace(
            handover=SimpleNamespace(_inbound=SimpleNamespace(phase=lambda grant_id: self.phase)),
            pool=SimpleNamespace(state=lambda block: SimpleNamespace(value="free")),
        )


def _pair(world, can_refuse):
    writer, reader = world.node("writer"), _Machine(world.node("reader"))
    source, target = KVPool(LAYOUT, 4), KVPool(LAYOUT, 4)
    source.runs[:] = np.random.default_rng(1).integers(0, 256, source.runs.shape)
    receiver = world.memory.receiver(reader, target, can_refuse=can_refuse)
    stored = []
    sender = world.memory.sender(writer, Source(source), receiver.endpoint(), lambda *what: stored.append(what))
    grant = Grant("g", "r", 1, "d", "p", (1, 2), 0, 8, LAYOUT, 10.0, (receiver.endpoint(),), "d:1")
    arrivals = Arrivals(grant, Place(LAYOUT))
    receiver.expect(grant, arrivals)
    sender.open(grant, receiver.endpoint())
    return SimpleNamespace(
        writer=writer, reader=reader, source=source, target=target, receiver=receiver, sender=sender, arrivals=arrivals, stored=stored
    )


def _push(pair):
    for layer in range(LAYOUT.num_layers):
        pair.sender.push("g", layer, [(0, 0), (3, 1)])


@pytest.mark.parametrize("can_refuse", [False, True])
def test_stores_land_and_have_digests(can_refuse):
    async def go(world):
        pair = _pair(world, can_refuse)
        _push(pair)
        digests = await pair.sender.finish("g", 1.0)
        assert len(digests) == 2 * LAYOUT.num_layers * 16
        assert pair.arrivals.is_complete == can_refuse
        assert [(layer, first) for _, layer, first, _ in pair.stored] == [(0, 0), (1, 0)]
        assert b"".join(told for *_, told in pair.stored) == digests
        assert np.array_equal(pair.target.runs[:, [1, 2]], pair.source.runs[:, [0, 3]])
        assert not world.problems

    run(go)


def test_a_mapped_store_freezes_with_its_writer_and_lands_when_it_goes_on():
    async def go(world):
        pair = _pair(world, can_refuse=False)
        _push(pair)
        await asyncio.sleep(0.001)
        pair.writer.stop()
        assert not pair.receiver.forget("g")
        await asyncio.sleep(10.0)
        assert not pair.target.runs.any()
        pair.reader.phase = None  # given back although its writer owes its word
        pair.writer.resume()
        await asyncio.sleep(1.0)
        assert pair.target.runs.any()
        assert "but g is over" in world.problems[0]

    run(go)


def test_a_mapped_store_never_lands_after_its_writers_death():
    async def go(world):
        pair = _pair(world, can_refuse=False)
        _push(pair)
        await asyncio.sleep(0.001)
        pair.writer.kill()
        await asyncio.sleep(10.0)
        assert not pair.target.runs.any()

    run(go)


def test_a_refusing_receiver_lets_no_late_store_in():
    async def go(world):
        pair = _pair(world, can_refuse=True)
        assert pair.receiver.forget("g")
        _push(pair)
        with pytest.raises(TransferFailed, match="refuses"):
            await pair.sender.finish("g", 1.0)
        assert not pair.target.runs.any()
        assert world.memory.num_refused == 1

    run(go)


def test_abort_returns_when_the_store_under_way_is_over():
    async def go(world):
        pair = _pair(world, can_refuse=False)
        world.memory.damage.delay_s = 1.0
        _push(pair)
        await asyncio.sleep(0.1)
        await pair.sender.abort("g")
        landed = pair.target.runs.copy()
        assert landed.any()
        await asyncio.sleep(20.0)
        assert np.array_equal(pair.target.runs, landed)

    run(go)
