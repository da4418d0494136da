"""Guesses without a model: what followed the last few tokens where they stood before, in the prompt or in the output.

Prompt lookup (Saxena 2023; "n-gram" in vLLM). The latest such place is taken, as text repeats what is near. A guess that reaches
the end of what is known goes on in itself, as an LZ77 copy does, so a short cycle is guessed to any length.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from engine.sequence import Sequence

MIN_ROOM = 256


class History:
    """The tokens of one sequence as numbers side by side, for searching."""

    __slots__ = ("_tokens", "_len")

    def __init__(self) -> None:
        self._tokens = np.empty(MIN_ROOM, dtype=np.int32)
        self._len = 0

    def update(self, token_ids: list[int]) -> None:
        """token_ids: those it knows already, and some more."""
        start, end = self._len, len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(max(end, 2 * len(self._tokens)), dtype=np.int32)
            grown[:start] = self._tokens[:start]
            self._tokens = grown
        self._tokens[start:end] = token_ids[start:]
        self._len = end

    def guess(self, count: int, shortest: int, longest: int) -> list[int]:
        """count tokens, or none where fewer than `shortest` of the last tokens have stood together before."""
        known = self._tokens[: self._len]
        if self._len <= shortest:
            return []
        ends = np.flatnonzero(known[:-1] == known[-1])  # where the n-gram ended that is as long as has been looked at
        for length in range(2, longest + 1):
            longer = ends[np.searchsorted(ends, length - 1) :]
            longer = longer[known[longer - (length - 1)] == known[-length]]
            if not len(longer):
                if length <= shortest:
                    return []
                break
            ends = longer
        if not len(ends):
            return []
        begin = int(ends[-1]) + 1
        found: list[int] = known[begin : begin + count].tolist()
        period = self._len - begin
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


class Lookup:
    """A `speculator.Guesser`. shortest, longest: of the n-grams that are looked for."""

    knows_at_once = True
    num_computed = 0

    def __init__(self, shortest: int, longest: int) -> None:
        assert 1 <= shortest <= longest, (shortest, longest)
        self._shortest, self._longest = shortest, longest
        self._histories: dict[int, History] = {}  # by id(sequence)

    def guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        history = self._histories.get(id(sequence))
        if history is None:
            history = self._histories[id(sequence)] = History()
        history.update(sequence.token_ids)
        return tuple(history.guess(count, self._shortest, self._longest))

    def draft(self, asked: SequenceOf[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        return [self.guess(sequence, count) for sequence, count in asked]

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(id(sequence), None)

    def __len__(self) -> int:
        return len(self._histories)
