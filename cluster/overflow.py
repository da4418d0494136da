"""A worker whose engine is another server: an OpenAI-compatible one behind our control protocol, for what ours cannot take in time.

To gateway and scheduler it is a decode worker that prefills for itself: Reserve -> Grant, then frames of tokens with their
indexes; Cancel closes the stream over there; heartbeats tell its load; a failure is tried again elsewhere, from the last token that
was delivered. It has no KV of ours: its blocks are only a measure of how much it may be given. No torch, no Ray; the engine is an
`upstream.Upstream`, given to it, as network and clock are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

import msgspec

from cluster.upstream import Asked, Piece, Upstream, wrapped
from protocol.errors import (
    Draining,
    InvalidRequest,
    ReservationRefused,
    TandemError,
    TransferFailed,
    WorkerLost,
    to_failure,
)
from protocol.kv import KVLayout
from protocol.messages import Cancel, Message, RequestFailed, Reserve, TokenFrame, TokenUpdate, WorkerInfo, WorkerStats
from protocol.network import Clock, Network, Peer
from protocol.request import Request
from protocol.ticket import Grant, sign
from protocol.timeline import Spent

log = logging.getLogger(__name__)

BLOCK_SIZE = 32
PROBE_S = 10.0  # between two looks whether an idle server is there
DOWN_PROBE_S = 2.0  # while it is not
POLL_S = 0.02
GOODBYE_S = 2.0
MAX_CANCELLED = 4096
SEED_MASK = (1 << 64) - 1


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """name: for people. price_per_hour: of the server."""

    incarnation: str
    name: str
    model: str
    max_model_len: int
    max_num_seqs: int
    price_per_hour: float = 0.0

    @property
    def layout(self) -> KVLayout:
        return KVLayout(1, 1, 1, BLOCK_SIZE, "uint8", "overflow")

    @property
    def num_blocks(self) -> int:
        """Room for max_num_seqs of the longest requests: their number is what limits it."""
        return self.max_num_seqs * self.layout.num_blocks_for(self.max_model_len)


class Job:
    """One attempt of one request: a stream from the server for each choice."""

    def __init__(self, reserve: Reserve, gateway: Peer, now: float) -> None:
        self.request: Request = reserve.request
        self.epoch = reserve.ticket.epoch
        self.gateway = gateway
        num_choices = self.request.sampling.n
        self.delivered = [list(ids) for ids in reserve.output_token_ids or ((),) * num_choices]
        self.streams: dict[int, asyncio.Task[None]] = {}
        self.held: dict[int, list[int]] = {}  # choice -> its last token so far, where no end token would follow it
        self.began_at = now
        self.has_told = False

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.epoch

    def num_blocks(self, layout: KVLayout) -> int:
        return sum(layout.num_blocks_for(self.request.prompt_len + len(self.delivered[choice]) + 1) for choice in self.streams)


class OverflowWorker:
    """See the module. `start()` once; `tick()` every so often. tests and `overflow_life.py` give it an agent."""

    def __init__(self, settings: Settings, upstream: Upstream, network: Network, clock: Clock, secret: bytes) -> None:
        self.settings = settings
        self._upstream = upstream
        self._network = network
        self._clock = clock
        self._secret = secret
        self._jobs: dict[str, Job] = {}
        self._cancelled: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_leaving = False
        self._is_down = True  # until it was seen
        self._probing: asyncio.Task[None] | None = None
        self._probed_at = float("-inf")
        self._generated = 0
        self._prompt_tokens = 0
        self.last_token_at: float | None = None
        self.why_down = "not asked yet"

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)
        await self._probe()

    async def close(self) -> None:
        for job in list(self._jobs.values()):
            self._drop(job)
        if self._probing is not None:
            self._probing.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstream.close()

    def info(self) -> WorkerInfo:
        settings = self.settings
        return WorkerInfo(
            incarnation=settings.incarnation,
            role="decode",
            name=settings.name,
            address=self._network.address,
            model=settings.model,
            layout=settings.layout,
            num_blocks=settings.num_blocks,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_model_len,
            pid=os.getpid(),
            host=socket.gethostname(),
            device="overflow",
            price_per_hour=settings.price_per_hour,
            is_overflow=True,
        )

    # ---- messages ----------------------------------------------------------------------------------------------------

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, Reserve):
            return self._reserve(peer, message)
        if isinstance(message, Cancel):
            self._cancel(message)
            return None
        raise InvalidRequest(f"an overflow worker does not take {type(message).__name__}")

    def on_lost(self, peer: Peer) -> None:
        """A gateway is gone: its work stops."""
        for job in [job for job in self._jobs.values() if job.gateway is peer]:
            self._drop(job)

    def _reserve(self, peer: Peer, message: Reserve) -> Grant:
        request, ticket = message.request, message.ticket
        if ticket.decode.incarnation != self.settings.incarnation:
            raise TransferFailed(f"the ticket is for {ticket.decode.incarnation}; here lives {self.settings.incarnation}")
        if ticket.prefill is not None:
            raise TransferFailed(f"{self.settings.name} prefills for itself: no KV of ours can be handed to {self._upstream.name}")
        if self._is_leaving:
            raise Draining(f"{self.settings.name} is draining")
        if self._is_down:
            raise Draining(f"the overflow server {self._upstream.name} does not answer: {self.why_down}")
        if peer.is_closed or (request.request_id, ticket.epoch) in self._cancelled:
            raise TransferFailed("the request was cancelled before it came")
        known = self._jobs.get(request.request_id)
        if known is not None:
            if known.epoch >= ticket.epoch:
                raise TransferFailed(f"epoch {ticket.epoch} of {request.request_id} is stale: {known.epoch} is here")
            self._drop(known)
        open_choices = [choice for choice in range(request.sampling.n) if choice not in message.finished]
        if self.num_running + len(open_choices) > self.settings.max_num_seqs and self._jobs:
            raise ReservationRefused(f"{self._upstream.name} has {self.num_running} requests of ours (overflow.max_num_seqs)")
        job = Job(message, peer, self._clock())
        for choice in open_choices:
            self._upstream.check(request.sampling, len(job.delivered[choice]))
        self._jobs[request.request_id] = job
        for choice in open_choices:
            job.streams[choice] = self._later(self._stream(job, choice))
        self._prompt_tokens += request.prompt_len
        return self._grant(job)

    def _grant(self, job: Job) -> Grant:
        request_id, epoch = job.key
        unsigned = Grant(
            grant_id=f"{self.settings.incarnation}/{request_id}/{epoch}",
            request_id=request_id,
            epoch=epoch,
            decode_incarnation=self.settings.incarnation,
            prefill_incarnation="",
            block_ids=(),
            num_cached_blocks=0,
            num_tokens=0,
            layout=self.settings.layout,
            lease_s=0.0,
            endpoints=(),
            control_address=self._network.address,
        )
        return sign(unsigned, self._secret)

    def _cancel(self, message: Cancel) -> None:
        job = self._jobs.get(message.request_id)
        if job is None or message.epoch not in (0, job.epoch):
            if message.choice is None:  # it may have overtaken its Reserve
                self._cancelled[(message.request_id, message.epoch)] = None
                while len(self._cancelled) > MAX_CANCELLED:
                    self._cancelled.popitem(last=False)
        elif message.choice is None:
            self._drop(job)
        elif message.choice in job.streams:
            job.streams.pop(message.choice).cancel()
            self._forget_if_over(job)

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def _stream(self, job: Job, choice: int) -> None:
        """One choice, from the server to the gateway. Leaving it, however, closes the stream over there."""
        sampling, delivered = job.request.sampling, job.delivered[choice]
        left = (sampling.max_tokens or 1) - len(delivered)
        seed = None if sampling.seed is None else (sampling.seed + choice) & SEED_MASK  # choices with one seed would be the same
        asked = msgspec.structs.replace(sampling, n=1, max_tokens=left, min_tokens=min(sampling.min_tokens, left), seed=seed)
        pieces = self._upstream.generate(Asked((*job.request.prompt_token_ids, *delivered), len(delivered), asked))
        try:
            async with contextlib.aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    self._is_down = False
                    if self._tell(job, choice, piece):
                        break
                else:
                    raise WorkerLost(f"the stream of {self._upstream.name} ended without a reason")
        except Exception as error:
            self._fail(job, error)
            return
        job.streams.pop(choice, None)
        self._forget_if_over(job)

    def _tell(self, job: Job, choice: int, piece: Piece) -> bool:
        """One frame. True when it was the choice's last: by its length, by a token that ends it, or because the server said so."""
        request, delivered = job.request, job.delivered[choice]
        sampling = request.sampling
        index, tokens = len(delivered), [*job.held.pop(choice, ()), *piece.token_ids]
        if not request.eos_token_ids and piece.finish_reason is None:  # the last one has to say that it is the last
            job.held[choice], tokens = tokens[-1:], tokens[:-1]
        reason: str | None = None
        stop: int | None = None
        for i, token in enumerate(tokens):
            num_tokens = index + i + 1
            ends = (not sampling.ignore_eos and token in request.eos_token_ids) or token in (sampling.stop_token_ids or ())
            if ends and num_tokens >= sampling.min_tokens:
                reason, tokens = "stop", tokens[: i + 1]
                stop = None if token in request.eos_token_ids else token
                break
            if num_tokens >= (sampling.max_tokens or 1):
                reason, tokens = "length", tokens[: i + 1]
                break
        if reason is None and piece.finish_reason is not None:
            # It ended without a token that says so; ours always ends with one, and its text is not shown.
            reason = piece.finish_reason
            tokens += request.eos_token_ids[:1]
            if not tokens:
                raise WorkerLost(f"{self._upstream.name} generated nothing, and this model has no token for that")
        if not tokens:
            return False
        delivered += tokens
        self._generated += len(tokens)
        self.last_token_at = now = self._clock()
        spent = None if job.has_told else Spent(0.0, now - job.began_at)
        job.has_told = True
        update = TokenUpdate(request.request_id, job.epoch, choice, index, tuple(tokens), None, reason, stop, spent=spent)
        job.gateway.send(TokenFrame((update,)))
        return reason is not None

    def _fail(self, job: Job, error: Exception) -> None:
        """The whole attempt: its other choices are resumed with it."""
        if self._jobs.get(job.request.request_id) is not job:
            return
        failure = wrapped(error, self._upstream.name)
        if not isinstance(error, TandemError):
            log.exception("while %s answered %s", self._upstream.name, job.request.request_id)
        if isinstance(failure, WorkerLost):
            self._probed_at = float("-inf")  # see at once whether it is still there
        job.gateway.send(RequestFailed(job.request.request_id, job.epoch, "decode", to_failure(failure)))
        self._drop(job)

    def _drop(self, job: Job) -> None:
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        streams, job.streams = job.streams, {}
        for task in streams.values():
            if task is not asyncio.current_task():
                task.cancel()

    def _forget_if_over(self, job: Job) -> None:
        if not job.streams and self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, deadline_s: float) -> None:
        """Nothing new; what runs may end; the rest is told to go on elsewhere."""
        self._is_leaving = True
        end = self._clock() + deadline_s
        while self._jobs and self._clock() < end:
            await asyncio.sleep(POLL_S)
        for job in list(self._jobs.values()):
            self._fail(job, WorkerLost(f"{self.settings.name} is draining"))
        end = self._clock() + GOODBYE_S
        while self._tasks and self._clock() < end:
            await asyncio.sleep(POLL_S)

    # ---- is the server there -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        period = DOWN_PROBE_S if self._is_down else PROBE_S
        if self._clock() - self._probed_at >= period and (self._probing is None or self._probing.done()):
            self._probing = self._later(self._probe())

    async def _probe(self) -> None:
        self._probed_at = self._clock()
        try:
            await self._upstream.probe()
        except Exception as error:
            failure = wrapped(error, self._upstream.name)
            if not self._is_down or self.why_down != failure.message:
                log.warning("%s: %s", self.settings.name, failure.message)
            self._is_down, self.why_down = True, failure.message
        else:
            self._is_down, self.why_down = False, ""
            self.last_token_at = self._clock()  # it answers; a token of its own would have to be paid for (R10 as far as it goes)

    @property
    def is_draining(self) -> bool:
        """Takes nothing new: it goes, or the server does not answer."""
        return self._is_leaving or self._is_down

    @is_draining.setter
    def is_draining(self, value: bool) -> None:
        self._is_leaving = value

    # ---- what others see ---------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return sum(len(job.streams) for job in self._jobs.values())

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def in_flight(self) -> tuple[tuple[str, int], ...]:
        return tuple(job.key for job in self._jobs.values())

    def stats(self) -> WorkerStats:
        used = min(self.settings.num_blocks, sum(job.num_blocks(self.settings.layout) for job in self._jobs.values()))
        return WorkerStats(
            num_running=self.num_running,
            num_free_blocks=self.settings.num_blocks - used,
            num_used_blocks=used,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
            last_token_age_s=-1.0 if self.last_token_at is None else self._clock() - self.last_token_at,
        )
