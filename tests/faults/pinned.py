"""Seeds that found something once, what it was, and which mutant puts it back."""

from __future__ import annotations

PINNED: dict[int, str] = {
    2: "a hand-shake whose answer was lost left a quarantine that nobody could lift: decode knew the writer, the writer no link",
    66: "an Admit whose answer was lost was waited for until the queue's deadline, two minutes by default",
    558: "prefill's GoneAway crossed the wire as an InternalError, so a request failed that another attempt would have saved",
}

# Where to begin to look for what a mutant breaks; the others are noticed within ten seeds.
NOTICED_BY: dict[str, int] = {
    "released_without_the_writers_word": 21,
    "epoch_ignored_at_the_gateway": 85,
    "leases_never_end": 15,
    "dead_gateways_work_goes_on": 37,
    "cancel_not_sent": 32,
    "dead_workers_still_placed": 51,
    "verifying_blocks_released_on_cancel": 29,
    "admission_asked_once": 66,
    "own_errors_unknown_to_others": 558,
}
