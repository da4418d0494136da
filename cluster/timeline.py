"""Keeps one request's marks while its walk goes on: bounded, cheap per token, in order. Owned by `walk.Walk`.

It decides nothing; with `is_on` false it remembers nothing either.
"""

from __future__ import annotations

from bisect import bisect_left

from protocol.messages import TokenUpdate
from protocol.ticket import Ticket
from protocol.timeline import GAP_BUCKETS, Mark, worker_name

FIRST_STRIDE = 16  # tokens between two marks; doubled whenever there are MAX_TOKEN_MARKS
MAX_TOKEN_MARKS = 32
MAX_MARKS = 192  # of all kinds; twelve attempts leave fewer
MAX_DETAIL = 200


class Timeline:
    """All times are the gateway's monotonic clock, seconds; marks count from `received_at`."""

    def __init__(self, received_at: float, intake_s: float, is_on: bool = True) -> None:
        self.is_on = is_on
        self.gaps: dict[int, int] = {}  # bucket of GAP_BUCKETS -> how many
        self.gap_s = 0.0  # their sum
        self.prefill_ended_at: float | None = None  # of this attempt
        self.transfer_ended_at: float | None = None
        self._received_at = received_at
        self._marks: list[Mark] = []
        self._token_marks: list[Mark] = []
        self._stride = FIRST_STRIDE
        self._num_tokens = 0
        self._last_at = received_at  # of the last mark that is not a token's: nothing is dated before it
        self._prefill: str | None = None
        self._decode: str | None = None
        self._is_local = False
        self._mark("received", received_at)
        self._mark("tokenized", received_at + intake_s)

    @property
    def workers(self) -> tuple[str | None, str | None]:
        """(prefill, decode) by name, of the last attempt."""
        return self._prefill, self._decode

    def marks(self) -> tuple[Mark, ...]:
        """In order of time; equal times in the order in which they were made."""
        return tuple(sorted((*self._marks, *self._token_marks), key=lambda mark: mark.at_s))

    def admitted(self, ticket: Ticket, now: float) -> None:
        self._decode = worker_name(ticket.decode.incarnation)
        self._is_local = ticket.prefill is None
        self._prefill = worker_name(ticket.prefill.incarnation) if ticket.prefill is not None else self._decode
        self.prefill_ended_at = self.transfer_ended_at = None
        self._mark("admitted", now, None, f"predicted TTFT {1e3 * ticket.predicted_ttft_s:.0f} ms")

    def reserved(self, num_cached_tokens: int, now: float) -> None:
        self._mark("reserved", now, self._decode, f"{num_cached_tokens} tokens cached there" if num_cached_tokens else None)

    def frame(self, update: TokenUpdate, now: float) -> None:
        """A worker's first frame of an attempt, or the first of each worker: what it measured dates what it did."""
        if not self.is_on:
            return
        spent = update.spent
        if self.prefill_ended_at is None and (update.from_prefill or self._is_local):
            computed = spent.compute_s if spent is not None else 0.0
            waited = f"waited {1e3 * spent.queue_s:.1f} ms there" if spent is not None else None
            self._mark("prefill_start", now - computed, self._prefill, waited)
            self._mark("prefill_end", now, self._prefill, f"{update.cached_tokens} tokens from its cache")
            self.prefill_ended_at = now
        elif self.transfer_ended_at is None and not update.from_prefill and not self._is_local:
            ended = now - (spent.queue_s if spent is not None else 0.0)
            if self.prefill_ended_at is None:  # decode's frame overtook prefill's
                self.prefill_ended_at = ended - (spent.transfer_s if spent is not None else 0.0)
                self._mark("prefill_end", self.prefill_ended_at, self._prefill)
            took = f"{1e3 * spent.transfer_s:.1f} ms until verified" if spent is not None else None
            self._mark("transfer_end", ended, self._decode, took)
            self.transfer_ended_at = max(ended, self.prefill_ended_at)

    def first_token(self, now: float) -> None:
        self._mark("first_token", now)

    def tokens(self, count: int, since: float | None, now: float) -> None:
        """`count` more tokens of one choice, whose last one before came at `since`."""
        if since is not None:
            bucket = bisect_left(GAP_BUCKETS, now - since)
            self.gaps[bucket] = self.gaps.get(bucket, 0) + 1
            self.gap_s += now - since
        before, self._num_tokens = self._num_tokens, self._num_tokens + count
        if before // self._stride != self._num_tokens // self._stride and self.is_on:
            self._token_marks.append(Mark(round(now - self._received_at, 6), "token", self._decode, f"{self._num_tokens} tokens"))
            if len(self._token_marks) >= MAX_TOKEN_MARKS:
                self._token_marks = self._token_marks[1::2]
                self._stride *= 2

    def resumed(self, reason: str, now: float) -> None:
        """An attempt is over and another one follows."""
        self._mark("resumed", now, None, reason)

    def ended(self, kind: str, now: float) -> None:
        self._mark("end", now, None, kind)

    def _mark(self, name: str, at: float, worker: str | None = None, detail: str | None = None) -> None:
        if not self.is_on or len(self._marks) >= MAX_MARKS:
            return
        self._last_at = at = max(at, self._last_at)
        self._marks.append(Mark(round(at - self._received_at, 6), name, worker, detail[:MAX_DETAIL] if detail else None))
