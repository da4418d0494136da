"""The prefill side of every hand-over: grants taken, runs that landed told, digests signed and sealed, grants given up.

The rules are in `kvtransfer/outbound.py`, which does no I/O; this carries out what they say, with links, senders and messages.
`worker.py` owns one; prompts, blocks and steps are not its business.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from kvtransfer.link import TRANSPORTS
from kvtransfer.outbound import Outbound
from kvtransfer.transport import OnLanded, Sender
from prefill.job import Job
from prefill.links import Link, Links
from protocol.errors import DamagedKV, InternalError, TandemError, TransferFailed
from protocol.kv import KVEndpoint, KVLayout
from protocol.messages import Handshake, Ok, PairStats, Seal, StopWriting
from protocol.network import Clock, Network
from protocol.parallel import Parallel
from protocol.rank import RankLanded
from protocol.ticket import FirstToken, Grant, Landed

log = logging.getLogger(__name__)

MAX_PAIR_STATS = 256
STOP_AGAIN_S = 1.0  # after a rank that did not say that it has stopped, until it is asked again

Connect = Callable[[str, Parallel, tuple[KVEndpoint, ...], OnLanded], Awaitable[Sender]]


class _Counts:
    """One decode worker over one transport."""

    def __init__(self) -> None:
        self.transfers = 0
        self.nbytes = 0
        self.seconds = 0.0
        self.failed = 0
        self.digest_failures = 0


class Handover:
    """on_failed(job, error, stage): a hand-over ended badly. on_void(job): its decode worker does not want it any more.
    on_over(job): nothing of ours reads its blocks now; called once for each job that was opened.
    """

    def __init__(
        self,
        handshake: Handshake,
        connect: Connect,
        network: Network,
        clock: Clock,
        secret: bytes,
        timeout_s: float,
        on_failed: Callable[[Job, TandemError, str], None],
        on_void: Callable[[Job], None],
        on_over: Callable[[Job], None],
    ) -> None:
        self.connect = connect
        self.outbound = Outbound(handshake.incarnation, handshake.layout, secret, parallel=handshake.parallel)
        self.links = Links(handshake, self._connected, network, clock, self._void)
        self.transfers = 0
        self.transfer_bytes = 0
        self.transfer_s = 0.0
        self.transfers_failed = 0
        self._layout: KVLayout = handshake.layout
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_failed = on_failed
        self._on_void = on_void
        self._on_over = on_over
        self._jobs: dict[str, Job] = {}  # by grant_id, until nothing of ours reads its blocks
        self._background: set[asyncio.Task[None]] = set()
        self._counts: OrderedDict[tuple[str, str], _Counts] = OrderedDict()  # by (decode incarnation, transport)

    @property
    def is_idle(self) -> bool:
        return not self._jobs and not self._background

    @property
    def num_owed(self) -> int:
        """Decode workers that may still wait for our word."""
        return self.links.num_owed

    def close(self) -> None:
        """This life of the worker is over while its process lives on, and nothing is under way: its senders end."""
        self.links.close()

    # ---- a grant's life --------------------------------------------------------------------------------------------

    async def open(self, job: Job) -> None:
        """Take the job's grant; its runs may be pushed from now on. Raises TransferFailed, HandshakeRefused: then it is over."""
        grant = job.grant
        self.outbound.opened(grant, self._clock())
        self._jobs[grant.grant_id] = job
        job.link.num_jobs += 1
        try:
            await job.link.sender.open(grant)
        except BaseException:  # also when whoever waits for us is cancelled
            self.give_up(job)
            raise

    def finish(self, job: Job, first_tokens: tuple[FirstToken, ...]) -> None:
        """Every run has been pushed: wait for them, sign, and have the decode worker verify; then on_over, or on_failed."""
        self._later(self._finish(job, first_tokens))

    def give_up(self, job: Job) -> None:
        """Stop writing, tell decode so (the acknowledgement that ends a quarantine, R2); then on_over."""
        self._later(self._abort(job))

    async def stop_writing(self, message: StopWriting) -> Ok:
        """Decode says that a grant is void. Our Ok is our word that nothing of ours is stored there any more."""
        if not self.outbound.stop_writing(message.grant_id, self._clock()):
            job = self._jobs[message.grant_id]
            await job.link.sender.abort(message.grant_id)
            self._on_void(job)
        return Ok()

    def expired(self) -> list[Job]:
        """Whose lease is over: decode has given them up."""
        jobs = (self._jobs.get(grant_id) for grant_id in self.outbound.expired(self._clock()))
        return [job for job in jobs if job is not None]

    def rank_landed(self, message: RankLanded) -> None:
        """Another rank of this worker has stored runs, and has signed it."""
        self._landed(message.grant, message.landed)

    async def _finish(self, job: Job, first_tokens: tuple[FirstToken, ...]) -> None:
        started = self._clock()
        try:
            await self._hand_over(job, first_tokens)
        except Exception as error:
            if not isinstance(error, TandemError):
                log.exception("handing over %s", job.grant.grant_id)
            if not job.is_dropped:
                fault = error if isinstance(error, TandemError) else InternalError("the hand-over failed; see the log")
                self.transfers_failed += 1
                self._on_failed(job, TransferFailed(f"KV transfer: {fault.message}"), "transfer")
            return
        seconds = self._clock() - started
        nbytes = (len(job.grant.block_ids) - job.grant.num_cached_blocks) * self._layout.block_nbytes
        self.transfers += 1
        self.transfer_s += seconds
        self.transfer_bytes += nbytes
        counts = self._counts_of(job.link)
        counts.transfers += 1
        counts.nbytes += nbytes
        counts.seconds += seconds
        self.links.transfer_succeeded(job.link)
        self._over(job)

    async def _hand_over(self, job: Job, first_tokens: tuple[FirstToken, ...]) -> None:
        grant_id, link, since = job.grant.grant_id, job.link, self._clock()
        self.outbound.finishing(grant_id)
        try:
            digests = await link.sender.finish(grant_id, self._timeout_s)
        except TandemError as error:
            if not job.is_dropped and not link.peer.is_closed:
                self._blame(link, error)
            raise
        manifest = self.outbound.sealed(grant_id, digests, first_tokens, TRANSPORTS[link.transport].digest)
        try:
            await link.peer.call(Seal(manifest, self._clock() - since), self._timeout_s)
        except DamagedKV as error:
            self._counts_of(link).digest_failures += 1
            self._blame(link, error)
            raise

    def _blame(self, link: Link, error: TandemError) -> None:
        self._counts_of(link).failed += 1
        self.links.transfer_failed(link, error.message)

    async def _abort(self, job: Job) -> None:
        grant_id = job.grant.grant_id
        self.outbound.failing(grant_id)
        while not await self._has_stopped(job):
            await asyncio.sleep(STOP_AGAIN_S)
        self.outbound.aborted(grant_id)
        self.links.writer_done(job.grant)
        self._over(job)

    async def _has_stopped(self, job: Job) -> bool:
        """False: some rank does not say so. It may still store there, and read our blocks for it; nobody is told otherwise."""
        try:
            await job.link.sender.abort(job.grant.grant_id)
        except Exception as error:
            log.warning("%s is not given up on every rank yet: %s", job.grant.grant_id, error)
            return False
        return True

    def _over(self, job: Job) -> None:
        """Idempotent: a job may be given up while its last words are under way."""
        if self._jobs.pop(job.grant.grant_id, None) is not None:
            self.links.released(job.link)
            self._on_over(job)

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- decode workers --------------------------------------------------------------------------------------------

    async def _connected(self, incarnation: str, target: Parallel, endpoints: tuple[KVEndpoint, ...]) -> Sender:
        return await self.connect(incarnation, target, endpoints, self._landed)

    def _landed(self, grant: Grant, landed: Landed) -> None:
        """Runs of ours are in the decode worker's blocks: let it hash them while the next ones are computed."""
        job = self._jobs.get(grant.grant_id)
        if job is not None and not job.is_dropped:
            job.link.peer.send(landed)

    def _void(self, grant_id: str) -> None:
        """A decode worker says at the hand-shake what it took back before it knew us; it does not wait for our word."""
        if not self.outbound.stop_writing(grant_id, self._clock()):
            self._on_void(self._jobs[grant_id])

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _counts_of(self, link: Link) -> _Counts:
        key = (link.incarnation, link.transport)
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
                seconds=counts.seconds,
                failed=counts.failed,
                fallbacks=self.links.num_fallbacks_to(peer),
                digest_failures=counts.digest_failures,
            )
            for (peer, transport), counts in self._counts.items()
        )
