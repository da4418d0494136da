"""Which part of each weight one rank holds, for any number of tensor ranks and pipeline stages, and what cannot be split so.

Plain integers, no torch. The arithmetic of layers and KV heads is protocol/parallel.py's, for the KV pool is split by the same;
here are the parts that only a model knows. Called by models/llama.py, models/toy.py and models/load.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from models.config import ModelConfig
from protocol.errors import ConfigError
from protocol.parallel import Parallel, heads_of, layers_of, part

if TYPE_CHECKING:
    from models.interface import Shard  # needs torch, which the check at start-up does without

TP_FLAGS = "--prefill-tp, --decode-tp"
PP_FLAGS = "--prefill-pp, --decode-pp"


class Split(msgspec.Struct, frozen=True):
    """One rank's ranges. inner: columns of gate and up, and of down's input. vocab: rows of embedding and head."""

    layers: range
    kv_heads: range
    q_heads: range
    inner: range
    vocab: range


def split(config: ModelConfig, shard: Shard) -> Split:
    """The query heads of a rank are those that attend to its KV heads. Where a KV head lies on several ranks, they share its
    query heads, the first ones taking one more where it is uneven. Raises ConfigError."""
    parallel = shard.parallel
    check(config, parallel)
    kv_heads = heads_of(config.num_kv_heads, parallel, shard.tp_rank)
    group = config.num_heads // config.num_kv_heads
    copies = num_copies(config, parallel)
    shared = part(group, copies, shard.tp_rank % copies)
    first = kv_heads.start * group
    q_heads = range(first, kv_heads.stop * group) if copies == 1 else range(first + shared.start, first + shared.stop)
    return Split(
        layers=layers_of(config.num_layers, parallel, shard.pp_rank),
        kv_heads=kv_heads,
        q_heads=q_heads,
        inner=part(config.intermediate_size, parallel.tp_size, shard.tp_rank),
        vocab=part(config.vocab_size, parallel.tp_size, shard.tp_rank),
    )


def num_copies(config: ModelConfig, parallel: Parallel) -> int:
    """On how many tensor ranks each KV head lies."""
    return max(1, parallel.tp_size // config.num_kv_heads)


def check(config: ModelConfig, parallel: Parallel) -> None:
    """Raises ConfigError when this model cannot be dealt to so many ranks. No torch, so that a start can be refused early."""
    tp, pp = parallel.tp_size, parallel.pp_size
    if pp > config.num_layers:
        raise ConfigError(
            f"{pp} pipeline stages ({PP_FLAGS}), but the model has only {config.num_layers} layers (num_hidden_layers)"
        )
    if config.num_kv_heads < tp and tp % config.num_kv_heads:
        raise ConfigError(
            f"{tp} tensor ranks ({TP_FLAGS}), but the model has {config.num_kv_heads} KV heads (num_key_value_heads), which cannot "
            f"be copied evenly to them; choose at most {config.num_kv_heads}, or a multiple of it"
        )
    for number, what in (
        (config.num_heads, "query heads (num_attention_heads)"),
        (config.intermediate_size, "columns between gate and down (intermediate_size)"),
        (config.vocab_size, "tokens in its vocabulary (vocab_size)"),
    ):
        if number < tp:
            raise ConfigError(f"{tp} tensor ranks ({TP_FLAGS}), but the model has only {number} {what}; choose fewer")
