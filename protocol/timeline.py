"""What happened to one request and when: `Mark`s on the gateway's clock, the numbers that go with them, and the phases in between.

A mark's time counts from when the gateway had the request's body; every mark is made by one gateway, so clocks of different
hosts are never subtracted. What a worker knows better travels as durations that it measured itself (`Spent`). Made by
`cluster/timeline.py`, sent with `messages.Outcome`, kept by `cluster/history.py`, drawn by the dashboard and `tandem trace`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

# In the order in which they come; those of an attempt come again after "resumed".
MARKS = (
    "received",
    "tokenized",
    "admitted",
    "reserved",
    "prefill_start",
    "prefill_end",
    "transfer_end",
    "first_token",
    "token",
    "resumed",
    "end",
)
# Upper bounds of gaps between two tokens, seconds; one more bucket is above the last. vLLM's, with finer ones below.
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75) + (
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip


class Origin(msgspec.Struct, frozen=True):
    """Where a request came from. For people and traces; nothing is decided by it.

    client_id: the X-Request-Id that it was answered with. intake_s: from its body being read until it was tokenized.
    operation: as OpenTelemetry calls it, "chat" or "text_completion".
    """

    client_id: str = ""
    traceparent: str = ""
    intake_s: float = 0.0
    operation: str = "text_completion"


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Seconds of one attempt, measured by the worker that says so. Prefill tells how long the prompt waited there and was
    computed; decode how long the KV took (computed -> verified) and then waited for its first step."""

    queue_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """at_s: seconds since the request was received. name: of MARKS. detail: for people."""

    at_s: float
    name: str
    worker: str | None = None
    detail: str | None = None


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """What goes with an Outcome for those who look at it afterwards. Workers by name ("decode:0"), of the last attempt.

    gaps: (bucket of GAP_BUCKETS, how many): times between two tokens of one choice. predicted_ttft_s: of the first ticket,
    from its placement on; placed_ttft_s: what became of it. failure: the message, when it failed.
    """

    client_id: str = ""
    model: str = ""
    prefill_worker: str | None = None
    decode_worker: str | None = None
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    num_resumptions: int = 0
    max_tokens: int = 0
    num_choices: int = 1
    max_output: int = 0  # tokens of the longest choice
    predicted_ttft_s: float = 0.0
    placed_ttft_s: float = 0.0
    failure: str | None = None
    gaps: tuple[tuple[int, int], ...] = ()
    gap_s: float = 0.0  # their sum
    marks: tuple[Mark, ...] = ()


class Phase(NamedTuple):
    """One bar of a waterfall; seconds since the request was received."""

    name: str  # "intake" | "queue" | "reserve" | "wait" | "prefill" | "transfer" | "decode"
    start_s: float
    end_s: float
    worker: str | None
    is_lost: bool  # cut short: another attempt followed, or nothing


_ENDS = {  # a mark -> the phase that it ends
    "tokenized": "intake",
    "admitted": "queue",
    "reserved": "reserve",
    "prefill_start": "wait",
    "prefill_end": "prefill",
    "transfer_end": "transfer",
}
_NEXT = {  # a mark -> the phase that begins with it, as far as one can tell by then
    "received": "intake",
    "tokenized": "queue",
    "admitted": "reserve",
    "reserved": "wait",
    "prefill_start": "prefill",
    "prefill_end": "transfer",
    "transfer_end": "decode",
    "resumed": "queue",
}


def phases(marks: Sequence[Mark], kind: str = "finished") -> list[Phase]:
    """The bars between the marks, without gaps and in order. kind: how it ended."""
    found: list[Phase] = []
    name, since = "intake", 0.0
    worker: str | None = None
    decode: str | None = None
    for mark in marks:
        if mark.name in _ENDS:
            worker = mark.worker or worker
            decode = worker if mark.name == "reserved" else decode
            found.append(Phase(_ENDS[mark.name], since, max(since, mark.at_s), mark.worker, False))
        elif mark.name in ("resumed", "end"):
            is_lost = mark.name == "resumed" or kind != "finished"
            if mark.at_s > since and not (name == "transfer" and not is_lost):  # else it ended with token 1
                found.append(Phase(name, since, mark.at_s, worker, is_lost))
        if mark.name in _NEXT:
            name, since = _NEXT[mark.name], max(since, mark.at_s)
            if mark.name == "prefill_end" and mark.worker == decode:
                name = "decode"  # prefilled where it decodes: nothing travels
            worker = mark.worker or worker
    return found


def worker_name(incarnation: str) -> str:
    """ "decode-0-1f2e3d" -> "decode:0"; anything else as it is."""
    parts = incarnation.rsplit("-", 2)
    return f"{parts[0]}:{parts[1]}" if len(parts) == 3 and parts[1].isdigit() else incarnation


def count_gaps(gaps: Iterable[tuple[int, int]]) -> list[int]:
    """One count per bucket of GAP_BUCKETS and the one above; what is out of range is left out."""
    counts = [0] * (len(GAP_BUCKETS) + 1)
    for bucket, count in gaps:
        if 0 <= bucket < len(counts) and count > 0:
            counts[bucket] += count
    return counts
