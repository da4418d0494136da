"""Negotiation: the prefill worker's first wish that works, or a sentence with both sides of it."""

from __future__ import annotations

import os

import pytest

from kvtransfer import process
from kvtransfer.link import choose, is_same_host, make_receivers
from kvtransfer.tcp_frames import FrameError, FrameReader, FrameWriter, Kind, grant_key, preamble_length, session
from protocol.errors import ConfigError, HandshakeRefused
from protocol.kv import MemoryEndpoint, ShmEndpoint, TcpEndpoint
from protocol.messages import Handshake


@pytest.mark.parametrize(
    ("offered", "accepted", "same_host", "chosen"),
    [
        (("shm", "tcp"), ("shm", "tcp"), True, "shm"),
        (("shm", "tcp"), ("tcp", "shm"), True, "shm"),
        (("shm", "tcp"), ("shm", "tcp"), False, "tcp"),
        (("shm", "tcp"), ("tcp",), True, "tcp"),
        (("nvlink", "tcp"), ("nvlink", "tcp"), True, "tcp"),
    ],
)
def test_choose(offered, accepted, same_host, chosen):
    assert choose(offered, accepted, same_host) == chosen


def test_nothing_in_common_names_both_lists():
    with pytest.raises(HandshakeRefused, match=r"prefill offers shm, decode has tcp, on one host \(--kv-transport\)"):
        choose(("shm",), ("tcp",), True)
    with pytest.raises(HandshakeRefused, match="prefill offers shm, decode has shm, on two hosts"):
        choose(("shm",), ("shm",), False)
    with pytest.raises(HandshakeRefused, match="prefill offers none"):
        choose((), ("shm",), False)


def handshake(pair, **changes):
    fields = {
        "incarnation": "P1",
        "layout": pair.layout,
        "transports": ("shm", "tcp"),
        "boot_id": process.boot_id(),
        "pid": os.getpid(),
        "start_ticks": process.start_ticks(),
    } | changes
    return Handshake(**fields)


def test_same_host_means_seen_from_here(pair):
    assert is_same_host(handshake(pair))
    assert not is_same_host(handshake(pair, boot_id="elsewhere"))
    assert not is_same_host(handshake(pair, start_ticks=1)), "that pid is somebody else in our namespace"
    assert not is_same_host(handshake(pair, pid=0)), "its death could not be observed"


def test_receivers_by_name_in_order(pair):
    pair.receivers = receivers = make_receivers(pair.target, ["tcp", "shm", "memory"], pair.secret, incarnation="D1")
    assert list(receivers) == ["tcp", "shm", "memory"]
    assert [type(r.endpoint()) for r in receivers.values()] == [TcpEndpoint, ShmEndpoint, MemoryEndpoint]
    assert receivers["tcp"].endpoint().host == "127.0.0.1"
    with pytest.raises(ConfigError, match="no KV transport 'rdma'; there are cuda_ipc, nccl, shm, tcp, memory"):
        make_receivers(pair.target, ["rdma"], pair.secret)


def test_memory_of_another_process_is_refused(pair):
    with pytest.raises(HandshakeRefused, match="no KV pool 999999 in this process"):
        pair.sender("memory", endpoint=MemoryEndpoint(999999))


def test_frame_headers_are_bound_to_session_direction_and_place():
    reader, writer = session(b"s", b"n" * 32, b"m" * 32, is_server=True)
    peer_reader, peer_writer = session(b"s", b"n" * 32, b"m" * 32, is_server=False)
    key = grant_key("g")
    first, second = peer_writer.header(Kind.FENCE, key), peer_writer.header(Kind.DATA, key, 3, 2, 512, 77)
    assert reader.header(first).kind is Kind.FENCE
    assert (reader.header(second).layer, peer_reader.header(writer.header(Kind.LANDED, key, count=9)).count) == (3, 9)
    with pytest.raises(FrameError, match="came where"):
        reader.header(second)
    with pytest.raises(FrameError, match="damaged or forged"):
        peer_reader.header(first)
    for place in range(len(first)):
        fresh = FrameReader(b"s", "to decode", b"n" * 32, b"m" * 32)
        with pytest.raises(FrameError):
            fresh.header(first[:place] + bytes([first[place] ^ 1]) + first[place + 1 :])
    stranger = FrameWriter(b"t", "to decode", b"n" * 32, b"m" * 32)
    with pytest.raises(FrameError):
        FrameReader(b"s", "to decode", b"n" * 32, b"m" * 32).header(stranger.header(Kind.FENCE, key))
    with pytest.raises(FrameError, match="not a hand-shake"):
        preamble_length(b"TdKV\0\x01\0\0\0\0\xff\xff")
