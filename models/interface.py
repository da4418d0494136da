"""What a model is to the runner, and what a batch is to a model: two Protocols, so that models/ needs nothing of engine/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kernels.ops import AttentionPlan

OnLayer = Callable[[int], None]


class ForwardBatch(Protocol):
    """engine.batch.Batch."""

    @property
    def token_ids(self) -> Tensor: ...  # int64 [num_tokens]

    @property
    def positions(self) -> Tensor: ...  # int64 [num_tokens]

    @property
    def attention(self) -> AttentionPlan: ...

    @property
    def logit_rows(self) -> Tensor: ...  # int64: the rows whose logits will be asked for; the others may hold anything


class Model(Protocol):
    def forward(self, batch: ForwardBatch, kv: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Write the batch's KV into kv [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim] and return what
        logits() takes, one row per token. on_layer(l) is called as soon as layer l's KV is written."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of what forward() returned -> float32 [rows, vocab_size]."""
