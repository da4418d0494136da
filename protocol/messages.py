"""Every message between gateway, scheduler and workers: one tagged union, `Message`, encoded with msgpack.

Named by what they ask. `-> X` in a docstring is the answer to a call; the others are sent without one. An answer of any
call may also be a `Failure`. No pickle, no client field that was not validated into a `Request`.
"""

from __future__ import annotations

import msgspec

from protocol.errors import Failure
from protocol.events import TokenLogprobs
from protocol.kv import XXH3, KVEndpoint, KVLayout, ProcessRef
from protocol.parallel import ALONE, Parallel
from protocol.request import Request
from protocol.ticket import Grant, Landed, Manifest, Ticket
from protocol.timeline import Spent, Trace


class Ok(msgspec.Struct, frozen=True, tag="ok"):
    """The empty answer."""


# ---- gateway -> scheduler ------------------------------------------------------------------------------------------


class Admit(msgspec.Struct, frozen=True, tag="admit", kw_only=True):
    """Place this request. -> Ticket, when it is its turn; Failure (429, 503) when it cannot be.

    prefix_hashes: chained hashes of the prompt's whole hash-blocks. excluded: incarnations that just failed it.
    resumption: it was running and goes to the head of the queue. deadline_s: give up after so long in the queue.
    local_prefill: the decode worker must prefill by itself (choices that already differ cannot share one prefill).
    ttft_slo_s, tpot_slo_s: the request's own promise, never looser than its class's; none: the class's. is_retry: the client
    says that it was refused before. waited_s: since the gateway has had it, which its promise counts too. keeps_model: its tokens
    mean nothing to the model that its class would fall back to. tenants_version: of the file under which its rights were judged.
    """

    request_id: str
    model: str
    tenant: str
    slo_class: str
    priority: int
    prompt_len: int
    max_tokens: int
    num_choices: int = 1
    prefix_hashes: tuple[bytes, ...] = ()
    excluded: tuple[str, ...] = ()
    resumption: bool = False
    local_prefill: bool = False
    last_epoch: int = 0
    deadline_s: float = 600.0
    client_id: str = ""  # for people who look for it
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    is_retry: bool = False
    waited_s: float = 0.0
    keeps_model: bool = False
    tenants_version: str = ""


class Withdraw(msgspec.Struct, frozen=True, tag="withdraw"):
    """The client is gone while its request was still queued."""

    request_id: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """The first token is out: the prefill worker's load of this request is over. prefill_s: placed -> first token."""

    request_id: str
    epoch: int
    prefill_s: float


class Outcome(msgspec.Struct, frozen=True, tag="outcome", kw_only=True):
    """The gateway alone tells how a request ended. kind: "finished" | "failed" | "cancelled".

    slo_class: whose promise it had in the end; asked_class: another one, when it was degraded out of that. degraded: as the ticket
    said. ttft_slo_s, tpot_slo_s: as in Admit, its own promise beside its class's.
    """

    request_id: str
    epoch: int
    kind: str
    tenant: str
    slo_class: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    failure_kind: str = ""
    finish_reason: str = ""  # of the first choice, when finished: "stop" | "length"
    trace: Trace | None = None
    asked_class: str = ""
    degraded: str = ""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None

    @property
    def was_refused(self) -> bool:
        """It failed without ever being placed: turned away, or not placed in time. Not so when no scheduler was there to ask."""
        return self.kind == "failed" and self.epoch == 0 and self.failure_kind != "WorkerLost"


class GatewayBeat(msgspec.Struct, frozen=True, tag="gateway_beat"):
    """I am alive, and these requests are mine as (request_id, epoch). -> Ok, or TenantsVersion where the cluster has a tenants
    file. Missing beats free what the gateway held. tenants_version: of the file that it goes by; "" without one."""

    gateway_id: str
    in_flight: tuple[tuple[str, int], ...]
    tenants_version: str = ""


class TenantsVersion(msgspec.Struct, frozen=True, tag="tenants_version"):
    """Which version of the tenants file is in force; "" while none is, as the file cannot be used: then `OfferTenants` helps.

    life: of the scheduler that says so. services: (band, tenant, service) of those that were served most; a scheduler after this
    one gets them back with `OfferServices`, so that a restart forgives nobody what it had.
    """

    version: str
    life: str = ""
    services: tuple[tuple[int, str, float], ...] = ()


class AskTenants(msgspec.Struct, frozen=True, tag="ask_tenants"):
    """-> TenantsInForce; Failure("Overloaded") while the scheduler has none."""


class TenantsInForce(msgspec.Struct, frozen=True, tag="tenants_in_force"):
    """The tenants file as it was taken, all of it. loaded: unix seconds. tenants: configs.tenants.Tenants as msgpack."""

    version: str
    loaded: float
    tenants: bytes


class OfferServices(msgspec.Struct, frozen=True, tag="offer_services"):
    """A gateway to a scheduler of another life: what the one before had counted. -> Ok"""

    services: tuple[tuple[int, str, float], ...]


class OfferTenants(msgspec.Struct, frozen=True, tag="offer_tenants"):
    """A gateway to a scheduler that was restarted and cannot use the file: what was in force before. -> Ok"""

    offered: TenantsInForce


class AskStatus(msgspec.Struct, frozen=True, tag="ask_status"):
    """-> Status"""


class AskMetrics(msgspec.Struct, frozen=True, tag="ask_metrics"):
    """-> Metrics"""


class AskHistory(msgspec.Struct, frozen=True, tag="ask_history", kw_only=True):
    """-> Status: one document of `cluster/history.py`; Failure("NotFound") for a request that it does not know.

    what: "snapshot" (with the hour's series) | "tick" (with its newest point) | "requests" (tenant, state, limit) |
    "request" | "decision" (request_id, which may be the client's own) | "sla" (window_s).
    """

    what: str
    tenant: str = ""
    state: str = ""
    request_id: str = ""
    limit: int = 100
    window_s: float = 300.0


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """A machine goes away in so many seconds. worker: the name of a worker, or a host's: all workers there. -> Noticed;
    Failure("NotFound")"""

    worker: str
    seconds: float


class Noticed(msgspec.Struct, frozen=True, tag="noticed"):
    """Who was told, by name."""

    workers: tuple[str, ...]


class Metrics(msgspec.Struct, frozen=True, tag="metrics"):
    """The whole cluster in Prometheus text format 0.0.4."""

    text: str


class Status(msgspec.Struct, frozen=True, tag="status"):
    """The scheduler's view as JSON (one document; `tandem status`, the dashboard and /metrics read it)."""

    json: bytes


# ---- worker -> scheduler -------------------------------------------------------------------------------------------


class WorkerInfo(msgspec.Struct, frozen=True, tag="worker_info", kw_only=True):
    """Register this life of a worker. -> Ok"""

    incarnation: str
    role: str
    name: str  # "decode:0", for people
    address: str
    model: str
    layout: KVLayout
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    pid: int
    host: str
    device: str
    can_prefill: bool = True
    parallel: Parallel = ALONE
    rank_pids: tuple[int, ...] = ()  # of its ranks, in their order; pid is the first of them
    max_num_batched_tokens: int = 0  # of one step; 0: not told
    price_per_hour: float = 0.0
    is_spot: bool = False
    is_overflow: bool = False  # takes only what no other worker can take in time


class PairStats(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """KV between this worker and one other over one transport, cumulative. seconds: from the last run's push to the seal.

    fallbacks: how often the pair had to leave a transport, whichever. stale: papers of grants that were over.
    """

    peer: str  # incarnation
    transport: str
    transfers: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    failed: int = 0
    fallbacks: int = 0
    digest_failures: int = 0
    stale: int = 0


class WorkerStats(msgspec.Struct, frozen=True, tag="worker_stats", kw_only=True):
    """Cumulative counters and present gauges of one worker. Times are sums of seconds."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_used_blocks: int = 0  # referenced by a sequence, a grant or a quarantine
    num_cached_blocks: int = 0  # free, but still holding reusable prefix KV
    num_quarantined_blocks: int = 0
    num_unused_slots: int = 0  # of the blocks of a decode worker's running sequences: room for tokens that hold none
    num_steps: int = 0
    step_s: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    decode_slots: int = 0  # decoding sequences of each step, summed over steps; without speculation each got one token
    num_drafts: int = 0  # of speculation: drafts that were verified, their tokens, and how many of those were right
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    num_preemptions: int = 0
    swapped_out: int = 0  # blocks of preempted sequences that went to host memory, and those that came back
    swapped_in: int = 0
    transfers: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    transfers_failed: int = 0
    digest_failures: int = 0
    leases_expired: int = 0
    last_token_age_s: float = -1.0  # seconds since it last produced a token; -1: never
    rss_bytes: int = 0
    host_tier_bytes: int = 0  # of evicted prefix KV kept in host memory; the rest of these in blocks
    host_tier_stored: int = 0
    host_tier_restored: int = 0
    host_tier_evicted: int = 0
    host_tier_digest_failures: int = 0
    pairs: tuple[PairStats, ...] = ()
    gpu: dict[str, float] = {}  # utilization (0..1), memory_used_bytes, memory_total_bytes, power_watts, temperature_celsius


class WorkerBeat(msgspec.Struct, frozen=True, tag="worker_beat"):
    """I am alive. -> Ok; Failure("NotFound") when the scheduler does not know this incarnation (register again)."""

    incarnation: str
    state: str  # "loading" | "ready" | "draining"
    stats: WorkerStats
    running: tuple[tuple[str, int], ...] = ()  # (request_id, epoch)


class WorkerPhase(msgspec.Struct, frozen=True, tag="worker_phase"):
    """How far a worker's start-up is, in words and seconds; printed by `tandem serve`."""

    name: str
    role: str
    incarnation: str
    phase: str
    detail: str
    elapsed_s: float


# ---- scheduler -> worker -------------------------------------------------------------------------------------------


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Your machine goes away in so many seconds: take nothing new, end or hand over what runs, then end. -> Ok, at once"""

    seconds: float


class SwitchRole(msgspec.Struct, frozen=True, tag="switch_role"):
    """Drain, then come back in the other role with the same model, as another incarnation. -> Ok, at once; Failure when it
    cannot."""

    incarnation: str
    role: str


# ---- gateway -> worker ---------------------------------------------------------------------------------------------


class Reserve(msgspec.Struct, frozen=True, tag="reserve"):
    """Decode: set blocks aside. -> Grant. output_token_ids: per choice, what was delivered before a resumption.

    With ticket.prefill None the decode worker starts to prefill by itself at once. finished: choices that had ended before a
    resumption and are not to be continued.
    """

    ticket: Ticket
    request: Request
    output_token_ids: tuple[tuple[int, ...], ...] = ()
    lease_s: float = 30.0
    finished: tuple[int, ...] = ()


class Prefill(msgspec.Struct, frozen=True, tag="prefill"):
    """Prefill: compute the prompt's KV, sample token 1 of each choice, push the KV into the grant's blocks. -> Ok (accepted)"""

    ticket: Ticket
    grant: Grant
    request: Request
    output_token_ids: tuple[tuple[int, ...], ...] = ()


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop work on a request (or on one choice of it) and give its blocks back. epoch 0: whichever attempt.

    is_tainted: a worker could not compute with its KV, so none of it may be kept for other prompts."""

    request_id: str
    epoch: int = 0
    choice: int | None = None
    is_tainted: bool = False


# ---- worker -> gateway ---------------------------------------------------------------------------------------------


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice. `index` is the place of tokens[0] among the choice's output tokens (truth rule R5)."""

    request_id: str
    epoch: int
    choice: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    from_prefill: bool = False  # sampled by the prefill worker; decode's first frame repeats it
    spent: Spent | None = None  # with a worker's first frame of an attempt


class TokenFrame(msgspec.Struct, frozen=True, tag="tokens"):
    """All tokens of one engine step that belong to one gateway."""

    updates: tuple[TokenUpdate, ...]


class RequestFailed(msgspec.Struct, frozen=True, tag="request_failed"):
    """One attempt ended badly on a worker. stage: "prefill" | "transfer" | "decode"."""

    request_id: str
    epoch: int
    stage: str
    failure: Failure


# ---- prefill worker <-> decode worker ------------------------------------------------------------------------------


class Handshake(msgspec.Struct, frozen=True, tag="handshake"):
    """Prefill asks: can we exchange KV? -> HandshakeAccepted, or Failure("HandshakeRefused") with both values.

    ranks: every process of the writer, the leader's first; a quarantine ends by death only when each of them is seen to be dead.
    """

    incarnation: str
    layout: KVLayout
    transports: tuple[str, ...]  # in order of preference
    boot_id: str
    pid: int = 0
    start_ticks: int = 0  # with pid and boot_id: this very process, so that its death can be observed
    parallel: Parallel = ALONE
    ranks: tuple[ProcessRef, ...] = ()  # empty: the process above is all of it


class HandshakeAccepted(msgspec.Struct, frozen=True, tag="handshake_accepted"):
    """endpoints: one per rank of the decode worker, in rank order, all of the transport that was chosen.
    void_grants: given to this life of the writer and taken back before it first called; it must refuse them.
    """

    incarnation: str
    layout: KVLayout
    endpoints: tuple[KVEndpoint, ...]
    parallel: Parallel = ALONE
    void_grants: tuple[str, ...] = ()
    digest: str = XXH3  # the kind that this transport's papers must have


class Seal(msgspec.Struct, frozen=True, tag="seal"):
    """The KV is on the wire and has landed; verify and start. -> Ok once verified, Failure("TransferFailed") if not."""

    manifest: Manifest
    landed_s: float = 0.0  # from token 1 until the last byte had landed, by the writer's clock


class WriterDone(msgspec.Struct, frozen=True, tag="writer_done"):
    """Prefill will never again write into this grant's blocks: the acknowledgement that ends a quarantine (R2)."""

    grant_id: str


class StopWriting(msgspec.Struct, frozen=True, tag="stop_writing"):
    """Decode: this grant is void. -> Ok when the writer has stopped (the same acknowledgement, asked for)."""

    grant_id: str


Message = (
    Ok
    | Failure
    | Admit
    | Withdraw
    | Ticket
    | Progress
    | Outcome
    | GatewayBeat
    | TenantsVersion
    | AskTenants
    | TenantsInForce
    | OfferTenants
    | OfferServices
    | AskStatus
    | Status
    | AskMetrics
    | AskHistory
    | Notice
    | Noticed
    | Metrics
    | WorkerInfo
    | WorkerBeat
    | WorkerPhase
    | Leave
    | SwitchRole
    | Reserve
    | Grant
    | Prefill
    | Cancel
    | TokenFrame
    | RequestFailed
    | Handshake
    | HandshakeAccepted
    | Seal
    | Landed
    | WriterDone
    | StopWriting
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises msgspec.DecodeError or ValidationError on anything that is not one of ours."""
    return _decoder.decode(data)
