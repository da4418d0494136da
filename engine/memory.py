"""How many KV blocks a worker can have. One sentence that names the knob when the answer is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.errors import ConfigError
from protocol.kv import KVLayout

if TYPE_CHECKING:
    import torch  # the arithmetic for a CPU is asked for where there is none


def num_blocks_on_cpu(layout: KVLayout, kv_cache_bytes: int, max_model_len: int) -> int:
    """As many as fit into a budget of bytes, at least one sequence of max_model_len tokens. Raises ConfigError."""
    return _at_least_one_sequence(
        kv_cache_bytes // layout.block_nbytes, layout, max_model_len, f"model.kv_cache_bytes = {kv_cache_bytes}"
    )


def num_blocks_on_gpu(layout: KVLayout, utilization: float, max_model_len: int, device: torch.device) -> int:
    """What utilization * total memory leaves besides the weights and whatever else is there. Call once the model is loaded."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    budget = int(total * utilization) - (total - free)
    return _at_least_one_sequence(
        max(0, budget) // layout.block_nbytes, layout, max_model_len, f"--gpu-memory-utilization {utilization}"
    )


def _at_least_one_sequence(num_blocks: int, layout: KVLayout, max_model_len: int, knob: str) -> int:
    needed = layout.num_blocks_for(max_model_len)
    if num_blocks < needed:
        raise ConfigError(
            f"{num_blocks} KV blocks fit into {knob}, but one sequence of max_model_len = {max_model_len} needs {needed} "
            f"({needed * layout.block_nbytes / 1e6:.0f} MB); raise it or lower --max-model-len",
            param="model.kv_cache_bytes" if "bytes" in knob else "model.gpu_memory_utilization",
        )
    return num_blocks
