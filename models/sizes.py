"""How large a model is, from its config alone: parameters and KV bytes of each rank. No torch, no weights.

Called by `cluster/memory.py` (`tandem memory`). What a rank holds is `models/split.py`'s; this only multiplies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from models.config import ModelConfig
from models.quantization import FLOATS, Quantization
from models.split import Split, split
from protocol.parallel import Parallel, heads_of, layers_of


class Place(NamedTuple):
    """A rank, for `split`; models.interface.Shard without torch."""

    parallel: Parallel
    tp_rank: int
    pp_rank: int


def num_params(config: ModelConfig, parallel: Parallel, rank: int) -> int:
    """Parameters that this rank holds. A tied head counts once. Raises ConfigError."""
    place = Place(parallel, parallel.tp_rank(rank), parallel.pp_rank(rank))
    mine = split(config, place)  # type: ignore[arg-type]
    hidden, head_dim = config.hidden_size, config.head_dim
    num_q, num_kv, inner, vocab = len(mine.q_heads), len(mine.kv_heads), len(mine.inner), len(mine.vocab)
    attention = hidden * head_dim * (2 * num_q + 2 * num_kv)
    attention += config.qkv_bias * head_dim * (num_q + 2 * num_kv) + config.qk_norm * 2 * head_dim
    mlp = 3 * hidden * inner + config.mlp_bias * 2 * inner
    if place.tp_rank == 0:  # biases that are added once, before a sum over the tensor ranks
        attention += config.o_bias * hidden
        mlp += config.mlp_bias * hidden
    total = len(mine.layers) * (attention + mlp + 2 * hidden)
    if place.pp_rank == 0:  # the first stage embeds, and is handed the last hidden states back for norm and head
        total += vocab * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    return total


def weight_nbytes(
    config: ModelConfig, parallel: Parallel, rank: int, dtype_nbytes: int, quantization: Quantization = FLOATS
) -> int:
    """Bytes of this rank's parameters, those that are no integers of dtype_nbytes each. Raises ConfigError."""
    place = Place(parallel, parallel.tp_rank(rank), parallel.pp_rank(rank))
    mine = split(config, place)  # type: ignore[arg-type]
    total = num_params(config, parallel, rank) * dtype_nbytes
    for module, out_width, in_width in _matrices(config, mine):
        bits = quantization.bits(module)
        if bits:
            num_groups = math.ceil(in_width / (quantization.group_len(module) or in_width))
            scale_nbytes = 2 if quantization.stored is None or quantization.stored.is_symmetric else 3  # a zero point beside it
            own = out_width * in_width * bits // 8 + out_width * num_groups * scale_nbytes
            total += len(mine.layers) * (own - out_width * in_width * dtype_nbytes)
    head = len(mine.vocab) * config.hidden_size
    if place.pp_rank == 0 and quantization.bits("lm_head") and (quantization.rounded or not config.tie_word_embeddings):
        total += head * quantization.bits("lm_head") // 8 + 2 * len(mine.vocab)
        total -= 0 if config.tie_word_embeddings else head * dtype_nbytes  # a tied one becomes a matrix beside the embedding
    return total


def _matrices(config: ModelConfig, mine: Split) -> list[tuple[str, int, int]]:
    """(module, out, in) of the linear modules of a layer."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_width, kv_width, inner = len(mine.q_heads) * head_dim, len(mine.kv_heads) * head_dim, len(mine.inner)
    widths = (
        ("self_attn.q_proj", q_width, hidden),
        ("self_attn.k_proj", kv_width, hidden),
        ("self_attn.v_proj", kv_width, hidden),
        ("self_attn.o_proj", hidden, q_width),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    )
    return [(f"model.layers.0.{module}", out_width, in_width) for module, out_width, in_width in widths]


def kv_nbytes_per_token(config: ModelConfig, parallel: Parallel, rank: int, dtype_nbytes: int) -> int:
    """Bytes of K and V of one token on this rank."""
    num_layers = len(layers_of(config.num_layers, parallel, parallel.pp_rank(rank)))
    num_kv_heads = len(heads_of(config.num_kv_heads, parallel, parallel.tp_rank(rank)))
    return 2 * num_layers * num_kv_heads * config.head_dim * dtype_nbytes
