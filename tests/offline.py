"""The smallest engine loop: a runner and a block pool, FCFS, chunks, prefix cache, preemption. For tests of what lies below."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from engine.batch import Chunk
from engine.blocks import BlockPool, OutOfBlocks
from engine.group import Group
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.stopping import finish_reason
from kvtransfer.layout import rank_layout
from models.load import LoadedModel
from protocol.events import TokenLogprobs
from protocol.request import Request, SamplingParams


def poisoned_pool(loaded: LoadedModel, block_size: int, num_blocks: int) -> torch.Tensor:
    """This rank's pool."""
    layout = rank_layout(loaded.kv_layout(block_size), loaded.shard.parallel, loaded.shard.rank)
    shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, block_size, layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    return torch.full(shape, float("nan") if dtype.is_floating_point else 171, dtype=dtype, device=loaded.device)


class Offline:
    """Chunk lengths come from `chunk_len` (uncomputed tokens -> tokens of this step). The pool starts poisoned with NaN. group:
    this is the leader's part; the other ranks are somewhere else (tests/ranks.py)."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        block_size: int = 8,
        num_blocks: int = 256,
        chunk_len: Callable[[int], int] = int,
        group: Group | None = None,
    ) -> None:
        self.layout = loaded.kv_layout(block_size)
        self.kv = poisoned_pool(loaded, block_size, num_blocks)
        self.pool = BlockPool(num_blocks, block_size)
        self.runner = ModelRunner(loaded, self.kv, self.layout, group=group)
        self.loaded = loaded
        self.chunk_len = chunk_len
        self.running: list[Sequence] = []
        self.failed: dict[str, str] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self.num_preemptions = self.num_cached_tokens = self.num_steps = 0

    def add(self, name: str, prompt: list[int], salt: str = "", **sampling: object) -> Sequence:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        request = Request(
            request_id=name, model="", prompt_token_ids=tuple(prompt), sampling=params, cache_salt=salt,
            eos_token_ids=self.loaded.config.eos_token_ids,
        )  # fmt: skip
        sequence = Sequence(request)
        self.running.append(sequence)
        return sequence

    def run(self) -> None:
        """Until nothing runs. Finished sequences keep their tokens."""
        while self.running:
            self.step()

    def step(self) -> None:
        self.num_steps += 1
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            if not sequence.blocks:
                self._match(sequence)
            length = max(1, min(sequence.num_uncomputed, self.chunk_len(sequence.num_uncomputed)))
            if self._grow(sequence, length, [chunk.sequence for chunk in chunks]):
                ends = length == sequence.num_uncomputed
                chunks.append(Chunk(sequence, length, (sequence,) if ends else ()))
        result = self.runner.run(chunks)
        for chunk in chunks:
            self._computed(chunk)
        for name, entries in result.prompt_logprobs.items():
            self.prompt_logprobs.setdefault(name, []).extend(entries)
        for sample in result.samples:
            name = sample.sequence.request.request_id
            if sample.error is not None:
                self.failed[name] = sample.error
                self._end(sample.sequence)
                continue
            sample.sequence.append(sample.token)
            if sample.logprobs is not None:
                self.logprobs.setdefault(name, []).append(sample.logprobs)
            if finish_reason(sample.sequence, self.loaded.config.max_position_embeddings):
                self._end(sample.sequence)
        self.pool.check_integrity()

    def _salt(self, sequence: Sequence) -> bytes:
        return self.layout.model_hash.encode() + sequence.request.cache_salt.encode()

    def _match(self, sequence: Sequence) -> None:
        if sequence.request.sampling.prompt_logprobs is not None:
            return
        sequence.extend_hashes(self.pool.block_size, self._salt(sequence))
        usable = (len(sequence) - 1) // self.pool.block_size  # one token at least must be computed
        sequence.blocks = self.pool.match(sequence.block_hashes[:usable])
        sequence.num_computed = len(sequence.blocks) * self.pool.block_size
        self.num_cached_tokens += sequence.num_computed

    def _grow(self, sequence: Sequence, length: int, busy: list[Sequence]) -> bool:
        """Blocks for the next `length` tokens; preempts the newest others, or waits."""
        while True:
            missing = sequence.num_blocks_for(sequence.num_computed + length, self.pool.block_size)
            try:
                if missing:
                    after = sequence.blocks[-1] if sequence.blocks else None
                    sequence.blocks += self.pool.allocate(missing, after)
                return True
            except OutOfBlocks:
                victims = [other for other in self.running if other.blocks and other is not sequence and other not in busy]
                if not victims:
                    return False
                self.pool.release(victims[-1].forget_blocks())
                self.num_preemptions += 1

    def _computed(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sealed = sequence.num_full_blocks(self.pool.block_size)
        sequence.num_computed += chunk.num_tokens
        sequence.extend_hashes(self.pool.block_size, self._salt(sequence))
        for index in range(sealed, sequence.num_full_blocks(self.pool.block_size)):
            self.pool.seal(sequence.blocks[index], sequence.block_hashes[index])

    def _end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.forget_blocks())


def random_chunks(seed: int, *lengths: int) -> Callable[[int], int]:
    rng = random.Random(seed)
    return lambda _: rng.choice(lengths)
