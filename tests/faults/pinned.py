"""Seeds that meet what once was wrong, what it was, and where to begin to look for what a mutant breaks.

A change to plans.py, or to what the product does, gives seeds another history: find new ones with the mutants.
"""

from __future__ import annotations

PINNED: dict[int, str] = {
    654: "a hand-shake whose answer was lost left a quarantine that nobody could lift: decode knew the writer, the writer no link",
    5: "an Admit whose answer was lost was waited for until the queue's deadline, two minutes by default",
    1840: "a decode group that was stopped did not answer when a void grant ended, and nobody asked again: quarantine for ever",
    295: "prefill's GoneAway crossed the wire as an InternalError, so a request failed that another attempt would have saved",
}

# The others are noticed within ten seeds.
NOTICED_BY: dict[str, int] = {
    "digest_check_skipped": 21,
    "source_released_before_it_was_read": 27,
    "silence_taken_for_death": 26,
    "epoch_ignored_at_the_gateway": 81,
    "outcome_dropped": 13,
    "leases_never_end": 17,
    "dead_gateways_work_goes_on": 53,
    "dead_workers_still_placed": 23,
    "verifying_blocks_released_on_cancel": 18,
    "own_errors_unknown_to_others": 295,
    "cancel_not_sent": 245,
    "unfinished_handshake_not_owed": 654,
    "claims_believed": 283,
    "kept_under_another_hash": 29,
    "told_digests_believed": 21,
    "hashed_is_good": 24,
    "draining_is_the_requests_fault": 59,
    "drained_prompts_fail": 11,
    "draining_worker_refuses_for_good": 27,
}
