"""The TCP receiver against strangers, impostors, slow writers and retired grants; the lane against a silent peer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

import msgspec
import numpy as np
import pytest

from kvtransfer import tcp_frames as frames
from kvtransfer.link import make_sender
from kvtransfer.pool import KVPool
from kvtransfer.tcp import MAX_PENDING, TcpReceiver
from kvtransfer.tcp_frames import Kind
from protocol.errors import ConfigError, HandshakeRefused, TandemError, TransferFailed
from protocol.kv import KVLayout, TcpEndpoint
from protocol.ticket import Grant, sign
from tests.faultproxy import Cut, FaultProxy
from tests.kvtransfer.conftest import LAYOUT, SECRET


class Writer:
    """A writer by hand: says exactly what a test wants."""

    def __init__(self, pair, *, incarnation="P1", peer="D1", layout=None, secret=None):
        endpoint = pair.receiver("tcp").endpoint()
        self.sock = socket.create_connection((endpoint.host, endpoint.port), 2.0)
        _, _, nonce_s = frames.GREETING.unpack(self.read(frames.GREETING.size))
        nonce_c = os.urandom(32)
        secret = secret or pair.secret
        hello = msgspec.msgpack.encode(frames.Hello(incarnation, peer, layout or pair.layout))
        self.sock.sendall(frames.pack_hello(secret, nonce_s, nonce_c, hello))
        welcome = self.read(frames.preamble_length(self.read(frames.PREAMBLE.size)))
        assert self.read(32) == frames.proof(secret, "server", nonce_s, nonce_c, hello, welcome)
        self.welcome = msgspec.msgpack.decode(welcome, type=frames.Welcome)
        self.reader, self.writer = frames.session(secret, nonce_s, nonce_c, is_server=False)

    def read(self, nbytes):
        data = b""
        while len(data) < nbytes:
            more = self.sock.recv(nbytes - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def data(self, grant, layer, indexes, payload, **changes):
        table = frames.pack_indexes(indexes)
        fields = {"layer": layer, "count": len(indexes), "payload_nbytes": len(payload), "table": frames.table_digest(table)}
        return self.writer.header(Kind.DATA, frames.grant_key(grant.grant_id), **(fields | changes)) + table + payload

    def fence(self, grant):
        self.sock.sendall(self.writer.header(Kind.FENCE, frames.grant_key(grant.grant_id)))

    def answer(self):
        return self.reader.header(self.read(frames.HEADER_NBYTES))

    def is_cut(self):
        try:
            return not self.sock.recv(1)
        except ConnectionError:
            return True


def run_bytes(pair, value):
    return bytes([value]) * pair.layout.run_nbytes


def test_a_writer_by_hand_is_served(pair):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    writer = Writer(pair)
    assert writer.welcome == frames.Welcome("D1", pair.layout)
    writer.sock.sendall(writer.data(grant, 1, [2, 1], run_bytes(pair, 2) + run_bytes(pair, 1)))
    writer.sock.sendall(writer.data(grant, 1, [2], run_bytes(pair, 3)))
    writer.fence(grant)
    landed = writer.answer()
    assert (landed.kind, landed.count) == (Kind.LANDED, 2), "distinct runs are counted"
    assert bytes(pair.target.run(1, 3)) == run_bytes(pair, 1)
    assert bytes(pair.target.run(1, 4)) == run_bytes(pair, 3)


@pytest.mark.parametrize(("layer", "indexes"), [(2, [1]), (0, [0]), (0, [3]), (0, [1, 2**32 - 1]), (2**32 - 1, [1])], ids=str)
def test_outside_of_the_grant_is_refused_and_the_connection_lives(pair, layer, indexes):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    before = pair.target.runs.copy()
    writer = Writer(pair)
    writer.sock.sendall(writer.data(grant, layer, indexes, run_bytes(pair, 7) * len(indexes)))
    nack = writer.answer()
    assert (nack.kind, nack.layer) == (Kind.NACK, frames.Reason.OUTSIDE)
    assert np.array_equal(before, pair.target.runs)
    writer.sock.sendall(writer.data(grant, 0, [1], run_bytes(pair, 7)))
    writer.fence(grant)
    assert writer.answer().count == 1


@pytest.mark.parametrize(
    "changes", [{"payload_nbytes": 1 << 62}, {"count": 2}, {"count": 0}, {"count": 1 << 31}, {"table": 1}], ids=str
)
def test_frames_that_contradict_themselves_end_the_connection(pair, changes):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    before = pair.target.runs.copy()
    writer = Writer(pair)
    writer.sock.sendall(writer.data(grant, 0, [1], run_bytes(pair, 7), **changes))
    assert writer.is_cut()
    assert np.array_equal(before, pair.target.runs)


def test_repeated_and_reordered_frames_end_the_connection(pair):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    writer = Writer(pair)
    frame = writer.data(grant, 0, [1], run_bytes(pair, 1))
    writer.sock.sendall(frame + frame)
    assert writer.is_cut()
    writer = Writer(pair)
    first, second = writer.data(grant, 0, [1], run_bytes(pair, 1)), writer.data(grant, 0, [2], run_bytes(pair, 2))
    writer.sock.sendall(second + first)
    assert writer.is_cut()
    other = Writer(pair)
    writer = Writer(pair, incarnation="P9")
    writer.sock.sendall(other.data(grant, 0, [1], run_bytes(pair, 1)))  # a frame of another connection
    assert writer.is_cut()


def test_strangers_get_nowhere(pair):
    endpoint = pair.receiver("tcp").endpoint()
    before = pair.target.runs.copy()
    with pytest.raises((EOFError, ConnectionError)):
        Writer(pair, secret=b"guessed")
    for junk in (b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, b"\x80\x04\x95", os.urandom(4000), b"TdKV\0\x01\0\0\xff\xff\xff\xff"):
        with socket.create_connection((endpoint.host, endpoint.port), 2.0) as sock:
            try:
                sock.sendall(junk)
                greeting = sock.recv(100)
                assert len(greeting) == frames.GREETING.size
                assert not sock.recv(100), "nothing but the greeting for those who do not know the secret"
            except OSError:
                pass  # cut already
    assert np.array_equal(before, pair.target.runs)
    Writer(pair)


def test_silent_strangers_are_bounded_and_dropped(pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtransfer.tcp.MAX_PENDING", 4)
        receiver = TcpReceiver(pair.target, pair.secret, "D1", handshake_timeout_s=0.3)
        endpoint = receiver.endpoint()
        before = threading.active_count()
        socks = [socket.create_connection((endpoint.host, endpoint.port), 2.0) for _ in range(20)]
        time.sleep(0.1)
        assert threading.active_count() <= before + 4
        deadline = time.monotonic() + 3.0
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert threading.active_count() <= before, "a silent stranger kept its thread"
        for sock in socks:
            sock.close()
        receiver.close()
    assert MAX_PENDING >= 8


def test_a_connection_that_cannot_have_a_thread_ends_alone(pair, monkeypatch):
    receiver, start = pair.receiver("tcp"), threading.Thread.start

    def no_thread(thread):
        if thread.name == "kv-receive":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        for _ in range(2):
            with socket.create_connection((receiver.endpoint().host, receiver.endpoint().port)) as sock:
                sock.settimeout(2.0)
                assert sock.recv(1) == b"", "closed at once"
    assert not receiver._connections
    with contextlib.closing(Writer(pair).sock):
        assert len(receiver._connections) == 1


def test_forget_in_the_middle_of_a_run_is_immediate_and_absolute(pair):
    """A writer stops in the middle of a run; the grant is retired; what comes after is thrown away."""
    grant = pair.grant()
    receiver = pair.receiver("tcp")
    receiver.expect(grant)
    pair.target.runs[:] = 0
    writer = Writer(pair)
    frame = writer.data(grant, 0, [1, 2], run_bytes(pair, 0xEE) * 2)
    writer.sock.sendall(frame[:-150])
    deadline = time.monotonic() + 2.0
    while not pair.target.runs[0, 4, 0] and time.monotonic() < deadline:
        time.sleep(0.001)
    started = time.monotonic()
    assert receiver.forget(grant.grant_id) is True
    assert time.monotonic() - started < 0.1
    pair.target.runs[:] = 0
    writer.sock.sendall(frame[-150:])
    nack = writer.answer()
    assert (nack.kind, nack.layer) == (Kind.NACK, frames.Reason.NOT_LIVE)
    assert not pair.target.runs.any(), "a store after forget() returned True"
    other = pair.grant()
    receiver.expect(other)
    writer.sock.sendall(writer.data(other, 0, [1], run_bytes(pair, 5)))
    writer.fence(other)
    assert writer.answer().count == 1, "the connection lives on, in step"


def test_forget_races_with_a_flood(pair):
    """No byte of a grant after its forget(), over many grants while a writer floods all of them."""
    receiver = pair.receiver("tcp")
    writer = Writer(pair)
    stop = threading.Event()
    grants = [pair.grant() for _ in range(60)]
    for grant in grants:
        receiver.expect(grant)
    nacks = threading.Thread(target=lambda: [None for _ in iter(lambda: _try_recv(writer.sock), b"")], daemon=True)
    nacks.start()

    def flood():
        while not stop.is_set():
            for grant in grants:
                writer.sock.sendall(writer.data(grant, 0, [1, 2], run_bytes(pair, 0xEE) * 2))

    flooding = threading.Thread(target=flood, daemon=True)
    flooding.start()
    time.sleep(0.1)
    for grant in grants:
        receiver.forget(grant.grant_id)
    pair.target.runs[:] = 0
    time.sleep(0.1)
    assert not pair.target.runs.any()
    stop.set()
    flooding.join(2.0)
    writer.sock.shutdown(socket.SHUT_RDWR)


def _try_recv(sock):
    try:
        return sock.recv(1 << 16)
    except OSError:
        return b""


def test_a_second_connection_of_an_incarnation_ends_the_first(pair):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    first = Writer(pair)
    frame = first.data(grant, 0, [1], run_bytes(pair, 1))
    first.sock.sendall(frame[:-10])
    second = Writer(pair)
    assert first.is_cut()
    second.sock.sendall(second.data(grant, 0, [1], run_bytes(pair, 2)))
    second.fence(grant)
    assert second.answer().count == 1
    assert bytes(pair.target.run(0, 3)) == run_bytes(pair, 2)


def test_a_writer_that_stops_in_the_middle_of_a_frame_is_dropped(pair):
    grant = pair.grant()
    pair.receiver("tcp").expect(grant)
    writer = Writer(pair)
    writer.sock.settimeout(5.0)
    writer.sock.sendall(writer.data(grant, 0, [1], run_bytes(pair, 1))[:-1])
    started = time.monotonic()
    assert writer.is_cut()
    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peer_incarnation": "D0"}, "this is decode incarnation D1, you meant D0"),
        ({"layout": KVLayout(2, 2, 4, 4, "float16", "m")}, "dtype: 'float16' here, 'float32' there"),
        ({"layout": KVLayout(2, 2, 4, 4, "float32", "n")}, "model_hash: 'n' here, 'm' there"),
    ],
)
def test_handshake_refusals_name_both_values(pair, run, changes, why):
    from kvtransfer.tcp_lane import TcpLane

    endpoint = pair.receiver("tcp").endpoint()
    options = {"layout": pair.layout, "peer_incarnation": "D1"} | changes
    lane = TcpLane(endpoint, secret=pair.secret, incarnation="P1", **options)
    with pytest.raises(HandshakeRefused, match=why):
        lane.warm()


def test_a_wrong_secret_or_version_is_said(pair, run):
    async def fails(match, error, **options):
        sender = pair.sender("tcp", **options)
        grant = pair.grant(endpoints=(options.get("endpoint", pair.receiver("tcp").endpoint()),))
        with pytest.raises(error, match=match):
            await pair.send(sender, grant, "tcp", grant.endpoints[0])

    run(fails("is the cluster secret the same", TransferFailed, secret=b"other"))

    def newer(connection, is_to_target, offset, data):
        return data[:4] + b"\0\x09" + data[6:] if not is_to_target and offset == 0 else data

    proxy = FaultProxy(pair.receiver("tcp").endpoint(), newer)
    run(fails("version 1 here.* version 9", HandshakeRefused, endpoint=proxy.endpoint))
    proxy.close()


def test_nobody_there(pair, run):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = TcpEndpoint("127.0.0.1", free.getsockname()[1])
    pair.receiver("tcp")

    async def scenario():
        sender = pair.sender("tcp", endpoint=endpoint)
        with pytest.raises(TransferFailed, match=f"broke twice.*127.0.0.1:{endpoint.port}"):
            await pair.send(sender, pair.grant(endpoints=(endpoint,)), "tcp", endpoint)

    run(scenario())


def test_a_peer_that_accepts_and_never_speaks(pair, run):
    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = TcpEndpoint("127.0.0.1", silent.getsockname()[1])
            sender = pair.sender("tcp", endpoint=endpoint, connect_timeout_s=0.2)
            started = time.monotonic()
            with pytest.raises(TandemError):
                await pair.send(sender, pair.grant(endpoints=(endpoint,)), "tcp", endpoint)
            assert time.monotonic() - started < 3.0

    run(scenario())


@pytest.mark.parametrize("state", ["hand-shake", "payload"])
def test_closing_does_not_wait_for_a_peer_that_stands_still(run, monkeypatch, state):
    """The event loop closes: a lost decode worker of many ranks would hold it up so long that others take ours for dead."""
    layout = msgspec.structs.replace(LAYOUT, num_layers=1, block_size=1 << 15)
    source, target, may_go = KVPool(layout, 16), KVPool(layout, 16), threading.Event()
    if state == "payload":  # 32 MiB, more than the sockets hold
        monkeypatch.setattr("kvtransfer.tcp._Connection._store", lambda *_: may_go.wait(10.0) and None)
    receiver = TcpReceiver(target, SECRET, "D1")
    if state == "hand-shake":
        monkeypatch.setattr("kvtransfer.tcp._Connection._shake_hands", lambda _: may_go.wait(10.0))
    sender = make_sender(receiver.endpoint(), source, SECRET, incarnation="P1", peer_incarnation="D1")
    fields = {"prefill_incarnation": "P1", "num_cached_blocks": 0, "num_tokens": 16 << 15, "layout": layout, "lease_s": 10.0}
    fields |= {"endpoints": (receiver.endpoint(),), "control_address": "127.0.0.1:1"}
    grant = sign(Grant("g", "r", 1, "D1", block_ids=tuple(range(16)), **fields), SECRET)

    async def scenario():
        receiver.expect(grant)
        sender.open(grant, receiver.endpoint())
        sender.push("g", 0, [(i, i) for i in range(16)])
        await asyncio.sleep(0.3)
        started = time.monotonic()
        sender.close()
        assert time.monotonic() - started < 0.2
        await asyncio.wait_for(sender.abort("g"), 0.5)

    try:
        run(scenario())
    finally:
        may_go.set()
        receiver.close()
        source.close()
        target.close()


def test_a_peer_that_stops_answering(pair, run):
    """The stream goes through, the answers do not: finish ends by its deadline and abort by the lane's."""
    is_mute = threading.Event()

    def mute(connection, is_to_target, offset, data):
        if not is_to_target and is_mute.is_set():
            time.sleep(1.5)
            return Cut()
        return data

    async def scenario():
        from kvtransfer.outbox import Outbox
        from kvtransfer.outgoing import Source
        from kvtransfer.tcp_lane import TcpLane

        proxy = FaultProxy(pair.receiver("tcp").endpoint(), mute)
        lane = TcpLane(proxy.endpoint, pair.layout, pair.secret, "P1", "D1", answer_timeout_s=0.3)
        sender = Outbox(lane, Source(pair.source))
        first = pair.grant(endpoints=(proxy.endpoint,))
        assert pair.is_verified(first, await pair.send(sender, first, "tcp", proxy.endpoint), "tcp")
        is_mute.set()
        started = time.monotonic()
        with pytest.raises(TandemError):
            await pair.send(sender, pair.grant(endpoints=(proxy.endpoint,)), "tcp", proxy.endpoint, timeout=0.5)
        assert time.monotonic() - started < 5.0
        sender.close()
        proxy.close()

    run(scenario())


def test_the_receiver_wants_a_secret_and_an_address(pair):
    with pytest.raises(ConfigError, match="secret"):
        TcpReceiver(pair.target, b"", "D1")
    with pytest.raises(ConfigError, match=r"transfer\.bind_host"):
        TcpReceiver(pair.target, b"x", "D1", host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"cannot listen for KV on 127\.0\.0\.1"):
        TcpReceiver(pair.target, b"x", "D1", port=pair.receiver("tcp").endpoint().port)


def test_threads_and_descriptors_go_back(pair, run):
    async def once():
        receiver = TcpReceiver(pair.target, pair.secret, "D1")
        pair.receivers = {"tcp": receiver}
        sender = pair.sender("tcp")
        grant = pair.grant()
        assert pair.is_verified(grant, await pair.send(sender, grant, "tcp"), "tcp")
        sender.close()
        receiver.close()
        pair.senders.clear()
        await asyncio.sleep(0.05)

    run(once())
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        run(once())
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
