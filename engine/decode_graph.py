"""A whole decode step on a GPU as one captured graph: embed, layers, head, sample, and the next step's inputs.

Buffers have fixed addresses and the device advances them itself, so step n + 1 can be launched before the host has read the
tokens of step n (one-step lookahead): the host only tells what changes, a row that begins, gets a block or ends. One graph per
batch size, the largest first, in one memory pool. Rows of padding have position -1: they attend to nothing and write nothing.

Not for prefill, for several ranks, for log-probabilities, logit bias or penalties; those steps go through ModelRunner.run().
Nobody in the workers calls it yet (docs/gpu.md says what is missing). Without a GPU `launch` runs the same step eagerly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.device_inputs import block_tables, upload
from kernels.ops import AttentionPlan
from models.interface import Model

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
NUM_PENDING = 2  # steps whose tokens may be on their way to the host
FAILED = -1  # instead of a token: the row's logits are not finite


class Row(msgspec.Struct, frozen=True):
    """One sequence from its newest token on, which is at `position` and whose KV is not computed yet."""

    index: int
    token: int
    position: int
    blocks: list[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """models.interface.ForwardBatch."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionPlan
    logit_rows: Tensor


class Pending:
    """Tokens of a launched step on their way to the host."""

    def __init__(self, tokens: Tensor, event: torch.cuda.Event | None) -> None:
        self._tokens, self._event = tokens, event

    @property
    def is_ready(self) -> bool:
        return self._event is None or self._event.query()

    def tokens(self) -> list[int]:
        """Waits for the step. FAILED for a row without a token. To be read before NUM_PENDING more launches."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()  # type: ignore[no-any-return]


class DecodeGraph:
    """model, whole, on kv [layers, num_blocks, 2, num_kv_heads, block_size, head_dim].

    max_blocks: of one sequence. sizes: batch sizes that are captured; a batch runs as the next larger one.
    """

    def __init__(
        self, model: Model, kv: Tensor, max_blocks: int, sizes: SequenceOf[int] = SIZES, device: torch.device | None = None
    ) -> None:
        self.model, self.kv = model, kv
        self.block_size = kv.shape[4]
        self.sizes = tuple(sorted(sizes))
        self.device = kv.device if device is None else device
        rows = self.sizes[-1]

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self.device)

        self.token_ids, self.positions = column(0, torch.int64), column(-1, torch.int64)
        self.tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=self.device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        self.temperature, self.top_p, self.min_p = (column(value, torch.float32) for value in (0.0, 1.0, 0.0))
        self.top_k = column(0, torch.int32)
        self.seeds, self.choices = column(0, torch.int64), column(0, torch.int64)
        self.tokens = column(FAILED, torch.int64)
        self._on_host = [torch.empty(rows, dtype=torch.int64, pin_memory=self.device.type == "cuda") for _ in range(NUM_PENDING)]
        self._num_launched = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._side: torch.cuda.Stream | None = None

    def capture(self) -> None:
        """Every size, the largest first, so that the smaller ones fit into its memory. Once, while no row is set."""
        assert self.device.type == "cuda", f"a graph is captured on a GPU, not on {self.device}"
        self._side = torch.cuda.Stream(self.device)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                self._step(size)  # compiles kernels and fills the allocators, which a capture may not do
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            self._graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[size], pool=pool):
                self._step(size)

    def set_rows(self, rows: SequenceOf[Row]) -> None:
        """Rows that begin, or go on with more blocks; their indexes are distinct. One copy, nothing waits."""
        if not rows:
            return
        tables = block_tables([row.blocks for row in rows])
        assert tables.shape[1] <= self.tables.shape[1], f"{tables.shape[1]} blocks, the graph has room for {self.tables.shape[1]}"
        wide = np.zeros((len(rows), self.tables.shape[1]), dtype=np.int32)
        wide[:, : tables.shape[1]] = tables
        seeds = np.array([row.seed % 2**64 for row in rows], dtype=np.uint64).view(np.int64)
        columns = [
            (self.token_ids, np.array([row.token for row in rows], dtype=np.int64)),
            (self.positions, np.array([row.position for row in rows], dtype=np.int64)),
            (self.tables, wide),
            (self.temperature, np.array([row.temperature for row in rows], dtype=np.float32)),
            (self.top_k, np.array([row.top_k for row in rows], dtype=np.int32)),
            (self.top_p, np.array([row.top_p for row in rows], dtype=np.float32)),
            (self.min_p, np.array([row.min_p for row in rows], dtype=np.float32)),
            (self.seeds, seeds),
            (self.choices, np.array([row.choice for row in rows], dtype=np.int64)),
        ]
        index = np.array([row.index for row in rows], dtype=np.int64)
        at, *values = upload([index, *(array for _, array in columns)], self.device)
        for (buffer, _), value in zip(columns, values, strict=True):
            buffer.index_copy_(0, at, value)

    def set_blocks(self, blocks: dict[int, list[int]]) -> None:
        """New tables of running rows, whose tokens and positions the device knows better than the host."""
        if not blocks:
            return
        wide = np.zeros((len(blocks), self.tables.shape[1]), dtype=np.int32)
        tables = block_tables(list(blocks.values()))
        wide[:, : tables.shape[1]] = tables
        at, value = upload([np.array(list(blocks), dtype=np.int64), wide], self.device)
        self.tables.index_copy_(0, at, value)

    def clear_rows(self, indexes: SequenceOf[int]) -> None:
        """They are padding from the next launch on."""
        if indexes:
            (at,) = upload([np.array(indexes, dtype=np.int64)], self.device)
            self.positions.index_fill_(0, at, -1)

    def launch(self, num_rows: int) -> Pending:
        """One step of rows [0, num_rows). Tables have a block for every row's position. Waits for nothing."""
        size = next((size for size in self.sizes if size >= num_rows), None)
        assert size is not None, f"{num_rows} rows, the largest graph has {self.sizes[-1]}"
        if self.device.type == "cuda":
            self._graphs[size].replay()
        else:
            self._step(size)
        host = self._on_host[self._num_launched % NUM_PENDING][:num_rows]
        self._num_launched += 1
        host.copy_(self.tokens[:num_rows], non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Pending(host, event)

    def _step(self, size: int) -> None:
        from kernels.sampling import SamplingInputs, sample

        with torch.inference_mode():
            positions, tables = self.positions[:size], self.tables[:size]
            is_row, at = positions >= 0, positions.clamp(min=0)
            block = tables.gather(1, (at // self.block_size)[:, None])[:, 0].long()
            plan = AttentionPlan(
                spans=(),
                num_single=size,
                slots=at,
                block_tables=tables,
                seq_lens=(positions + 1).to(torch.int32),
                query_starts=self.starts[: size + 1],
                token_slots=torch.where(is_row, block * self.block_size + at % self.block_size, -1),
            )
            batch = _Inputs(self.token_ids[:size], at, plan, at)
            logits = self.model.logits(self.model.forward(batch, self.model.embed(batch), self.kv))
            assert logits is not None, "one rank has the whole model"
            inputs = SamplingInputs(
                temperature=self.temperature[:size],
                top_k=self.top_k[:size],
                top_p=self.top_p[:size],
                min_p=self.min_p[:size],
                seeds=self.seeds[:size],
                choices=self.choices[:size],
                positions=positions + 1,  # the place of the token that is drawn, as in engine/sampler.py
            )
            tokens = sample(logits.contiguous(), inputs)
            tokens = torch.where(is_row, tokens, FAILED)
            self.tokens[:size].copy_(tokens)
            self.token_ids[:size].copy_(tokens.clamp(min=0))
            self.positions[:size].add_(is_row)
