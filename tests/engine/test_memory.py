"""How many blocks fit, and the sentence when none do."""

from __future__ import annotations

import pytest
import torch

from engine.memory import num_blocks_on_cpu, num_blocks_on_gpu
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


@pytest.mark.parametrize(("utilization", "expected"), [(0.9, 40), (0.5, 0), (1.0, 50)])
def test_a_share_of_a_gpu_less_what_is_there_already(monkeypatch: pytest.MonkeyPatch, utilization: float, expected: int) -> None:
    """--gpu-memory-utilization: of 100 blocks' worth of memory, weights and others hold 50."""
    nbytes = LAYOUT.block_nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * nbytes, 100 * nbytes))
    device = torch.device("cuda")
    if expected:
        assert num_blocks_on_gpu(LAYOUT, utilization, 160, device) == expected
        return
    with pytest.raises(ConfigError, match=r"0 KV blocks fit into --gpu-memory-utilization 0.5, but .* needs 10 ") as caught:
        num_blocks_on_gpu(LAYOUT, utilization, 160, device)
    assert caught.value.param == "model.gpu_memory_utilization"
