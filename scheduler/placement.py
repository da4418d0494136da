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
from typing import NamedTuple, Protocol

from protocol.errors import TandemError
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
    tpot_s: float = 0.0  # predicted; 0: not
    tpot_limit: float = math.inf  # seconds a token that others must leave it; infinite: nothing was promised that could be kept


class Refused(NamedTuple):
    """For policies that reject: the request is over, with this error."""

    error: TandemError


class Placer(Protocol):
    """Decides where one request goes now. `workers`: those of its model. `matches`: incarnation -> leading hashes it holds.
    admit.ttft_slo_s and tpot_slo_s are what it was promised; it waits since `queued_at`."""

    def place(
        self,
        admit: Admit,
        workers: Sequence[WorkerState],
        output: OutputLength,
        matches: Mapping[str, int],
        queued_at: float,
        now: float,
    ) -> Placement | Blocked | Refused: ...


class Rules(NamedTuple):
    """What the configuration says about placement."""

    disaggregation_threshold: int
    tpot_target_s: float
    max_prefill_queue_s: float  # work beyond it waits in the scheduler's queue, where it can still change its mind
    hash_block_len: int  # tokens behind one hash of Admit.prefix_hashes
    attainment: float = 0.9  # the share of requests that is to keep its promise


class OneByOne:
    """Today's `place` with its rules bound: looks at every worker in turn."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def place(
        self,
        admit: Admit,
        workers: Sequence[WorkerState],
        output: OutputLength,
        matches: Mapping[str, int],
        queued_at: float,
        now: float,
    ) -> Placement | Blocked | Refused:
        return place(admit, workers, output, matches, self._rules, queued_at, now)


class BestPrefill(NamedTuple):
    worker: WorkerState
    ttft_s: float  # predicted
    prefill_s: float  # of it, the prefill alone


class Candidate(NamedTuple):
    """A decode worker with room that would break the promise."""

    worker: WorkerState
    tpot_s: float


def place(
    admit: Admit,
    workers: Sequence[WorkerState],
    output: OutputLength,
    matches: Mapping[str, int],
    rules: Rules,
    queued_at: float,
    now: float,
) -> Placement | Blocked:
    """Where this request goes now. `workers`: those of its model. `matches`: incarnation -> leading hashes it holds.

    Excluded workers are the last choice, not a forbidden one: a decode worker that failed this request takes it when there
    is no other and a heartbeat since `queued_at` shows that it lives; a prefill worker when decode cannot prefill either.
    """
    excluded = admit.excluded
    taking = [w for w in workers if w.takes_work]
    usable = [w for w in taking if w.incarnation not in excluded] if excluded else taking
    decodes = [w for w in usable if w.info.role == "decode"]
    if not decodes and excluded:
        decodes = [w for w in taking if w.info.role == "decode" and w.last_beat_at > queued_at]
    if not decodes:
        return Blocked.NO_WORKER
    prefills = [w for w in usable if w.info.role == "prefill"]
    if excluded and not prefills and not any(w.info.can_prefill for w in decodes):
        prefills = [w for w in taking if w.info.role == "prefill"]
    if admit.local_prefill:
        prefills = []
    expected = output.expected(admit.max_tokens)

    def cached(worker: WorkerState) -> int:
        num_hashes = matches.get(worker.incarnation) if matches else None
        return min(num_hashes * rules.hash_block_len, admit.prompt_len - 1) if num_hashes else 0

    best = _best_prefill(admit, prefills, cached, now)
    threshold = rules.disaggregation_threshold
    everywhere = best is None or admit.prompt_len < threshold
    local: list[WorkerState] = []
    if everywhere or matches:
        short = [w for w in decodes if w.info.can_prefill and admit.prompt_len - cached(w) < threshold]
        local = decodes if best is None else short
    chosen = None
    overfull: list[Candidate] = []
    if local:

        def until_first(worker: WorkerState) -> float:
            return _queue_and_prefill(admit, worker, cached(worker), now)[0]

        chosen = _fullest(admit, local, output, until_first, rules.tpot_target_s, overfull)
    if chosen is None and best is not None:
        ttft_s = best.ttft_s
        others = [w for w in decodes if w not in local] if local else decodes
        chosen = _fullest(admit, others, output, lambda _: ttft_s, rules.tpot_target_s, overfull)
    if chosen is None and overfull:  # nobody keeps the promise: where it is missed by the least
        chosen = min(overfull, key=lambda c: (c.tpot_s, c.worker.incarnation)).worker
    if chosen is None:
        return Blocked.NO_ROOM
    if best is None or chosen in local:
        ttft_s, prefill_s = _queue_and_prefill(admit, chosen, cached(chosen), now)
        return Placement(chosen, None, cached(chosen), prefill_s, ttft_s, expected)
    if best.worker.prefill_queue_s(now) > rules.max_prefill_queue_s and len(best.worker.prefills) >= 2:
        return Blocked.NO_ROOM
    return Placement(chosen, best.worker, cached(best.worker), best.prefill_s, best.ttft_s, expected)


def _best_prefill(
    admit: Admit, prefills: Sequence[WorkerState], cached: Callable[[WorkerState], int], now: float
) -> BestPrefill | None:
    """Least predicted TTFT; None without a prefill worker whose pool holds the prompt. Ties: the shorter queue."""
    best: tuple[float, int, str] | None = None
    found: BestPrefill | None = None
    for worker in prefills:
        layout = worker.info.layout
        num_blocks = layout.num_blocks_for(admit.prompt_len)
        if num_blocks > worker.info.num_blocks:
            continue
        ttft, prefill_s = _queue_and_prefill(admit, worker, cached(worker), now)
        # Layers travel while the next ones compute; what is left at the end is about one layer's share of the blocks.
        ttft += worker.cost.transfer_s(num_blocks * layout.run_nbytes)
        rank = (ttft, len(worker.prefills), worker.incarnation)
        if best is None or rank < best:
            best, found = rank, BestPrefill(worker, ttft, prefill_s)
    return found


def _queue_and_prefill(admit: Admit, worker: WorkerState, cached: int, now: float) -> tuple[float, float]:
    prefill_s = worker.cost.prefill_s(admit.prompt_len, cached) * worker.prefill_drift.factor
    return worker.prefill_queue_s(now) + prefill_s, prefill_s


def _fullest(
    admit: Admit,
    workers: Sequence[WorkerState],
    output: OutputLength,
    until_first: Callable[[WorkerState], float],
    tpot_target_s: float,
    overfull: list[Candidate],
) -> WorkerState | None:
    """The first, from the fullest down, that has room and keeps the promise. Those with room that do not: `overfull`."""
    for worker in sorted(workers, key=_load, reverse=True):
        tpot_s = _predicted_tpot(admit, worker, output, until_first)
        if tpot_s is not None:
            if tpot_s <= tpot_target_s:
                return worker
            overfull.append(Candidate(worker, tpot_s))
    return None


def _load(worker: WorkerState) -> tuple[int, int, str]:
    return worker.num_decoding + worker.num_coming, worker.blocks_at_end, worker.incarnation


def _blocks_to_begin(admit: Admit, worker: WorkerState) -> int:
    wanted = blocks_to_reserve(worker.info, admit.prompt_len, admit.num_choices)
    if admit.resumption and admit.local_prefill and not worker.entries:
        # Choices that differ come back one after the other, so alone it needs no more than the first of them does.
        return min(wanted, worker.info.layout.num_blocks_for(admit.prompt_len))
    return wanted


def _predicted_tpot(
    admit: Admit, worker: WorkerState, output: OutputLength, until_first: Callable[[WorkerState], float]
) -> float | None:
    """A step's time when this request starts to decode there; None without room for it."""
    if worker.is_full:
        return None
    info, cost, choices = worker.info, worker.cost, admit.num_choices
    # The worker keeps a block free for every other running sequence's next token; so must this prediction.
    headroom = (worker.num_decoding + worker.num_coming) // 2
    if worker.num_free_blocks < _blocks_to_begin(admit, worker) + headroom:
        return None
    drift = worker.decode_drift.factor
    survivors = 0.0
    if worker.num_decoding:
        # Of those that decode now, some will have ended. Lengths are memoryless here: nobody knows when one stops.
        step_s = cost.decode_s(worker.num_decoding, worker.num_context_tokens) * drift
        survivors = worker.num_decoding * math.exp(-until_first(worker) / (step_s * output.mean))
    num_seqs = survivors + worker.num_coming + choices
    expected = output.expected(admit.max_tokens)
    if worker.entries:  # an empty worker takes whatever its pool can hold
        if num_seqs > info.max_num_seqs:
            return None
        if worker.blocks_at_end + blocks_at_end(info, admit.prompt_len, choices, expected) > info.num_blocks:
            return None
    share = num_seqs / max(1, worker.num_decoding + worker.num_coming + choices)
    context = worker.num_context_tokens * share + choices * (admit.prompt_len + expected / 2)
    return cost.decode_s(num_seqs, context) * drift
