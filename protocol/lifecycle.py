"""The phases of one request at the gateway, and the one table of allowed moves.

    RECEIVED ──> QUEUED ──> PLACED ──> RESERVED ──> PREFILLING ──> TRANSFERRING ──> DECODING ──> FINISHED
                   ^  │        │           │             │  │            │             │  │
                   │  │        └───────────┴─────────────┼──┼────────────┴─────────────┘  └──> FAILED (from anywhere)
                   │  │   a worker refused, died or timed out: next epoch   │
                   └──┼──────────────────────────────────┘                 ends with token 1: FINISHED
                      └──> FAILED (429, 503)

A request whose decode worker prefills by itself goes PREFILLING -> DECODING without TRANSFERRING.
"""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    RECEIVED = "received"
    QUEUED = "queued"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"


ALLOWED: dict[Phase, frozenset[Phase]] = {
    Phase.RECEIVED: frozenset({Phase.QUEUED, Phase.FAILED}),
    Phase.QUEUED: frozenset({Phase.PLACED, Phase.FAILED}),
    Phase.PLACED: frozenset({Phase.RESERVED, Phase.QUEUED, Phase.FAILED}),
    Phase.RESERVED: frozenset({Phase.PREFILLING, Phase.QUEUED, Phase.FAILED}),
    Phase.PREFILLING: frozenset({Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED, Phase.QUEUED, Phase.FAILED}),
    Phase.TRANSFERRING: frozenset({Phase.DECODING, Phase.FINISHED, Phase.QUEUED, Phase.FAILED}),
    Phase.DECODING: frozenset({Phase.FINISHED, Phase.QUEUED, Phase.FAILED}),
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
}
TERMINAL = frozenset({Phase.FINISHED, Phase.FAILED})


def move(current: Phase, target: Phase) -> Phase:
    """The target, if the table allows the move."""
    assert target in ALLOWED[current], f"a request may not go from {current.value} to {target.value}"
    return target
