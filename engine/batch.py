"""What the runner computes in one step: chunks of sequences, and the same as tensors. Called by engine/runner.py only."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence
from kernels.ops import AttentionPlan, Span
from protocol.kv import KVLayout


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Compute the next num_tokens tokens of a sequence, from sequence.num_computed on. Its blocks have room for them.

    samples: who gets a token from the last row's logits: () inside a prompt, usually (sequence,), and all siblings when
    the prompt of a request with n > 1 ends.
    """

    sequence: Sequence
    num_tokens: int
    samples: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """models.interface.ForwardBatch. Rows of one chunk are neighbours; chunks of one token come first.

    logit_rows: ascending. samples: for each sampled sequence the index into logit_rows. scored: for each chunk whose
    prompt is scored (sequence, first index into logit_rows, number of rows).
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    attention: AttentionPlan
    logit_rows: Tensor  # int64
    samples: tuple[tuple[Sequence, int], ...]
    scored: tuple[tuple[Sequence, int, int], ...]


def is_scored(sequence: Sequence) -> bool:
    """Its request wants prompt log-probabilities, and this pass over the prompt is the first."""
    return sequence.choice == 0 and sequence.output_len == 0 and sequence.request.sampling.prompt_logprobs is not None


def build_batch(chunks: SequenceOf[Chunk], layout: KVLayout, device: torch.device) -> Batch:
    """Tensors for one forward pass."""
    ordered = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
    spans: list[Span] = []
    token_ids: list[int] = []
    logit_rows: list[int] = []
    samples: list[tuple[Sequence, int]] = []
    scored: list[tuple[Sequence, int, int]] = []
    starts: list[int] = []
    for chunk in ordered:
        sequence, start = chunk.sequence, len(token_ids)
        begin, end = sequence.num_computed, sequence.num_computed + chunk.num_tokens
        assert 0 < chunk.num_tokens <= sequence.num_uncomputed, (sequence, chunk.num_tokens)
        assert end <= len(sequence.blocks) * layout.block_size, f"{sequence} has no block for token {end - 1}"
        token_ids += sequence.token_ids[begin:end]
        starts.append(begin - start)
        blocks = sequence.blocks[: layout.num_blocks_for(end)]
        spans.append(Span(start, chunk.num_tokens, begin, blocks, torch.tensor(blocks, device=device)))
        if is_scored(sequence):
            scored.append((sequence, len(logit_rows), chunk.num_tokens))
            logit_rows += range(start, len(token_ids))
        elif chunk.samples:
            logit_rows.append(len(token_ids) - 1)
        samples += [(sampled, len(logit_rows) - 1) for sampled in chunk.samples]
    lengths = [span.length for span in spans]
    positions = np.arange(len(token_ids)) + np.repeat(starts, lengths)
    num_single = sum(length == 1 for length in lengths)
    tables, seq_lens = (None, None) if device.type == "cpu" else _device_tables(spans[:num_single], device)
    slots = torch.from_numpy(_slots(spans, positions, layout)).to(device)
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(positions).to(device),
        attention=AttentionPlan(tuple(spans), num_single, slots, tables, seq_lens),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        samples=tuple(samples),
        scored=tuple(scored),
    )


def _slots(spans: list[Span], positions: np.ndarray, layout: KVLayout) -> np.ndarray:
    """Where each token's K and V rows go in a layer seen as rows of head_dim: int64 [num_tokens, 2, num_kv_heads]."""
    block_size = layout.block_size
    blocks = np.concatenate(
        [
            np.asarray(span.blocks, dtype=np.int64)[np.arange(span.context_len, span.context_len + span.length) // block_size]
            for span in spans
        ]
    )
    lanes = np.arange(2 * layout.num_kv_heads).reshape(2, layout.num_kv_heads) * block_size
    first: np.ndarray = blocks * (2 * layout.num_kv_heads * block_size) + positions % block_size
    slots: np.ndarray = first[:, None, None] + lanes
    return slots


def _device_tables(singles: list[Span], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(int32 [num_single, max_blocks], int32 [num_single]) for the paged kernel."""
    if not singles:
        return None, None
    tables = np.zeros((len(singles), max(len(span.blocks) for span in singles)), dtype=np.int32)
    for row, span in enumerate(singles):
        tables[row, : len(span.blocks)] = span.blocks
    lens = np.array([span.context_len + 1 for span in singles], dtype=np.int32)
    return torch.from_numpy(tables).to(device), torch.from_numpy(lens).to(device)
