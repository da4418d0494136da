"""How many blocks fit, and the sentence when none do."""

from __future__ import annotations

import pytest

from engine.memory import num_blocks_on_cpu
from protocol.errors import ConfigError
from protocol.kv import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, dtype="float32", model_hash="x")


def test_a_budget_in_bytes() -> None:
    assert LAYOUT.block_nbytes == 2 * 2 * 3 * 16 * 8 * 4
    assert num_blocks_on_cpu(LAYOUT, 10 * LAYOUT.block_nbytes + 5, 160) == 10


def test_too_little_for_one_sequence_names_the_knob() -> None:
    with pytest.raises(ConfigError, match=r"9 KV blocks fit into model.kv_cache_bytes.* needs 10 .*--max-model-len") as caught:
        num_blocks_on_cpu(LAYOUT, 10 * LAYOUT.block_nbytes - 1, 160)
    assert caught.value.param == "model.kv_cache_bytes"
