"""Which guesses of a draft stand: those that equal the token that the target itself sampled in their place.

A token at position p is a function of the model's logits there, the request's parameters, the tokens before it and one number
that depends on (seed, choice, p) alone (engine/philox.py). So the target's own sample for each row of a draft is the very token
that it would have sampled without one, as long as the row's guesses were right up to it; the first row whose guess was wrong
gives the token that belongs there, and the rows behind it mean nothing. What comes out is therefore, token for token, what comes
out without speculation, greedy or sampled, whoever guessed. (Leviathan et al. 2023 and Chen et al. 2023 accept by a coin
instead, which keeps the distribution only; docs/speculation.md compares.) Called by engine/runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import msgspec

from engine.sampler import Sample
from engine.sequence import Ahead


def verified(samples: SequenceOf[Sample]) -> list[Sample]:
    """samples: of a step, each sequence followed by itself ahead. The same without those whose guesses were wrong, and with the
    sequence itself in place of itself ahead. A row that could not be sampled ends the draft, as a wrong guess does: without it
    the next step meets the same logits and its error."""
    kept: list[Sample] = []
    holds = True
    for sample in samples:
        ahead = sample.sequence
        if not isinstance(ahead, Ahead):
            holds = sample.error is None
            kept.append(sample)
            continue
        holds = holds and kept[-1].token == ahead.draft[-1] and sample.error is None
        if holds:
            kept.append(msgspec.structs.replace(sample, sequence=ahead.sequence))
    return kept
