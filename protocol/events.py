"""What the gateway's walk yields for one request. Exactly one of `Finished` and `Failed` comes, and comes last.

`Placed` comes first, once, where somebody waits for it: the request's class may degrade, or this one was degraded.
"""

from __future__ import annotations

import msgspec

from protocol.errors import Failure


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position: the token's own log-probability and rank (1 = most likely), and the k best as (token, logprob) pairs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class Placed(msgspec.Struct, frozen=True):
    """It has its first ticket. degraded: what was taken off, in words; "" for nothing. model: another one than was asked for."""

    degraded: str = ""
    model: str = ""


class PromptScored(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt; None at position 0, which nothing predicts. Comes before any token."""

    logprobs: tuple[TokenLogprobs | None, ...]


class Tokens(msgspec.Struct, frozen=True):
    """New tokens of one choice, in order, and the text that they complete (empty while a glyph or a stop string is pending)."""

    choice: int
    index: int  # position of the first of them among the choice's output tokens
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None  # "stop" | "length": set on the choice's last Tokens event
    stop_reason: int | str | None = None  # the stop token id or stop string; None for EOS and length


class Timing(msgspec.Struct, frozen=True):
    """Seconds on the gateway's monotonic clock, each phase of the walk. 0.0 where a phase did not happen."""

    queue_s: float = 0.0  # received -> placed, tokenizing included
    prefill_s: float = 0.0  # placed -> first token
    transfer_s: float = 0.0  # first token -> KV verified by decode (its first frame, where it does not say)
    decode_s: float = 0.0  # first token -> last token
    ttft_s: float = 0.0  # received -> first token
    e2e_s: float = 0.0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    num_resumptions: int = 0  # how often another worker had to take over


class Finished(msgspec.Struct, frozen=True):
    usage: Usage
    timing: Timing
    degraded: str = ""


class Failed(msgspec.Struct, frozen=True):
    failure: Failure


Event = Placed | PromptScored | Tokens | Finished | Failed
