"""How two workers agree on a transport, and the making of senders and receivers. Called by decode/handover.py and by cluster/.

prefill  Handshake(layout, transports in order of preference, boot_id, pid, start_ticks) ─>
decode   choose(...)               <─ HandshakeAccepted(endpoint), or HandshakeRefused with both values
prefill  make_sender(endpoint, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtransfer.memory import DirectSender, MemoryLane, MemoryReceiver
from kvtransfer.outbox import Outbox
from kvtransfer.outgoing import Lane
from kvtransfer.pool import KVPool
from kvtransfer.process import observe
from kvtransfer.shm import ShmLane, ShmReceiver
from kvtransfer.tcp import TcpReceiver
from kvtransfer.tcp_lane import TcpLane
from kvtransfer.transport import Receiver, Sender
from protocol.errors import ConfigError, HandshakeRefused
from protocol.kv import KVEndpoint, MemoryEndpoint, ShmEndpoint
from protocol.messages import Handshake

TRANSPORTS = ("shm", "tcp", "memory")


def choose(offered: Sequence[str], accepted: Sequence[str], same_host: bool, same_process: bool = False) -> str:
    """The first of the prefill worker's wishes that the decode worker can serve. Raises HandshakeRefused with both
    lists.
    """
    works = {"shm": same_host, "tcp": True, "memory": same_process}
    for name in offered:
        if name in accepted and works.get(name, False):
            return name
    where = "one process" if same_process else "one host" if same_host else "two hosts, or pid namespaces"
    raise HandshakeRefused(
        f"no common KV transport: prefill offers {', '.join(offered) or 'none'}, "
        f"decode has {', '.join(accepted) or 'none'}, on {where} (--kv-transport)",
        param="transfer.transport",
    )


def is_same_host(handshake: Handshake) -> bool:
    """Is the peer's process visible from here, so that memory can be mapped and its death observed?"""
    watched = observe(handshake.boot_id, handshake.pid, handshake.start_ticks)
    if watched is None:  # also when it does not say its pid: then a quarantine might never end
        return False
    watched.close()
    return True


def make_receivers(
    pool: KVPool,
    transports: Sequence[str],
    secret: bytes,
    host: str = "127.0.0.1",
    *,
    incarnation: str = "",
    port: int = 0,
    advertise_host: str | None = None,
    stall_timeout_s: float = 5.0,
) -> dict[str, Receiver]:
    """Decode: one receiver for each transport named, in that order. Raises ConfigError."""
    receivers: dict[str, Receiver] = {}
    for name in transports:
        if name == "shm":
            receivers[name] = ShmReceiver(pool)
        elif name == "tcp":
            receivers[name] = TcpReceiver(
                pool, secret, incarnation, host=host, port=port, advertise_host=advertise_host, stall_timeout_s=stall_timeout_s
            )
        elif name == "memory":
            receivers[name] = MemoryReceiver(pool)
        else:
            raise ConfigError(f"there is no KV transport {name!r}; there are {', '.join(TRANSPORTS)}", param="transfer.transport")
    return receivers


def make_sender(
    endpoint: KVEndpoint,
    pool: KVPool,
    secret: bytes,
    *,
    incarnation: str,
    peer_incarnation: str = "",
    max_queued: int = 4096,
    push_timeout_s: float = 0.25,
    connect_timeout_s: float = 5.0,
    stall_timeout_s: float = 5.0,
    tamper: Callable[[Lane], Lane] | None = None,
) -> Sender:
    """Prefill: the sender to one decode worker. Maps memory at once (raises HandshakeRefused); connects in its own
    thread.

    tamper wraps the lane, for fault tests (faults.FaultyLane).
    """
    lane: Lane
    if isinstance(endpoint, MemoryEndpoint):
        lane = MemoryLane(endpoint, pool.layout, incarnation)
    elif isinstance(endpoint, ShmEndpoint):
        lane = ShmLane(endpoint, pool.layout)
    else:
        lane = TcpLane(
            endpoint,
            pool.layout,
            secret,
            incarnation,
            peer_incarnation,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )
    if tamper is not None:
        lane = tamper(lane)
    if isinstance(endpoint, MemoryEndpoint):
        return DirectSender(lane, pool)
    return Outbox(lane, pool, name=peer_incarnation or "peer", max_queued=max_queued, push_timeout_s=push_timeout_s)
