"""Why a request got what it got: the last decisions, in a bounded ring. Read by `tandem explain` and GET /admin/decisions/{id}.

A row is kept as what was at hand when it was decided, and made into JSON when somebody asks: deciding must stay cheap.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import msgspec

from protocol.messages import Admit, Outcome


class Candidate(NamedTuple):
    """One worker that was looked at. Predictions in seconds; None: does not apply. why_not: "" for those that could have had it."""

    worker: str
    role: str
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    cached: int = 0
    load: int = 0  # sequences
    why_not: str = ""


class Looked(Protocol):
    """Whom a placement looked at, as numbers."""

    def candidates(self) -> tuple[Candidate, ...]: ...


class Row:
    """One request, over all its attempts."""

    def __init__(self, admit: Admit, now: float) -> None:
        self.admit = admit
        self.at = now
        self.steps: list[tuple[float, str, dict[str, Any]]] = []
        self.looked: Looked | None = None
        self.outcome: Outcome | None = None
        self.first_token_s: float | None = None

    def document(self) -> dict[str, Any]:
        admit, outcome = self.admit, self.outcome
        return {
            "request_id": admit.request_id,
            "request": {
                "client_id": admit.client_id or None,
                "model": admit.model,
                "tenant": admit.tenant,
                "class": admit.slo_class,
                "priority": admit.priority,
                "prompt_tokens": admit.prompt_len,
                "max_tokens": admit.max_tokens,
                "choices": admit.num_choices,
                "is_retry": admit.is_retry,
                "waited_s": admit.waited_s,
            },
            "promise": {"ttft_s": admit.ttft_slo_s, "tpot_s": admit.tpot_slo_s},
            "steps": [{"at_s": at - self.at, "what": what, **details} for at, what, details in self.steps],
            "candidates": [candidate._asdict() for candidate in (self.looked.candidates() if self.looked is not None else ())],
            "came_true": None
            if outcome is None and self.first_token_s is None
            else {
                "placed_to_first_token_s": self.first_token_s,
                "kind": outcome.kind if outcome else None,
                "ttft_s": outcome.ttft_s if outcome else None,
                "tpot_s": outcome.tpot_s if outcome else None,
                "queue_s": outcome.queue_s if outcome else None,
                "output_tokens": outcome.output_tokens if outcome else None,
                "cached_tokens": outcome.cached_tokens if outcome else None,
            },
        }


MAX_STEPS = 32  # of one request


class Decisions:
    """The newest `max_rows` requests."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._by_client: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def asked(self, admit: Admit, now: float) -> Row:
        """It came, or came again."""
        row = self._rows.get(admit.request_id)
        if row is None:
            row = self._rows[admit.request_id] = Row(admit, now)
            if admit.client_id:
                self._by_client[admit.client_id] = admit.request_id
            if len(self._rows) > self._max_rows:
                _, gone = self._rows.popitem(last=False)
                if self._by_client.get(gone.admit.client_id) == gone.admit.request_id:
                    del self._by_client[gone.admit.client_id]
        return row

    def note(self, request_id: str, now: float, what: str, **details: Any) -> None:
        """One step of a request's way; nothing for one that is not remembered."""
        row = self._rows.get(request_id)
        if row is not None and len(row.steps) < MAX_STEPS:
            row.steps.append((now, what, details))

    def saw(self, request_id: str, looked: Looked) -> None:
        """Whom its last placement looked at."""
        row = self._rows.get(request_id)
        if row is not None:
            row.looked = looked

    def first_token(self, request_id: str, seconds: float) -> None:
        row = self._rows.get(request_id)
        if row is not None:
            row.first_token_s = seconds

    def ended(self, outcome: Outcome, now: float) -> None:
        row = self._rows.get(outcome.request_id)
        if row is not None:
            row.outcome = msgspec.structs.replace(outcome, trace=None)

    def get(self, request_id: str) -> Row | None:
        return self._rows.get(request_id) or self._rows.get(self._by_client.get(request_id, ""))

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """JSON-ready; None for a request that is not remembered. Takes the client's own name of it as well."""
        row = self.get(request_id)
        return row.document() if row is not None else None
