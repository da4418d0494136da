"""A decode worker: reserves blocks, takes verified KV in, decodes by continuous batching, and prefills short prompts itself.

It knows no Ray, no sockets and no clock of its own: network, clock and `compute` (how to run the model without blocking the
event loop) are given to it. `step()` reads: plan, run, emit. All its state is touched on the event loop only; the model
runs elsewhere on sequences that nobody changes meanwhile, so whatever arrives during a step waits in `_after_step`.
Built by `cluster/deployments.py` (Serve), `tandem.LLM` (one process) and the fault tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from decode.drafting import Drafting, Limits
from decode.handover import Handover
from decode.job import Job
from decode.planner import Budget, plan, steady
from decode.report import Report
from decode.reservation import Reservations
from decode.sequences import Sequences
from engine.batch import Chunk
from engine.blocks import BlockPool, OutOfBlocks
from engine.cores import BORROWED_S, Cores
from engine.pace import Load, Pace
from engine.prefix import forget_prefix
from engine.runner import ModelRunner, Sample, StepResult
from engine.sequence import Sequence
from engine.speculation.speculator import Speculator
from engine.step import Extras
from engine.step_log import StepLog
from engine.stopping import finish_reason
from engine.swap import Swap
from kvtransfer.receiving import GroupReceivers
from protocol.errors import (
    Draining,
    InternalError,
    InvalidRequest,
    ReservationRefused,
    TandemError,
    TransferFailed,
    WorkerLost,
    to_failure,
)
from protocol.events import TokenLogprobs
from protocol.kv import KVLayout
from protocol.messages import (
    Cancel,
    Handshake,
    Message,
    Ok,
    RequestFailed,
    Reserve,
    Seal,
    TokenFrame,
    TokenUpdate,
    WorkerStats,
    WriterDone,
)
from protocol.network import Clock, Network, Peer
from protocol.ticket import Grant, Landed

log = logging.getLogger(__name__)

DRAIN_S = 30.0
POLL_S = 0.02
GOODBYE_S = 5.0  # after a drain's deadline: for quarantined blocks to come back
STALL_S = 0.05  # how long to wait when there is work but no block for it
MAX_CANCELLED = 4096
_T = TypeVar("_T")
Compute = Callable[[Callable[[], _T]], Awaitable[_T]]  # runs a function off the event loop, one at a time, in order


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    incarnation: str
    layout: KVLayout
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    enable_chunked_prefill: bool = True
    max_jobs: int = 4096  # requests that may hold or wait for blocks at once
    without: str = "nothing"  # or "continuous-batching", "paging": for measuring what they are worth


class DecodeWorker:
    """See the module. Call `start()` once, then `run()` until it is cancelled; `tick()` every so often."""

    def __init__(
        self,
        settings: Settings,
        runner: ModelRunner,
        pool: BlockPool,
        receivers: GroupReceivers,
        network: Network,
        clock: Clock,
        compute: Compute,
        secret: bytes,
        speculator: Speculator | None = None,
        swap: Swap | None = None,
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.pool = pool
        self._network = network
        self._clock = clock
        self._compute = compute
        self._jobs: dict[str, Job] = {}  # by request_id: one attempt at a time
        self._cancelled: OrderedDict[tuple[str, int], None] = OrderedDict()  # attempts that are over before they came
        self._sequences = Sequences(pool, settings.layout, swap, settings.max_model_len if settings.without == "paging" else 0)
        limits = Limits(settings.max_num_batched_tokens, settings.max_model_len, settings.layout.block_size)
        self.drafting = Drafting(speculator, self._sequences, pool, limits) if speculator is not None else None
        self._in_step = False
        self._after_step: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self.is_draining = False
        self.last_token_at: float | None = None
        self._step_began_at = 0.0
        self._counts: dict[str, float] = defaultdict(float)
        self._step_s = 0.0  # of the newest step
        self.step_log: StepLog | None = None
        self.cores: Cores | None = None  # who says how many threads a step may use; none: always the runner's number
        self.pace = Pace()
        self.handover = Handover(
            settings.incarnation, settings.layout, pool, receivers, network, clock, secret, self._fail_transfer, self.wake
        )
        self._reservations = Reservations(settings.layout, pool, self._sequences, self.handover)
        self._report = Report(self._counts, self._sequences, pool, self.handover, self._reservations, self.drafting)

    # ---- messages --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, Reserve):
            return await self._reserve(peer, message)
        if isinstance(message, Seal):
            return await self._seal(message)
        if isinstance(message, Landed):
            self.handover.landed(message)
            return None
        if isinstance(message, Handshake):
            return self.handover.handshake(peer, message)
        if isinstance(message, Cancel):
            self._cancel(message)
            return None
        if isinstance(message, WriterDone):
            self.handover.writer_done(message.grant_id)
            return None
        raise InvalidRequest(f"a decode worker does not take {type(message).__name__}")

    def on_lost(self, peer: Peer) -> None:
        """A gateway is gone: its work stops. A prefill worker is gone: `tick` sees whether it is dead."""
        for job in [j for j in self._jobs.values() if j.gateway is peer]:
            self._drop(job)
        self.handover.tick()

    # ---- reserve ---------------------------------------------------------------------------------------------------

    async def _reserve(self, peer: Peer, message: Reserve) -> Grant:
        """Awaits only where there is something to wait for: other ranks of this worker, or what an earlier attempt left."""
        request, ticket = message.request, message.ticket
        if ticket.decode.incarnation != self.settings.incarnation:
            raise TransferFailed(f"the ticket is for {ticket.decode.incarnation}; here lives {self.settings.incarnation}")
        self._supersede(request.request_id, ticket.epoch)
        await self.handover.settled(request.request_id)
        if self.is_draining:
            raise Draining("this decode worker is draining")
        if peer.is_closed or (request.request_id, ticket.epoch) in self._cancelled:
            raise TransferFailed("the request was cancelled before it came")
        self._supersede(request.request_id, ticket.epoch)
        if len(self._jobs) >= self.settings.max_jobs:
            raise ReservationRefused(f"{len(self._jobs)} requests are here already")
        self._reservations.check_it_can_ever_fit(request)
        job = self._jobs[request.request_id] = Job(message, peer, self._clock())
        try:
            grant = self._reservations.local(job) if ticket.prefill is None else await self._reservations.remote(job, message)
        except OutOfBlocks:
            self._drop(job)
            raise ReservationRefused(
                f"{self.pool.num_free} blocks are free, {self.settings.layout.num_blocks_for(request.prompt_len)} are needed"
            ) from None
        except BaseException:  # also when the gateway goes while we wait for another rank
            self._drop(job)
            raise
        if job.is_dropped:
            raise TransferFailed("the request was cancelled while its blocks were set aside")
        self._wake.set()
        return grant

    def _supersede(self, request_id: str, epoch: int) -> None:
        """One attempt of a request at a time, the newest."""
        known = self._jobs.get(request_id)
        if known is not None:
            if known.epoch >= epoch:
                raise TransferFailed(f"epoch {epoch} of {request_id} is stale: {known.epoch} is here")
            self._drop(known)

    # ---- seal ------------------------------------------------------------------------------------------------------

    async def _seal(self, message: Seal) -> Ok:
        """Verify what prefill says it wrote, then let its sequences run. Unverified KV is never read (R4)."""
        started = self._clock()
        job = await self.handover.verify(message.manifest)
        job.sealed(self._clock(), message.landed_s, started)
        self._sequences.open(job, message.manifest.num_written, message.manifest.first_tokens)
        if not job.sequences:
            del self._jobs[job.request.request_id]
        self._wake.set()
        return Ok()

    # ---- giving up -------------------------------------------------------------------------------------------------

    def _soon(self, act: Callable[[], None]) -> None:
        """Now, or right after the step that is under way."""
        if self._in_step:
            self._after_step.append(act)
        else:
            act()

    def _cancel(self, message: Cancel) -> None:
        job = self._jobs.get(message.request_id)
        if job is None or message.epoch not in (0, job.epoch):
            if message.choice is None:  # it may have overtaken its Reserve
                self._cancelled[(message.request_id, message.epoch)] = None
                while len(self._cancelled) > MAX_CANCELLED:
                    self._cancelled.popitem(last=False)
            return
        if message.choice is None:
            if message.is_tainted:
                self.handover.distrust(message.request_id)
                self.pool.forget(job.block_hashes)
            self._drop(job)
            return
        job.ended.add(message.choice)
        sequence = job.sequences.get(message.choice)
        if sequence is not None:
            self._soon(lambda: self._retire(sequence))
        elif len(job.ended) == job.request.sampling.n:
            self._drop(job)

    def _fail_transfer(self, job: Job, error: TandemError | None) -> None:
        """The hand-over ended before it was sealed. Without an error the gateway knows: token 1 was the last."""
        if error is None:
            self._drop(job)
        else:
            self._fail(job, "transfer", error)

    def _fail(self, job: Job, stage: str, error: TandemError) -> None:
        if not job.is_dropped:
            job.gateway.send(RequestFailed(job.request.request_id, job.epoch, stage, to_failure(error)))
            self._drop(job)

    def _drop(self, job: Job) -> None:
        """Take down one attempt whole; idempotent. Its sequences may be in the step that is under way: they go after it."""
        job.is_dropped = True
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        for sequence in list(job.sequences.values()):
            self._soon(lambda sequence=sequence: self._retire(sequence))
        if job.spare_blocks:
            self.pool.release(job.spare_blocks)
            job.spare_blocks = []
        self.handover.give_up(job)
        self._wake.set()

    def wake(self) -> None:
        """Blocks came free by somebody else's hand."""
        self._wake.set()

    async def drain(self, deadline_s: float = DRAIN_S) -> None:
        """Take nothing new, finish what can be finished in time, and hand over the rest: each request that is left hears, after its
        last frame, that this worker goes, and its gateway resumes it elsewhere. Returns when every block is back (or, where a
        writer owes its word for longer than GOODBYE_S, without those)."""
        self.is_draining = True
        end = self._clock() + deadline_s
        while self._jobs and self._clock() < end:
            await asyncio.sleep(POLL_S)
        going = WorkerLost(f"decode worker {self.settings.incarnation} is draining")
        for job in list(self._jobs.values()):
            self._soon(functools.partial(self._fail, job, "decode", going))
        end = self._clock() + GOODBYE_S
        while (self._jobs or self._sequences or self.pool.num_used) and self._clock() < end:
            await asyncio.sleep(POLL_S)

    def tick(self) -> None:
        """Leases, quarantines and dead writers; every quarter of a second or so."""
        self.pool.take_events()  # nobody is told of cache changes yet; untaken they would pile up
        self.handover.tick()

    # ---- the step --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            if not self._sequences:
                self._rest()
                self._wake.clear()
                await self._wake.wait()
                continue
            await self.step()

    async def step(self) -> None:
        """Plan, run, emit. Whatever goes wrong ends the requests of this step, never the loop (R11)."""
        chunks: list[Chunk] = []
        try:
            chunks = self._plan()
            if not chunks:
                self._rest()
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), STALL_S)
                return
            self._emit(*await self._execute(chunks))
        except Exception as error:
            log.exception("a decode step failed")
            self._fail_step(chunks, error)
        acts, self._after_step = self._after_step, []
        for act in acts:
            try:
                act()
            except Exception:
                log.exception("after a decode step")

    async def _execute(self, chunks: list[Chunk]) -> tuple[list[Chunk], StepResult]:
        """-> the chunks as they were computed, with their drafts."""
        copies = self._sequences.take_copies(chunks)
        self._in_step = True
        self._step_began_at = self._clock()
        result: StepResult | None = None
        try:
            chunks, result = await self._compute(lambda: self._run(chunks, Extras(copies=tuple(copies))))
            self.pace.learn(result.stats, self.runner.num_threads or 0)
            return chunks, result
        finally:
            self._in_step = False
            self._sequences.copied(copies)
            self._counts["num_steps"] += 1
            seconds = self._step_s = self._clock() - self._step_began_at
            self._counts["step_s"] += seconds
            if self.step_log is not None:
                self._report.log_step(self.step_log, self._step_began_at, seconds, chunks, result)

    def _run(self, chunks: list[Chunk], extras: Extras) -> tuple[list[Chunk], StepResult]:
        """In the engine's thread."""
        if self.drafting is not None:
            chunks = self.drafting.draft(chunks)
        return chunks, self.runner.run(chunks, None, extras)

    def _fail_step(self, chunks: list[Chunk], error: Exception) -> None:
        failure = InternalError(f"a decode step failed ({type(error).__name__}); the worker's log has the details")
        concerned = [chunk.sequence for chunk in chunks] or [*self._sequences.running, *self._sequences.preempted]
        jobs = {id(job): job for job in map(self._sequences.job_of, concerned) if job is not None}
        for job in jobs.values():
            self._after_step.append(lambda job=job: self._fail(job, "decode", failure))

    def _plan(self) -> list[Chunk]:
        budget = Budget(self.settings.max_num_seqs, self._max_tokens(), self.settings.enable_chunked_prefill)
        block_size = self.settings.layout.block_size
        mine = self._sequences
        running = mine.running if self.settings.without != "continuous-batching" else mine.static_batch(budget.max_num_seqs)
        growing = None if mine.preempted else steady(running, self.pool.num_free, block_size, budget)
        if growing is not None:
            for sequence in growing:
                mine.grow(sequence)
            chunks = [sequence.chunk or mine.chunk(sequence, 1) for sequence in running]
        else:
            decided = plan(running, mine.preempted, self.pool.num_free, block_size, budget)
            for sequence in decided.preempt:
                mine.preempt(sequence)
            left_out = {id(sequence) for sequence in decided.grow if not mine.grow(sequence)}
            left_out |= {id(sequence) for sequence in decided.restart if not mine.restart(sequence)}
            self._counts["num_preemptions"] += len(decided.preempt)
            chunks = [mine.chunk(s, min(n, s.num_uncomputed)) for s, n in decided.chunks if id(s) not in left_out]
        if self.drafting is not None:
            self.drafting.plan(chunks)
        return chunks

    def _max_tokens(self) -> int:
        """Of the next step; and its threads are taken. Work on borrowed cores is cut: their owner may wake at any time."""
        most = self.settings.max_num_batched_tokens
        if self.cores is None:
            return most
        running = self._sequences.running
        prompt = next((s for s in running if s.num_uncomputed > 1), None)
        decoding = [s.num_computed for s in running if s.num_uncomputed == 1]
        room = 0 if prompt is None else min(most - len(decoding), prompt.num_uncomputed)
        load = Load(prompt.num_computed if prompt is not None else 0, max(0, room), len(decoding), sum(decoding))
        choice = self.pace.choose(BORROWED_S, self.cores.num_own, self.cores.take(self._step_s), load)
        self.runner.num_threads = choice.num_threads
        return most if choice.max_tokens >= room else len(decoding) + choice.max_tokens

    def _rest(self) -> None:
        if self.cores is not None:
            self.cores.rest()

    def _emit(self, chunks: list[Chunk], result: StepResult) -> None:
        """Apply the step to its sequences and tell each gateway in one frame."""
        peer: Peer | None = None
        updates: list[TokenUpdate] = []
        frames: dict[int, tuple[Peer, list[TokenUpdate]]] = {}
        block_size = self.settings.layout.block_size
        samples: dict[int, list[Sample]] = {}
        for sample in result.samples:
            samples.setdefault(id(sample.sequence), []).append(sample)
        if self.drafting is not None:
            self.drafting.learn_step(chunks, result)
        for chunk in chunks:
            lead = chunk.sequence
            job = self._sequences.job_of(lead)
            if job is None or job.is_dropped:
                continue
            lead.num_computed += chunk.num_tokens
            if job.first_step_at is None:
                job.first_step_at = self._step_began_at
            self._counts["prompt_tokens" if chunk.num_tokens > 1 else "decode_rows"] += chunk.num_tokens
            if chunk.num_tokens > 1 or lead.num_computed % block_size == 0:
                self._sequences.seal(lead)
            if chunk is not lead.chunk:
                self._after_prompt(job, chunk, result)
            for sequence in chunk.samples:
                came = samples[id(sequence)]
                if came[0].error is not None:
                    forget_prefix(self.pool, sequence, self.settings.layout)
                    self._after_step.append(lambda job=job, e=came[0].error: self._fail(job, "decode", InternalError(e)))
                    continue
                if self.drafting is not None and sequence is lead:
                    self.drafting.learn(chunk, [sample.token for sample in came])
                if job.gateway is not peer:
                    peer = job.gateway
                    updates = frames.setdefault(id(peer), (peer, []))[1]
                updates.append(self._advance(job, sequence, came))
        for peer, updates in frames.values():
            self.last_token_at = self._clock()
            peer.send(TokenFrame(tuple(updates)))

    def _after_prompt(self, job: Job, chunk: Chunk, result: StepResult) -> None:
        """What there may be to do after a chunk of a prompt, or the first token after one, and never after that."""
        lead = chunk.sequence
        if len(chunk.samples) > 1:
            self._sequences.part_ways(job, chunk)
        if lead.choice == 0:
            job.scored += result.prompt_logprobs.get(lead.request.request_id, ())

    def _advance(self, job: Job, sequence: Sequence, came: list[Sample]) -> TokenUpdate:
        index, tokens, logprobs = self._sequences.take_opening(sequence)
        if sequence.chunk is None:
            sequence.chunk = Chunk(sequence, 1, (sequence,))
        max_len = min(sequence.max_len, self.settings.max_model_len)
        finished = None
        for sample in came:
            sequence.append(sample.token)
            tokens = (*tokens, sample.token)
            if sample.logprobs is not None:
                logprobs = (*(logprobs or ()), sample.logprobs)
            self._counts["generation_tokens"] += 1
            if sample.token in sequence.enders or len(sequence.token_ids) >= max_len:
                finished = finish_reason(sequence, self.settings.max_model_len)
                if finished:
                    break
        if len(came) > 1:  # what was guessed and is so has been computed
            sequence.num_computed = len(sequence) - 1
            self._sequences.seal(sequence)
        if self.drafting is not None:
            self._sequences.trim(sequence)
        if finished is None and logprobs is None and job.has_told and not job.scored:  # as nearly all are
            return TokenUpdate(job.request.request_id, job.epoch, sequence.choice, index, tokens)
        update = TokenUpdate(
            request_id=job.request.request_id,
            epoch=job.epoch,
            choice=sequence.choice,
            index=index,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=finished[0] if finished else None,
            stop_reason=finished[1] if finished else None,
            cached_tokens=job.cached_tokens,
            prompt_logprobs=self._take_scores(job),
            spent=job.take_spent(self._clock),
        )
        if finished:
            job.ended.add(sequence.choice)
            self._after_step.append(lambda: self._retire(sequence))
        return update

    def _take_scores(self, job: Job) -> tuple[TokenLogprobs | None, ...] | None:
        if not job.scored:
            return None
        scored, job.scored = tuple(job.scored), []
        return scored

    # ---- the end of things ------------------------------------------------------------------------------------------

    def _retire(self, sequence: Sequence) -> None:
        """The sequence is over, however it ended; idempotent."""
        if self.drafting is not None:
            self.drafting.speculator.forget(sequence)
        job = self._sequences.retire(sequence)
        if job is None or job.sequences or job.grant is not None:
            return
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]

    # ---- what others see -------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        return not self._jobs and not self.handover.is_keeping

    def in_flight(self) -> tuple[tuple[str, int], ...]:
        return tuple(job.key for job in self._jobs.values())

    def stats(self) -> WorkerStats:
        return self._report.stats(-1.0 if self.last_token_at is None else self._clock() - self.last_token_at)

    def check_integrity(self) -> None:
        """When idle: every block is free or cached, nothing is reserved or quarantined, no state is left."""
        self.pool.check_integrity()
        if self.is_idle:
            self._sequences.check_is_empty()
            assert self.pool.num_used == self.handover.num_held_blocks
