"""Seeds that found something once, what it was, and which mutant puts it back."""

from __future__ import annotations

PINNED: dict[int, str] = {
    2: "a hand-shake whose answer was lost left a quarantine that nobody could lift: decode knew the writer, the writer no link",
    66: "an Admit whose answer was lost was waited for until the queue's deadline, two minutes by default",
    558: "prefill's GoneAway crossed the wire as an InternalError, so a request failed that another attempt would have saved",
}

# Where to begin to look; a mutant without an entry is noticed within a few dozen seeds.
NOTICED_BY: dict[str, int] = {
    "admission_asked_once": 66,
    "own_errors_unknown_to_others": 558,
}
