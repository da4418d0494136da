"""Writers of several processes: the death of all of them is what counts, and it is seen at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest

from decode.writers import Writers
from kvtransfer.layout import Place
from kvtransfer.process import boot_id, start_ticks
from protocol.errors import HandshakeRefused
from protocol.kv import KVLayout, MemoryEndpoint, ProcessRef, ShmEndpoint
from protocol.messages import Handshake
from protocol.parallel import Parallel

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32", model_hash="m")
TWO_STAGES = Parallel(1, 2)


def writers(on_death=lambda: None, boot=None, parallel=TWO_STAGES):
    """Of a decode worker of two ranks; the second one's memory is on `boot`."""
    shm = tuple(ShmEndpoint(end, 1, 3, 5, 4096) for end in (boot_id(), boot or boot_id()))
    receivers = SimpleNamespace(
        place=Place(LAYOUT, parallel), endpoints={"shm": shm, "tcp": (MemoryEndpoint(1), MemoryEndpoint(2))}
    )
    return Writers("D", receivers, lambda: 0.0, on_death)


def children(count):
    return [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(count)]


def handshake(processes, transports=("shm", "tcp"), **changes):
    refs = tuple(ProcessRef(boot_id(), process.pid, start_ticks(process.pid)) for process in processes)
    first = refs[0]
    fields = {"parallel": Parallel(2, 1), "ranks": refs} | changes
    return Handshake("P", LAYOUT, transports, first.boot_id, first.pid, first.start_ticks, **fields)


def kill(process):
    process.kill()
    process.wait()
    process.stdin.close()


async def test_only_the_death_of_every_rank_is_the_writers_death():
    died = []
    known = writers(lambda: died.append(1))
    one, two = children(2)
    try:
        answer = known.handshake(SimpleNamespace(is_closed=False), handshake([one, two]))
        assert len(answer.endpoints) == 2
        assert answer.parallel == Parallel(1, 2)
        assert known.get("P").transport == "shm"
        kill(one)
        async with asyncio.timeout(5):
            while not died:
                await asyncio.sleep(0.005)
        known.get("P").peer.is_closed = True
        assert known.take_dead() == [], "the other rank may store yet"
        kill(two)
        async with asyncio.timeout(5):
            while len(died) < 2:
                await asyncio.sleep(0.005)
        assert known.take_dead() == ["P"]
        assert known.get("P") is None
    finally:
        for process in (one, two):
            if process.poll() is None:
                kill(process)


async def test_memory_is_mapped_only_where_every_rank_of_both_is_in_sight():
    one, two = children(2)
    try:
        peer = SimpleNamespace(is_closed=False)
        known = writers()
        elsewhere = ProcessRef("another boot", two.pid, 1)
        ranks = (handshake([one]).ranks[0], elsewhere)
        known.handshake(peer, handshake([one], ranks=ranks))
        writer = known.get("P")
        assert (writer.transport, writer.processes) == ("tcp", None), "one rank of the writer is on another host"
        assert not writer.is_dead
        peer.is_closed = True
        assert writer.is_dead, "where late stores are refused, a broken connection is enough"
        with pytest.raises(HandshakeRefused, match="no common KV transport"):
            writers(boot="another boot").handshake(peer, handshake([one, two], ("shm",)))
    finally:
        kill(one)
        kill(two)


async def test_a_writer_that_is_out_of_sight_once_is_not_dead_when_its_connection_breaks(monkeypatch):
    """Without a descriptor to watch it by (there may be none just now) it is still the process that mapped our memory before."""
    (one,) = children(1)
    known = writers(parallel=Parallel(1, 2))
    try:
        known.handshake(SimpleNamespace(is_closed=False), handshake([one]))
        assert known.get("P").transport == "shm"
        peer = SimpleNamespace(is_closed=False)
        with monkeypatch.context() as patch:
            patch.setattr("kvtransfer.process.os.pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(24, "too many open files")))
            known.handshake(peer, handshake([one]))
        peer.is_closed = True
        assert known.take_dead() == [], "it lives, and may store yet"
        kill(one)
        assert known.take_dead() == ["P"]
    finally:
        if one.poll() is None:
            kill(one)
