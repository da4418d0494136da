"""What the runner computes in one step: chunks of sequences, the same as plain integers, and those as tensors.

`plan_step` is the leader's; `build_batch` is every rank's. Called by engine/runner.py and engine/follower.py only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.device_inputs import device_inputs
from engine.sequence import Ahead, Sequence
from engine.step import NOTHING, Extras, Step
from kernels.ops import AttentionPlan, Span, on_gpu
from protocol.kv import KVLayout

MAX_SCORED_ROWS = 64  # logits of so many prompt rows are in memory at a time


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Compute the next num_tokens tokens of a sequence, from sequence.num_computed on. Its blocks have room for them.

    samples: who gets a token from the last row's logits: () inside a prompt, usually (sequence,), and all siblings when
    the prompt of a request with n > 1 ends. draft: guesses at what follows the sequence's newest token, which this chunk ends
    with; they are computed behind it, and each row of them gets a token as well (engine/verify.py says which of those stand).
    """

    sequence: Sequence
    num_tokens: int
    samples: tuple[Sequence, ...] = ()
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One call of Model.logits() for prompt rows of a sequence: row i scores tokens[i]."""

    sequence: Sequence
    tokens: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Whom the logits of a step are for. samples: (sequence, row of the first call), empty when nobody samples, and a sequence with
    a draft is followed by itself ahead; scored: one entry for each of the calls after it, in order. scoring: the sequences
    whose prompt is scored by this step."""

    samples: tuple[tuple[Sequence | Ahead, int], ...]
    scored: tuple[Scored, ...]
    scoring: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """models.interface.ForwardBatch. Rows of one chunk are neighbours; chunks of one token come first."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    attention: AttentionPlan
    logit_rows: Tensor  # int64, ascending


def is_scored(sequence: Sequence) -> bool:
    """Its request wants prompt log-probabilities, and this pass over the prompt is the first."""
    return sequence.choice == 0 and sequence.output_len == 0 and sequence.request.sampling.prompt_logprobs is not None


def plan_step(chunks: SequenceOf[Chunk], block_size: int, extras: Extras = NOTHING) -> tuple[Step, Wanted]:
    """The chunks as plain integers, and whom their logits are for."""
    if all([chunk.sequence.chunk is chunk for chunk in chunks]):  # noqa: C419 - a list is quicker than a generator
        return _plan_decode(chunks, block_size, extras)
    token_ids: list[int] = []
    lengths: list[int] = []
    contexts: list[int] = []
    blocks: list[list[int]] = []
    logit_rows: list[int] = []
    sampled: list[tuple[Sequence | Ahead, int]] = []
    scoring: list[tuple[Sequence, int, int]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.num_rows > 1):
        sequence, draft, start = chunk.sequence, chunk.draft, len(token_ids)
        begin, end = sequence.num_computed, sequence.num_computed + chunk.num_rows
        assert 0 < chunk.num_tokens <= sequence.num_uncomputed, (sequence, chunk.num_tokens)
        assert not draft or (chunk.num_tokens == sequence.num_uncomputed and chunk.samples == (sequence,)), (sequence, draft)
        assert end <= len(sequence.blocks) * block_size, f"{sequence} has no block for token {end - 1}"
        token_ids += sequence.token_ids[begin : begin + chunk.num_tokens]
        token_ids += draft
        lengths.append(chunk.num_rows)
        contexts.append(begin)
        blocks.append(sequence.blocks[: -(-end // block_size)])
        if is_scored(sequence):
            assert not draft, f"{sequence} is scored and has a draft"
            scoring.append((sequence, len(logit_rows), chunk.num_tokens))
            logit_rows += range(start, len(token_ids))
        elif chunk.samples:
            logit_rows.append(len(token_ids) - 1 - len(draft))
        sampled += [(sample, len(logit_rows) - 1) for sample in chunk.samples]
        for place in range(len(draft)):
            logit_rows.append(len(token_ids) - len(draft) + place)
            sampled.append((Ahead(sequence, draft[: place + 1]), len(logit_rows) - 1))
    calls: list[list[int]] = []
    if sampled:
        calls.append(sorted({index for _, index in sampled}))
        place = {index: row for row, index in enumerate(calls[0])}
        sampled = [(sequence, place[index]) for sequence, index in sampled]
    scored: list[Scored] = []
    for sequence, first, count in scoring:
        start = sequence.num_computed
        count = min(count, sequence.request.prompt_len - 1 - start)  # the last prompt row predicts the output
        for offset in range(0, count, MAX_SCORED_ROWS):
            number = min(MAX_SCORED_ROWS, count - offset)
            scored.append(Scored(sequence, sequence.token_ids[start + offset + 1 : start + offset + 1 + number]))
            calls.append(list(range(first + offset, first + offset + number)))
    step = Step(token_ids, lengths, contexts, blocks, logit_rows, calls, extras)
    return step, Wanted(tuple(sampled), tuple(scored), tuple(sequence for sequence, _, _ in scoring))


def _plan_decode(chunks: SequenceOf[Chunk], block_size: int, extras: Extras) -> tuple[Step, Wanted]:
    """plan_step() where every chunk is its sequence's own `Sequence.chunk`: one token, and one to be sampled."""
    token_ids: list[int] = []
    contexts: list[int] = []
    blocks: list[list[int]] = []
    sampled: list[tuple[Sequence, int]] = []
    for row, chunk in enumerate(chunks):
        sequence = chunk.sequence
        begin, held = sequence.num_computed, sequence.blocks
        num_blocks = begin // block_size + 1
        assert len(sequence.token_ids) == begin + 1, sequence
        assert len(held) >= num_blocks, f"{sequence} has no block for token {begin}"
        token_ids.append(sequence.token_ids[begin])
        contexts.append(begin)
        blocks.append(held if len(held) == num_blocks else held[:num_blocks])  # nobody changes it before the step is over
        sampled.append((sequence, row))
    rows = list(range(len(token_ids)))
    return Step(token_ids, [1] * len(rows), contexts, blocks, rows, [rows], extras), Wanted(tuple(sampled), (), ())


def build_batch(step: Step, layout: KVLayout, device: torch.device) -> Batch:
    """Tensors for one forward pass over a pool of this layout, which is the rank's own. The step has tokens."""
    if on_gpu(device):
        return Batch(*device_inputs(step, layout.block_size, device))
    spans: list[Span] = []
    starts: list[int] = []
    start = 0
    indexes = _block_tables(step.blocks)
    if device.type != "cpu":
        indexes = [index.to(device) for index in indexes]
    for length, context_len, blocks, index in zip(step.lengths, step.contexts, step.blocks, indexes, strict=True):
        spans.append(Span(start, length, context_len, blocks, index))
        starts.append(context_len - start)
        start += length
    positions = np.arange(start) + np.repeat(starts, step.lengths)
    num_single = step.lengths.count(1)
    slots = torch.from_numpy(_slots(spans, positions, layout)).to(device)
    return Batch(
        token_ids=torch.tensor(step.token_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(positions).to(device),
        attention=AttentionPlan(tuple(spans), num_single, slots),
        logit_rows=torch.tensor(step.logit_rows, dtype=torch.int64, device=device),
    )


def _block_tables(blocks: SequenceOf[SequenceOf[int]]) -> list[Tensor]:
    """int64, one for each sequence; views of one array, which is quicker to make than many."""
    lengths = [len(some) for some in blocks]
    together = np.fromiter(itertools.chain.from_iterable(blocks), dtype=np.int64, count=sum(lengths))
    return list(torch.from_numpy(together).split(lengths))


def _slots(spans: list[Span], positions: np.ndarray, layout: KVLayout) -> np.ndarray:
    """Where each token's K and V rows go in a layer seen as rows of head_dim: int64 [num_tokens, 2, num_kv_heads]."""
    block_size = layout.block_size
    own: list[int] = []  # each token's block
    for span in spans:
        if span.length == 1:
            own.append(span.blocks[span.context_len // block_size])
        else:
            end = span.context_len + span.length
            places = np.arange(span.context_len, end) // block_size
            own += np.asarray(span.blocks, dtype=np.int64)[places].tolist()
    blocks = np.array(own, dtype=np.int64)
    lanes = np.arange(2 * layout.num_kv_heads).reshape(2, layout.num_kv_heads) * block_size
    first: np.ndarray = blocks * (2 * layout.num_kv_heads * block_size) + positions % block_size
    slots: np.ndarray = first[:, None, None] + lanes
    return slots
