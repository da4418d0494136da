"""One engine step: chunks in, KV written, tokens out. It decides nothing and changes no Sequence.

Called by the loops of prefill/worker.py and decode/worker.py, which apply the result to their sequences.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import msgspec
import torch
from torch import Tensor

from engine.batch import Batch, Chunk, build_batch
from engine.sampler import Sample, sample, score
from engine.sequence import Sequence
from engine.stats import StepStats
from models.load import LoadedModel
from protocol.events import TokenLogprobs
from protocol.kv import KVLayout

MAX_SCORED_ROWS = 64  # logits of so many prompt rows are in memory at a time


class StepResult(msgspec.Struct, frozen=True):
    """prompt_logprobs[request_id]: the entries of the prompt positions that this step scored, position 0 as None. Over all
    chunks of a prompt they are prompt_len entries, in order."""

    samples: list[Sample]
    prompt_logprobs: dict[str, list[TokenLogprobs | None]]
    stats: StepStats


class ModelRunner:
    """loaded on kv, the pool's tensor [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim].

    num_threads: how many threads torch may use in the thread that calls run(); None leaves torch's own choice.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: Tensor,
        layout: KVLayout,
        num_threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        expected = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        assert (kv.shape[0], *kv.shape[2:]) == expected, f"pool {tuple(kv.shape)} is not of {layout}"
        assert loaded.model_hash == layout.model_hash, "the pool belongs to another model"
        assert str(kv.dtype) == f"torch.{layout.dtype}", f"pool dtype {kv.dtype}, layout {layout.dtype}"
        self.loaded = loaded
        self.kv = kv
        self.layout = layout
        self.num_threads = num_threads
        self._clock = clock
        self._thread: int | None = None

    def run(self, chunks: SequenceOf[Chunk], on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Compute the chunks in one forward pass and sample where they ask for it.

        on_layer(layer) is called in this thread as soon as the layer's KV of this batch is in the pool. A sequence whose
        logits are not finite gets a Sample with an error; the others are not touched by it.
        """
        assert chunks, "a step without work"
        self._own_threads()
        model = self.loaded.model
        with torch.inference_mode():
            started = self._clock()
            batch = build_batch(chunks, self.layout, self.loaded.device)
            hidden = model.forward(batch, self.kv, on_layer)
            rows = hidden[batch.logit_rows] if len(batch.logit_rows) != len(hidden) else hidden
            computed = self._clock()
            samples = self._sample(batch, rows)
            scores = self._score(batch, rows)
            ended = self._clock()
        return StepResult(samples, scores, _stats(chunks, ended - started, computed - started, ended - computed))

    def warm_up(self) -> None:
        """Run one token through block 0 once, so that the first request does not pay for threads and lazy libraries.

        Only before the pool is in use: block 0 is zeroed afterwards.
        """
        from protocol.request import Request, SamplingParams

        request = Request(request_id="warm-up", model="", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0.0))
        sequence = Sequence(request)
        sequence.blocks = [0]
        self.run([Chunk(sequence, 1, (sequence,))])
        self.fill_block(0, 0.0)

    def copy_block(self, source: int, target: int) -> None:
        """Copy on write: all layers of one block."""
        with torch.inference_mode():
            self.kv[:, target].copy_(self.kv[:, source])

    def fill_block(self, block: int, value: float) -> None:
        """Overwrite one block; for tests that poison KV, with NaN where the dtype has one."""
        with torch.inference_mode():
            self.kv[:, block].fill_(value)

    def _own_threads(self) -> None:
        # OpenMP's thread count belongs to the calling thread, so it is set where run() is called, not where we were built.
        current = threading.get_ident()
        if self._thread != current and self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        self._thread = current

    def _sample(self, batch: Batch, rows: Tensor) -> list[Sample]:
        if not batch.samples:
            return []
        indices = [index for _, index in batch.samples]
        if indices != list(range(len(rows))):
            distinct = sorted(set(indices))
            logits = self.loaded.model.logits(rows[torch.tensor(distinct, device=rows.device)])
            place = {index: row for row, index in enumerate(distinct)}
            if indices != distinct:
                logits = logits[torch.tensor([place[index] for index in indices], device=rows.device)]
        else:
            logits = self.loaded.model.logits(rows)
        return sample(logits, [sequence for sequence, _ in batch.samples])

    def _score(self, batch: Batch, rows: Tensor) -> dict[str, list[TokenLogprobs | None]]:
        scores: dict[str, list[TokenLogprobs | None]] = {}
        for sequence, first, count in batch.scored:
            request = sequence.request
            start = sequence.num_computed
            count = min(count, request.prompt_len - 1 - start)  # the last prompt row predicts the output
            entries: list[TokenLogprobs | None] = [None] if start == 0 else []
            for offset in range(0, count, MAX_SCORED_ROWS):
                number = min(MAX_SCORED_ROWS, count - offset)
                tokens = sequence.token_ids[start + offset + 1 : start + offset + 1 + number]
                logits = self.loaded.model.logits(rows[first + offset : first + offset + number])
                entries += score(logits, tokens, request.sampling.prompt_logprobs or 0)
            scores[request.request_id] = entries
        return scores


def _stats(chunks: SequenceOf[Chunk], seconds: float, forward_s: float, sample_s: float) -> StepStats:
    prefill_tokens = prefill_pairs = num_decode = decode_context = 0
    for chunk in chunks:
        sequence, length = chunk.sequence, chunk.num_tokens
        begin = sequence.num_computed
        if length == 1 and begin >= sequence.prompt_len:
            num_decode += 1
            decode_context += begin + 1
        else:
            prefill_tokens += length
            prefill_pairs += length * begin + length * (length + 1) // 2
    return StepStats(
        num_prefill_tokens=prefill_tokens,
        num_decode=num_decode,
        prefill_pairs=prefill_pairs,
        decode_context=decode_context,
        num_samples=sum(len(chunk.samples) for chunk in chunks),
        seconds=seconds,
        forward_s=forward_s,
        sample_s=sample_s,
    )
