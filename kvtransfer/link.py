"""How two workers agree on a transport, and the making of senders and receivers. Called by decode/handover.py and by group.py.

prefill  Handshake(layout, parallel, transports in order of preference, every process of it) ─>
decode   choose(...)            <─ HandshakeAccepted(endpoints, one per rank), or HandshakeRefused with both values
prefill  Connector.connect(endpoints) (group.py); when that fails, the hand-shake again without this transport (prefill/links.py)

A new transport is an endpoint in protocol/kv.py, a lane (or a sender of its own), a receiver, and a line in TRANSPORTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kvtransfer import gpu
from kvtransfer.cuda_ipc import CudaIpcLane, CudaIpcReceiver
from kvtransfer.layout import Place, rank_layout
from kvtransfer.listening import ANY, Ports
from kvtransfer.memory import DirectSender, MemoryLane, MemoryReceiver
from kvtransfer.nccl_lane import NcclLane
from kvtransfer.nccl_receiver import NcclReceiver, is_usable
from kvtransfer.outbox import Outbox
from kvtransfer.outgoing import Lane, Source
from kvtransfer.pool import KVPool
from kvtransfer.process import Process, boot_id, observe
from kvtransfer.shm import ShmLane, ShmReceiver
from kvtransfer.tcp import TcpReceiver
from kvtransfer.tcp_lane import TcpLane
from kvtransfer.transport import OnStored, Receiver, RouteSender
from kvtransfer.view import view_of
from protocol.errors import ConfigError, HandshakeRefused
from protocol.kv import (
    LANESUM,
    XXH3,
    CudaIpcEndpoint,
    KVEndpoint,
    KVLayout,
    MemoryEndpoint,
    NcclEndpoint,
    ProcessRef,
    ShmEndpoint,
    TcpEndpoint,
)
from protocol.messages import Handshake


class LaneOptions(msgspec.Struct, frozen=True):
    """What a lane wants to know beside its endpoint and its source. Times in seconds."""

    secret: bytes
    incarnation: str
    peer_incarnation: str = ""
    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 5.0


class ReceiverOptions(msgspec.Struct, frozen=True):
    place: Place
    secret: bytes
    incarnation: str
    host: str
    port: int
    advertise_host: str | None
    stall_timeout_s: float
    ports: Ports = ANY


class Meeting(NamedTuple):
    """Where two workers are, seen from the decode worker's leader."""

    same_host: bool  # every process of both, and visible: memory can be mapped, a death observed
    same_process: bool = False


class Transport(NamedTuple):
    endpoint: type[KVEndpoint]
    works: Callable[[Meeting], bool]
    make_receiver: Callable[[KVPool, ReceiverOptions], Receiver]
    make_lane: Callable[[KVEndpoint, Source, LaneOptions], Lane]
    hashes_itself: bool = False  # its receiver hashes what it receives; the others wait for `Landed`
    digest: str = XXH3  # the kind that goes with it: from GPU to GPU digests are computed there


def _shm_lane(endpoint: KVEndpoint, source: Source, options: LaneOptions) -> Lane:
    assert isinstance(endpoint, ShmEndpoint)
    return ShmLane(endpoint, _peer_layout(source), source.route.target_area)


def _tcp_lane(endpoint: KVEndpoint, source: Source, options: LaneOptions) -> Lane:
    assert isinstance(endpoint, TcpEndpoint)
    return TcpLane(
        endpoint,
        source.whole,
        options.secret,
        options.incarnation,
        options.peer_incarnation,
        route=source.route,
        source=source.source,
        target=source.target,
        digest=source.view.digest,
        connect_timeout_s=options.connect_timeout_s,
        stall_timeout_s=options.stall_timeout_s,
    )


def _memory_lane(endpoint: KVEndpoint, source: Source, options: LaneOptions) -> Lane:
    assert isinstance(endpoint, MemoryEndpoint)
    return MemoryLane(endpoint, _peer_layout(source), options.incarnation, source.route.target_area)


def _tcp_receiver(pool: KVPool, options: ReceiverOptions) -> Receiver:
    return TcpReceiver(
        pool,
        options.secret,
        options.incarnation,
        place=options.place,
        host=options.host,
        port=options.port,
        ports=options.ports,
        advertise_host=options.advertise_host,
        stall_timeout_s=options.stall_timeout_s,
    )


def _cuda_ipc_lane(endpoint: KVEndpoint, source: Source, options: LaneOptions) -> Lane:
    assert isinstance(endpoint, CudaIpcEndpoint)
    return CudaIpcLane(endpoint, source, _peer_layout(source))


def _nccl_lane(endpoint: KVEndpoint, source: Source, options: LaneOptions) -> Lane:
    assert isinstance(endpoint, NcclEndpoint)
    other = endpoint.fallback
    return NcclLane(
        endpoint,
        source,
        options.secret,
        options.incarnation,
        options.peer_incarnation,
        gpu.uuid_of(source.view.device.index),
        (lambda: _tcp_lane(other, source, options)) if other is not None else None,
        connect_timeout_s=options.connect_timeout_s,
        timeout_s=options.stall_timeout_s,
    )


def _nccl_receiver(pool: KVPool, options: ReceiverOptions) -> Receiver:
    return NcclReceiver(
        pool,
        options.secret,
        options.incarnation,
        place=options.place,
        host=options.host,
        ports=options.ports,
        advertise_host=options.advertise_host,
        timeout_s=options.stall_timeout_s,
    )


def _peer_layout(source: Source) -> KVLayout:
    return rank_layout(source.whole, source.target, source.route.target)


TRANSPORTS: dict[str, Transport] = {
    "cuda_ipc": Transport(
        CudaIpcEndpoint,
        lambda at: at.same_host and not at.same_process,
        lambda pool, _: CudaIpcReceiver(pool),
        _cuda_ipc_lane,
        digest=LANESUM,
    ),
    "nccl": Transport(NcclEndpoint, lambda at: not at.same_process, _nccl_receiver, _nccl_lane, hashes_itself=True, digest=LANESUM),
    "shm": Transport(ShmEndpoint, lambda at: at.same_host, lambda pool, _: ShmReceiver(pool), _shm_lane),
    "tcp": Transport(TcpEndpoint, lambda at: True, _tcp_receiver, _tcp_lane, hashes_itself=True),
    "memory": Transport(MemoryEndpoint, lambda at: at.same_process, lambda pool, _: MemoryReceiver(pool), _memory_lane),
}


def name_of(endpoint: KVEndpoint) -> str:
    return next(name for name, transport in TRANSPORTS.items() if isinstance(endpoint, transport.endpoint))


def choose(offered: Sequence[str], accepted: Sequence[str], same_host: bool, same_process: bool = False) -> str:
    """The first of the prefill worker's wishes that the decode worker can serve. Raises HandshakeRefused with both
    lists.
    """
    meeting = Meeting(same_host, same_process)
    for name in offered:
        if name in accepted and name in TRANSPORTS and TRANSPORTS[name].works(meeting):
            return name
    where = "one process" if same_process else "one host" if same_host else "two hosts, or pid namespaces"
    raise HandshakeRefused(
        f"no common KV transport: prefill offers {', '.join(offered) or 'none'}, "
        f"decode has {', '.join(accepted) or 'none'}, on {where} (--kv-transport)",
        param="transfer.transport",
    )


def processes_of(handshake: Handshake) -> tuple[ProcessRef, ...]:
    """Every process of the writer."""
    return handshake.ranks or (ProcessRef(handshake.boot_id, handshake.pid, handshake.start_ticks),)


def observe_all(handshake: Handshake) -> list[Process] | None:
    """Watch every process of the writer. None: one of them is not on this host, or not visible from here."""
    watched: list[Process] = []
    for ref in processes_of(handshake):
        process = observe(ref.boot_id, ref.pid, ref.start_ticks)
        if process is None:
            for other in watched:
                other.close()
            return None
        watched.append(process)
    return watched


def is_same_host(handshake: Handshake) -> bool:
    """Is every process of the peer visible from here, so that memory can be mapped and its death observed?"""
    watched = observe_all(handshake)
    if watched is None:  # also when it does not say its pid: then a quarantine might never end
        return False
    for process in watched:
        process.close()
    return True


def is_here(endpoints: Sequence[KVEndpoint]) -> bool:
    """Do all ranks of our own group that have mappable memory have it on this host?"""
    return all(endpoint.boot_id == boot_id() for endpoint in endpoints if isinstance(endpoint, ShmEndpoint | CudaIpcEndpoint))


def usable(transports: Sequence[str], pool: KVPool) -> tuple[str, ...]:
    """Those that work with the memory of this pool, in their order. Raises ConfigError when there is none. On a GPU their kernels
    are compiled here, before a hand-shake waits for them.
    """
    can = {
        "shm": not pool.is_on_gpu,
        "cuda_ipc": pool.is_on_gpu and gpu.has_cupy(),
        "nccl": is_usable(pool),
    }
    names = tuple(name for name in transports if can.get(name, True))
    if not names:
        raise ConfigError(
            f"--kv-transport {', '.join(transports)} does not work for KV on {pool.device}"
            + ("" if gpu.has_cupy() or not pool.is_on_gpu else "; CuPy is not installed (cupy-cuda13x)"),
            param="transfer.transport",
        )
    if pool.is_on_gpu:
        view_of(pool, digest=LANESUM).rehearse()
    return names


def make_receivers(
    pool: KVPool,
    transports: Sequence[str],
    secret: bytes,
    host: str = "127.0.0.1",
    *,
    incarnation: str = "",
    place: Place | None = None,
    port: int = 0,
    advertise_host: str | None = None,
    stall_timeout_s: float = 5.0,
    ports: Ports = ANY,
) -> dict[str, Receiver]:
    """Decode: one receiver for each transport named, in that order. Raises ConfigError."""
    options = ReceiverOptions(place or Place(pool.layout), secret, incarnation, host, port, advertise_host, stall_timeout_s, ports)
    receivers: dict[str, Receiver] = {}
    for name in transports:
        if name not in TRANSPORTS:
            raise ConfigError(f"there is no KV transport {name!r}; there are {', '.join(TRANSPORTS)}", param="transfer.transport")
        receivers[name] = TRANSPORTS[name].make_receiver(pool, options)
    nccl, tcp = receivers.get("nccl"), receivers.get("tcp")
    if isinstance(nccl, NcclReceiver) and isinstance(tcp, TcpReceiver):
        nccl.falls_back_to(tcp.endpoint())
    return receivers


def make_sender(
    endpoint: KVEndpoint,
    pool: KVPool,
    secret: bytes,
    *,
    incarnation: str,
    peer_incarnation: str = "",
    source: Source | None = None,
    on_stored: OnStored | None = None,
    max_queued: int = 4096,
    push_timeout_s: float = 0.25,
    connect_timeout_s: float = 5.0,
    stall_timeout_s: float = 5.0,
    tamper: Callable[[Lane], Lane] | None = None,
) -> RouteSender:
    """Prefill: the sender of one route to one decode rank. Maps memory at once (raises HandshakeRefused); connects in its own
    thread (`ready` waits for it). source None: a pool that is alone, to a worker that is alone.

    tamper wraps the lane, for fault tests (faults.FaultyLane).
    """
    source = source or Source(pool, kind=TRANSPORTS[name_of(endpoint)].digest)
    options = LaneOptions(secret, incarnation, peer_incarnation, connect_timeout_s, stall_timeout_s)
    lane = TRANSPORTS[name_of(endpoint)].make_lane(endpoint, source, options)
    if tamper is not None:
        lane = tamper(lane)
    if isinstance(endpoint, CudaIpcEndpoint):
        on_stored = None  # what has been launched has not landed; the digests come with the fence, and summing again is cheap
    if isinstance(endpoint, MemoryEndpoint):
        return DirectSender(lane, source, on_stored)
    name = f"{peer_incarnation or 'peer'}/{source.route.target}"
    try:
        return Outbox(lane, source, name=name, max_queued=max_queued, push_timeout_s=push_timeout_s, on_stored=on_stored)
    except BaseException:  # it has no thread, which would have closed the lane
        lane.close()
        raise
