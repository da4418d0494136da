"""What messages teach the cost models: which figure is clean enough to believe, and of what it is an observation.

Clean means that nothing else is in it: a prefill's time without the queue before it, a decode step's without prompts in
it. Called by `scheduler.Scheduler` when a message arrives; it changes cost models and drifts, never the ledger.
"""

from __future__ import annotations

import math

from protocol.messages import Outcome, WorkerStats
from scheduler.cost import TRUSTED_AFTER
from scheduler.ledger import Entry, WorkerState

MIN_PACE_TOKENS = 8  # below so many the hand-over before the second token decides over the pace
MIN_MARGIN_TOKENS = 16  # the same for what the margin learns: no load is low enough for them
CLEAN_S = 10.0  # without a clean decode heartbeat for so long, what requests experienced has to do


def learn_from_first_token(entry: Entry, prefill_s: float, now: float) -> None:
    """One prefill's time: from when it got to the head of its worker's queue (or was placed) to its first token."""
    worker = entry.prefilling_at
    worker.cost.ttft_error.observe(now - entry.placed_at, entry.ttft_s)
    if next(iter(worker.prefills), None) != entry.request_id:
        return  # it overtook somebody, so when it began is not known
    service = now - max(entry.placed_at, worker.prefill_head_since)
    service = min(service, prefill_s) if prefill_s > 0 else service
    if entry.was_overtaken or _shared_its_step(entry):
        return
    predicted = worker.cost.prefill_s(entry.prompt_len, entry.cached)
    worker.cost.prefill_error.observe(service, predicted * worker.prefill_drift.factor)
    worker.cost.observe_prefill(entry.prompt_len, entry.cached, service)
    worker.prefill_drift.observe(service, predicted)
    worker.touch()


def _shared_its_step(entry: Entry) -> bool:
    """Whether the next prompt was computed together with it: then its time is that of both."""
    worker = entry.prefilling_at
    order = iter(worker.prefills.values())
    next(order)
    after = next(order, None)
    if after is None or worker.info.max_num_batched_tokens <= 0:
        return False
    fits = entry.uncached % worker.info.max_num_batched_tokens + after.uncached <= worker.info.max_num_batched_tokens
    return fits and after.placed_at <= max(entry.placed_at, worker.prefill_head_since)


def learn_from_beat(worker: WorkerState, before: WorkerStats | None, after: WorkerStats, now: float) -> None:
    """The mean step between two heartbeats."""
    if before is None:
        return
    num_steps = after.num_steps - before.num_steps
    num_prompt = after.prompt_tokens - before.prompt_tokens
    num_transfers = after.transfers - before.transfers
    if num_transfers > 0 and after.transfer_s > before.transfer_s:
        num_bytes = (after.transfer_bytes - before.transfer_bytes) / num_transfers
        worker.cost.observe_transfer(num_bytes, (after.transfer_s - before.transfer_s) / num_transfers)
    if num_steps <= 0:
        return
    step_s = (after.step_s - before.step_s) / num_steps
    if worker.info.role == "prefill":
        # Requests say it better. But where a first prefill outlives its lease there never is a first token, and
        # without this the next one would be given no more time.
        if worker.cost.prefill.num_observations < TRUSTED_AFTER and num_prompt > 0:
            worker.cost.observe_prefill(num_prompt / num_steps, 0, step_s)
        return
    num_generated = after.generation_tokens - before.generation_tokens
    if num_prompt > 0.02 * num_generated or num_generated <= 0:
        return
    # With speculation a step yields several tokens of a sequence; what is learned is the time of one.
    num_slots = (after.decode_slots - before.decode_slots) or num_generated
    num_seqs = num_slots / num_steps
    step_s *= num_slots / num_generated
    # Of those that decode: what is still being prefilled elsewhere is in no step here.
    context = (worker.num_context_tokens - worker.num_coming_tokens) * num_seqs / max(1.0, worker.num_decoding)
    predicted = worker.cost.decode_s(num_seqs, context)
    worker.cost.decode_error.observe(step_s, predicted * worker.decode_drift.factor)
    worker.cost.observe_decode(num_seqs, context, step_s)
    worker.decode_drift.observe(step_s, predicted)
    worker.clean_decode_at = now


def learn_from_outcome(entry: Entry, outcome: Outcome, now: float) -> None:
    """What a finished request's own pace says: how good the prediction of it was, and, from a worker that prefills all the
    time and so
    has no clean decode steps, what a step takes."""
    worker, tpot_s = entry.decode, outcome.tpot_s
    if entry.first_token_at is None or tpot_s <= 0:
        return
    num_tokens = outcome.output_tokens / entry.num_choices
    if entry.tpot_s > 0 and num_tokens >= MIN_PACE_TOKENS:
        worker.cost.tpot_error.observe(tpot_s, entry.tpot_s)
    if entry.tpot_limit < math.inf and num_tokens >= MIN_MARGIN_TOKENS:
        worker.cost.tpot_margin.observe(tpot_s <= entry.tpot_limit)
    if now - worker.clean_decode_at >= CLEAN_S:
        context = worker.num_context_tokens - worker.num_coming_tokens
        worker.cost.observe_decode(max(1, worker.num_decoding), context, tpot_s)
