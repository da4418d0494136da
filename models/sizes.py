"""How large a model is, from its config alone: parameters and KV bytes of each rank. No torch, no weights.

Called by `cluster/memory.py` (`tandem memory`). What a rank holds is `models/split.py`'s; this only multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

from models.config import ModelConfig
from models.split import split
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


def kv_nbytes_per_token(config: ModelConfig, parallel: Parallel, rank: int, dtype_nbytes: int) -> int:
    """Bytes of K and V of one token on this rank."""
    num_layers = len(layers_of(config.num_layers, parallel, parallel.pp_rank(rank)))
    num_kv_heads = len(heads_of(config.num_kv_heads, parallel, parallel.tp_rank(rank)))
    return 2 * num_layers * num_kv_heads * config.head_dim * dtype_nbytes
