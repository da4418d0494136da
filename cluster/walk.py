"""What one request has been through so far: its phase, its attempts, and per choice the tokens delivered.

`gateway.py` decides, this remembers. The merge of token updates lives here: whatever workers die, resume, repeat or
reorder, a choice's token indexes come out contiguous, each once (truth rule R5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from api.inbox import Inbox
from cluster.timeline import Timeline
from protocol.errors import Draining, InternalError, ReservationRefused, TandemError
from protocol.events import Event, Finished, Placed, PromptScored, Timing, Tokens, Usage
from protocol.lifecycle import TERMINAL, Phase, move
from protocol.messages import RequestFailed, TokenUpdate
from protocol.network import Peer
from protocol.request import Request
from protocol.ticket import Ticket
from protocol.timeline import Trace

_OutcomeT = TypeVar("_OutcomeT")


class Detokenizer(Protocol):
    """One per choice: token ids in, text out, stop strings found. `api.detokenize.Detokenizer` is the real one."""

    def feed(self, token_ids: Sequence[int]) -> tuple[str, str | None]: ...

    def flush(self) -> str: ...


class PeerLost:
    """Put into a walk's inbox when one of the attempt's workers is gone."""

    def __init__(self, role: str) -> None:
        self.role = role


class Attempt:
    """One ticket's worth of work and the connections it goes over."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.decode: Peer | None = None
        self.prefill: Peer | None = None
        self.has_tokens = False
        self.prefill_was_asked = False
        self.decode_has_begun = False


class Choice:
    """One of a request's n answers."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.token_ids: list[int] = []
        self.pending: dict[int, TokenUpdate] = {}  # updates beyond a gap, by their index
        self.gap_at: float | None = None  # since when there is one
        self.finish_reason: str | None = None
        self.stopped_here = False  # by a stop string, which only the gateway sees
        self.last_at: float | None = None  # when its last token came


class Walk:
    """State of one request at the gateway. Times are the gateway's monotonic clock, seconds."""

    def __init__(
        self, request: Request, detokenizer: Callable[[Request], Detokenizer], now: float, with_timeline: bool = True
    ) -> None:
        self.request = request
        received_at = now - request.origin.intake_s
        self.timeline = Timeline(received_at, request.origin.intake_s, with_timeline)
        self.phase = Phase.RECEIVED
        self.choices = [Choice(detokenizer(request)) for _ in range(request.sampling.n)]
        self.inbox: Inbox[TokenUpdate | RequestFailed | PeerLost] = Inbox()
        self.epoch = 0
        self.num_attempts = 0
        self.num_vain_attempts = 0  # since the last token that was new to the client
        self.num_resumptions = 0
        self.excluded: list[str] = []
        self.cached_tokens = 0
        self.received_at = received_at
        self.placed_at = now
        self.predicted_ttft_s = 0.0  # by the first ticket
        self.asked_class = request.slo_class
        self.degraded = ""  # what tickets took off, in words
        self.placed_event: Placed | None = None  # until it was told
        self.first_placed_at: float | None = None
        self.first_token_at: float | None = None
        self.decode_began_at: float | None = None
        self.last_progress_at = now
        self._attempt: Attempt | None = None
        self._num_open = len(self.choices)  # choices without a finish_reason
        self._prompt_scored = request.sampling.prompt_logprobs is None
        self._held: list[TokenUpdate] = []
        self._prefix_hashes: tuple[bytes, ...] | None = None
        self._stopped: list[int] = []

    # ---- where it stands -------------------------------------------------------------------------------------------

    @property
    def attempt(self) -> Attempt:
        assert self._attempt is not None
        return self._attempt

    @property
    def attempt_is_none(self) -> bool:
        return self._attempt is None

    @property
    def is_complete(self) -> bool:
        return self._num_open == 0

    @property
    def gap_at(self) -> float | None:
        """Since when some choice has had later tokens and lacks the next one."""
        if len(self.choices) == 1:
            return self.choices[0].gap_at
        return min((choice.gap_at for choice in self.choices if choice.gap_at is not None), default=None)

    @property
    def max_delivered(self) -> int:
        return max(len(choice.token_ids) for choice in self.choices)

    @property
    def needs_local_prefill(self) -> bool:
        """Choices that differ already, and prompts to be scored, are prefilled where they decode."""
        if self.request.sampling.prompt_logprobs is not None:
            return True
        return len(self.choices) > 1 and self.max_delivered > 0

    @property
    def ended_at_prefill(self) -> bool:
        """The grant was never used: somebody must give its blocks back."""
        return self._attempt is not None and not self._attempt.decode_has_begun

    @property
    def finished_choices(self) -> tuple[int, ...]:
        return tuple(i for i, choice in enumerate(self.choices) if choice.finish_reason is not None)

    @property
    def was_stopped_here(self) -> bool:
        """Some choice ended by a stop string, of which its worker knows nothing."""
        return any(choice.stopped_here for choice in self.choices)

    def delivered_token_ids(self) -> tuple[tuple[int, ...], ...]:
        """Per choice what the client already has, for a worker that takes over; empty on the first attempt."""
        if self.max_delivered == 0:
            return ()
        return tuple(tuple(choice.token_ids) for choice in self.choices)

    def prefix_hashes(self, hashes: Callable[[tuple[int, ...], str], tuple[bytes, ...]]) -> tuple[bytes, ...]:
        if self._prefix_hashes is None:
            self._prefix_hashes = hashes(self.request.prompt_token_ids, self.request.cache_salt)
        return self._prefix_hashes

    # ---- what happens to it ----------------------------------------------------------------------------------------

    def move(self, target: Phase) -> None:
        if self.phase not in TERMINAL:
            self.phase = move(self.phase, target)

    def begin(self, attempt: Attempt, now: float) -> None:
        assert attempt.ticket.epoch > self.epoch, "epochs only grow"
        self.move(Phase.PLACED)
        self._attempt = attempt
        self.epoch = attempt.ticket.epoch
        self.num_attempts += 1
        self.num_vain_attempts += 1
        self.num_resumptions += self.max_delivered > 0
        self.placed_at = now
        if self.first_placed_at is None:
            self.first_placed_at = now
            self.predicted_ttft_s = attempt.ticket.predicted_ttft_s
            self.placed_event = Placed()
        self.timeline.admitted(attempt.ticket, now)
        self.inbox.clear()  # what an earlier epoch left behind
        for choice in self.choices:
            choice.pending.clear()
            choice.gap_at = None
        self._held.clear()

    def degrade(self, ticket: Ticket, adapt: Callable[[Request, str], Request | None]) -> None:
        """The request becomes what the ticket leaves of it, for this attempt and all that follow."""
        request = self.request
        if ticket.model and ticket.model != request.model:
            adapted = adapt(request, ticket.model)
            if adapted is None:
                raise InternalError(f"the scheduler sent this request to {ticket.model}, which cannot read its tokens")
            request = adapted
        if ticket.slo_class and ticket.slo_class != request.slo_class:
            request = msgspec.structs.replace(request, slo_class=ticket.slo_class, claim=msgspec.structs.replace(
                request.claim, ttft_slo_s=None, tpot_slo_s=None))  # fmt: skip
        if ticket.max_tokens is not None:
            most = min(request.sampling.max_tokens or ticket.max_tokens, self.max_delivered + ticket.max_tokens)
            sampling = msgspec.structs.replace(request.sampling, max_tokens=most, min_tokens=min(request.sampling.min_tokens, most))
            request = msgspec.structs.replace(request, sampling=sampling)
        if self.placed_event is not None:
            self.placed_event = Placed(ticket.degraded, request.model if request.model != self.request.model else "")
        self.request, self.degraded = request, ticket.degraded

    def blame(self, error: TandemError) -> None:
        """Remember whom not to be placed on again, if there is anybody else. That decode has no room is nobody's fault: it may
        have some in a moment. Who drains will not, and a prefill worker that takes no more is not worth waiting for.

        Whoever has not delivered yet is at fault: prefill until decode's first frame, unless decode itself is gone.
        """
        attempt = self._attempt
        if attempt is None:
            return
        lacks_room = isinstance(error, ReservationRefused) and not isinstance(error, Draining)
        if lacks_room and not attempt.prefill_was_asked:
            return
        ticket = attempt.ticket
        decode_is_gone = attempt.decode is None or attempt.decode.is_closed
        prefill_was_at_it = attempt.prefill_was_asked and not attempt.decode_has_begun and not decode_is_gone
        blamed = ticket.prefill if prefill_was_at_it else ticket.decode
        assert blamed is not None
        self.excluded = [*self.excluded[-7:], blamed.incarnation]

    def is_moot(self, item: TokenUpdate | RequestFailed | PeerLost) -> bool:
        """What became of the prefill worker does not matter any more once decode delivers."""
        if not self.attempt.decode_has_begun:
            return False
        if isinstance(item, PeerLost):
            return item.role == "prefill"
        return isinstance(item, RequestFailed) and item.stage in ("prefill", "transfer")

    def peer_lost(self, peer: Peer) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        if peer is attempt.decode:
            self.inbox.put(PeerLost("decode"))
        elif peer is attempt.prefill and not attempt.decode_has_begun:
            self.inbox.put(PeerLost("prefill"))

    def finish(self, now: float) -> None:
        self.last_progress_at = now
        self.move(Phase.FINISHED)

    def newly_stopped(self) -> list[int]:
        stopped, self._stopped = self._stopped, []
        return [] if self.is_complete else stopped

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def absorb(self, update: TokenUpdate | RequestFailed | PeerLost, now: float) -> list[Event]:
        """Merge one update; the events that it completes, in order."""
        assert isinstance(update, TokenUpdate)
        attempt = self.attempt
        attempt.has_tokens = True
        if update.cached_tokens > self.cached_tokens:
            self.cached_tokens = update.cached_tokens
        if not (attempt.decode_has_begun if not update.from_prefill else self.timeline.prefill_ended_at):
            self.timeline.frame(update, now)
        if not update.from_prefill and not attempt.decode_has_begun:
            attempt.decode_has_begun = True
            self.decode_began_at = self.decode_began_at or self.timeline.transfer_ended_at or now
            self.move(Phase.DECODING)
        elif update.from_prefill and self.phase is Phase.PREFILLING:
            self.move(Phase.TRANSFERRING)
        if self._prompt_scored:
            return self._merge(update, now)
        if update.prompt_logprobs is None:
            self._held.append(update)
            return []
        self._prompt_scored = True
        events: list[Event] = [PromptScored(update.prompt_logprobs)]
        held, self._held = self._held, []
        for item in (*held, update):
            events += self._merge(item, now)
        return events

    def _merge(self, update: TokenUpdate, now: float) -> list[Event]:
        choice = self.choices[update.choice]
        if update.index == len(choice.token_ids) and not choice.pending and choice.finish_reason is None:  # as nearly all are
            return [self._advance(choice, update, 0, now)]
        known = choice.pending.get(update.index)
        if known is None or len(known.tokens) < len(update.tokens):
            choice.pending[update.index] = update
        events: list[Event] = []
        while choice.finish_reason is None:
            ready = next((u for i, u in choice.pending.items() if i <= len(choice.token_ids)), None)
            if ready is None:
                break
            del choice.pending[ready.index]
            skip = len(choice.token_ids) - ready.index  # what was delivered before: a repeat
            if skip < len(ready.tokens):
                events.append(self._advance(choice, ready, skip, now))
        if not choice.pending or choice.finish_reason is not None:
            choice.gap_at = None
        elif events or choice.gap_at is None:
            choice.gap_at = now
        return events

    def _advance(self, choice: Choice, update: TokenUpdate, skip: int, now: float) -> Tokens:
        """The next tokens of a choice: update.tokens[skip:], of which there are some."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.timeline.first_token(now)
        self.last_progress_at = now
        self.num_vain_attempts = 0
        event = self._deliver(choice, update, skip)
        self.timeline.tokens(len(event.token_ids), choice.last_at, now)
        choice.last_at = now
        return event

    def _deliver(self, choice: Choice, update: TokenUpdate, skip: int) -> Tokens:
        tokens, logprobs = update.tokens, update.logprobs
        if skip:
            tokens, logprobs = tokens[skip:], logprobs[skip:] if logprobs else None
        start = len(choice.token_ids)
        stop_reason: int | str | None = update.stop_reason
        text, stop = choice.detokenizer.feed(tokens[:1])
        taken = 1
        while taken < len(tokens) and stop is None:
            piece, stop = choice.detokenizer.feed(tokens[taken : taken + 1])
            text += piece
            taken += 1
        if taken < len(tokens):
            tokens, logprobs = tokens[:taken], logprobs[:taken] if logprobs is not None else None
        choice.token_ids += tokens
        if stop is not None:
            choice.finish_reason, stop_reason, choice.stopped_here = "stop", stop, True
            self._num_open -= 1
            if update.finish_reason is None:
                self._stopped.append(update.choice)
        elif update.finish_reason is not None:
            choice.finish_reason = update.finish_reason
            self._num_open -= 1
            text += choice.detokenizer.flush()
        return Tokens(update.choice, start, tokens, text, logprobs, choice.finish_reason, stop_reason)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def timing(self, now: float) -> Timing:
        placed = self.first_placed_at if self.first_placed_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        began = self.decode_began_at if self.decode_began_at is not None else first
        return Timing(
            queue_s=placed - self.received_at,
            prefill_s=first - placed if self.first_token_at is not None else 0.0,
            transfer_s=max(0.0, began - first),
            decode_s=max(0.0, self.last_progress_at - first),
            ttft_s=first - self.received_at if self.first_token_at is not None else 0.0,
            e2e_s=now - self.received_at,
        )

    def usage(self) -> Usage:
        completion = sum(len(choice.token_ids) for choice in self.choices)
        return Usage(self.request.prompt_len, completion, min(self.cached_tokens, self.request.prompt_len), self.num_resumptions)

    def finished_event(self) -> Finished:
        return Finished(self.usage(), self.timing(self.last_progress_at), self.degraded)

    def outcome(
        self, make: Callable[..., _OutcomeT], kind: str, failure_kind: str, now: float, failure: str | None = None
    ) -> _OutcomeT:
        usage, timing = self.usage(), self.timing(now)
        longest = self.max_delivered
        self.timeline.ended(kind, now)
        return make(
            request_id=self.request.request_id,
            epoch=self.epoch,
            kind=kind,
            tenant=self.request.tenant,
            slo_class=self.request.slo_class,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            queue_s=timing.queue_s,
            ttft_s=timing.ttft_s,
            tpot_s=timing.decode_s / (longest - 1) if longest > 1 else 0.0,
            e2e_s=timing.e2e_s,
            failure_kind=failure_kind,
            finish_reason=self.choices[0].finish_reason or "",
            trace=self.trace(timing, failure),
            asked_class=self.asked_class if self.asked_class != self.request.slo_class else "",
            degraded=self.degraded,
            ttft_slo_s=self.request.claim.ttft_slo_s,
            tpot_slo_s=self.request.claim.tpot_slo_s,
        )

    def trace(self, timing: Timing, failure: str | None = None) -> Trace:
        """What it has been through so far, for people."""
        prefill, decode = self.timeline.workers
        placed = self.first_placed_at if self.first_placed_at is not None else self.received_at
        return Trace(
            client_id=self.request.origin.client_id,
            model=self.request.model,
            prefill_worker=prefill,
            decode_worker=decode,
            prefill_s=timing.prefill_s,
            transfer_s=timing.transfer_s,
            decode_s=timing.decode_s,
            num_resumptions=self.num_resumptions,
            max_tokens=self.request.sampling.max_tokens or 0,
            num_choices=len(self.choices),
            max_output=self.max_delivered,
            predicted_ttft_s=self.predicted_ttft_s,
            placed_ttft_s=self.first_token_at - placed if self.first_token_at is not None else 0.0,
            failure=failure,
            gaps=tuple(self.timeline.gaps.items()),
            gap_s=self.timeline.gap_s,
            marks=self.timeline.marks(),
        )
