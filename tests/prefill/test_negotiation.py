"""A pair settles on the best transport that works, leaves one that does not, and says why when none is left."""

from __future__ import annotations

import asyncio
import random
import socket

import msgspec
import pytest

from kvtransfer.faults import Fault, FaultyLane
from kvtransfer.memory import MemoryLane
from kvtransfer.shm import ShmLane
from protocol.errors import HandshakeRefused, IncompatibleWorkers, TransferFailed
from protocol.events import Failed, Finished
from protocol.kv import ShmEndpoint
from protocol.messages import Handshake, HandshakeAccepted
from protocol.parallel import Parallel
from tests.system.local import cluster, events_of, oracle, request, tokens_of


def link_of(prefill):
    (link,) = prefill.handover.links.values()
    return link


async def one_more(made, seed=0):
    prompt = [(seed + i) % 500 for i in range(40)]
    events = await events_of(made, request(prompt))
    assert tokens_of(events) == oracle(prompt, 8), events[-1]


def refuse(monkeypatch, lane, reason):
    calls = []

    def broken(self, *args, **kwargs):
        calls.append(args)
        raise HandshakeRefused(reason)

    monkeypatch.setattr(lane, "__init__", broken)
    return calls


async def test_memory_that_cannot_be_mapped_falls_back_to_the_next_transport(monkeypatch):
    calls = refuse(monkeypatch, ShmLane, "shm: cannot open")
    async with cluster(("shm", "tcp")) as made:
        for seed in range(3):
            await one_more(made, seed)
        prefill = made.workers[1]
        assert link_of(prefill).transport == "tcp"
        assert len(calls) == 1, "it was not tried again for each request"
        assert prefill.handover.links.num_fallbacks == 1
        (stats,) = prefill.stats().pairs
        assert (stats.transport, stats.transfers, stats.fallbacks) == ("tcp", 3, 1)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("can't start new thread")], ids=type)
async def test_whatever_stands_in_the_way_of_a_sender_is_a_reason_to_fall_back(monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    async with cluster(("shm", "tcp")) as made:
        monkeypatch.setattr("kvtransfer.shm.mmap.mmap" if isinstance(error, OSError) else "kvtransfer.shm.View", broken)
        await one_more(made)
        prefill = made.workers[1]
        assert link_of(prefill).transport == "tcp"
        assert str(error) in prefill.handover.links._pair(link_of(prefill).incarnation).reasons()


async def test_a_port_that_nobody_listens_on_falls_back(monkeypatch):
    async with cluster(("tcp", "memory")) as made:
        decode, prefill = made.workers
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        receivers = decode.handover._receivers
        receivers.endpoints["tcp"] = tuple(msgspec.structs.replace(end, port=port) for end in receivers.endpoints["tcp"])
        await one_more(made)
        assert link_of(prefill).transport == "memory"
        assert f"to 127.0.0.1:{port} (KV, tcp): refused" in prefill.handover.links._pair(link_of(prefill).incarnation).reasons()


async def test_a_better_transport_comes_back_when_its_time_is_over(monkeypatch):
    async with cluster(("shm", "memory")) as made:
        prefill = made.workers[1]
        links = prefill.handover.links
        with monkeypatch.context() as patch:
            refuse(patch, ShmLane, "shm: cannot open")
            await one_more(made)
        assert link_of(prefill).transport == "memory"
        await one_more(made, 1)
        assert link_of(prefill).transport == "memory", "not yet"
        links._clock = lambda: asyncio.get_running_loop().time() + 3600
        await one_more(made, 2)
        assert link_of(prefill).transport == "shm"


async def test_when_none_works_the_request_hears_of_each_and_why(monkeypatch):
    shm = refuse(monkeypatch, ShmLane, "this is why")
    memory = refuse(monkeypatch, MemoryLane, "and this is why")
    async with cluster(("shm", "memory")) as made:
        events = await events_of(made, request(range(40)))
        assert isinstance(events[-1], (Failed, Finished))
        if isinstance(events[-1], Failed):  # nobody else could take it
            assert "this is why" in events[-1].failure.message
            assert "and this is why" in events[-1].failure.message
        assert len(shm) <= 2
        assert len(memory) <= 2, "answered at once after that"
        links = made.workers[1].handover.links
        with pytest.raises(HandshakeRefused, match=r"no KV transport is left between .*shm: this is why; memory: and this is why"):
            await links.to(made.workers[0].settings.incarnation, made.workers[0]._network.address)


async def test_two_failed_transfers_in_a_row_take_a_transport_out():
    rng = random.Random(1)
    async with cluster(("shm", "memory"), prefill__max_num_batched_tokens=16) as made:
        decode, prefill = made.workers

        def tamper(lane):
            return FaultyLane(lane, lambda: Fault.FLIP, rng) if isinstance(lane.endpoint, ShmEndpoint) else lane

        prefill.connector.options["tamper"] = tamper
        for seed in (0, 100, 200, 300):  # a request whose transfer fails may be prefilled where it decodes
            await one_more(made, seed)
        assert link_of(prefill).transport == "memory"
        assert decode.handover.digest_failures == 2
        by_transport = {stats.transport: stats for stats in prefill.stats().pairs}
        assert by_transport["shm"].digest_failures == by_transport["shm"].failed == 2
        assert by_transport["memory"].transfers == 2
        assert {stats.transport: stats.digest_failures for stats in decode.stats().pairs} == {"shm": 2, "memory": 0}


async def test_an_old_mapping_still_counts_after_the_transport_changed():
    """Its writer shook hands again, over a transport that refuses late stores; what it mapped before cannot refuse them."""
    async with cluster(("shm", "memory")) as made:
        decode, prefill = made.workers
        await one_more(made)
        writers = decode.handover.writers
        handshake = prefill.handover.links._handshake
        answer = writers.handshake(link_of(prefill).peer.other, msgspec.structs.replace(handshake, transports=("memory",)))
        assert isinstance(answer, HandshakeAccepted)
        writer = writers.get(handshake.incarnation)
        assert writer.transport == "memory"
        assert writer.transports == {"shm", "memory"}
        assert not writer.has_stopped({"shm": False, "memory": True})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": {"block_size": 16}}, "block_size: 8 here, 16 there"),
        ({"layout": {"dtype": "float16"}}, "dtype: 'uint8' here, 'float16' there"),
        ({"layout": {"model_hash": "x"}}, "model_hash: .* here, 'x' there"),
        ({"layout": {"version": 9}}, "version: 1 here, 9 there"),
        ({"parallel": Parallel(1, 900)}, r"1 x 1 \(tp x pp\) here, 1 x 900 \(tp x pp\) there"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_differs_is_refused_with_both_values(changes, why):
    async with cluster() as made:
        decode, prefill = made.workers
        handshake = prefill.handover.links._handshake
        if "layout" in changes:
            changes = {"layout": msgspec.structs.replace(handshake.layout, **changes["layout"])}
        changed = msgspec.structs.replace(handshake, **changes)
        assert isinstance(changed, Handshake)
        with pytest.raises(IncompatibleWorkers, match=why):
            decode.handover.handshake(None, changed)


async def test_incompatible_workers_are_remembered_and_answered_at_once():
    async with cluster() as made:
        decode, prefill = made.workers
        links = prefill.handover.links
        other = msgspec.structs.replace(links._handshake.layout, block_size=16)
        links._handshake = msgspec.structs.replace(links._handshake, layout=other)
        asked = []
        handshake = decode.handover.handshake
        decode.handover.handshake = lambda *args: asked.append(1) or handshake(*args)
        for _ in range(3):
            with pytest.raises(IncompatibleWorkers, match="block_size: 8 here, 16 there"):
                await links.to(decode.settings.incarnation, decode._network.address)
        assert len(asked) == 1, "nobody was asked again"


async def test_a_ticket_for_another_layout_is_not_even_a_handshake(monkeypatch):
    async with cluster() as made:
        decode, prefill = made.workers
        grants = []
        send = decode.handover._receivers.expect

        async def expect(grant):
            grants.append(grant)
            await send(grant)

        decode.handover._receivers.expect = expect
        await one_more(made)
        other = msgspec.structs.replace(grants[0], layout=msgspec.structs.replace(grants[0].layout, dtype="float16"))
        with pytest.raises(IncompatibleWorkers, match="dtype: 'uint8' here, 'float16' there"):
            await prefill._link(other, None)
        assert not issubclass(IncompatibleWorkers, TransferFailed)
