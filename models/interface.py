"""What a model is to the runner, what a batch is to a model, and what a rank's place in its group is to both: Protocols and one
struct, so that models/ needs nothing of engine/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
from torch import Tensor

from kernels.ops import AttentionPlan
from protocol.parallel import ALONE, Parallel

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


class TensorRanks(Protocol):
    """The ranks that share one stage's layers. With one rank all of it is the identity."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the tensor ranks, the same bits on each of them. x is contiguous and is used up."""

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """Columns of all tensor ranks side by side on tensor rank 0, None elsewhere. x [rows, widths[tp_rank]]."""


class NoOtherRanks:
    """TensorRanks of a rank that shares its layers with nobody."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        return x


class Shard(msgspec.Struct, frozen=True):
    """A rank's place: which layers and heads it holds (protocol/parallel.py has the arithmetic)."""

    parallel: Parallel = ALONE
    rank: int = 0

    @property
    def tp_rank(self) -> int:
        return self.parallel.tp_rank(self.rank)

    @property
    def pp_rank(self) -> int:
        return self.parallel.pp_rank(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp_size - 1


WHOLE = Shard()


class Model(Protocol):
    """One rank's part. The first stage holds the embedding and also the last norm and the head, so that tied weights lie on one
    stage and only the wanted rows of hidden states travel back, not logits.
    """

    def embed(self, batch: ForwardBatch) -> Tensor:
        """First stage only: what forward() takes, [num_tokens, hidden width]."""

    def new_hidden(self, num_rows: int) -> Tensor:
        """Uninitialised hidden states of so many rows, to receive another stage's into."""

    def forward(self, batch: ForwardBatch, hidden: Tensor, kv: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """This stage's layers: write the batch's KV into kv [own layers, num_blocks, 2, own KV heads, block_size, head_dim] and
        return the hidden states. on_layer(l) is called as soon as own layer l's KV is written."""

    def logits(self, hidden: Tensor) -> Tensor | None:
        """First stage, all its tensor ranks together: rows of the last stage's hidden states -> float32 [rows, vocab_size] on
        tensor rank 0, None on the others."""
