"""The hand-off of KV as two pure state machines: `Inbound` (here) for all grants of a decode worker, `Outbound` (outbound.py) for
those of a prefill worker.

No I/O, no threads, no clock of its own: callers pass `now` (seconds, monotonic, their own clock) and carry out what is
returned. Used by decode/handover.py and prefill/worker.py; the simulator and the fault tests use the very same classes.

Inbound, per grant ("the blocks" are the written ones, `written_blocks(grant)`; cached ones are only read and never at
risk):

    granted() ──> RESERVED ── check_seal() ──> VERIFYING ── verified(ok) ──────────────> SEALED    KEEP: the sequence has them
                    │  │                         │   └───── verified(not ok) ───> RELEASED         RELEASE
                    │  │                         └── cancelled() ──> DROPPING ── verified(any) ──> RELEASED   RELEASE
                    │  │                                             (a reader is still on the blocks)
                    │  └─ writer_done() / writer_lost() / cancelled(writer_stopped=True) ────────> RELEASED   RELEASE
                    └──── cancelled(writer_stopped=False) ──> QUARANTINED                          QUARANTINE
                                                                 └─ writer_done() / writer_lost() > RELEASED   LIFT

check_landed() moves nothing. While RESERVED it says whether a `Landed` may be believed: its runs may be hashed now, and what it
claims may be held against the blocks once the writer is gone. A block whose claims then hold is worth keeping: RELEASE and LIFT
give it back to the prefix cache under its hash instead of to the free ones. The worker reads it for that only after the effect,
when no store can happen any more; until it has, the block is given to nobody.

Outbound, per grant:

    opened() ──> OPENED ── pushing() ──> PUSHING ── finishing() ──> FINISHING ── sealed() ──> SEALED   a signed manifest
                   └────────────────────────┴──────────────────────────┘
                                stop_writing() / failing()
                                            v
                                        ABORTING ── aborted() ──> ABORTED   acknowledge: WriterDone, or Ok to StopWriting

Truth rules kept here: R1 a grant and its manifest are authentic, agree on request, epoch, both incarnations, block
count and layout, and are used once; R2 blocks with a writer that may still store are never given back; R3 leases end on
the caller's clock; R4 only `verified(ok=True)` after an accepted manifest says KEEP. A signed manifest is the writer's
word that it has stopped.
"""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

from kvtransfer.layout import num_rows
from protocol.errors import TransferFailed
from protocol.kv import KVLayout
from protocol.ticket import Grant, Landed, Manifest, is_authentic

DIGEST_NBYTES = 16
MEMORY_S = 600.0  # how long ended ids and seen epochs are remembered: far longer than any message can be under way


def written_blocks(grant: Grant) -> tuple[int, ...]:
    """The blocks that the prefill worker writes."""
    return grant.block_ids[grant.num_cached_blocks :]


def cached_blocks(grant: Grant) -> tuple[int, ...]:
    """The blocks that already hold verified KV; shared, so they are released at once whenever the grant ends badly."""
    return grant.block_ids[: grant.num_cached_blocks]


class Effect(enum.Enum):
    """What the decode worker does now with a grant's written blocks."""

    KEEP = "keep"  # nothing: leave them as they are
    RELEASE = "release"  # give them back; no store can happen any more
    QUARANTINE = "quarantine"  # set them apart; release the cached ones; ask the writer to stop
    LIFT = "lift"  # they were in quarantine and may go back now


class InboundPhase(enum.Enum):
    RESERVED = "reserved"  # the writer may store
    VERIFYING = "verifying"  # the writer has stopped; digests are being recomputed
    DROPPING = "dropping"  # cancelled while being verified
    QUARANTINED = "quarantined"  # void, but the writer may still store
    SEALED = "sealed"
    RELEASED = "released"


class OutboundPhase(enum.Enum):
    OPENED = "opened"
    PUSHING = "pushing"
    FINISHING = "finishing"
    ABORTING = "aborting"  # void, but a store of ours may still be under way
    SEALED = "sealed"
    ABORTED = "aborted"


INBOUND_MOVES: dict[InboundPhase, frozenset[InboundPhase]] = {
    InboundPhase.RESERVED: frozenset({InboundPhase.VERIFYING, InboundPhase.QUARANTINED, InboundPhase.RELEASED}),
    InboundPhase.VERIFYING: frozenset({InboundPhase.SEALED, InboundPhase.RELEASED, InboundPhase.DROPPING}),
    InboundPhase.DROPPING: frozenset({InboundPhase.RELEASED}),
    InboundPhase.QUARANTINED: frozenset({InboundPhase.RELEASED}),
    InboundPhase.SEALED: frozenset(),
    InboundPhase.RELEASED: frozenset(),
}
OUTBOUND_MOVES: dict[OutboundPhase, frozenset[OutboundPhase]] = {
    OutboundPhase.OPENED: frozenset({OutboundPhase.PUSHING, OutboundPhase.FINISHING, OutboundPhase.ABORTING}),
    OutboundPhase.PUSHING: frozenset({OutboundPhase.FINISHING, OutboundPhase.ABORTING}),
    OutboundPhase.FINISHING: frozenset({OutboundPhase.SEALED, OutboundPhase.ABORTING}),
    OutboundPhase.ABORTING: frozenset({OutboundPhase.ABORTED}),
    OutboundPhase.SEALED: frozenset(),
    OutboundPhase.ABORTED: frozenset(),
}

_Key = TypeVar("_Key")
_Phase = TypeVar("_Phase", InboundPhase, OutboundPhase)


class Memory(dict[_Key, tuple[float, int]]):
    """Ids with the time they were put in, oldest first; `prune` drops what is older than memory_s."""

    def put(self, key: _Key, now: float, value: int = 0) -> None:
        self.pop(key, None)
        self[key] = (now, value)

    def prune(self, before: float) -> None:
        while self:
            key = next(iter(self))
            if self[key][0] >= before:
                return
            del self[key]


class Held(Generic[_Phase]):
    """One open grant, when its lease ends, and where it stands."""

    def __init__(self, grant: Grant, expires: float, phase: _Phase) -> None:
        self.grant = grant
        self.expires = expires
        self.phase: _Phase = phase


class Inbound:
    """All grants that this life of a decode worker gave out and that are not over. Not thread-safe: one event loop owns
    it.

    The worker's side of each move:
      expired(now)           for each id: stopped = receiver.forget(id); effect = cancelled(id, writer_stopped=stopped)
      check_seal(manifest)   receiver.forget(id); bad = digest.verify(...); effect = verified(id, ok=not bad)
      QUARANTINE             StopWriting to the writer; its Ok is writer_done(id); its death, observed, is
      writer_lost(incarnation) writer_lost, RELEASE   receiver.forget(id) first: bytes that are already in our socket
      are stored by our own thread
    """

    def __init__(self, incarnation: str, layout: KVLayout, secret: bytes, *, memory_s: float = MEMORY_S) -> None:
        self._incarnation = incarnation
        self._layout = layout
        self._secret = secret
        self._memory_s = memory_s
        self._held: dict[str, Held[InboundPhase]] = {}
        self._ended: Memory[str] = Memory()  # ids of grants that are over
        self._epochs: Memory[str] = Memory()  # request_id -> newest epoch granted
        self._now = float("-inf")

    def __contains__(self, grant_id: str) -> bool:
        return grant_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, grant_id: str) -> Grant | None:
        """The grant, while it is not over."""
        held = self._held.get(grant_id)
        return held.grant if held else None

    def phase(self, grant_id: str) -> InboundPhase | None:
        """None: unknown or over."""
        held = self._held.get(grant_id)
        return held.phase if held else None

    def quarantined(self) -> list[Grant]:
        """Grants whose writer still owes its word; ask again with StopWriting."""
        return [held.grant for held in self._held.values() if held.phase is InboundPhase.QUARANTINED]

    def grants_of(self, prefill_incarnation: str) -> list[Grant]:
        """All that this life of a prefill worker was to write and that are not over."""
        return [held.grant for held in self._held.values() if held.grant.prefill_incarnation == prefill_incarnation]

    def granted(self, grant: Grant, now: float) -> list[str]:
        """Our own signed grant leaves the worker; its lease runs from now. -> ids of older attempts of the same
        request, now void: cancel each of them (they can never be sealed).

        Raises TransferFailed when a newer epoch of this request was granted before: the ticket is stale.
        """
        self._tick(now)
        assert is_authentic(grant, self._secret), "a grant is signed before it is granted"
        assert grant.decode_incarnation == self._incarnation, "a grant names the worker that gives it"
        assert grant.layout == self._layout, "a grant names the layout of our pool"
        assert grant.prefill_incarnation, "a grant without a writer needs no hand-off"
        newest = self._epochs.get(grant.request_id, (0.0, -1))[1]
        if grant.epoch <= newest:  # first: a Reserve that comes twice asks for an id that was used, and that is not our mistake
            raise TransferFailed(
                f"request {grant.request_id}: epoch {grant.epoch} is stale, this worker already granted epoch {newest}"
            )
        assert grant.grant_id not in self._held, f"grant id {grant.grant_id} is in use"
        assert grant.grant_id not in self._ended, f"grant id {grant.grant_id} was used before"
        assert 0 <= grant.num_cached_blocks <= len(grant.block_ids), "more cached blocks than blocks"
        assert grant.lease_s > 0, "a lease is longer than nothing"
        taken = set(written_blocks(grant))
        assert len(taken) == len(written_blocks(grant)), "a block twice in one grant"
        for held in self._held.values():
            assert taken.isdisjoint(written_blocks(held.grant)), f"a block has two writers ({held.grant.grant_id})"
        older = [
            held.grant.grant_id
            for held in self._held.values()
            if held.grant.request_id == grant.request_id and held.phase is InboundPhase.RESERVED
        ]
        self._epochs.put(grant.request_id, now, grant.epoch)
        self._held[grant.grant_id] = Held(grant, now + grant.lease_s, InboundPhase.RESERVED)
        return older

    def check_seal(self, manifest: Manifest, now: float) -> None:
        """Accept a manifest, once: RESERVED -> VERIFYING. Forget the grant at the receiver, then verify the digests.

        Raises TransferFailed with the reason, in an order that tells a stranger nothing: MAC, then identity, then
        state. A refused manifest moves nothing, so a forged one cannot end somebody's grant.
        """
        self._tick(now)
        if not is_authentic(manifest, self._secret):
            raise TransferFailed("manifest refused: its MAC is not ours (is the cluster secret the same on every worker?)")
        if manifest.decode_incarnation != self._incarnation:
            raise TransferFailed(
                f"manifest refused: it is for decode incarnation {manifest.decode_incarnation}, this is {self._incarnation}"
            )
        held = self._held.get(manifest.grant_id)
        if held is None:
            what = "is over (used, expired or cancelled)" if manifest.grant_id in self._ended else "is unknown"
            raise TransferFailed(f"manifest refused: grant {manifest.grant_id} {what}")
        grant = held.grant
        _compare(grant, manifest)
        if held.phase is not InboundPhase.RESERVED:
            raise TransferFailed(f"manifest refused: grant {grant.grant_id} is already {held.phase.value}")
        if now >= held.expires:
            raise TransferFailed(
                f"manifest refused: the lease of grant {grant.grant_id} ended {now - held.expires:.3f} s ago; "
                "raise transfer.lease_s if prefills are that long"
            )
        newest = self._epochs.get(grant.request_id, (0.0, grant.epoch))[1]
        if newest != grant.epoch:
            raise TransferFailed(f"manifest refused: epoch {grant.epoch} is stale, epoch {newest} was granted since")
        self._move(held, InboundPhase.VERIFYING)

    def check_landed(self, landed: Landed, now: float) -> Grant | None:
        """The grant of which these runs may be hashed ahead of the seal; None: it is over, or sealing has begun. Moves nothing.

        Raises TransferFailed with the reason when the paper is forged, or names what the grant does not hold.
        """
        self._tick(now)
        if not is_authentic(landed, self._secret):
            raise TransferFailed("landed runs refused: the MAC is not ours (is the cluster secret the same on every worker?)")
        held = self._held.get(landed.grant_id)
        if held is None or held.phase is not InboundPhase.RESERVED or now >= held.expires:
            return None
        grant = held.grant
        _compare_names(grant, landed, "landed runs")
        rows = num_rows(grant.layout, grant.source, grant.target)
        fits = (
            0 <= landed.row < landed.row + landed.num_rows <= rows
            and grant.num_cached_blocks <= landed.first < landed.first + landed.count <= len(grant.block_ids)
            and len(landed.digests) == landed.num_rows * landed.count * DIGEST_NBYTES
        )
        if not fits:
            raise TransferFailed(
                f"landed runs refused: rows {landed.row} + {landed.num_rows} of {rows}, blocks {landed.first} + {landed.count} of "
                f"{len(grant.block_ids)}, {len(landed.digests)} bytes of digests"
            )
        return grant

    def verified(self, grant_id: str, ok: bool) -> Effect:
        """Verification ended. KEEP: the blocks are good and belong to the sequence. RELEASE: wrong bytes, or cancelled
        meanwhile.
        """
        held = self._held[grant_id]
        assert held.phase in (InboundPhase.VERIFYING, InboundPhase.DROPPING), f"verified() while {held.phase.value}"
        if ok and held.phase is InboundPhase.VERIFYING:
            self._end(held, InboundPhase.SEALED)
            return Effect.KEEP
        self._end(held, InboundPhase.RELEASED)
        return Effect.RELEASE

    def cancelled(self, grant_id: str, *, writer_stopped: bool = False) -> Effect:
        """The request is gone, the lease ended, or a newer epoch came. writer_stopped: what receiver.forget(grant_id)
        returned.

        KEEP while a verification reads the blocks (its `verified` says RELEASE then), for unknown grants, and when
        asked again.
        """
        held = self._held.get(grant_id)
        if held is None or held.phase in (InboundPhase.DROPPING, InboundPhase.QUARANTINED):
            return Effect.KEEP
        if held.phase is InboundPhase.VERIFYING:
            self._move(held, InboundPhase.DROPPING)
            return Effect.KEEP
        if writer_stopped:
            self._end(held, InboundPhase.RELEASED)
            return Effect.RELEASE
        self._move(held, InboundPhase.QUARANTINED)
        return Effect.QUARANTINE

    def expired(self, now: float) -> list[str]:
        """Grants whose lease is over and that no manifest has reached. Each is to be forgotten and cancelled; see the class."""
        self._tick(now)
        return [held.grant.grant_id for held in self._held.values() if held.phase is InboundPhase.RESERVED and now >= held.expires]

    def next_expiry(self) -> float | None:
        """When `expired` may have something next, on the caller's clock."""
        return min((held.expires for held in self._held.values() if held.phase is InboundPhase.RESERVED), default=None)

    def writer_done(self, grant_id: str) -> Effect:
        """The writer's word that it will never again store into this grant: WriterDone, or Ok to StopWriting."""
        held = self._held.get(grant_id)
        return self._writer_gone(held) if held else Effect.KEEP

    def writer_lost(self, prefill_incarnation: str) -> list[tuple[str, Effect]]:
        """The death of this life of a prefill worker was observed (not: it is silent). -> (grant_id, effect) where
        there is one.

        A grant whose manifest was accepted before is not touched: its bytes have landed.
        """
        gone = [held for held in self._held.values() if held.grant.prefill_incarnation == prefill_incarnation]
        effects = [(held.grant.grant_id, self._writer_gone(held)) for held in gone]
        return [(grant_id, effect) for grant_id, effect in effects if effect is not Effect.KEEP]

    def check_integrity(self) -> None:
        """Raises AssertionError when two open grants share a written block."""
        owners: dict[int, str] = {}
        for held in self._held.values():
            for block in written_blocks(held.grant):
                other = owners.setdefault(block, held.grant.grant_id)
                assert other == held.grant.grant_id, f"block {block} is in grants {other} and {held.grant.grant_id}"

    def _writer_gone(self, held: Held[InboundPhase]) -> Effect:
        if held.phase is InboundPhase.QUARANTINED:
            self._end(held, InboundPhase.RELEASED)
            return Effect.LIFT
        if held.phase is InboundPhase.RESERVED:
            self._end(held, InboundPhase.RELEASED)
            return Effect.RELEASE
        return Effect.KEEP

    def _move(self, held: Held[InboundPhase], target: InboundPhase) -> None:
        assert target in INBOUND_MOVES[held.phase], f"no move from {held.phase.value} to {target.value}"
        held.phase = target

    def _end(self, held: Held[InboundPhase], target: InboundPhase) -> None:
        self._move(held, target)
        del self._held[held.grant.grant_id]
        self._ended.put(held.grant.grant_id, self._now)

    def _tick(self, now: float) -> None:
        self._now = max(self._now, now)
        self._ended.prune(self._now - self._memory_s)
        self._epochs.prune(self._now - self._memory_s)


def _compare(grant: Grant, manifest: Manifest) -> None:
    """Raises TransferFailed with both values of the first thing on which the two papers differ."""
    _compare_names(grant, manifest, "manifest")
    if difference := grant.layout.difference(manifest.layout):
        raise TransferFailed(f"manifest refused: layouts differ: {difference}")
    num_written = len(written_blocks(grant))
    if manifest.num_written != num_written:
        raise TransferFailed(f"manifest refused: {num_written} blocks were granted, {manifest.num_written} written")
    expected = num_written * num_rows(grant.layout, grant.source, grant.target) * DIGEST_NBYTES
    if len(manifest.digests) != expected:
        raise TransferFailed(f"manifest refused: {len(manifest.digests)} bytes of digests, expected {expected}")


def _compare_names(grant: Grant, paper: Manifest | Landed, what: str) -> None:
    for name in ("request_id", "epoch", "decode_incarnation", "prefill_incarnation"):
        ours, theirs = getattr(grant, name), getattr(paper, name)
        if ours != theirs:
            raise TransferFailed(f"{what} refused: {name} is {ours!r} in the grant, {theirs!r} in the {what}")
