"""Guesses by a smaller model that lives beside the target, with a KV pool of its own.

For each sequence that is drafted there is a *shadow*: the same request and the same tokens, with blocks in the draft model's pool.
The shadow samples as the target does, from the draft model's logits with the very same random number for each position, so the two
choose the same token whenever their distributions agree about it. The prompt is computed here in chunks, a bounded number of tokens
a step, between the target's own steps; drafts begin once a shadow has caught up. Its full blocks are sealed and shared through
the pool's prefix cache as the target's are. Without room a shadow gives up its blocks, and its sequence goes on without drafts.

Everything but `forget` runs in the engine's thread; `forget` runs between steps.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import msgspec

from engine.batch import Chunk
from engine.blocks import BlockPool, OutOfBlocks
from engine.prefix import attach_prefix, seal_full_blocks
from engine.runner import ModelRunner
from engine.sequence import Sequence
from protocol.kv import KVLayout


class _Shadow:
    """tokens: its own; the first `num_true` of them are the target's too."""

    __slots__ = ("sequence", "num_true")

    def __init__(self, target: Sequence) -> None:
        sampling = msgspec.structs.replace(target.request.sampling, logprobs=None, prompt_logprobs=None)
        request = msgspec.structs.replace(target.request, sampling=sampling)
        self.sequence = Sequence(request, target.choice, target.output_token_ids)
        self.num_true = len(target)

    def follow(self, target: Sequence) -> None:
        """What was guessed and is so stays computed; the rest goes."""
        mine, own = self.sequence, self.sequence.token_ids
        place = self.num_true
        while place < min(len(own), len(target)) and own[place] == target.token_ids[place]:
            place += 1
        mine.num_computed = min(mine.num_computed, place, len(target) - 1)
        own[place:] = target.token_ids[place:]
        self.num_true = len(target)
        if mine.token_counts is not None:
            mine.token_counts = None  # counted guesses


class DraftModel:
    """A `speculator.Guesser`. max_tokens: prompt tokens computed in one step, of all shadows. max_len: the model's own context.
    vocab_size: of the target; a guess that it does not know ends a draft."""

    knows_at_once = False

    def __init__(
        self, runner: ModelRunner, pool: BlockPool, layout: KVLayout, max_tokens: int, max_len: int, vocab_size: int
    ) -> None:
        self.runner = runner
        self.pool = pool
        self.layout = layout
        self.num_computed = 0  # tokens, since the beginning
        self._max_tokens = max_tokens
        self._max_len = max_len
        self._vocab_size = vocab_size
        self._own_vocab_size = runner.loaded.config.vocab_size
        self._shadows: dict[int, _Shadow] = {}  # by id(target)

    def guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        raise AssertionError("a draft model must be run")

    def draft(self, asked: SequenceOf[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """One forward pass catches up and guesses a token; each further one guesses one more."""
        drafts: list[list[int]] = [[] for _ in asked]
        chunks: list[Chunk] = []
        guessing: list[tuple[Sequence, int, list[int]]] = []  # a shadow that has caught up, tokens to guess, those there are
        left = self._max_tokens
        for (target, count), draft in zip(asked, drafts, strict=True):
            shadow = self._follow(target, count)
            if shadow is None:
                continue
            missing = shadow.num_uncomputed
            chunk_len = min(missing, left) if missing > count + 1 else missing
            if chunk_len < 1:
                continue
            left -= chunk_len
            ends = chunk_len == missing
            chunks.append(Chunk(shadow, chunk_len, (shadow,) if ends else ()))
            if ends:
                guessing.append((shadow, count, draft))
        while chunks:
            self._run(chunks)
            said = [one for one in guessing if one[0].num_uncomputed == 1]  # not so where logits were not finite
            for shadow, _, draft in said:
                draft.append(shadow.last_token)
            guessing = [one for one in said if len(one[2]) < one[1] and one[0].last_token < self._own_vocab_size]
            chunks = [Chunk(shadow, 1, (shadow,)) for shadow, _, _ in guessing]
        return [self._known(draft) for draft in drafts]

    def _known(self, draft: SequenceOf[int]) -> tuple[int, ...]:
        for place, token in enumerate(draft):
            if token >= self._vocab_size:
                return tuple(draft[:place])
        return tuple(draft)

    def _follow(self, target: Sequence, count: int) -> Sequence | None:
        """Its shadow with blocks for all its tokens and the draft, or None where that cannot be."""
        if len(target) + count > self._max_len:
            self.forget(target)
            return None
        shadow = self._shadows.get(id(target))
        if shadow is None:
            shadow = self._shadows[id(target)] = _Shadow(target)
        else:
            shadow.follow(target)
            if shadow.sequence.blocks:  # now, while it holds no guesses, of which nothing may be sealed or hashed
                seal_full_blocks(self.pool, shadow.sequence, self.layout)
        mine = shadow.sequence
        if max(mine.token_ids[mine.num_computed :]) >= self._own_vocab_size:
            return None
        try:
            if not mine.blocks:
                attach_prefix(self.pool, mine, self.layout, 0)
            missing = mine.num_blocks_for(len(mine) + count, self.layout.block_size)
            if missing:
                mine.blocks += self.pool.allocate(missing, after=mine.blocks[-1])
        except OutOfBlocks:
            self.forget(target)
            return None
        return mine

    def _run(self, chunks: list[Chunk]) -> None:
        samples = self.runner.run(chunks).samples
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            self.num_computed += chunk.num_tokens
        for sample in samples:
            if sample.error is None and isinstance(sample.sequence, Sequence):
                sample.sequence.append(sample.token)

    def forget(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(id(sequence), None)
        if shadow is not None:
            self.pool.release(shadow.sequence.blocks)

    def __len__(self) -> int:
        return len(self._shadows)
