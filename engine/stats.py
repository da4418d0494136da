"""What one step did, in numbers. cluster/ publishes them, and scheduler/ fits its cost model to them."""

from __future__ import annotations

import msgspec


class StepStats(msgspec.Struct, frozen=True):
    """Times are seconds of the runner's own clock, from batch building to sampled tokens.

    Prefill cost is fitted as a + b * num_prefill_tokens + c * prefill_pairs, decode cost as a + b * decode_context +
    c * num_decode.
    """

    num_prefill_tokens: int  # tokens of chunks that are longer than one token or end a prompt
    num_decode: int  # sequences that computed one token after their prompt
    prefill_pairs: int  # sum over prefill tokens of the tokens each attends to
    decode_context: int  # sum of the context lengths of the decoding sequences
    num_samples: int
    seconds: float
    forward_s: float
    sample_s: float

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode
