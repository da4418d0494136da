"""Which prompts get how many tokens of the next prefill step. Pure: state in, plan out; called by `worker.py`.

First come, first served, in chunks: the oldest prompt takes as much of the token budget as it can use, the rest goes to the
next, so a step is always about as large as the budget. Nobody overtakes but those whose ticket says that they go first: they
stand before the others, among themselves as they came, from the next step on.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from engine.sequence import Sequence


class PlannedChunk(NamedTuple):
    sequence: Sequence
    num_tokens: int


def plan(active: Seq[Sequence], max_num_batched_tokens: int) -> list[PlannedChunk]:
    """Chunks for the sequences that hold blocks, oldest first. At most `max_num_batched_tokens` tokens in all."""
    chunks: list[PlannedChunk] = []
    budget = max_num_batched_tokens
    for sequence in active:
        if budget <= 0:
            break
        num_tokens = min(budget, sequence.num_uncomputed)
        if num_tokens > 0:
            chunks.append(PlannedChunk(sequence, num_tokens))
            budget -= num_tokens
    return chunks


def place_in(line: Seq[bool], goes_first: bool) -> int:
    """Where in a line a newcomer stands; line: of each that is there whether it goes first."""
    at = len(line)
    while goes_first and at > 0 and not line[at - 1]:
        at -= 1
    return at


def num_admissible(waiting: Seq[int], num_active: int, max_num_seqs: int, num_free_blocks: int) -> int:
    """How many of the waiting prompts (as numbers of blocks they need, in their order) may start now; none is left out."""
    count = 0
    for num_blocks in waiting:
        if num_active + count >= max_num_seqs or num_blocks > num_free_blocks:
            break
        num_free_blocks -= num_blocks
        count += 1
    return count
