"""What a step takes, from a cost file: DistServe's form with a term for the cached prefix, and a piece for large batches.

    prefill step   a + b * tokens + c * (end^2 - begin^2 of each chunk)
    decode step    a + b * sum of contexts + c * sequences; other a, b, c above `above` sequences, where the file has them
    mixed step     a decode step, plus the chunks' b and c terms: the weights are read once
    transfer       a + bytes / rate, over links (`links.py`)

A file describes one kind of worker (model, device, tensor ranks), so that a pool of each role may be of another kind. Seconds,
tokens, bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import yaml
from msgspec import Meta

from protocol.errors import ConfigError
from protocol.kv import DTYPE_NBYTES, KVLayout

NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=2**40)]
T = TypeVar("T")


class PrefillCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds for a step, for each token of it, for each token squared."""

    per_step_s: Positive
    per_token_s: NotNegative
    per_token2_s: NotNegative = 0.0


class DecodeCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds for a step, for each token of context in it, for each sequence in it."""

    per_step_s: Positive
    per_context_token_s: NotNegative
    per_seq_s: NotNegative = 0.0


class LargeDecodeCost(DecodeCost, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for steps of more than `above` sequences."""

    above: Count


class KvShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the model: what a token's KV weighs, and a block's tokens."""

    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    block_size: Count = 16
    dtype: str = "float16"

    @property
    def token_nbytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_NBYTES[self.dtype]


class RoleLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """max_num_batched_tokens, max_num_seqs: of one step."""

    max_num_batched_tokens: Count
    max_num_seqs: Count


class Contention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the roles share cores: how many times as long a step of this role takes while the other role is busy, too."""

    prefill: Annotated[float, Meta(ge=1, le=100)] = 1.0
    decode: Annotated[float, Meta(ge=1, le=100)] = 1.0


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of worker. overhead_s: door to worker; return_s: a token back to the
    client. transfer_s: of each
    hand-over, whatever its size. price_per_hour: of one worker."""

    name: str
    model: str
    source: str
    prefill: PrefillCost
    decode: DecodeCost
    decode_large: LargeDecodeCost | None = None
    kv: KvShape
    num_blocks: Count
    device: str = "cuda"
    gpus: Count = 1
    price_per_hour: NotNegative = 0.0
    prefill_limits: RoleLimits = RoleLimits(max_num_batched_tokens=2048, max_num_seqs=16)
    decode_limits: RoleLimits = RoleLimits(max_num_batched_tokens=512, max_num_seqs=256)
    overhead_s: NotNegative = 0.0
    return_s: NotNegative = 0.0
    transfer_s: NotNegative = 0.002
    link_gbps: Positive = 200.0
    contention: Contention = Contention()
    errors: dict[str, Any] = {}  # what a calibration measured on held-out requests; for people

    def layout(self) -> KVLayout:
        kv = self.kv
        return KVLayout(kv.num_layers, kv.num_kv_heads, kv.head_dim, kv.block_size, kv.dtype, self.model)

    def decode_terms(self, num_seqs: int) -> tuple[float, float, float]:
        """(a, b, c) that hold for a batch of so many."""
        cost: DecodeCost = self.decode
        if self.decode_large is not None and num_seqs > self.decode_large.above:
            cost = self.decode_large
        return cost.per_step_s, cost.per_context_token_s, cost.per_seq_s

    def prefill_s(self, prompt_len: int, cached: int = 0) -> float:
        """A prompt alone on a worker, in chunks."""
        cost, chunk = self.prefill, self.prefill_limits.max_num_batched_tokens
        num_steps = math.ceil((prompt_len - cached) / chunk)
        return (
            num_steps * cost.per_step_s + (prompt_len - cached) * cost.per_token_s + (prompt_len**2 - cached**2) * cost.per_token2_s
        )

    def decode_s(self, num_seqs: int, num_context_tokens: float) -> float:
        a, b, c = self.decode_terms(num_seqs)
        return a + b * num_context_tokens + c * num_seqs


def read(path: Path, kind: type[T]) -> T:
    """A YAML file as a struct. Raises ConfigError with file, key and what is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return msgspec.convert(raw, kind)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", param=str(path)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}", param=str(path)) from None
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", param=str(path)) from None


def read_cost(path: Path) -> Cost:
    """Raises ConfigError."""
    cost = read(path, Cost)
    if cost.kv.dtype not in DTYPE_NBYTES:
        raise ConfigError(f"{path}: kv.dtype {cost.kv.dtype!r} is none of {', '.join(DTYPE_NBYTES)}", param="kv.dtype")
    return cost


class Span(NamedTuple):
    """n equal steps of one worker as numbers: step i (from 0) takes `lin + quad * (2 i + 1)`, so n take lin n + quad n^2."""

    lin: float
    quad: float

    def seconds(self, n: float) -> float:
        return n * (self.lin + self.quad * n)

    def steps(self, elapsed: float) -> float:
        """How many steps (a fraction counts) fit into so many seconds: the inverse of `seconds`."""
        if elapsed <= 0:
            return 0.0
        if self.quad <= 0:
            return elapsed / self.lin
        # Not (-lin + sqrt) / 2 quad, whose difference cancels where quad is tiny.
        return 2 * elapsed / (self.lin + math.sqrt(self.lin * self.lin + 4 * self.quad * elapsed))


def span_of(cost: Cost, num_seqs: int, context: float, chunk: int = 0, begin: int = 0, slow: float = 1.0) -> Span:
    """Steps in which `num_seqs` sequences, of `context` tokens together before the first, get a token each, and one prompt gets
    `chunk` tokens each, `begin` of which are computed already.

    Step i of them: a + b (context + num_seqs i) + c num_seqs + b_p chunk + c_p ((begin + chunk (i + 1))^2 - (begin + chunk i)^2).
    """
    prefill = cost.prefill
    lin = prefill.per_token_s * chunk + 2 * prefill.per_token2_s * begin * chunk
    quad = prefill.per_token2_s * chunk * chunk
    if num_seqs:
        a, b, c = cost.decode_terms(num_seqs)
        lin += a + b * context + c * num_seqs - b * num_seqs / 2
        quad += b * num_seqs / 2
    else:
        lin += prefill.per_step_s
    return Span(lin * slow, quad * slow)
