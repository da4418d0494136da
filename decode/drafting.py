"""Drafts in the steps of a decode worker: who may have one, room for them in budget and blocks, and what is learned of them.

A draft takes only what is free: it never preempts anybody, and leaves half of a step's budget to prompts that wait for it. Its
tokens are no sequence's tokens until they are verified, so nothing of a rejected one is sealed, hashed, shared or counted as
computed; the slots it wrote are written again by the next step. Called by `worker.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from decode.sequences import Sequences
from engine.batch import Chunk
from engine.blocks import BlockPool
from engine.runner import StepResult
from engine.sequence import Sequence
from engine.speculation.speculator import Speculator


class Limits(NamedTuple):
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int


class Drafting:
    def __init__(self, speculator: Speculator, sequences: Sequences, pool: BlockPool, limits: Limits) -> None:
        self.speculator = speculator
        self._sequences = sequences
        self._pool = pool
        self._limits = limits
        self._wanted: dict[int, int] = {}  # id(sequence) -> length of its draft in the step that is planned

    def plan(self, chunks: list[Chunk]) -> None:
        """Decide on the drafts of this step and find blocks for them. On the event loop, before the step."""
        self._wanted.clear()
        mine = [chunk.sequence for chunk in chunks if _may_draft(chunk)]
        if not mine:
            return
        used = sum(chunk.num_tokens for chunk in chunks)
        left = self._limits.max_num_batched_tokens - used
        if any(sequence.num_uncomputed > 1 for sequence in self._sequences.running):
            left = min(left, self._limits.max_num_batched_tokens // 2)
        context = sum(len(sequence) for sequence in mine)
        lengths = self.speculator.plan(mine, [min(left, self._limit(sequence)) for sequence in mine], len(mine), context)
        for sequence, length in zip(mine, lengths, strict=True):
            length = self._with_blocks(sequence, min(length, left))
            if length > 0:
                self._wanted[id(sequence)] = length
                left -= length

    def _limit(self, sequence: Sequence) -> int:
        """Tokens of a draft that could be delivered beside the one that comes anyway."""
        room = self._limits.max_model_len - len(sequence)
        if sequence.request.sampling.max_tokens is not None:
            room = min(room, sequence.request.sampling.max_tokens - sequence.output_len)
        return room - 1

    def _with_blocks(self, sequence: Sequence, length: int) -> int:
        """As much of the length as there are blocks for, some of them new where nobody misses them."""
        block_size = self._limits.block_size
        while length > 0 and sequence.num_blocks_for(len(sequence) + length, block_size):
            if self._pool.num_free <= len(self._sequences.running) or not self._sequences.extend(sequence):
                length = len(sequence.blocks) * block_size - len(sequence)
        return length

    def draft(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks with their drafts. In the engine's thread, as a part of the step."""
        if not self._wanted:
            return chunks
        asked = [(chunk.sequence, self._wanted[id(chunk.sequence)]) for chunk in chunks if id(chunk.sequence) in self._wanted]
        drafts = {id(sequence): draft for (sequence, _), draft in zip(asked, self.speculator.draft(asked), strict=True)}
        return [Chunk(c.sequence, c.num_tokens, c.samples, drafts.get(id(c.sequence), ())) for c in chunks]

    def learn_step(self, chunks: list[Chunk], result: StepResult) -> None:
        """Before the step is applied to its sequences."""
        if all(chunk.num_tokens == 1 for chunk in chunks):
            context = sum(len(chunk.sequence) for chunk in chunks)
            num_draft = sum(len(chunk.draft) for chunk in chunks)
            self.speculator.learn_step(len(chunks), num_draft, context, result.stats.seconds)

    def learn(self, chunk: Chunk, tokens: list[int]) -> None:
        """tokens: what came of it, as many as stand. Before they are the sequence's."""
        self.speculator.learn(chunk.sequence, chunk.draft, len(tokens) - 1, tokens[0])

    def numbers(self) -> dict[str, int]:
        """By the names of `WorkerStats`."""
        own = self.speculator
        return {"num_drafts": own.num_drafts, "draft_tokens": own.num_draft_tokens, "accepted_tokens": own.num_accepted}


def _may_draft(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return chunk.num_tokens == 1 and sequence.is_decoding and chunk.samples == (sequence,)
