"""The decode side of every hand-over that is not sealed yet: grants given, landed runs hashed, digests verified, blocks in
quarantine, and what a lost writer had written well kept for the next attempt.

The rules are in `kvtransfer/handoff.py`, which does no I/O; this carries out what they say, with receivers, writers and the
block pool. `worker.py` owns one and tells it of messages; sequences and steps are not its business.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from decode.claims import Claims
from decode.job import Job
from decode.writers import Writers
from engine.blocks import BlockPool
from kvtransfer.handoff import Effect, Inbound
from kvtransfer.receiving import GroupReceivers
from protocol.errors import DamagedKV, TandemError, TransferFailed
from protocol.kv import KVLayout
from protocol.messages import Handshake, HandshakeAccepted, PairStats, Reserve, StopWriting
from protocol.network import Clock, Network, Peer
from protocol.ticket import Grant, Landed, Manifest, sign

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
FORGET_AGAIN_S = 1.0
KEEP_TIMEOUT_S = 2.0  # how long a next attempt waits to find what the last one left
QUARANTINE_S = 0.25  # and how long for the end of its quarantine: a word takes a millisecond, seeing a death a few
MAX_KEEP_NBYTES = 1 << 30  # of one grant read again; more would hold its blocks, and the verifying thread, for too long
MAX_PAIR_STATS = 256


class _Counts:
    """One prefill worker over one transport."""

    def __init__(self) -> None:
        self.transfers = 0
        self.nbytes = 0
        self.failed = 0
        self.digest_failures = 0
        self.stale = 0


class Handover:
    """on_failed(job, error) is called when a grant ends unsealed by anybody's doing but the worker's own. on_released: blocks came
    back later than their job ended.
    """

    def __init__(
        self,
        incarnation: str,
        layout: KVLayout,
        pool: BlockPool,
        receivers: GroupReceivers,
        network: Network,
        clock: Clock,
        secret: bytes,
        on_failed: Callable[[Job, TandemError | None], None],
        on_released: Callable[[], None],
    ) -> None:
        self._incarnation = incarnation
        self._layout = layout
        self._pool = pool
        self._receivers = receivers
        self._network = network
        self._clock = clock
        self._secret = secret
        self._on_failed = on_failed
        self._on_released = on_released
        self._inbound = Inbound(incarnation, layout, secret)
        self.writers = Writers(incarnation, receivers, clock, self.reap)
        self._jobs: dict[str, Job] = {}  # by grant_id
        self._held: dict[str, list[int]] = {}  # written blocks of grants that are over but not yet given back
        self._claims: dict[str, Claims] = {}  # by grant_id, until sealing begins or the blocks are given back
        self._keeping: dict[str, asyncio.Task[None]] = {}  # by request_id
        self._asking: dict[str, asyncio.Task[None]] = {}  # by grant_id
        self._background: set[asyncio.Task[None]] = set()
        self._counts: OrderedDict[tuple[str, str], _Counts] = OrderedDict()  # by (prefill incarnation, transport)
        self.transfers = 0
        self.transfer_bytes = 0
        self.transfers_failed = 0
        self.digest_failures = 0
        self.num_kept_blocks = 0
        self.leases_expired = 0

    @property
    def num_open(self) -> int:
        return len(self._jobs)

    @property
    def is_keeping(self) -> bool:
        """Blocks that a writer left are being read again."""
        return bool(self._keeping)

    @property
    def num_held_blocks(self) -> int:
        """Of grants that are over: in quarantine, or being read once more."""
        return sum(len(blocks) for blocks in self._held.values())

    @property
    def num_owed(self) -> int:
        """Words that a writer still waits for: none, as whoever writes here speaks first."""
        return 0

    def close(self) -> None:
        """This life of the worker is over while its process lives on, and nothing is held: no store comes in any more."""
        self._receivers.close()
        self.writers.close()

    def handshake(self, peer: Peer, message: Handshake) -> HandshakeAccepted:
        """Raises IncompatibleWorkers with both values of what differs, HandshakeRefused when no transport is left."""
        return self.writers.handshake(peer, message)

    # ---- granting --------------------------------------------------------------------------------------------------

    async def grant(self, job: Job, num_cached: int, num_tokens: int, message: Reserve, block_hashes: Sequence[bytes]) -> Grant:
        """Sign a grant over job.granted_blocks and expect its writer, on every rank. Raises TransferFailed when the ticket is stale
        (then job.grant is None), or when a rank does not answer."""
        assert message.ticket.prefill is not None
        made = self._sign(job, tuple(job.granted_blocks), num_cached, num_tokens, message)
        self._inbound.granted(made, self._clock())
        job.grant = made
        self._jobs[made.grant_id] = job
        self._claims[made.grant_id] = Claims(made, block_hashes if self._pool.enable_prefix_caching else ())
        await self._receivers.expect(made)
        return made

    def local_grant(self, job: Job) -> Grant:
        """For a prompt that this worker prefills itself: nobody writes, so nothing is handed over."""
        return self._sign(job, (), 0, 0, None)

    def _sign(self, job: Job, block_ids: tuple[int, ...], num_cached: int, num_tokens: int, message: Reserve | None) -> Grant:
        request_id, epoch = job.key
        prefill = message.ticket.prefill if message is not None else None
        endpoints = tuple(end for of_one in self._receivers.endpoints.values() for end in of_one) if message is not None else ()
        unsigned = Grant(
            grant_id=f"{self._incarnation}/{request_id}/{epoch}",
            request_id=request_id,
            epoch=epoch,
            decode_incarnation=self._incarnation,
            prefill_incarnation=prefill.incarnation if prefill is not None else "",
            block_ids=block_ids,
            num_cached_blocks=num_cached,
            num_tokens=num_tokens,
            layout=self._layout,
            lease_s=message.lease_s if message is not None else 0.0,
            endpoints=endpoints,
            control_address=self._network.address,
            target=self._receivers.place.parallel,
        )
        if prefill is not None:
            unsigned = msgspec.structs.replace(unsigned, source=prefill.parallel)
        return sign(unsigned, self._secret)

    async def settled(self, request_id: str) -> None:
        """Before blocks are looked for again for a request: what its last attempt left may be worth finding, once its writer says
        that it has stopped or is seen to be dead. Bounded, and nothing is awaited where nothing is left."""
        end = self._clock() + QUARANTINE_S
        while self._may_find_more(request_id) and self._clock() < end:
            await asyncio.sleep(QUARANTINE_S / 100)
            self.reap()
        keeping = self._keeping.get(request_id)
        if keeping is not None:
            await asyncio.wait((keeping,), timeout=KEEP_TIMEOUT_S)

    def _may_find_more(self, request_id: str) -> bool:
        """An attempt of it is in quarantine, and signed papers say that whole blocks of it are good."""
        grants = [grant.grant_id for grant in self._inbound.quarantined() if grant.request_id == request_id]
        return any(self._claims[grant_id].num_leading() for grant_id in grants if grant_id in self._claims)

    # ---- sealing ---------------------------------------------------------------------------------------------------

    def landed(self, message: Landed) -> None:
        """Runs have landed: hash them while others are on their way. Raises TransferFailed when the paper is forged."""
        grant = self._inbound.check_landed(message, self._clock())
        writer = self.writers.get(message.prefill_incarnation)
        if writer is None:
            return
        if grant is None:
            self._counts_of(message.prefill_incarnation).stale += 1
            return
        self._claims[grant.grant_id].put(message)
        self._receivers.landed(grant, message, writer.transport)

    async def verify(self, manifest: Manifest) -> Job:
        """The job whose KV is now whole and true; its blocks are the caller's. Raises TransferFailed, and then they are not."""
        grant_id = manifest.grant_id
        self._inbound.check_seal(manifest, self._clock())
        job = self._jobs[grant_id]
        grant = job.grant
        assert grant is not None
        self._claims.pop(grant_id, None)
        try:
            if self._receivers.is_alone:
                self._receivers.forget_here(grant_id)
            else:
                await self._receivers.forget(grant_id, is_over=False)
            bad = await self._receivers.verify(grant, manifest)
        except BaseException:  # not verified is not good, and the blocks must not stay between two states
            self._end(grant_id, self._inbound.verified(grant_id, False), TransferFailed("the verification itself failed"))
            raise
        effect = self._inbound.verified(grant_id, not bad)
        if self._jobs.get(grant_id) is not job:  # given up while it was being verified
            self._apply(grant_id, effect)
            raise TransferFailed("the request was cancelled")
        counts = self._counts_of(grant.prefill_incarnation)
        if bad:
            self.digest_failures += 1
            self.transfers_failed += 1
            counts.digest_failures += 1
            error = DamagedKV(f"{len(bad)} runs of KV differ from their digests, the first at (layer, block) {min(bad)}")
            self._on_failed(job, error)
            self._apply(grant_id, effect)
            raise error
        del self._jobs[grant_id]
        job.grant = None
        nbytes = manifest.num_written * self._layout.block_nbytes
        self.transfers += 1
        self.transfer_bytes += nbytes
        counts.transfers += 1
        counts.nbytes += nbytes
        return job

    # ---- giving up -------------------------------------------------------------------------------------------------

    def give_up(self, job: Job) -> None:
        """The job is over before it was sealed: its cached blocks come back now, the written ones when nobody can store there."""
        if job.grant is None:
            return
        grant, job.grant = job.grant, None
        grant_id = grant.grant_id
        del self._jobs[grant_id]
        self._pool.release(job.granted_blocks[: grant.num_cached_blocks])
        self._held[grant_id] = job.granted_blocks[grant.num_cached_blocks :]
        job.granted_blocks = []
        if grant_id in self._inbound:
            self._apply(grant_id, self._inbound.cancelled(grant_id, writer_stopped=self._has_stopped(grant)))

    def writer_done(self, grant_id: str) -> None:
        """The writer gave up by itself, or acknowledges that it has stopped."""

        def end(refused: Mapping[str, bool]) -> None:
            self._end(grant_id, self._inbound.writer_done(grant_id), None)

        self._when_forgotten(grant_id, end)

    def tick(self) -> None:
        """Expired leases, writers that died, quarantines whose writer still owes its word."""
        self.reap()
        for grant_id in self._inbound.expired(self._clock()):
            self.transfers_failed += 1
            self.leases_expired += 1
            error = TransferFailed("the lease ran out before the KV was sealed (transfer.lease_s)")
            self._on_failed(self._jobs[grant_id], error)
        self._ask_writers()

    def reap(self) -> None:
        """Writers that were seen to die: nothing of them can be stored any more."""
        for incarnation in self.writers.take_dead():
            for grant in self._inbound.grants_of(incarnation):
                self._when_forgotten(grant.grant_id, functools.partial(self._lost, grant.grant_id))

    def _lost(self, grant_id: str, refused: Mapping[str, bool]) -> None:
        self._end(grant_id, self._inbound.writer_done(grant_id), TransferFailed("the prefill worker died before it sealed its KV"))

    def _end(self, grant_id: str, effect: Effect, error: TandemError | None) -> None:
        """The state machine has ended a grant; tell the worker if it still counted on it."""
        job = self._jobs.get(grant_id)
        if job is not None and effect is not Effect.KEEP:
            self._on_failed(job, error)
        self._apply(grant_id, effect)

    def _when_forgotten(self, grant_id: str, act: Callable[[Mapping[str, bool]], None]) -> None:
        """Let no more stores in on any rank, then act (on what each transport answers). At once where the worker is alone."""
        if self._receivers.is_alone:
            act(self._receivers.forget_here(grant_id))
        else:
            self._later(self._forget_then(grant_id, act))

    async def _forget_then(self, grant_id: str, act: Callable[[Mapping[str, bool]], None], pause_s: float = 0.0) -> None:
        if pause_s:
            await asyncio.sleep(pause_s)
        act(await self._receivers.forget(grant_id, is_over=True))

    def _has_stopped(self, grant: Grant) -> bool:
        """Whether the writer of a void grant can no longer store into it: this end refuses, or it never called here, or none of our
        memory is mapped there and its connection broke. In a group the answer of the other ranks comes later, and ends the
        quarantine that begins now.
        """
        here = self._receivers.forget_here(grant.grant_id)
        writer = self.writers.get(grant.prefill_incarnation)
        never_called = writer is None and self.writers.remember_void(grant)
        if self._receivers.is_alone:
            return never_called or (writer is not None and writer.has_stopped(here))

        def end(refused: Mapping[str, bool]) -> None:
            all_refuse = all(refused[name] for name, can_refuse in here.items() if can_refuse)
            if (never_called and all_refuse) or (writer is not None and writer.has_stopped(refused)):
                self._end(grant.grant_id, self._inbound.writer_done(grant.grant_id), None)
            elif never_called:  # a rank did not answer (it was stopped, say), and there is no writer whose word would end this
                self._later(self._forget_then(grant.grant_id, end, FORGET_AGAIN_S))

        self._when_forgotten(grant.grant_id, end)
        return False

    def _apply(self, grant_id: str, effect: Effect) -> None:
        """What is to be done with the written blocks of a grant that is over."""
        if effect is Effect.QUARANTINE:
            self._pool.quarantine(self._held[grant_id])
            self._ask_writers()
        elif effect in (Effect.RELEASE, Effect.LIFT):
            claims = self._claims.pop(grant_id, None)
            part = claims.part(MAX_KEEP_NBYTES) if claims is not None else None
            self._receivers.drop(grant_id)
            if claims is None or part is None:
                self._give_back(grant_id, effect, ())
            else:
                task = self._later(self._keep(grant_id, effect, claims, *part))
                self._keeping[claims.grant.request_id] = task

    def distrust(self, request_id: str) -> None:
        """Its writer computed rubbish: what it claims to have written is given back like what nobody claimed."""
        for grant_id in [name for name, claims in self._claims.items() if claims.grant.request_id == request_id]:
            del self._claims[grant_id]

    # ---- keeping what a lost writer has left --------------------------------------------------------------------------

    async def _keep(self, grant_id: str, effect: Effect, claims: Claims, part: Grant, manifest: Manifest) -> None:
        """Nobody can store into these blocks any more, and they are nobody's yet: read again what signed papers say of them, and
        give back to the prefix cache what holds it (R4: before it was read so, no block is found there)."""
        good = 0
        try:
            bad = await self._receivers.verify(part, manifest)
            good = min((index for _, index in bad), default=len(part.block_ids)) - part.num_cached_blocks
        except Exception:
            log.exception("reading again what %s left", part.grant_id)
        finally:
            first = part.num_cached_blocks
            self._give_back(grant_id, effect, claims.block_hashes[first : first + good])
            if self._keeping.get(part.request_id) is asyncio.current_task():
                del self._keeping[part.request_id]

    def _give_back(self, grant_id: str, effect: Effect, hashes: Sequence[bytes]) -> None:
        """The first blocks are good and full, and go to the prefix cache under these hashes; the others are free."""
        blocks = self._held.pop(grant_id)
        good, rest = blocks[: len(hashes)], blocks[len(hashes) :]
        if effect is Effect.LIFT:
            self._pool.readmit(good)
            self._pool.lift(rest)
        else:
            self._pool.release(rest)
        for block, block_hash in zip(good, hashes, strict=True):
            self._pool.filling(block)
            self._pool.seal(block, block_hash)
        self._pool.release(good)
        self.num_kept_blocks += len(good)
        self._on_released()

    # ---- asking writers to stop ----------------------------------------------------------------------------------------

    def _ask_writers(self) -> None:
        """Ask for the acknowledgement that ends each quarantine; asked again at every tick until it comes."""
        for grant in self._inbound.quarantined():
            writer = self.writers.get(grant.prefill_incarnation)
            if writer is not None and not writer.peer.is_closed and grant.grant_id not in self._asking:
                self._asking[grant.grant_id] = asyncio.create_task(self._ask_to_stop(writer.peer, grant.grant_id))

    async def _ask_to_stop(self, peer: Peer, grant_id: str) -> None:
        try:
            await peer.call(StopWriting(grant_id), STOP_TIMEOUT_S)
            self.writer_done(grant_id)
        except TandemError as error:
            log.info("%s has not said that it stopped writing into %s: %s", peer.name, grant_id, error.message)
        finally:
            del self._asking[grant_id]

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- numbers -------------------------------------------------------------------------------------------------------

    def _counts_of(self, incarnation: str) -> _Counts:
        writer = self.writers.get(incarnation)
        key = (incarnation, writer.transport if writer is not None else "")
        counts = self._counts.pop(key, None) or _Counts()
        self._counts[key] = counts
        while len(self._counts) > MAX_PAIR_STATS:
            self._counts.popitem(last=False)
        return counts

    def pair_stats(self) -> tuple[PairStats, ...]:
        return tuple(
            PairStats(
                peer=peer,
                transport=transport,
                transfers=counts.transfers,
                nbytes=counts.nbytes,
                failed=counts.failed + counts.digest_failures,
                digest_failures=counts.digest_failures,
                stale=counts.stale,
            )
            for (peer, transport), counts in self._counts.items()
        )
