"""What one step did, in numbers. cluster/ publishes them, and scheduler/ fits its cost model to them."""

from __future__ import annotations

import msgspec


class StepStats(msgspec.Struct, frozen=True):
    """Times are seconds of the runner's own clock, from batch building to sampled tokens.

    Prefill cost is fitted as a + b * num_prefill_tokens + c * prefill_pairs, decode cost as a + b * decode_context +
    c * num_decode. The drafts of a decoding sequence are counted apart: its context is read once, whatever their number.
    """

    num_prefill_tokens: int  # tokens of chunks that are longer than one token or end a prompt
    num_decode: int  # sequences that computed one token after their prompt
    prefill_pairs: int  # sum over prefill tokens of the tokens each attends to
    decode_context: int  # sum of the context lengths of the decoding sequences
    num_samples: int  # tokens that came of it; with drafts more than one of a sequence
    seconds: float
    forward_s: float
    sample_s: float
    num_draft: int = 0  # guessed tokens that were computed beside the others

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode + self.num_draft
