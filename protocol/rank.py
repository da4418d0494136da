"""What the leader of a group (rank 0) and its other ranks say to each other beside the step broadcasts. One tagged union.

The connection is one of `protocol.network` (authenticated, pinged every second): when it breaks, either side ends its process,
because one rank's death is the group's death. Steps do not travel here; they are broadcast inside the group (engine/group.py).
"""

from __future__ import annotations

import msgspec

from protocol.kv import KVEndpoint
from protocol.parallel import Parallel
from protocol.ticket import Grant, Landed, Manifest


class ProcessRef(msgspec.Struct, frozen=True, array_like=True):
    """One process, so that its death can be observed from the same host (kvtransfer/process.py)."""

    boot_id: str
    pid: int
    start_ticks: int


class RankHello(msgspec.Struct, frozen=True, tag="rank_hello"):
    """Rank -> leader, first word of a rank's life. -> RankSetup, or Failure when this group does not want it."""

    rank: int
    group_id: str  # which life of which group; the leader gave it to whoever started the rank
    process: ProcessRef


class RankSetup(msgspec.Struct, frozen=True, tag="rank_setup"):
    """-> what a rank needs to join. The store is the leader's TCPStore, on the leader's own address."""

    config_json: bytes
    incarnation: str
    parallel: Parallel
    store_host: str
    store_port: int
    transports: tuple[str, ...]


class RankLoaded(msgspec.Struct, frozen=True, tag="rank_loaded"):
    """Rank -> leader: weights are in; so many blocks fit here. -> RankPool once every rank has said so."""

    rank: int
    num_blocks: int
    model_hash: str


class RankPool(msgspec.Struct, frozen=True, tag="rank_pool"):
    """-> build the pool with so many blocks (the least of all ranks), and step on."""

    num_blocks: int


class RankReady(msgspec.Struct, frozen=True, tag="rank_ready"):
    """Rank -> leader: pool, transports and engine loop are up. endpoints: by transport name. -> Ok"""

    rank: int
    endpoints: dict[str, KVEndpoint]


# ---- leader -> rank, about KV; each is answered -----------------------------------------------------------------------


class RankConnect(msgspec.Struct, frozen=True, tag="rank_connect"):
    """Make (or replace) the senders to a decode worker. endpoints: one per rank of it, in rank order. -> Ok"""

    peer_incarnation: str
    target: Parallel
    endpoints: tuple[KVEndpoint, ...]


class RankDisconnect(msgspec.Struct, frozen=True, tag="rank_disconnect"):
    """That decode worker, or the link to it, is gone. -> Ok"""

    peer_incarnation: str


class RankOpen(msgspec.Struct, frozen=True, tag="rank_open"):
    """Sender.open on this rank. -> Ok, or the Failure it raised"""

    grant: Grant


class RankFinish(msgspec.Struct, frozen=True, tag="rank_finish"):
    """Sender.finish on this rank. -> RankDigests, or the Failure it raised"""

    grant_id: str
    timeout: float


class RankDigests(msgspec.Struct, frozen=True, tag="rank_digests"):
    digests: bytes  # of this rank's routes, in route order


class RankAbort(msgspec.Struct, frozen=True, tag="rank_abort"):
    """Sender.abort on this rank. -> Ok once nothing of it can be stored any more"""

    grant_id: str


class RankExpect(msgspec.Struct, frozen=True, tag="rank_expect"):
    """Receiver.expect on this rank. -> Ok; the grant leaves the worker only then"""

    grant: Grant


class RankForget(msgspec.Struct, frozen=True, tag="rank_forget"):
    """Receiver.forget on this rank. -> RankForgot"""

    grant_id: str


class RankForgot(msgspec.Struct, frozen=True, tag="rank_forgot"):
    refuses: dict[str, bool]  # by transport name: True, no late store is possible


class RankLanded(msgspec.Struct, frozen=True, tag="rank_landed"):
    """Runs have landed in this rank's pool: hash them ahead of the seal. Sent, not called."""

    grant: Grant
    landed: Landed


class RankVerify(msgspec.Struct, frozen=True, tag="rank_verify"):
    """Compare this rank's routes with the manifest. -> RankVerdict"""

    grant: Grant
    manifest: Manifest


class RankVerdict(msgspec.Struct, frozen=True, tag="rank_verdict"):
    bad: tuple[tuple[int, int], ...]  # (global layer, index into grant.block_ids); empty: good


RankMessage = (
    RankHello
    | RankSetup
    | RankLoaded
    | RankPool
    | RankReady
    | RankConnect
    | RankDisconnect
    | RankOpen
    | RankFinish
    | RankDigests
    | RankAbort
    | RankExpect
    | RankForget
    | RankForgot
    | RankLanded
    | RankVerify
    | RankVerdict
)
