"""A guesser that knows the answers, as far as it is told to: for tests of speculation with any share of right guesses.

Run the requests without speculation, give it what they said, and run them again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

VOCAB_SIZE = 512


class Prophet:
    """answers: (prompt, choice) -> output. share_right: of the guessed tokens. One of two kinds: with knows_at_once it is a lookup,
    else a model."""

    num_computed = 0

    def __init__(
        self,
        answers: Mapping[tuple[tuple[int, ...], int], Sequence[int]],
        share_right: float,
        seed: int,
        knows_at_once: bool = True,
    ) -> None:
        self.answers = answers
        self.knows_at_once = knows_at_once
        self.asked = 0
        self._share_right = share_right
        self._rng = random.Random(seed)

    def guess(self, sequence, count: int) -> tuple[int, ...]:
        self.asked += 1
        answer = self.answers.get((tuple(sequence.request.prompt_token_ids), sequence.choice), ())
        coming = list(answer[sequence.output_len : sequence.output_len + count])
        for place, token in enumerate(coming):
            if self._rng.random() >= self._share_right:
                coming[place] = (token + 1 + self._rng.randrange(VOCAB_SIZE - 1)) % VOCAB_SIZE
        return tuple(coming)

    def draft(self, asked) -> list[tuple[int, ...]]:
        return [self.guess(sequence, count) for sequence, count in asked]

    def forget(self, sequence) -> None:
        pass
