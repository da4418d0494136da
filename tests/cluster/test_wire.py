"""Our own sockets: calls, sends, order, the secret, garbage, and what happens when a side goes silent or away."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import msgspec
import pytest

from cluster import wire
from cluster.loopback import Hub
from cluster.wire import SocketNetwork
from protocol.errors import DeadlineExceeded, InvalidRequest, NotFound, TandemError, WorkerLost
from protocol.messages import AskStatus, Cancel, Ok, Reserve, Status, Withdraw, encode
from protocol.request import Request, SamplingParams
from protocol.ticket import Ticket, WorkerRef
from tests.faultproxy import FaultProxy

SECRET = b"s" * 32


class Server:
    """Answers AskStatus, refuses Withdraw, remembers Cancels."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.lost: list[str] = []
        self.gate = asyncio.Event()

    async def handle(self, peer, message):
        if isinstance(message, AskStatus):
            return Status(b"{}")
        if isinstance(message, Withdraw):
            if message.request_id == "slow":
                await self.gate.wait()
                return Ok()
            if message.request_id == "bug":
                raise ZeroDivisionError
            raise NotFound("not here", param="request_id")
        assert isinstance(message, Cancel)
        self.seen.append(message.request_id)
        if message.request_id == "echo":
            peer.send(Cancel("back"))
        return None

    def on_lost(self, peer) -> None:
        self.lost.append(peer.name)


@contextlib.asynccontextmanager
async def pair(kind: str = "socket"):
    server, client = Server(), Server()
    if kind == "socket":
        here, there = SocketNetwork("client", SECRET), SocketNetwork("server", SECRET)
    else:
        hub = Hub(encoded=True)
        here, there = hub.network("client"), hub.network("server")
    await there.serve(server.handle, server.on_lost)
    await here.serve(client.handle, client.on_lost)
    try:
        yield server, client, here, there
    finally:
        await here.close()
        await there.close()


@pytest.mark.parametrize("kind", ["socket", "loopback"])
class TestBoth:
    async def test_a_call_is_answered(self, kind):
        async with pair(kind) as (_, _, here, there):
            peer = await here.connect(there.address)
            assert await peer.call(AskStatus(), 2.0) == Status(b"{}")

    async def test_an_error_arrives_as_itself(self, kind):
        async with pair(kind) as (_, _, here, there):
            peer = await here.connect(there.address)
            with pytest.raises(NotFound, match="not here") as caught:
                await peer.call(Withdraw("x"), 2.0)
            assert caught.value.param == "request_id"

    async def test_a_bug_over_there_is_an_internal_error_here(self, kind):
        async with pair(kind) as (_, _, here, there):
            peer = await here.connect(there.address)
            with pytest.raises(TandemError, match="ZeroDivisionError"):
                await peer.call(Withdraw("bug"), 2.0)

    async def test_sends_keep_their_order_and_the_other_side_may_send_too(self, kind):
        async with pair(kind) as (server, client, here, there):
            peer = await here.connect(there.address)
            for i in range(200):
                peer.send(Cancel(str(i)))
            peer.send(Cancel("echo"))
            await until(lambda: client.seen == ["back"])
            assert server.seen == [*map(str, range(200)), "echo"]

    async def test_a_slow_call_blocks_nobody_and_ends_at_its_deadline(self, kind):
        async with pair(kind) as (server, _, here, there):
            peer = await here.connect(there.address)
            slow = asyncio.create_task(peer.call(Withdraw("slow"), 0.2))
            assert await peer.call(AskStatus(), 2.0) == Status(b"{}")
            with pytest.raises(DeadlineExceeded, match=r"Withdraw within 0\.2 s"):
                await slow
            server.gate.set()
            assert await peer.call(AskStatus(), 2.0) == Status(b"{}")  # the late answer confused nobody

    async def test_there_is_one_connection_per_pair(self, kind):
        async with pair(kind) as (_, _, here, there):
            first, second = await asyncio.gather(here.connect(there.address), here.connect(there.address))
            assert first is second

    async def test_when_the_other_side_goes_callers_hear_of_it(self, kind):
        async with pair(kind) as (_, client, here, there):
            peer = await here.connect(there.address)
            waiting = asyncio.create_task(peer.call(Withdraw("slow"), 5.0))
            await asyncio.sleep(0.05)
            await there.close()
            with pytest.raises(WorkerLost):
                await waiting
            await until(lambda: len(client.lost) == 1)
            with pytest.raises(WorkerLost):
                await here.connect(there.address)


async def until(condition, seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_another_secret_is_refused_on_both_sides():
    server = Server()
    there, stranger = SocketNetwork("server", SECRET), SocketNetwork("stranger", b"t" * 32)
    await there.serve(server.handle, server.on_lost)
    await stranger.serve(server.handle, server.on_lost)
    with pytest.raises(WorkerLost):
        await stranger.connect(there.address)
    assert not there._all
    await there.close()
    await stranger.close()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200, b"\x80\x04\x95" + b"." * 200, b"\0" * 200],
    ids=["http", "pickle", "zeros"],
)
async def test_a_stranger_that_cannot_prove_the_secret_gets_nothing(garbage):
    async with pair() as (server, _, _, there):
        host, port = there.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        nonce = await reader.readexactly(32)
        writer.write(garbage)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert len(nonce) == 32
        assert server.seen == []
        writer.close()


async def test_garbage_behind_the_handshake_closes_that_connection_only():
    async with pair() as (_, client, here, there):
        peer = await here.connect(there.address)
        peer._write(0, 0, b"\xc1abcd")
        await until(lambda: peer.is_closed)
        again = await here.connect(there.address)
        assert await again.call(AskStatus(), 2.0) == Status(b"{}")
        assert client.lost


async def test_a_request_outside_of_our_bounds_is_refused_and_the_connection_lives():
    """Another version's gateway may let more through than we take; the streams beside it have nothing to do with that."""
    request = Request(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams())
    plain = msgspec.msgpack.decode(encode(Reserve(Ticket("r", 1, WorkerRef("i", "decode", "a:1"), None), request)))
    plain["request"]["sampling"]["temperature"] = -5.0
    outside = msgspec.msgpack.encode(plain)
    async with pair() as (server, _, here, there):
        peer = await here.connect(there.address)
        theirs = peer._codec
        peer._codec = theirs._replace(encode=lambda message: outside)
        with pytest.raises(InvalidRequest, match="temperature must be in"):
            await peer.call(AskStatus(), 2.0)
        peer.send(AskStatus())
        peer._codec = theirs
        peer.send(Cancel("next"))
        assert await peer.call(AskStatus(), 2.0) == Status(b"{}")
        assert server.seen == ["next"]


@pytest.mark.parametrize(("is_to_server", "place"), [(True, 3), (True, 4), (True, 20), (True, -1), (False, 8), (False, -1)])
async def test_a_bit_that_flips_on_the_way_is_nobodys_token(is_to_server, place):
    """In any part of a frame, and in either direction: the connection ends, and whoever waits for an answer hears so."""
    is_spoiling = False

    def edit(connection, is_to_target, offset, data):
        if not is_spoiling or is_to_target != is_to_server:
            return data
        spoiled = bytearray(data)
        spoiled[place] ^= 1
        return bytes(spoiled)

    async with pair() as (server, _, here, there):
        proxy = FaultProxy(there.address, edit)
        peer = await here.connect(proxy.address)
        assert await peer.call(AskStatus(), 2.0) == Status(b"{}")
        is_spoiling = True
        peer.send(Cancel("echo"))
        with pytest.raises(WorkerLost):
            await peer.call(AskStatus(), 4.0)
        assert server.seen in ([], ["echo"])
        proxy.close()


async def test_a_frame_above_the_cap_is_not_read():
    async with pair() as (_, _, here, there):
        peer = await here.connect(there.address)
        peer._writer.write(struct.pack("!IBQ", wire.MAX_FRAME_BYTES + 1, 0, 0))
        await until(lambda: peer.is_closed)


async def test_a_silent_peer_is_dead_after_its_heartbeats(monkeypatch):
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.05)
    async with pair() as (_, client, here, there):
        peer = await here.connect(there.address)
        for connection in list(there._all):  # the other process is stopped: its sockets stay open, nothing moves
            for task in connection._tasks:
                task.cancel()
        await until(lambda: peer.is_closed)
        assert len(client.lost) == 1


async def test_all_who_dial_a_stopped_process_share_one_attempt():
    """A stopped process accepts and says nothing. Seventy streams that were placed on it once dialled it one after the other, a
    whole time-out each; and whoever asks later gets an attempt of his own."""
    async with pair() as (_, _, here, there):
        silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        started = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(*(here.connect(address, 0.3) for _ in range(70)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {WorkerLost}
        assert len({id(outcome) for outcome in outcomes}) == 70
        assert asyncio.get_running_loop().time() - started < 1.0
        with pytest.raises(WorkerLost, match="no answer"):
            await here.connect(address, 0.1)
        silent.close()
        peers = await asyncio.gather(*(here.connect(there.address) for _ in range(5)))
        assert len(set(peers)) == 1
        assert not here._dialing


async def test_a_dial_that_its_caller_gives_up_still_serves_the_others():
    async with pair() as (_, _, here, there):
        first = asyncio.create_task(here.connect(there.address))
        second = asyncio.create_task(here.connect(there.address))
        await asyncio.sleep(0)
        first.cancel()
        assert await (await second).call(AskStatus(), 1.0) == Status(b"{}")


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 1 << 20)
    async with pair() as (_, _, here, there):
        peer = await here.connect(there.address)
        for connection in there._all:
            connection._tasks[0].cancel()
        await asyncio.sleep(0.01)
        for _ in range(400):
            peer.send(Cancel("x" * 65536))
            if peer.is_closed:
                break
        assert peer.is_closed


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_breaks_while_something_is_sent_closes_the_connection_and_raises_nothing(loop):
    """uvloop's transport raises on a write after it broke, which may be before anybody has read that it did: an engine's step that
    sends to a gateway that has just died must not notice."""

    async def main() -> None:
        async with pair() as (_, client, here, there):
            peer = await here.connect(there.address)
            peer._writer.transport.abort()  # as the loop does when the other side resets it, before `_read` runs
            peer.send(Cancel("x"))
            assert peer.is_closed
            assert client.lost == [there.address]

    if loop == "uvloop":
        pytest.importorskip("uvloop").run(main())
    else:
        asyncio.run(main())
