"""A step's plain integers as tensors on a GPU: one pinned buffer, one copy, nothing that waits. Called by engine/batch.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from engine.step import Step
from kernels.ops import AttentionPlan

MAX_SHORT_LEN = 8  # chunks of so many rows are few enough to share one tile with their heads
_ALIGNED = 16  # bytes; any dtype may begin there, and so may a 16-byte load
_NOWHERE = torch.empty(0, dtype=torch.int64)


def device_inputs(step: Step, block_size: int, device: torch.device) -> tuple[Tensor, Tensor, AttentionPlan, Tensor]:
    """(token_ids, positions, plan, logit_rows) of engine.batch.Batch. Spans of one token come first in a step."""
    lengths, contexts = np.array(step.lengths, dtype=np.int32), np.array(step.contexts, dtype=np.int32)
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    tables = block_tables(step.blocks)
    span_of_row = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(span_of_row)) + (contexts - starts[:-1])[span_of_row]
    slots = tables[span_of_row, positions // block_size].astype(np.int64) * block_size + positions % block_size
    num_single = int((lengths == 1).sum())
    chunks = set(step.lengths[num_single:])
    short_len = chunks.pop() if len(chunks) == 1 else 0
    on_device = upload(
        [
            np.array(step.token_ids, dtype=np.int64),
            positions.astype(np.int64),
            np.array(step.logit_rows, dtype=np.int64),
            slots,
            tables,
            contexts + lengths,
            starts,
        ],
        device,
    )
    token_ids, on_positions, logit_rows, token_slots, on_tables, seq_lens, query_starts = on_device
    plan = AttentionPlan(
        spans=(),
        num_single=num_single,
        slots=_NOWHERE,
        block_tables=on_tables,
        seq_lens=seq_lens,
        query_starts=query_starts,
        token_slots=token_slots,
        short_len=short_len if short_len <= MAX_SHORT_LEN else 0,
    )
    return token_ids, on_positions, plan, logit_rows


def block_tables(blocks: SequenceOf[SequenceOf[int]]) -> np.ndarray:
    """int32 [num_spans, most blocks of any], 0 where a span has fewer."""
    widths = np.array([len(some) for some in blocks])
    tables = np.zeros((len(blocks), int(widths.max())), dtype=np.int32)
    together = np.fromiter(itertools.chain.from_iterable(blocks), dtype=np.int32, count=int(widths.sum()))
    tables[np.arange(tables.shape[1]) < widths[:, None]] = together
    return tables


def upload(arrays: SequenceOf[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, from one copy out of pinned memory."""
    offsets = [0, *itertools.accumulate(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays)]
    buffer = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = buffer.numpy()
    for offset, array in zip(offsets, arrays, strict=False):
        raw[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = buffer.to(device, non_blocking=True)
    return [
        moved[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for offset, array in zip(offsets, arrays, strict=False)
    ]
