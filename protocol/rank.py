"""What the leader of a group (rank 0) and its other ranks say to each other beside the step broadcasts. One tagged union.

The connection is one of `protocol.network` (authenticated, pinged every second): when it breaks, either side ends its process,
because one rank's death is the group's death. Steps do not travel here; they are broadcast inside the group (engine/group.py).
"""

from __future__ import annotations

import msgspec

from protocol.errors import Failure
from protocol.kv import KVEndpoint, ProcessRef
from protocol.messages import Ok
from protocol.parallel import Parallel
from protocol.ticket import Grant, Landed, Manifest


class RankHello(msgspec.Struct, frozen=True, tag="rank_hello"):
    """Rank -> leader, first word of a rank's life. -> RankSetup, or Failure when this group does not want it."""

    rank: int
    group_id: str  # which life of which group; the leader gave it to whoever started the rank
    process: ProcessRef


class RankSetup(msgspec.Struct, frozen=True, tag="rank_setup"):
    """-> what a rank needs to join. The store is the leader's TCPStore, on the leader's own address."""

    config_json: bytes
    role: str
    incarnation: str
    parallel: Parallel
    store_host: str
    store_port: int
    transports: tuple[str, ...]
    leader: ProcessRef


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
    """Make the senders of a link to a decode worker. endpoints: one per rank of it, in rank order. -> Ok

    link: numbered by the leader. A pair that changes transports has two for a while: the old one ends with its last prompt.
    """

    link: int
    peer_incarnation: str
    target: Parallel
    endpoints: tuple[KVEndpoint, ...]


class RankDisconnect(msgspec.Struct, frozen=True, tag="rank_disconnect"):
    """That decode worker, or this link to it, is gone. -> Ok"""

    link: int


class RankOpen(msgspec.Struct, frozen=True, tag="rank_open"):
    """Sender.open on this rank, over this link. -> Ok, or the Failure it raised"""

    link: int
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
    """Receiver.forget on this rank. is_over: nothing of it will be verified, so what is known of its bytes may go. -> RankForgot"""

    grant_id: str
    is_over: bool = False


class RankDrop(msgspec.Struct, frozen=True, tag="rank_drop"):
    """The grant is over on this rank too: what was hashed of it ahead is of no use. Sent, not called."""

    grant_id: str


class RankForgot(msgspec.Struct, frozen=True, tag="rank_forgot"):
    refuses: dict[str, bool]  # by transport name: True, no late store is possible


class RankLanded(msgspec.Struct, frozen=True, tag="rank_landed"):
    """Decode, leader -> rank: runs have landed in this rank's pool, hash them ahead of the seal. Prefill, rank -> leader: this
    rank has stored them, tell the decode worker; the rank has signed it. Sent, not called.
    """

    grant: Grant
    landed: Landed


class RankVerify(msgspec.Struct, frozen=True, tag="rank_verify"):
    """Compare this rank's routes with the manifest. -> RankVerdict"""

    grant: Grant
    manifest: Manifest


class RankVerdict(msgspec.Struct, frozen=True, tag="rank_verdict"):
    bad: tuple[tuple[int, int], ...]  # (global layer, index into grant.block_ids); empty: good


class RankFailed(msgspec.Struct, frozen=True, tag="rank_failed"):
    """Rank -> leader: it cannot start, and why; its process ends. Sent, not called."""

    rank: int
    failure: Failure


class RankLeave(msgspec.Struct, frozen=True, tag="rank_leave"):
    """Rank -> leader: this process was asked to end (SIGTERM). The whole group drains, and goes as one. Sent, not called."""

    rank: int


RankMessage = (
    Ok
    | Failure
    | RankHello
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
    | RankDrop
    | RankLanded
    | RankVerify
    | RankVerdict
    | RankFailed
    | RankLeave
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)


def encode(message: RankMessage) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> RankMessage:
    """Raises msgspec.DecodeError or ValidationError on anything that is not one of ours."""
    return _decoder.decode(data)
