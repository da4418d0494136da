"""What a client asked, validated once: `SamplingParams` and `Request`. The only client data that crosses into the cluster.

`SamplingParams` has vLLM's names and defaults, because its users know them; `tandem.SamplingParams` is this class.
Built by `api/` from an HTTP body and by `tandem.LLM`; read by `engine/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from msgspec.structs import force_setattr

from protocol.errors import InvalidRequest, PromptTooLong
from protocol.timeline import Origin

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_SCORED_TOKENS = 32_768  # of one prompt; their log-probabilities travel in one message
SEED_MASK = (1 << 64) - 1


def _finite(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}], got {value}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be an integer in [{low}, {high}], got {value!r}", param=name)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen. Raises InvalidRequest that names the field.

    temperature 0 is greedy. top_k 0 or -1 is off. seed None: the gateway draws one. logprobs k: the chosen token's
    and the k best at each position. prompt_logprobs k: the same for the prompt (needs echo over HTTP).
    max_tokens None: up to the context's end.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: Sequence[str] | str | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_CHOICES)
        _finite("temperature", self.temperature, 0.0, 100.0)
        _finite("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _finite("min_p", self.min_p, 0.0, 1.0)
        _finite("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _finite("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _finite("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _finite("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
            force_setattr(self, "seed", self.seed & SEED_MASK)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS or any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequest(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings", param="stop")
        force_setattr(self, "stop", stop)
        ids = tuple(self.stop_token_ids or ())
        for token in ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        force_setattr(self, "stop_token_ids", ids)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", param="min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Claim(msgspec.Struct, frozen=True):
    """What a request asked for within its tenant's rights. ttft_slo_s, tpot_slo_s: a promise of its own, tighter than its class's.
    is_retry: its client was refused before. tenants_version: of the file under which the rights were judged."""

    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    is_retry: bool = False
    tenants_version: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One client request after validation: token ids, never text. `sampling.max_tokens` is set; the gateway draws a missing seed.

    cache_salt: what keeps this tenant's prefix blocks apart from others'. max_total_len: prompt + output may not pass it.
    claim: what it may ask for beyond its class; only the scheduler reads it.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    tenant: str = "default"
    slo_class: str = "standard"
    priority: int = 0
    cache_salt: str = ""
    origin: Origin = Origin()
    claim: Claim = Claim()

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_total_len(self) -> int:
        """Prompt plus every token it may still generate."""
        return self.prompt_len + (self.sampling.max_tokens or 0)

    def validate_tokens(self, vocab_size: int, max_model_len: int) -> None:
        """Every id a client can name is inside the logits, and the whole fits. Raises InvalidRequest, PromptTooLong."""
        if not self.prompt_token_ids:
            raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
        for name, ids in (
            ("prompt", self.prompt_token_ids),
            ("logit_bias", self.sampling.logit_bias),
            ("stop_token_ids", self.sampling.stop_token_ids or ()),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(f"{name}: token id {token} is outside the vocabulary [0, {vocab_size})", param=name)
        if self.sampling.prompt_logprobs is not None and self.prompt_len > MAX_SCORED_TOKENS:
            raise InvalidRequest(
                f"log-probabilities of a prompt are given for at most {MAX_SCORED_TOKENS} tokens, this one has {self.prompt_len}",
                param="prompt_logprobs",
            )
        if self.prompt_len >= max_model_len:
            raise PromptTooLong(
                f"the prompt has {self.prompt_len} tokens; with at least one output token it must fit into "
                f"max_model_len = {max_model_len} (--max-model-len)",
                param="prompt",
            )
        if self.sampling.max_tokens is not None and self.max_total_len > max_model_len:
            raise PromptTooLong(
                f"{self.prompt_len} prompt tokens + max_tokens {self.sampling.max_tokens} = {self.max_total_len} is above "
                f"max_model_len = {max_model_len}; lower max_tokens or raise --max-model-len",
                param="max_tokens",
            )
