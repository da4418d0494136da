"""Which sequences take part in the next decode step, and who gives way when blocks run out. Pure; called by `worker.py`.

Continuous batching: every sequence that waits for its next token is in the step. What is left of the token budget goes to
prompts that this worker prefills by itself (short ones, resumed ones, preempted ones), in chunks, so that their arrival does
not stall the others. Out of blocks: the newest sequence of the lowest band is preempted and recomputed later.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from engine.sequence import Sequence


class PlannedChunk(NamedTuple):
    sequence: Sequence
    num_tokens: int


class Plan(NamedTuple):
    chunks: tuple[PlannedChunk, ...]
    grow: tuple[Sequence, ...]  # each needs one more block before the step
    preempt: tuple[Sequence, ...]  # give up all their blocks and wait
    restart: tuple[Sequence, ...]  # preempted earlier; there is room again


class Budget(NamedTuple):
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool = True


def steady(running: Seq[Sequence], num_free_blocks: int, block_size: int, budget: Budget) -> list[Sequence] | None:
    """Whether plan() would say of these, while nobody is preempted, just this: one token for each. -> who needs one more block for
    it; None: ask plan(). Of many steps in a row it is so, and then this is all the planning there is."""
    if len(running) > budget.max_num_seqs:
        return None
    grow: list[Sequence] = []
    for sequence in running:
        num_tokens = len(sequence.token_ids)
        if num_tokens - sequence.num_computed != 1:
            return None
        if num_tokens > len(sequence.blocks) * block_size:
            grow.append(sequence)
    return grow if len(grow) <= num_free_blocks else None


def plan(running: Seq[Sequence], preempted: Seq[Sequence], num_free_blocks: int, block_size: int, budget: Budget) -> Plan:
    """running: in order of arrival, blocks held. preempted: in the order they are to return, no blocks held.

    The oldest running sequence always makes progress: it is the last to be preempted.
    """
    victims_first = sorted(running, key=lambda s: s.request.priority)  # stable: oldest first within a band
    alive = list(running)
    preempt: list[Sequence] = []
    grow: list[Sequence] = []
    free = num_free_blocks
    for sequence in victims_first:
        if sequence in preempt or sequence.num_uncomputed != 1 or not sequence.last_block_is_full(block_size):
            continue
        while free < 1 and victims_first[-1] is not sequence:
            victim = victims_first.pop()
            if victim in grow:
                grow.remove(victim)
                free += 1
            preempt.append(victim)
            alive.remove(victim)
            free += len(victim.blocks)
        if free >= 1:
            free -= 1
            grow.append(sequence)
        else:  # the last one left: it keeps its blocks and waits for those that grants hold
            alive.remove(sequence)
    restart = _restart(preempted, preempt, alive, free, block_size, budget)
    return Plan(_chunks([*alive, *restart], budget), tuple(grow), tuple(preempt), tuple(restart))


def _restart(
    preempted: Seq[Sequence],
    just_preempted: Seq[Sequence],
    alive: Seq[Sequence],
    free: int,
    block_size: int,
    budget: Budget,
) -> list[Sequence]:
    """Who of the preempted comes back: in order, only whole, and never in a step that had to preempt."""
    restart: list[Sequence] = []
    if just_preempted:
        return restart
    for sequence in preempted:
        num_blocks = -(-len(sequence.token_ids) // block_size)
        headroom = len(alive) + len(restart)  # a block each, or the next step preempts again
        if len(alive) + len(restart) >= budget.max_num_seqs or (num_blocks + headroom > free and (alive or restart)):
            break
        if num_blocks > free:
            break
        free -= num_blocks
        restart.append(sequence)
    return restart


def _chunks(candidates: Seq[Sequence], budget: Budget) -> tuple[PlannedChunk, ...]:
    chunks = [PlannedChunk(s, 1) for s in candidates if s.num_uncomputed == 1][: budget.max_num_seqs]
    left = budget.max_num_batched_tokens - len(chunks)
    for sequence in candidates:
        wanted = sequence.num_uncomputed
        if wanted <= 1:
            continue
        num_tokens = min(left, wanted) if budget.enable_chunked_prefill else wanted
        if num_tokens <= 0 or (num_tokens > left and len(chunks) > 0):
            break
        chunks.append(PlannedChunk(sequence, num_tokens))
        left -= num_tokens
    return tuple(chunks)
