"""A prefill worker: computes prompts in chunks, samples token 1, pushes KV into the decode worker's granted blocks.

KV leaves while it is made: after each layer of each chunk the blocks that the chunk completed go to the pair's sender thread.
What has landed is told as it lands, and at the end the signed manifest is sent to the decode worker (`Seal`), which verifies
before it reads (`handover.py`). Like the decode worker it is given network, clock and `compute`, and keeps its state on the
event loop. `step()` reads: plan, run, emit.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from engine.batch import Chunk
from engine.blocks import BlockPool, OutOfBlocks
from engine.pace import Load, Pacer
from engine.prefix import attach_prefix, forget_prefix, seal_full_blocks
from engine.runner import ModelRunner, StepResult
from engine.sampler import Sample
from engine.step import Extras
from engine.step_log import StepLog
from engine.stopping import finish_reason
from kvtransfer.group import Connector
from kvtransfer.transport import Sender
from prefill.handover import Handover
from prefill.job import Job
from prefill.links import Link
from prefill.planner import num_admissible, place_in, plan
from protocol.errors import (
    Draining,
    HandshakeRefused,
    IncompatibleWorkers,
    InternalError,
    InvalidRequest,
    ReservationRefused,
    TandemError,
    TransferFailed,
    WorkerLost,
    to_failure,
)
from protocol.kv import KVLayout, ProcessRef
from protocol.messages import (
    Cancel,
    Handshake,
    Message,
    Ok,
    Prefill,
    RequestFailed,
    StopWriting,
    TokenFrame,
    TokenUpdate,
    WorkerStats,
)
from protocol.network import Clock, Network, Peer
from protocol.parallel import ALONE, Parallel
from protocol.rank import RankLanded
from protocol.ticket import FirstToken, Grant

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Push = tuple[Sender, str, list[tuple[int, int]]]  # (to whom, grant_id, (our block, its index in the grant))
Compute = Callable[[Callable[[], _T]], Awaitable[_T]]
DRAIN_S = 30.0
POLL_S = 0.02
CALL_TIMEOUT_S = 10.0
COUNTERS = ("num_steps", "prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits")
MAX_CANCELS = 4096  # remembered: a Cancel may overtake its Prefill while that waits for a hand-shake


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    incarnation: str
    layout: KVLayout
    max_model_len: int
    transports: tuple[str, ...]  # in order of preference
    boot_id: str
    pid: int
    start_ticks: int
    parallel: Parallel = ALONE
    ranks: tuple[ProcessRef, ...] = ()  # every process of this worker, the leader's first; empty: only this one
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_step_s: float | None = None  # steps are cut to take no longer; none: only to max_num_batched_tokens
    max_waiting: int = 4096
    transfer_timeout_s: float = 30.0


class PrefillWorker:
    """See the module. connector makes the senders to a decode worker, over the transport that the hand-shake chose."""

    def __init__(
        self,
        settings: Settings,
        runner: ModelRunner,
        pool: BlockPool,
        connector: Connector,
        network: Network,
        clock: Clock,
        compute: Compute,
        secret: bytes,
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.pool = pool
        self._network = network
        self._clock = clock
        self._compute = compute
        self._jobs: dict[str, Job] = {}  # by request_id: one attempt at a time
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        s = settings
        handshake = Handshake(s.incarnation, s.layout, s.transports, s.boot_id, s.pid, s.start_ticks, s.parallel, s.ranks)
        self.connector = connector
        self.handover = Handover(
            handshake,
            connector.connect,
            network,
            clock,
            secret,
            settings.transfer_timeout_s,
            self._fail,
            lambda job: self._soon(lambda: self._drop(job)),
            self._release,
        )
        self._cancels: OrderedDict[tuple[str, int], None] = OrderedDict()  # (request_id, epoch), oldest first
        self._accepting: list[tuple[str, int]] = []  # attempts that wait for a hand-shake
        self._in_step = False
        self._after_step: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self.is_draining = False
        self.last_token_at: float | None = None
        self._counts: dict[str, float] = defaultdict(float)
        self.step_log: StepLog | None = None
        self.pacer = Pacer(settings.max_step_s)

    # ---- messages --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, Prefill):
            return await self._accept(peer, message)
        if isinstance(message, Cancel):
            self._remember_cancel(message)
            self._soon(lambda: self._cancel(message))
            return None
        if isinstance(message, StopWriting):
            return await self.handover.stop_writing(message)
        raise InvalidRequest(f"a prefill worker does not take {type(message).__name__}")

    def on_lost(self, peer: Peer) -> None:
        """A gateway or a decode worker is gone: what was prefilled for it is of no use."""

        def clean() -> None:
            for job in [j for j in self._jobs.values() if j.gateway is peer or j.link.peer is peer]:
                if job.link.peer is peer:
                    self._fail(job, WorkerLost("the decode worker that granted the blocks is gone"))
                else:
                    self._drop(job)

        self.handover.links.lost(peer)
        self._soon(clean)

    def on_rank_landed(self, message: RankLanded) -> None:
        """Another rank of this worker has stored runs (kvtransfer/group.py)."""
        self.handover.rank_landed(message)

    def wake(self) -> None:
        """Blocks came back from somebody who is not a prompt of ours: who waits for some may look again."""
        self._wake.set()

    async def _accept(self, gateway: Peer, message: Prefill) -> Ok:
        ticket, grant = message.ticket, message.grant
        if ticket.prefill is None or ticket.prefill.incarnation != self.settings.incarnation:
            raise TransferFailed(f"the ticket is not for {self.settings.incarnation}, which lives here now")
        if (grant.request_id, grant.epoch) != (message.request.request_id, ticket.epoch):
            raise TransferFailed("grant and ticket are not of the same attempt")
        if self.is_draining:
            raise Draining("this prefill worker is draining")
        if len(self._jobs) >= self.settings.max_waiting:
            raise ReservationRefused(f"this prefill worker has {len(self._jobs)} prompts already (prefill.max_waiting)")
        needed = self.settings.layout.num_blocks_for(grant.num_tokens)
        if needed > self.pool.num_blocks:
            raise TransferFailed(  # of this worker; another one, or decode itself, may have the room
                f"the prompt needs {needed} KV blocks, this prefill pool has {self.pool.num_blocks}; raise "
                "--num-gpu-blocks-override (model.kv_cache_bytes on a CPU)"
            )
        self._supersede(grant)
        job = Job(message, gateway, await self._link(grant, gateway), self._clock())
        self._jobs[grant.request_id] = job
        try:
            await self.handover.open(job)
        except BaseException:
            self._forget(job)
            raise
        if job.is_dropped:  # while the ranks were getting ready
            raise TransferFailed(f"{grant.request_id}, epoch {grant.epoch}, was cancelled")
        self._waiting.insert(place_in([other.goes_first for other in self._waiting], job.goes_first), job)
        self._wake.set()
        return Ok()

    def _supersede(self, grant: Grant) -> None:
        """One attempt of a request at a time, the newest."""
        known = self._jobs.get(grant.request_id)
        if known is not None:
            if known.epoch >= grant.epoch:
                raise TransferFailed(f"epoch {grant.epoch} is stale: {known.epoch} is here")
            self._soon(lambda: self._drop(known))

    async def _link(self, grant: Grant, gateway: Peer) -> Link:
        """The link to the decode worker that gave the grant. A hand-shake takes time: what changed meanwhile is looked at again.

        Raises IncompatibleWorkers when the layouts differ, which no retry mends, and errors that a retry may mend for the rest.
        """
        difference = self.settings.layout.difference(grant.layout)
        if difference is not None:
            pair = f"prefill {self.settings.incarnation} and decode {grant.decode_incarnation}"
            raise IncompatibleWorkers(f"{pair} differ: {difference}")
        attempt = (grant.request_id, grant.epoch)
        self._accepting.append(attempt)
        try:
            link = await self.handover.links.to(grant.decode_incarnation, grant.control_address)
        except IncompatibleWorkers:
            raise
        except HandshakeRefused as error:
            raise TransferFailed(f"no link to the decode worker: {error.message}") from error
        finally:
            self._accepting.remove(attempt)
        if gateway.is_closed:
            raise WorkerLost(f"the gateway of {grant.request_id} is gone")
        if attempt in self._cancels:
            raise TransferFailed(f"{grant.request_id}, epoch {grant.epoch}, was cancelled")
        if link.peer.is_closed:
            raise WorkerLost("the decode worker that granted the blocks is gone")
        self._supersede(grant)
        return link

    # ---- giving up -------------------------------------------------------------------------------------------------

    def _soon(self, act: Callable[[], None]) -> None:
        if self._in_step:
            self._after_step.append(act)
        else:
            act()

    def _remember_cancel(self, message: Cancel) -> None:
        if message.choice is not None:
            return
        any_epoch = [attempt for attempt in self._accepting if attempt[0] == message.request_id]
        self._cancels.update(dict.fromkeys(any_epoch if message.epoch == 0 else [(message.request_id, message.epoch)]))
        while len(self._cancels) > MAX_CANCELS:
            self._cancels.popitem(last=False)

    def _cancel(self, message: Cancel) -> None:
        job = self._jobs.get(message.request_id)
        if job is not None and message.epoch in (0, job.epoch) and message.choice is None:
            self._drop(job)

    def _tell_failure(self, job: Job, error: TandemError, stage: str = "prefill") -> None:
        job.gateway.send(RequestFailed(job.request.request_id, job.epoch, stage, to_failure(error)))

    def _fail(self, job: Job, error: TandemError, stage: str = "prefill") -> None:
        """Take it down first: telling may fail as well, and must not keep its blocks."""
        if not job.is_dropped:
            self._drop(job)
            self._tell_failure(job, error, stage)

    def _drop(self, job: Job) -> None:
        """Take one prompt down; its blocks come back once no store of ours reads them. Idempotent."""
        if not job.is_dropped:
            self._forget(job)
            self.handover.give_up(job)

    def _forget(self, job: Job) -> None:
        """Nothing more is to be done for it. Its blocks are not touched."""
        job.is_dropped = True
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        if job in self._active:
            self._active.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)

    def _release(self, job: Job) -> None:
        """Nothing of ours reads its blocks any more."""
        self._forget(job)
        self.pool.release(job.sequence.blocks)
        job.sequence.blocks = []
        self._wake.set()

    async def drain(self, deadline_s: float = DRAIN_S) -> None:
        """Take nothing new, and return when what is here has been computed and its KV taken (its Seal was answered), or when the
        deadline is over: what is left by then fails, so that it is tried elsewhere."""
        self.is_draining = True
        end = self._clock() + deadline_s
        while not self.is_idle and self._clock() < end:
            await asyncio.sleep(POLL_S)
        for job in list(self._jobs.values()):
            self._soon(functools.partial(self._fail, job, WorkerLost(f"prefill worker {self.settings.incarnation} is draining")))
        end = self._clock() + CALL_TIMEOUT_S
        while not self.is_idle and self._clock() < end:  # a store under way ends; its word is said
            await asyncio.sleep(POLL_S)

    # ---- the step --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            if not self._active and not self._admit():
                self.pacer.rest()
                self._wake.clear()
                await self._wake.wait()
                continue
            await self.step()

    async def step(self) -> None:
        """Plan, run, emit. Whatever goes wrong fails the prompts of this step, and the loop goes on (R11)."""
        self._admit()
        in_step = list(self._active)
        tokens: list[tuple[str, int]] = []
        started = self._clock()
        try:
            left = sum(job.sequence.num_uncomputed for job in in_step)
            first = in_step[0].sequence.num_computed if in_step else 0
            load = Load(first, min(left, self.settings.max_num_batched_tokens))
            planned = plan([job.sequence for job in in_step], self.pacer.size(self.runner, load))
            jobs = {id(job.sequence): job for job in in_step}
            in_step = [jobs[id(sequence)] for sequence, _ in planned] or in_step
            chunks = [jobs[id(sequence)].chunk(num_tokens) for sequence, num_tokens in planned]
            tokens = [(jobs[id(sequence)].request.request_id, number) for sequence, number in planned]
            pushes = [jobs[id(c.sequence)].completed_blocks(c) for c in chunks]
            self._in_step = True
            try:
                extras = self._extras(pushes)
                result = await self._compute(lambda: self.runner.run(chunks, lambda layer: _push(layer, pushes), extras))
                self.pacer.learn(self.runner, result.stats)
            finally:
                self._in_step = False
            self._emit(chunks, result, jobs)
        except Exception as error:
            for job in in_step:
                self._give_up(job, _step_failed(error))
        self._counts["num_steps"] += 1
        seconds = self._clock() - started
        self._counts["step_s"] += seconds
        if self.step_log is not None:
            self.step_log.step(started, seconds, tokens, len(self._active), len(self._waiting), self.pool)
        self._act()

    def _extras(self, pushes: list[Push]) -> Extras:
        """What the other ranks push beside what `_push` pushes here. Nobody else writes to this pool, so steps may overlap."""
        if self.settings.parallel == ALONE:
            return Extras()
        return Extras(pushes=tuple((grant_id, tuple(pairs)) for _, grant_id, pairs in pushes if pairs), overlaps=True)

    def _act(self) -> None:
        acts, self._after_step = self._after_step, []
        for act in acts:
            try:
                act()
            except Exception:  # one prompt's end must not stand in the way of the others'
                log.exception("after a prefill step")

    def _admit(self) -> bool:
        """Let waiting prompts in while there are blocks for them whole. True when somebody is active."""
        try:
            self._let_in()
        except Exception as error:  # the head of the queue is what cannot be let in
            if self._waiting:
                self._give_up(self._waiting[0], _step_failed(error))
            self._act()
        return bool(self._active)

    def _let_in(self) -> None:
        layout = self.settings.layout
        needs = [layout.num_blocks_for(job.grant.num_tokens) for job in list(self._waiting)[: self.settings.max_num_seqs]]
        for _ in range(num_admissible(needs, len(self._active), self.settings.max_num_seqs, self.pool.num_free)):
            job = self._waiting[0]
            try:
                attach_prefix(self.pool, job.sequence, layout, 0)
            except OutOfBlocks:
                break
            self._waiting.popleft()
            job.cached_tokens, job.started_at = job.sequence.num_computed, self._clock()
            self._counts["prefix_queries"] += job.grant.num_tokens
            self._counts["prefix_hits"] += job.cached_tokens
            self._active.insert(place_in([other.goes_first for other in self._active], job.goes_first), job)

    def _emit(self, chunks: list[Chunk], result: StepResult, jobs: dict[int, Job]) -> None:
        samples = {id(sample.sequence): sample for sample in result.samples}
        for chunk in chunks:
            job = jobs[id(chunk.sequence)]
            try:
                self._advance(job, chunk, samples)
            except Exception as error:  # the others of this step are none the worse
                self._give_up(job, _step_failed(error))

    def _advance(self, job: Job, chunk: Chunk, samples: dict[int, Sample]) -> None:
        job.sequence.num_computed += chunk.num_tokens
        self._counts["prompt_tokens"] += chunk.num_tokens
        seal_full_blocks(self.pool, job.sequence, self.settings.layout)
        if not chunk.samples or job.is_dropped:
            return
        self._active.remove(job)
        bad = next((samples[id(s)].error for s in chunk.samples if samples[id(s)].error is not None), None)
        if bad is not None:
            forget_prefix(self.pool, job.sequence, self.settings.layout)
            self._give_up(job, InternalError(bad))
        else:
            self._first_tokens(job, [(s, samples[id(s)]) for s in chunk.samples])

    def _first_tokens(self, job: Job, sampled: list) -> None:
        """Token 1 of every choice: to the gateway at once, and into the manifest."""
        updates, first = [], []
        for sequence, sample in sampled:
            index = sequence.output_len
            sequence.append(sample.token)
            reason, stop = finish_reason(sequence, self.settings.max_model_len) or (None, None)
            updates.append(
                TokenUpdate(
                    request_id=job.request.request_id,
                    epoch=job.epoch,
                    choice=sequence.choice,
                    index=index,
                    tokens=(sample.token,),
                    logprobs=(sample.logprobs,) if sample.logprobs is not None else None,
                    finish_reason=reason,
                    stop_reason=stop,
                    cached_tokens=job.cached_tokens,
                    from_prefill=True,
                    spent=job.spent(self._clock()),
                )
            )
            first.append(FirstToken(sequence.choice, sample.token, reason, stop, sample.logprobs))
        self.last_token_at = self._clock()
        self._counts["generation_tokens"] += len(first)
        job.gateway.send(TokenFrame(tuple(updates)))
        if all(f.finish_reason is not None for f in first):
            self._drop(job)  # it ends here: nothing is sealed, decode gets its blocks back with our acknowledgement
        else:
            self.handover.finish(job, tuple(first))

    def _give_up(self, job: Job, error: TandemError) -> None:
        self._after_step.append(lambda: self._fail(job, error))

    # ---- what others see -------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Prompts whose lease ran out before they were even started are not worth starting; words still owed are said."""
        self.pool.take_events()  # nobody is told of cache changes yet; untaken they would pile up
        self.handover.links.tick()
        for job in self.handover.expired():
            error = TransferFailed("the lease ran out before the prefill was done (transfer.lease_s)")
            self._soon(functools.partial(self._fail, job, error, "transfer"))

    @property
    def is_idle(self) -> bool:
        return not self._jobs and self.handover.is_idle

    def in_flight(self) -> tuple[tuple[str, int], ...]:
        return tuple((job.request.request_id, job.epoch) for job in self._jobs.values())

    def stats(self) -> WorkerStats:
        c = self._counts
        return WorkerStats(
            num_running=len(self._active),
            num_waiting=len(self._waiting),
            step_s=c["step_s"],
            transfers=self.handover.transfers,
            transfer_bytes=self.handover.transfer_bytes,
            transfer_s=self.handover.transfer_s,
            transfers_failed=self.handover.transfers_failed,
            pairs=self.handover.pair_stats(),
            last_token_age_s=-1.0 if self.last_token_at is None else self._clock() - self.last_token_at,
            **self.pool.numbers,
            **{name: int(c[name]) for name in COUNTERS},
        )

    def check_integrity(self) -> None:
        self.pool.check_integrity()
        assert not self.is_idle or (not self._active and not self._waiting and self.pool.num_used == 0)


def _push(layer: int, pushes: list[Push]) -> None:
    """Called by the engine's thread after each layer: hand the layer's finished blocks to the sender threads."""
    for sender, grant_id, pairs in pushes:
        if pairs:
            sender.push(grant_id, layer, pairs)


def _step_failed(error: Exception) -> InternalError:
    log.error("a prefill step failed", exc_info=error)
    return InternalError(f"a prefill step failed ({type(error).__name__}); the worker's log has the details")
