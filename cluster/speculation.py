"""Puts the speculation of a decode worker together from the configuration: the lookup, or the draft model with its own KV pool.

A draft model is whole on the rank that leads, whatever the size of the group: the others only ever see the steps of the target.
Called by `life.py` and `local.py`, in the engine's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cluster.preflight import check_draft
from configs.schema import Config
from engine.blocks import BlockPool
from engine.runner import ModelRunner
from engine.speculation.drafter import DraftModel
from engine.speculation.lookup import Lookup
from engine.speculation.speculator import Guesser, Speculator
from models.load import load_model

if TYPE_CHECKING:
    from cluster.assembly import Engine

CATCH_UP_TOKENS = 256  # of prompts, that a draft model computes in a step


def make_speculator(config: Config, role: str, engine: Engine) -> Speculator | None:
    """None where none is asked for. Raises ModelError, ConfigError."""
    decode = config.decode
    if role != "decode" or decode.speculation is None:
        return None
    guesser: Guesser
    if decode.speculation == "ngram":
        guesser = Lookup(decode.prompt_lookup_min, decode.prompt_lookup_max)
    else:
        guesser = _draft_model(config, engine)
    return Speculator(guesser, decode.num_speculative_tokens, decode.adapt_speculation)


def _draft_model(config: Config, engine: Engine) -> DraftModel:
    name = config.decode.speculative_model
    assert name is not None, "configs/check.py"
    loaded = load_model(name, config.model.dtype, config.model.device)
    check_draft(config, engine.loaded.config, loaded.config)
    layout = loaded.kv_layout(engine.layout.block_size)
    num_blocks = engine.pool.num_blocks
    shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    kv = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=loaded.device)
    runner = ModelRunner(loaded, kv, layout, engine.runner.num_threads)
    pool = BlockPool(num_blocks, layout.block_size, config.model.enable_prefix_caching)
    max_len = loaded.config.max_position_embeddings
    return DraftModel(runner, pool, layout, CATCH_UP_TOKENS, max_len, engine.loaded.config.vocab_size)
