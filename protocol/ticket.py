"""The papers of one hand-off: `Ticket` (the scheduler's decision), `Grant` (decode's reservation), `Manifest` (what prefill wrote).

Grant and manifest name request, epoch, both incarnations, block count, layout and expiry, carry a MAC under the cluster
secret, and are used once (truth rule R1). Sealing needs both. Times are seconds on the *issuer's* monotonic clock, so
leases travel as durations.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TypeVar

import msgspec

from protocol.events import TokenLogprobs
from protocol.kv import XXH3, KVEndpoint, KVLayout
from protocol.parallel import ALONE, Parallel


class WorkerRef(msgspec.Struct, frozen=True):
    """Where to find one life of one worker. Identity is the incarnation, never the address."""

    incarnation: str
    role: str  # "prefill" | "decode"
    address: str  # host:port of its control socket
    parallel: Parallel = ALONE


class Ticket(msgspec.Struct, frozen=True, tag="ticket"):
    """Which workers serve which attempt of a request. prefill None: the decode worker prefills by itself.

    goes_first: its tenant asks for well less than its share: on the prefill worker the next step is its own, before those of
    tenants who do not. degraded: what was taken off so that it could be served, in words for `x-tandem-degraded`; "" for nothing.
    Then slo_class, max_tokens and model say what holds instead of what was asked for; their defaults: as asked.
    """

    request_id: str
    epoch: int  # which attempt; only the scheduler mints it
    decode: WorkerRef
    prefill: WorkerRef | None
    predicted_ttft_s: float = 0.0
    degraded: str = ""
    slo_class: str = ""
    max_tokens: int | None = None
    model: str = ""
    goes_first: bool = False


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """Blocks that a decode worker set aside for one attempt.

    block_ids[i] holds tokens [i*block_size, (i+1)*block_size); the first num_cached_blocks of them already hold verified KV
    and are not to be written. lease_s counts from the reservation; nobody renews it: a longer prefill asks for a longer lease.
    """

    grant_id: str
    request_id: str
    epoch: int
    decode_incarnation: str
    prefill_incarnation: str  # "" when decode prefills by itself
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    num_tokens: int  # whose KV is to be written: the whole prompt (and what was delivered before a resumption)
    layout: KVLayout
    lease_s: float
    endpoints: tuple[KVEndpoint, ...]
    control_address: str
    source: Parallel = ALONE  # the writer's group; with `target` it says which rank writes what to whom (kvtransfer/layout.py)
    target: Parallel = ALONE
    mac: bytes = b""


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """What prefill sampled for one choice; the gateway has it already, decode continues from it."""

    choice: int
    token: int
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: TokenLogprobs | None = None


class Manifest(msgspec.Struct, frozen=True, tag="manifest"):
    """Prefill's signed list of what it wrote: digests[(row * num_written + i) * 16 :][:16] for written block i, 16 bytes each.

    Rows: the routes of (layout, grant.source, grant.target) in their order (kvtransfer/layout.plan_routes), and within each
    route its layers; with one rank on each side row = layer. Written blocks are the grant's block_ids[num_cached_blocks:].
    first_tokens has one entry per choice.
    """

    grant_id: str
    request_id: str
    epoch: int
    decode_incarnation: str
    prefill_incarnation: str
    num_written: int
    layout: KVLayout
    digests: bytes
    first_tokens: tuple[FirstToken, ...]
    mac: bytes = b""
    digest: str = XXH3  # which kind the digests are


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """Ahead of the manifest: a rectangle of runs that have landed, and their digests, so that they are verified while later
    layers and chunks are still being computed.

    Rows as in Manifest, [row, row + num_rows); blocks [first, first + count) of the grant's block_ids. digests[(r * count + i) *
    16 :][:16] for row `row + r`, block `first + i`. A block that was verified in all its rows outlives a writer that dies.
    """

    grant_id: str
    request_id: str
    epoch: int
    decode_incarnation: str
    prefill_incarnation: str
    row: int
    num_rows: int
    first: int
    count: int
    digests: bytes
    mac: bytes = b""
    digest: str = XXH3


_Signed = TypeVar("_Signed", Grant, Manifest, Landed)
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def _mac(document: Grant | Manifest | Landed, secret: bytes) -> bytes:
    unsigned = msgspec.structs.replace(document, mac=b"")
    return hmac.new(secret, _encode(unsigned), hashlib.sha256).digest()


def sign(document: _Signed, secret: bytes) -> _Signed:
    return msgspec.structs.replace(document, mac=_mac(document, secret))


def is_authentic(document: Grant | Manifest | Landed, secret: bytes) -> bool:
    return hmac.compare_digest(document.mac, _mac(document, secret))
