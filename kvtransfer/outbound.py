"""The prefill side of the hand-off as a pure state machine. Its drawing, and the decode side, are in handoff.py.

No I/O, no threads, no clock of its own. Used by prefill/worker.py; the simulator and the fault tests use the very same class.
"""

from __future__ import annotations

from kvtransfer.handoff import DIGEST_NBYTES, MEMORY_S, OUTBOUND_MOVES, Held, Memory, OutboundPhase, written_blocks
from kvtransfer.layout import num_rows
from protocol.errors import TransferFailed
from protocol.kv import XXH3, KVLayout
from protocol.parallel import ALONE, Parallel
from protocol.ticket import FirstToken, Grant, Manifest, is_authentic, sign


class Outbound:
    """All grants that this life of a prefill worker writes into. Not thread-safe: one event loop owns it.

    Source blocks must keep their bytes until the grant is over here (`sealed` returned, or `aborted` was called).
    """

    def __init__(
        self, incarnation: str, layout: KVLayout, secret: bytes, *, parallel: Parallel = ALONE, memory_s: float = MEMORY_S
    ) -> None:
        self._incarnation = incarnation
        self._parallel = parallel
        self._layout = layout
        self._secret = secret
        self._memory_s = memory_s
        self._held: dict[str, Held[OutboundPhase]] = {}
        self._void: Memory[str] = Memory()  # ids never to be written (again): used, aborted, or stopped before they came
        self._epochs: Memory[str] = Memory()
        self._now = float("-inf")

    def __contains__(self, grant_id: str) -> bool:
        return grant_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, grant_id: str) -> Grant | None:
        """The grant, while it is not over."""
        held = self._held.get(grant_id)
        return held.grant if held else None

    def phase(self, grant_id: str) -> OutboundPhase | None:
        """None: unknown or over."""
        held = self._held.get(grant_id)
        return held.phase if held else None

    def opened(self, grant: Grant, now: float) -> None:
        """Take a grant that came with a Prefill message, once. Raises TransferFailed: forged, not for us, used,
        stopped, stale.

        Its lease began earlier, at the decode worker; ours runs from now, so decode's ends first and it is decode that
        decides.
        """
        self._tick(now)
        if not is_authentic(grant, self._secret):
            raise TransferFailed("grant refused: its MAC is not ours (is the cluster secret the same on every worker?)")
        if grant.prefill_incarnation != self._incarnation:
            raise TransferFailed(
                f"grant refused: it is for prefill incarnation {grant.prefill_incarnation!r}, this is {self._incarnation!r}"
            )
        if difference := self._layout.difference(grant.layout):
            raise TransferFailed(f"grant refused: layouts differ: {difference}")
        if grant.source != self._parallel:
            raise TransferFailed(f"grant refused: it is for a group of {grant.source}, this one is {self._parallel}")
        if grant.grant_id in self._held or grant.grant_id in self._void:
            raise TransferFailed(f"grant refused: {grant.grant_id} was already used, or stopped by its decode worker")
        newest = self._epochs.get(grant.request_id, (0.0, -1))[1]
        if grant.epoch <= newest:
            raise TransferFailed(f"grant refused: epoch {grant.epoch} of {grant.request_id} is stale, {newest} came before")
        self._epochs.put(grant.request_id, now, grant.epoch)
        self._held[grant.grant_id] = Held(grant, now + grant.lease_s, OutboundPhase.OPENED)

    def pushing(self, grant_id: str) -> bool:
        """May runs of this grant be pushed? Ask before each push. False: it is void or finishing, do not."""
        held = self._held.get(grant_id)
        if held is None or held.phase not in (OutboundPhase.OPENED, OutboundPhase.PUSHING):
            return False
        if held.phase is OutboundPhase.OPENED:
            self._move(held, OutboundPhase.PUSHING)
        return True

    def finishing(self, grant_id: str) -> None:
        """Every run is pushed; sender.finish() follows. Raises TransferFailed when the grant became void meanwhile."""
        self._move(self._live(grant_id), OutboundPhase.FINISHING)

    def sealed(self, grant_id: str, digests: bytes, first_tokens: tuple[FirstToken, ...], digest: str = XXH3) -> Manifest:
        """sender.finish() returned these digests, of kind `digest`: nothing of ours is under way. -> the signed manifest, the
        writer's word that it has stopped; the grant is over here. Raises TransferFailed when it became void meanwhile (abort it
        then)."""
        held = self._live(grant_id)
        grant = held.grant
        num_written = len(written_blocks(grant))
        rows = num_rows(grant.layout, grant.source, grant.target)
        assert len(digests) == num_written * rows * DIGEST_NBYTES, "digests of another grant"
        self._end(held, OutboundPhase.SEALED)
        manifest = Manifest(
            grant_id=grant.grant_id,
            request_id=grant.request_id,
            epoch=grant.epoch,
            decode_incarnation=grant.decode_incarnation,
            prefill_incarnation=grant.prefill_incarnation,
            num_written=num_written,
            layout=grant.layout,
            digests=digests,
            first_tokens=first_tokens,
            digest=digest,
        )
        return sign(manifest, self._secret)

    def stop_writing(self, grant_id: str, now: float) -> bool:
        """Decode says that the grant is void. True: nothing of ours is under way and never will be, acknowledge now.
        False: await sender.abort(grant_id), call aborted(grant_id), then acknowledge.

        A grant that has not come yet is remembered: its Prefill message, still on the way, will be refused.
        """
        self._tick(now)
        held = self._held.get(grant_id)
        if held is None:
            self._void.put(grant_id, self._now)
            return True
        self._abort(held)
        return False

    def failing(self, grant_id: str) -> bool:
        """Our side gives up (cancelled, engine error, finish failed). -> True: sender.abort, then aborted(), then
        WriterDone. False: it is over already, nothing to do."""
        held = self._held.get(grant_id)
        if held is None:
            return False
        self._abort(held)
        return True

    def aborted(self, grant_id: str) -> None:
        """sender.abort() returned: no store of ours can happen any more. The grant is over here. Idempotent."""
        held = self._held.get(grant_id)
        if held is not None:
            self._end(held, OutboundPhase.ABORTED)

    def expired(self, now: float) -> list[str]:
        """Grants that outlived their lease: decode has given them up. Fail each of them."""
        self._tick(now)
        return [
            held.grant.grant_id for held in self._held.values() if held.phase is not OutboundPhase.ABORTING and now >= held.expires
        ]

    def next_expiry(self) -> float | None:
        return min((held.expires for held in self._held.values() if held.phase is not OutboundPhase.ABORTING), default=None)

    def _live(self, grant_id: str) -> Held[OutboundPhase]:
        held = self._held.get(grant_id)
        if held is None or held.phase is OutboundPhase.ABORTING:
            raise TransferFailed(f"grant {grant_id} was stopped by its decode worker, or is over")
        return held

    def _abort(self, held: Held[OutboundPhase]) -> None:
        if held.phase is not OutboundPhase.ABORTING:
            self._move(held, OutboundPhase.ABORTING)

    def _move(self, held: Held[OutboundPhase], target: OutboundPhase) -> None:
        assert target in OUTBOUND_MOVES[held.phase], f"no move from {held.phase.value} to {target.value}"
        held.phase = target

    def _end(self, held: Held[OutboundPhase], target: OutboundPhase) -> None:
        self._move(held, target)
        del self._held[held.grant.grant_id]
        self._void.put(held.grant.grant_id, self._now)

    def _tick(self, now: float) -> None:
        self._now = max(self._now, now)
        self._void.prune(self._now - self._memory_s)
        self._epochs.prune(self._now - self._memory_s)
