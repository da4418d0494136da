"""The walk of one request, door to door. Read this file first; `Gateway.generate` is the function.

    1 admit      scheduler: order, refuse early, place      -> Ticket
    2 reserve    decode worker sets blocks aside            -> Grant
    3 prefill    prefill worker computes the prompt's KV, samples token 1, pushes KV block by block
    4 seal       prefill tells decode what it wrote; decode verifies; nothing of it passes through here
    5 decode     one frame per engine step carries all tokens for this gateway
    6 deliver    text, stop strings, exactly one terminal event, and the outcome for the scheduler's ledger

The gateway drives and nobody else does: every retry, cancellation and failover is decided here. It knows no Ray, no
HTTP and no torch; network, clock and detokenizer are given to it, so the same walk runs under Serve (`deployments.py`),
inside one process (`tandem.LLM`) and in fault tests. What one request has been through so far is a `walk.Walk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from cluster.tenants_view import TenantsView
from cluster.walk import Attempt, Detokenizer, PeerLost, Walk
from engine.hashing import block_hashes
from protocol.errors import (
    CannotServe,
    DeadlineExceeded,
    Draining,
    HandshakeRefused,
    InternalError,
    ReservationRefused,
    TandemError,
    TenantsChanged,
    TransferFailed,
    WorkerLost,
    from_failure,
    to_failure,
)
from protocol.events import Event, Failed
from protocol.lifecycle import Phase
from protocol.messages import (
    Admit,
    Cancel,
    GatewayBeat,
    Message,
    OfferTenants,
    Ok,
    Outcome,
    Prefill,
    Progress,
    RequestFailed,
    Reserve,
    TenantsVersion,
    TokenFrame,
    TokenUpdate,
    Withdraw,
)
from protocol.network import Clock, Network, Peer
from protocol.request import Request
from protocol.ticket import Grant, Ticket

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
ASK_AGAIN_S = 15.0  # an answer of the scheduler may be lost for ever; who waits in its queue keeps its place when asked again
BEAT_S = 1.0
MAX_ATTEMPTS = 12  # of one request without a new token; each names another worker where there is one
HASH_BLOCK_LEN = 64  # tokens; the cluster-wide unit of the scheduler's prefix index
RETRYABLE = (WorkerLost, TransferFailed, ReservationRefused, DeadlineExceeded, HandshakeRefused)


class Limits(msgspec.Struct, frozen=True):
    """The gateway's deadlines, in seconds."""

    queue_timeout_s: float = 120.0
    prefill_timeout_s: float = 300.0  # reserved -> first token
    token_timeout_s: float = 60.0  # silence between two tokens
    recovery_timeout_s: float = 30.0  # how long to look for a scheduler or a worker that comes back
    request_timeout_s: float = 3600.0  # door to door
    lease_s: float = 30.0


class Gateway:
    """Drives every request of one gateway replica.

    find_scheduler: where the scheduler listens now (it may have moved). detokenizer: makes one per choice of a request.
    seed: what the seeds of requests without one are drawn from, in the order in which they come to this gateway, beginning anew
    with it; None: from the system's randomness. observers: called with every request that ended; they must neither wait nor raise.
    tenants: this gateway's copy of the tenants file; None: there is none. adapt: the request as another model takes it, None when
    its tokens mean nothing to that one.
    """

    def __init__(
        self,
        gateway_id: str,
        network: Network,
        find_scheduler: Callable[[], Awaitable[str]],
        detokenizer: Callable[[Request], Detokenizer],
        clock: Clock,
        limits: Limits | None = None,
        seed: int | None = None,
        timelines: bool = True,
        observers: Sequence[Callable[[Request, Outcome], None]] = (),
        tenants: TenantsView | None = None,
        adapt: Callable[[Request, str], Request | None] = lambda *_: None,
    ) -> None:
        self.gateway_id = gateway_id
        self._tenants = tenants
        self._adapt = adapt
        self.limits = limits or Limits()
        self._network = network
        self._find_scheduler = find_scheduler
        self._detokenizer = detokenizer
        self._clock = clock
        # Each gateway draws its own numbers, or two of them would answer in step.
        self._seeds = random.SystemRandom() if seed is None else random.Random(f"{seed}/{gateway_id}")
        self._timelines = timelines
        self._observers = observers
        self._walks: dict[str, Walk] = {}
        self._scheduler_address: str | None = None
        self._beat: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references to tasks
        self._leaving: dict[str, int] = {}  # request_id -> epoch: over, but its outcome is not sent yet

    async def start(self) -> None:
        await self._network.serve(self.handle, self.on_lost)
        self._beat = asyncio.create_task(self._keep_beating())

    async def close(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        await self._network.close()

    @property
    def num_in_flight(self) -> int:
        return len(self._walks)

    # ---- the walk ------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, tells_placed: bool = False) -> AsyncIterator[Event]:
        """Every event of one request; the last one, and only the last, is Finished or Failed. tells_placed: Placed comes first even
        where nothing was degraded.

        Closing the generator early means that the client is gone: all work on the request stops.
        """
        assert request.request_id not in self._walks, "request ids are ours and unique"
        if request.sampling.seed is None:  # drawn once, so that a resumption draws the same numbers
            seeded = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(64))
            request = msgspec.structs.replace(request, sampling=seeded)
        walk = Walk(request, self._detokenizer, self._clock(), self._timelines)
        self._walks[request.request_id] = walk
        failure: TandemError | None = None
        try:
            while True:
                try:
                    async with self._in_time(walk):
                        ticket = await self._admit(walk)
                    if walk.placed_event is not None and (tells_placed or ticket.degraded):
                        told, walk.placed_event = walk.placed_event, None
                        yield told
                    async with self._in_time(walk):
                        grant = await self._reserve(walk, ticket)
                        await self._prefill(walk, ticket, grant)
                    while not walk.is_complete:
                        for event in await self._receive(walk):
                            yield event
                    break
                except TandemError as error:
                    await self._retreat(walk, error)
            walk.finish(self._clock())
            yield walk.finished_event()
        except TandemError as error:
            failure = error
            walk.move(Phase.FAILED)
            yield Failed(to_failure(error))
        except Exception as error:
            log.exception("request %s", request.request_id)
            failure = InternalError("the gateway failed; its log has the details")
            walk.move(Phase.FAILED)
            yield Failed(to_failure(error))
        finally:
            self._leave(walk, failure)

    @contextlib.asynccontextmanager
    async def _in_time(self, walk: Walk) -> AsyncIterator[None]:
        """Steps of a walk, ended when the request as a whole has had its time."""
        try:
            async with asyncio.timeout(self._seconds_left(walk)) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._out_of_time() from None

    def _seconds_left(self, walk: Walk) -> float:
        return walk.received_at + self.limits.request_timeout_s - self._clock()

    def _out_of_time(self) -> DeadlineExceeded:
        limit = f"{self.limits.request_timeout_s:g} s (gateway.request_timeout_s)"
        return DeadlineExceeded(f"the request took longer than {limit}", param="gateway.request_timeout_s")

    async def _admit(self, walk: Walk) -> Ticket:
        walk.move(Phase.QUEUED)
        try:
            ticket = await self._ask_scheduler(self._application(walk), self.limits.queue_timeout_s + CALL_TIMEOUT_S)
        except TenantsChanged:  # whoever judged this request does so again, and finds the new file here
            await self._refresh_tenants(walk.request.claim.tenants_version)
            raise
        assert isinstance(ticket, Ticket)
        walk.begin(Attempt(ticket), self._clock())
        if ticket.degraded:
            walk.degrade(ticket, self._adapt)
        return ticket

    def _application(self, walk: Walk) -> Admit:
        request = walk.request
        return Admit(
            request_id=request.request_id,
            model=request.model,
            tenant=request.tenant,
            slo_class=request.slo_class,
            priority=request.priority,
            prompt_len=request.prompt_len + walk.max_delivered,
            max_tokens=max(1, (request.sampling.max_tokens or 1) - walk.max_delivered),
            num_choices=request.sampling.n,
            prefix_hashes=walk.prefix_hashes(_hashes),
            excluded=tuple(walk.excluded),
            resumption=walk.num_attempts > 0,
            local_prefill=walk.needs_local_prefill,
            last_epoch=walk.epoch,
            deadline_s=min(self.limits.queue_timeout_s, max(0.0, self._seconds_left(walk))),
            client_id=request.origin.client_id,
            ttft_slo_s=request.claim.ttft_slo_s,
            tpot_slo_s=request.claim.tpot_slo_s,
            is_retry=request.claim.is_retry,
            waited_s=max(0.0, self._clock() - walk.received_at),
            keeps_model=self._keeps_model(request),
            tenants_version=request.claim.tenants_version,
        )

    def _keeps_model(self, request: Request) -> bool:
        """Whether the model that the request's class falls back to could not read its tokens."""
        if self._tenants is None or self._tenants.is_missing:
            return True
        fallback = self._tenants.in_force().tenants.slo_class(request.slo_class).degrade_to_model
        return fallback is None or self._adapt(request, fallback) is None

    async def _reserve(self, walk: Walk, ticket: Ticket) -> Grant:
        attempt = walk.attempt
        attempt.decode = await self._network.connect(ticket.decode.address)
        lease_s = self.limits.lease_s + 4 * ticket.predicted_ttft_s
        message = Reserve(ticket, walk.request, walk.delivered_token_ids(), lease_s, walk.finished_choices)
        grant = await attempt.decode.call(message, CALL_TIMEOUT_S)
        assert isinstance(grant, Grant)
        walk.move(Phase.RESERVED)
        walk.timeline.reserved(grant.num_cached_blocks * grant.layout.block_size, self._clock())
        return grant

    async def _prefill(self, walk: Walk, ticket: Ticket, grant: Grant) -> None:
        """Start the prefill. With ticket.prefill None the decode worker began by itself when it reserved."""
        walk.move(Phase.PREFILLING)
        if ticket.prefill is None:
            return
        attempt = walk.attempt
        attempt.prefill_was_asked = True
        attempt.prefill = await self._network.connect(ticket.prefill.address)
        answer = await attempt.prefill.call(Prefill(ticket, grant, walk.request, walk.delivered_token_ids()), CALL_TIMEOUT_S)
        assert isinstance(answer, Ok)

    async def _receive(self, walk: Walk) -> list[Event]:
        """Wait for news of this request and turn all there is into events. Raises what ended the attempt."""
        if not walk.inbox:
            await self._wait(walk)
        events: list[Event] = []
        while walk.inbox and not walk.is_complete:
            item = walk.inbox.take()
            if isinstance(item, TokenUpdate):
                events += self._absorb(walk, item)
            elif walk.is_moot(item):
                continue
            elif events:  # they come first; what went wrong is looked at next time
                walk.inbox.give_back(item)
                break
            elif isinstance(item, PeerLost):
                raise WorkerLost(f"the {item.role} worker of {walk.request.request_id} is gone")
            else:
                raise from_failure(item.failure)
        return events

    async def _wait(self, walk: Walk) -> None:
        """Until something has come. Raises when that takes too long."""
        timeout = self.limits.token_timeout_s if walk.attempt.has_tokens else self.limits.prefill_timeout_s
        gap_at = walk.gap_at
        if gap_at is not None:  # tokens that come cannot be delivered, so they are no sign that all is well
            timeout = max(0.0, gap_at + self.limits.token_timeout_s - self._clock())
        seconds_left = self._seconds_left(walk)
        if await walk.inbox.wait(min(timeout, seconds_left)):
            return
        if seconds_left <= timeout:
            raise self._out_of_time()
        if gap_at is not None:
            raise WorkerLost(f"a token of {walk.request.request_id} is missing, and later ones came")
        raise WorkerLost(f"no token of {walk.request.request_id} for {timeout:.0f} s")

    def _absorb(self, walk: Walk, update: TokenUpdate) -> list[Event]:
        before = walk.first_token_at
        events = walk.absorb(update, self._clock())
        if before is None and walk.first_token_at is not None:
            self._tell_scheduler(Progress(walk.request.request_id, walk.epoch, walk.first_token_at - walk.placed_at))
        for choice in walk.newly_stopped():
            self._cancel(walk, choice)
        return events

    async def _retreat(self, walk: Walk, error: TandemError) -> None:
        """An attempt failed: give back what it held, and let the loop try again, or raise when trying again is no use."""
        if walk.phase is Phase.QUEUED:  # the scheduler's own answer, and it is final
            raise error
        self._cancel(walk, is_tainted=isinstance(error, InternalError))
        if self._seconds_left(walk) <= 0:
            raise self._out_of_time() from error
        walk.blame(error)
        if isinstance(error, CannotServe) and len(set(walk.excluded)) < len(walk.excluded):
            raise error  # back at the same worker: there is no other
        if not isinstance(error, RETRYABLE) or walk.num_vain_attempts >= MAX_ATTEMPTS:
            raise error
        walk.timeline.resumed(error.message, self._clock())
        log.info("request %s, epoch %d: %s; trying again", walk.request.request_id, walk.epoch, error.message)
        if isinstance(error, ReservationRefused) and not isinstance(error, Draining):
            await asyncio.sleep(0.02 * walk.num_vain_attempts)

    def _leave(self, walk: Walk, failure: TandemError | None) -> None:
        """However the walk ended: nothing of it goes on anywhere, and the scheduler's ledger hears of it once."""
        request = walk.request
        walk.inbox.close()
        del self._walks[request.request_id]
        if walk.phase is Phase.QUEUED:
            self._tell_scheduler(Withdraw(request.request_id))
        if walk.phase is not Phase.FINISHED or walk.ended_at_prefill or walk.was_stopped_here:
            self._cancel(walk)
        kind = "finished" if walk.phase is Phase.FINISHED else "failed" if failure is not None else "cancelled"
        self._leaving[request.request_id] = walk.epoch
        if isinstance(failure, TenantsChanged):  # it has not ended: it comes again, under the same name
            del self._leaving[request.request_id]
            return
        told = (type(failure).__name__, failure.message) if failure is not None else ("", None)
        outcome = walk.outcome(Outcome, kind, told[0], self._clock(), told[1])
        task = self._tell_scheduler(outcome)
        for observe in self._observers:
            observe(request, outcome)
        task.add_done_callback(lambda _: self._leaving.pop(request.request_id, None))

    def _cancel(self, walk: Walk, choice: int | None = None, is_tainted: bool = False) -> None:
        if walk.attempt_is_none:
            return
        for peer in (walk.attempt.prefill, walk.attempt.decode):
            if peer is not None and not peer.is_closed:
                peer.send(Cancel(walk.request.request_id, walk.epoch, choice, is_tainted))

    # ---- what arrives --------------------------------------------------------------------------------------------

    async def handle(self, peer: Peer, message: Message) -> Message | None:
        if isinstance(message, TokenFrame):
            for update in message.updates:
                walk = self._walks.get(update.request_id)
                if walk is not None and update.epoch == walk.epoch:
                    walk.inbox.put(update)
            return None
        if isinstance(message, RequestFailed):
            walk = self._walks.get(message.request_id)
            if walk is not None and message.epoch == walk.epoch:
                walk.inbox.put(message)
            return None
        raise TandemError(f"a gateway does not take {type(message).__name__}")

    def on_lost(self, peer: Peer) -> None:
        for walk in self._walks.values():
            walk.peer_lost(peer)

    # ---- the scheduler -------------------------------------------------------------------------------------------

    async def _scheduler(self) -> Peer:
        if self._scheduler_address is None:
            self._scheduler_address = await self._find_scheduler()
        try:
            return await self._network.connect(self._scheduler_address)
        except WorkerLost:
            self._scheduler_address = None
            raise

    async def _ask_scheduler(self, message: Message, timeout: float) -> Message:
        """A call that outlives the scheduler: when it dies, its successor is asked the same."""
        lost_at: float | None = None
        deadline = self._clock() + timeout
        while True:
            try:
                peer = await self._scheduler()
                lost_at = None  # it is there; a wait in its queue may be long
                async with asyncio.timeout(ASK_AGAIN_S):
                    return await peer.call(message, max(0.0, deadline - self._clock()))
            except TimeoutError:
                log.info("no answer to %s for %g s; asking again", type(message).__name__, ASK_AGAIN_S)
            except WorkerLost as error:
                self._scheduler_address = None
                lost_at = self._clock() if lost_at is None else lost_at
                if self._clock() - lost_at > self.limits.recovery_timeout_s:
                    raise WorkerLost(f"no scheduler for {self.limits.recovery_timeout_s:g} s: {error.message}") from None
                await asyncio.sleep(0.2)

    def walk_of(self, request_id: str) -> Walk | None:
        """The running request of that id, or with that X-Request-Id."""
        known = self._walks.get(request_id)
        return known or next((w for w in self._walks.values() if w.request.origin.client_id == request_id), None)

    async def ask(self, message: Message) -> Message:
        """Status and metrics of the whole cluster, for the HTTP side."""
        return await self._ask_scheduler(message, CALL_TIMEOUT_S)

    def _tell_scheduler(self, message: Message) -> asyncio.Task[None]:
        """Best effort: what is lost here is corrected by the next beat of workers and gateways."""

        async def tell() -> None:
            try:
                (await self._scheduler()).send(message)
            except (TandemError, OSError) as error:
                log.debug("not told to the scheduler: %s", error)

        task = asyncio.create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return task

    async def _refresh_tenants(self, stale: str) -> None:
        """Best effort: the next beat says again what is in force."""
        if self._tenants is None:
            return
        try:
            await self._tenants.refresh(stale, self.ask)
        except (TandemError, OSError) as error:
            log.debug("tenants: %s", error)

    async def _follow_tenants(self, peer: Peer, answer: TenantsVersion) -> None:
        """What is in force by the scheduler's word: nothing when it was restarted and cannot use the file."""
        if self._tenants is None:
            return
        counted = self._tenants.heard(answer)
        if counted is not None:
            await peer.call(counted, CALL_TIMEOUT_S)
        if answer.version == self._tenants.version:
            return
        if answer.version:
            await self._refresh_tenants(self._tenants.version)
        elif self._tenants.document is not None:
            await peer.call(OfferTenants(self._tenants.document), CALL_TIMEOUT_S)

    async def _keep_beating(self) -> None:
        if self._tenants is not None and self._tenants.is_missing:
            await self._refresh_tenants("")
        while True:
            await asyncio.sleep(BEAT_S)
            # With those whose outcome is still on its way: unnamed they would count as abandoned.
            walks = ((walk.request.request_id, walk.epoch) for walk in self._walks.values())
            in_flight = (*walks, *self._leaving.items())
            try:
                peer = await self._scheduler()
                version = self._tenants.version if self._tenants is not None else ""
                answer = await peer.call(GatewayBeat(self.gateway_id, in_flight, version), CALL_TIMEOUT_S)
                if isinstance(answer, TenantsVersion):
                    await self._follow_tenants(peer, answer)
            except (TandemError, OSError) as error:
                log.debug("beat: %s", error)
            except Exception:  # a gateway that stops beating would be taken for dead, with all it holds
                log.exception("a beat failed")


def _hashes(token_ids: tuple[int, ...], salt: str) -> tuple[bytes, ...]:
    return tuple(block_hashes(token_ids, HASH_BLOCK_LEN, salt.encode()))
