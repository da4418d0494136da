"""When a sequence ends by its tokens. Stop strings are the gateway's business, which alone sees text."""

from __future__ import annotations

from engine.sequence import Sequence


def finish_reason(sequence: Sequence, max_model_len: int) -> tuple[str, int | None] | None:
    """(finish_reason, stop_reason) once the newest token ends the sequence, else None. Call after each append.

    EOS gives ("stop", None), one of stop_token_ids ("stop", token), max_tokens or the context's end ("length", None).
    Before min_tokens only the context's end counts; the sampler masks the stopping tokens until then.
    """
    request = sequence.request
    sampling = request.sampling
    output_len = sequence.output_len
    if output_len == 0:
        return None
    if output_len >= sampling.min_tokens:
        token = sequence.last_token
        if not sampling.ignore_eos and token in request.eos_token_ids:
            return "stop", None
        if sampling.stop_token_ids and token in sampling.stop_token_ids:
            return "stop", token
        if sampling.max_tokens is not None and output_len >= sampling.max_tokens:
            return "length", None
    if len(sequence) >= max_model_len:
        return "length", None
    return None
