"""Which workers serve a request: predictions and choices, pure functions of ledger, cost models and prefix index.

    prefill worker  least predicted TTFT = its queue + the uncached part of the prompt (+ transfer)
    decode worker   the fullest one whose step time still keeps the promise, and whose blocks and sequences still fit,
                    at the moment the prefill ends; nobody keeps it: the one with the least predicted step time
    neither         a prompt with few uncached tokens, or no prefill worker alive: the decode worker prefills by itself

Filling one decode worker before the next leaves whole workers free for what needs them (PolyServe's load gradient);
least TTFT over a global prefix view is Mooncake's conductor. Called by `scheduler.Scheduler` only.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from protocol.messages import Admit
from scheduler.cost import OutputLength
from scheduler.ledger import WorkerState, blocks_at_end, blocks_to_reserve


class Blocked(enum.Enum):
    """Why a request cannot be placed now."""

    NO_WORKER = "no worker"  # none alive that this request may use: others may still go ahead
    NO_ROOM = "no room"  # it is first in line and waits for room


class Placement(NamedTuple):
    decode: WorkerState
    prefill: WorkerState | None
    cached: int  # prompt tokens that the prefilling worker is believed to hold
    prefill_s: float  # predicted, without queueing
    ttft_s: float  # predicted, from now
    expected_output: float  # tokens of one choice


class Rules(NamedTuple):
    """What the configuration says about placement."""

    disaggregation_threshold: int
    tpot_target_s: float
    max_prefill_queue_s: float  # work beyond it waits in the scheduler's queue, where it can still change its mind
    hash_block_len: int  # tokens behind one hash of Admit.prefix_hashes


class Candidate(NamedTuple):
    """A decode worker with room, and what it would be like there."""

    worker: WorkerState
    tpot_s: float
    num_seqs: float  # at the moment the prefill ends
    is_local: bool


def place(
    admit: Admit,
    workers: Sequence[WorkerState],
    output: OutputLength,
    matches: Mapping[str, int],
    rules: Rules,
    now: float,
) -> Placement | Blocked:
    """Where this request goes now. `workers`: those of its model. `matches`: incarnation -> leading hashes it holds."""
    usable = [w for w in workers if w.takes_work and w.incarnation not in admit.excluded]
    decodes = [w for w in usable if w.info.role == "decode"]
    if not decodes:
        return Blocked.NO_WORKER
    prefills = [] if admit.local_prefill else [w for w in usable if w.info.role == "prefill"]
    expected = output.expected(admit.max_tokens)

    def cached(worker: WorkerState) -> int:
        return min(matches.get(worker.incarnation, 0) * rules.hash_block_len, admit.prompt_len - 1)

    best = _best_prefill(admit, prefills, cached, now)
    candidates = []
    for worker in decodes:
        is_short = admit.prompt_len - cached(worker) < rules.disaggregation_threshold
        is_local = best is None or (is_short and worker.info.can_prefill)
        if is_local:
            until_first = _queue_and_prefill(admit, worker, cached(worker), now)[0]
        else:
            assert best is not None, "not local has a prefill worker"
            until_first = best[1]
        candidate = _candidate(admit, worker, output.mean, expected, until_first, is_local)
        if candidate is not None:
            candidates.append(candidate)
    if not candidates:
        return Blocked.NO_ROOM
    chosen = _fullest(candidates, rules.tpot_target_s)
    if chosen.is_local:
        ttft, prefill_s = _queue_and_prefill(admit, chosen.worker, cached(chosen.worker), now)
        return Placement(chosen.worker, None, cached(chosen.worker), prefill_s, ttft, expected)
    assert best is not None, "not local has a prefill worker"
    worker, ttft, prefill_s = best
    if worker.prefill_queue_s(now) > rules.max_prefill_queue_s and len(worker.prefills) >= 2:
        return Blocked.NO_ROOM
    return Placement(chosen.worker, worker, cached(worker), prefill_s, ttft, expected)


def _best_prefill(
    admit: Admit, prefills: Sequence[WorkerState], cached: Callable[[WorkerState], int], now: float
) -> tuple[WorkerState, float, float] | None:
    """(worker, predicted TTFT, its prefill alone), or None without a prefill worker. Ties go to the one used least."""
    best: tuple[float, int, str] | None = None
    found: tuple[WorkerState, float, float] | None = None
    for worker in prefills:
        ttft, prefill_s = _queue_and_prefill(admit, worker, cached(worker), now)
        layout = worker.info.layout
        # Layers travel while the next ones compute; what is left at the end is about one layer's share of the blocks.
        tail = layout.num_blocks_for(admit.prompt_len) * layout.run_nbytes
        ttft += worker.cost.transfer_s(tail)
        rank = (ttft, len(worker.prefills), worker.incarnation)
        if best is None or rank < best:
            best, found = rank, (worker, ttft, prefill_s)
    return found


def _queue_and_prefill(admit: Admit, worker: WorkerState, cached: int, now: float) -> tuple[float, float]:
    prefill_s = worker.cost.prefill_s(admit.prompt_len, cached) * worker.prefill_drift.factor
    return worker.prefill_queue_s(now) + prefill_s, prefill_s


def _candidate(
    admit: Admit, worker: WorkerState, mean_output: float, expected: float, until_first: float, is_local: bool
) -> Candidate | None:
    """What the worker will be like when this request starts to decode there; None without room."""
    info, cost, choices = worker.info, worker.cost, admit.num_choices
    drift = worker.decode_drift.factor
    step_s = cost.decode_s(worker.num_decoding, worker.num_context_tokens) * drift
    # Of those that decode now, some will have ended. Lengths are taken as memoryless: nobody knows when one stops.
    survivors = worker.num_decoding * math.exp(-until_first / (step_s * mean_output))
    num_seqs = survivors + worker.num_coming + choices
    if worker.is_full:
        return None
    if worker.entries:  # an empty worker takes whatever its pool can hold
        if num_seqs > info.max_num_seqs:
            return None
        at_end = blocks_at_end(info, admit.prompt_len, choices, expected)
        if worker.blocks_at_end + at_end > info.num_blocks:
            return None
    # The worker keeps a block free for every other running sequence's next token; so must this prediction.
    headroom = (worker.num_decoding + worker.num_coming) // 2
    if worker.num_free_blocks < blocks_to_reserve(info, admit.prompt_len, choices) + headroom:
        return None
    share = num_seqs / max(1.0, worker.num_decoding + worker.num_coming + choices)
    context = worker.num_context_tokens * share + choices * (admit.prompt_len + expected / 2)
    return Candidate(worker, cost.decode_s(num_seqs, context) * drift, num_seqs, is_local)


def _fullest(candidates: Sequence[Candidate], tpot_target_s: float) -> Candidate:
    """The fullest that keeps the promise, one that has the prompt's prefix first; else the least overfull."""
    keeping = [c for c in candidates if c.tpot_s <= tpot_target_s]
    if not keeping:
        return min(candidates, key=lambda c: (c.tpot_s, c.worker.incarnation))
    local = [c for c in keeping if c.is_local]
    return max(local or keeping, key=lambda c: (c.num_seqs, c.worker.blocks_at_end, c.worker.incarnation))
