"""The decode side of every hand-over that is not sealed yet: grants given, writers known, digests verified, blocks in quarantine.

The rules are in `kvtransfer/handoff.py`, which does no I/O; this carries out what they say, with receivers, peers and the
block pool. `worker.py` owns one and tells it of messages; sequences and steps are not its business.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from decode.job import Job
from engine.blocks import BlockPool
from kvtransfer.digest import verify
from kvtransfer.handoff import MEMORY_S, Effect, Inbound
from kvtransfer.link import choose, is_same_host
from kvtransfer.pool import KVPool
from kvtransfer.process import Process, boot_id, observe
from kvtransfer.transport import Receiver
from protocol.errors import HandshakeRefused, TandemError, TransferFailed
from protocol.kv import KVLayout
from protocol.messages import Handshake, HandshakeAccepted, Reserve, StopWriting
from protocol.network import Clock, Network, Peer
from protocol.ticket import Grant, Manifest, sign

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
MAX_VOID_GRANTS = 256  # remembered per writer that had not called yet; more go into quarantine
MAX_VOID_WRITERS = 64  # likewise: writers with such grants


class Writer:
    """One life of a prefill worker that shook hands with us: where to ask it to stop, and how its death would be seen."""

    def __init__(self, peer: Peer, transport: str, process: Process | None) -> None:
        self.peer = peer
        self.transport = transport
        self.process = process

    @property
    def is_dead(self) -> bool:
        """Observed, not guessed: a process that we can see has ended, or (elsewhere, where a late store is refused at this
        end) its connection broke."""
        return self.process.is_dead() if self.process is not None else self.peer.is_closed

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


class Handover:
    """on_failed(job, error) is called when a grant ends unsealed by anybody's doing but the worker's own."""

    def __init__(
        self,
        incarnation: str,
        layout: KVLayout,
        pool: BlockPool,
        kv: KVPool,
        receivers: dict[str, Receiver],
        network: Network,
        clock: Clock,
        verify_compute: Callable[[Callable[[], Any]], Awaitable[Any]],
        secret: bytes,
        on_failed: Callable[[Job, TandemError | None], None],
    ) -> None:
        self._incarnation = incarnation
        self._layout = layout
        self._pool = pool
        self._kv = kv
        self._receivers = receivers
        self._network = network
        self._clock = clock
        self._verify_compute = verify_compute
        self._secret = secret
        self._on_failed = on_failed
        self._inbound = Inbound(incarnation, layout, secret)
        self._jobs: dict[str, Job] = {}  # by grant_id
        self._held: dict[str, list[int]] = {}  # written blocks of grants that are over but not yet given back
        self._writers: dict[str, Writer] = {}  # by prefill incarnation
        # Prefill incarnation -> what it must refuse, by when it was taken back. Said at each hand-shake, as an answer may be
        # lost, until the writer is dead or no message can still be under way.
        self._void: dict[str, dict[str, float]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}  # by grant_id
        self.transfers = 0
        self.transfer_bytes = 0
        self.transfers_failed = 0
        self.digest_failures = 0
        self.leases_expired = 0

    @property
    def num_open(self) -> int:
        return len(self._jobs)

    @property
    def num_quarantined_blocks(self) -> int:
        return sum(len(blocks) for blocks in self._held.values())

    def handshake(self, peer: Peer, message: Handshake) -> HandshakeAccepted:
        """Raises HandshakeRefused with both values of what differs."""
        difference = self._layout.difference(message.layout)
        if difference is not None:
            raise HandshakeRefused(f"decode {self._incarnation} and prefill {message.incarnation} differ: {difference}")
        is_same_process = message.boot_id == boot_id() and message.pid == os.getpid()
        name = choose(message.transports, tuple(self._receivers), is_same_host(message), is_same_process)
        process = observe(message.boot_id, message.pid, message.start_ticks)
        known = self._writers.get(message.incarnation)
        if known is not None:
            known.close()
        self._writers[message.incarnation] = Writer(peer, name, process)
        void = tuple(self._void.get(message.incarnation, ()))
        return HandshakeAccepted(self._incarnation, self._layout, self._receivers[name].endpoint(), void)

    # ---- granting --------------------------------------------------------------------------------------------------

    def grant(self, job: Job, num_cached: int, num_tokens: int, message: Reserve) -> Grant:
        """Sign a grant over job.granted_blocks and expect its writer. Raises TransferFailed when the ticket is stale."""
        assert message.ticket.prefill is not None
        made = self._sign(job, tuple(job.granted_blocks), num_cached, num_tokens, message.ticket.prefill.incarnation, message)
        self._inbound.granted(made, self._clock())
        job.grant = made
        self._jobs[made.grant_id] = job
        for receiver in self._receivers.values():
            receiver.expect(made)
        return made

    def local_grant(self, job: Job) -> Grant:
        """For a prompt that this worker prefills itself: nobody writes, so nothing is handed over."""
        return self._sign(job, (), 0, 0, "", None)

    def _sign(
        self, job: Job, block_ids: tuple[int, ...], num_cached: int, num_tokens: int, writer: str, message: Reserve | None
    ) -> Grant:
        request_id, epoch = job.key
        endpoints = tuple(receiver.endpoint() for receiver in self._receivers.values()) if message is not None else ()
        unsigned = Grant(
            grant_id=f"{self._incarnation}/{request_id}/{epoch}",
            request_id=request_id,
            epoch=epoch,
            decode_incarnation=self._incarnation,
            prefill_incarnation=writer,
            block_ids=block_ids,
            num_cached_blocks=num_cached,
            num_tokens=num_tokens,
            layout=self._layout,
            lease_s=message.lease_s if message is not None else 0.0,
            endpoints=endpoints,
            control_address=self._network.address,
        )
        return sign(unsigned, self._secret)

    # ---- sealing ---------------------------------------------------------------------------------------------------

    async def verify(self, manifest: Manifest) -> Job:
        """The job whose KV is now whole and true; its blocks are the caller's. Raises TransferFailed, and then they are not."""
        grant_id = manifest.grant_id
        self._inbound.check_seal(manifest, self._clock())
        job = self._jobs[grant_id]
        grant = job.grant
        assert grant is not None
        self._forget(grant_id)
        try:
            bad = await self._verify_compute(lambda: verify(self._kv, grant, manifest))
        except BaseException:  # not verified is not good, and the blocks must not stay between two states
            self._end(grant_id, self._inbound.verified(grant_id, False), TransferFailed("the verification itself failed"))
            raise
        effect = self._inbound.verified(grant_id, not bad)
        if self._jobs.get(grant_id) is not job:  # given up while it was being verified
            self._apply(grant_id, effect)
            raise TransferFailed("the request was cancelled")
        if bad:
            self.digest_failures += 1
            self.transfers_failed += 1
            error = TransferFailed(f"{len(bad)} runs of KV differ from their digests, the first at (layer, block) {bad[0]}")
            self._on_failed(job, error)
            self._apply(grant_id, effect)
            raise error
        del self._jobs[grant_id]
        job.grant = None
        self.transfers += 1
        self.transfer_bytes += manifest.num_written * self._layout.block_nbytes
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
        self._forget(grant_id)
        self._end(grant_id, self._inbound.writer_done(grant_id), None)

    def tick(self) -> None:
        """Expired leases, writers that were seen to die, quarantines whose writer still owes its word."""
        for incarnation, writer in list(self._writers.items()):
            if writer.peer.is_closed and writer.is_dead:
                del self._writers[incarnation]
                self._void.pop(incarnation, None)
                writer.close()
                for grant_id in [g for g, job in self._jobs.items() if job.grant and job.grant.prefill_incarnation == incarnation]:
                    self._forget(grant_id)
                for grant_id, effect in self._inbound.writer_lost(incarnation):
                    self._end(grant_id, effect, TransferFailed("the prefill worker died before it sealed its KV"))
        for grant_id in self._inbound.expired(self._clock()):
            self.transfers_failed += 1
            self.leases_expired += 1
            error = TransferFailed("the lease ran out before the KV was sealed (transfer.lease_s)")
            self._on_failed(self._jobs[grant_id], error)
        self._ask_writers()

    def _end(self, grant_id: str, effect: Effect, error: TandemError | None) -> None:
        """The state machine has ended a grant; tell the worker if it still counted on it."""
        job = self._jobs.get(grant_id)
        if job is not None and effect is not Effect.KEEP:
            self._on_failed(job, error)
        self._apply(grant_id, effect)

    def _forget(self, grant_id: str) -> dict[str, bool]:
        """Let no more stores in; by transport, whether a late one is impossible now."""
        return {name: receiver.forget(grant_id) for name, receiver in self._receivers.items()}

    def _has_stopped(self, grant: Grant) -> bool:
        """Whether the writer of a void grant can no longer store into it: this end refuses, or it never called here."""
        refused = self._forget(grant.grant_id)
        writer = self._writers.get(grant.prefill_incarnation)
        if writer is not None:
            return refused[writer.transport]
        return self._remember_void(grant)

    def _remember_void(self, grant: Grant) -> bool:
        """Its writer has not called yet and will be told at the hand-shake. False: too much to remember, so it might still use
        this grant: quarantine."""
        now = self._clock()
        self._prune_void(now)
        void = self._void.get(grant.prefill_incarnation, {})
        if len(void) >= MAX_VOID_GRANTS or (not void and len(self._void) >= MAX_VOID_WRITERS):
            return False
        void[grant.grant_id] = now
        self._void[grant.prefill_incarnation] = void
        return True

    def _prune_void(self, now: float) -> None:
        """Nothing is under way for as long as MEMORY_S; the state machines of both sides count on the same."""
        for incarnation, void in list(self._void.items()):
            for grant_id in [g for g, since in void.items() if now - since > MEMORY_S]:
                del void[grant_id]
            if not void:
                del self._void[incarnation]

    def _apply(self, grant_id: str, effect: Effect) -> None:
        """What is to be done with the written blocks of a grant that is over."""
        if effect is Effect.RELEASE:
            self._pool.release(self._held.pop(grant_id))
        elif effect is Effect.QUARANTINE:
            self._pool.quarantine(self._held[grant_id])
            self._ask_writers()
        elif effect is Effect.LIFT:
            self._pool.lift(self._held.pop(grant_id))

    def _ask_writers(self) -> None:
        """Ask for the acknowledgement that ends each quarantine; asked again at every tick until it comes."""
        for grant in self._inbound.quarantined():
            writer = self._writers.get(grant.prefill_incarnation)
            if writer is not None and not writer.peer.is_closed and grant.grant_id not in self._asking:
                self._asking[grant.grant_id] = asyncio.create_task(self._ask_to_stop(writer.peer, grant.grant_id))

    async def _ask_to_stop(self, peer: Peer, grant_id: str) -> None:
        try:
            await peer.call(StopWriting(grant_id), STOP_TIMEOUT_S)
            self._end(grant_id, self._inbound.writer_done(grant_id), None)
        except TandemError as error:
            log.info("%s has not said that it stopped writing into %s: %s", peer.name, grant_id, error.message)
        finally:
            del self._asking[grant_id]
