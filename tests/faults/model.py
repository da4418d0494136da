"""A model runner of a few microseconds that works straight on a pool's bytes, and its oracle, which needs no pool.

KV at a position is a hash chain over the tokens up to there (as in models/toy.py), in every layer, K and V; the next token is
a hash of every KV byte that attention would read, and, unless greedy, of seed, choice and position. So a wrong byte, a block
of somebody else, or a token more or less changes the output. Beyond that `LightRunner` compares all it reads with what these
tokens' KV is, and says whose block it was if it differs: a wrong read counts even when nobody sees its token.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import xxhash

from engine.batch import Chunk
from engine.runner import StepResult
from engine.sampler import Sample
from engine.sequence import Sequence
from engine.stats import StepStats
from kvtransfer.pool import KVPool
from protocol.kv import KVLayout
from protocol.request import SamplingParams

BLOCK_SIZE = 4
NUM_LAYERS = 2
VOCAB_SIZE = 256
LAYOUT = KVLayout(
    num_layers=NUM_LAYERS,
    num_kv_heads=1,
    head_dim=8,
    block_size=BLOCK_SIZE,
    dtype="uint8",
    model_hash="light model of the fault tests",
)
ROOT = 0x9E3779B97F4A7C15
# A bijection for each (layer, K or V); the first is the identity, so that a chunk finds its parent's link in layer 0.
_ODD = np.array([1, 0xD1342543DE82EF95, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB], dtype=np.uint64).reshape(NUM_LAYERS, 2)
_STATS = StepStats(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


def _link(parent: int, token: int) -> int:
    return xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + token.to_bytes(4, "little"))


def _cells(links: SequenceOf[int]) -> np.ndarray:
    """uint64 [tokens, layers, 2]"""
    return np.array(links, dtype=np.uint64)[:, None, None] * _ODD


def block_cells(kv: KVPool, block: int) -> np.ndarray:
    """uint64 [BLOCK_SIZE, layers, 2], as the pool has them."""
    return kv.runs[:, block].view(np.uint64).reshape(NUM_LAYERS, 2, BLOCK_SIZE).transpose(2, 0, 1)


def _token(cells: np.ndarray, position: int, choice: int, sampling: SamplingParams) -> int:
    """cells: uint64 [tokens, layers, 2], of all tokens up to `position`, exclusive."""
    summary: int = xxhash.xxh3_64_intdigest(cells.tobytes())
    if not sampling.is_greedy:
        summary = xxhash.xxh3_64_intdigest(f"{summary}/{sampling.seed}/{choice}/{position}".encode())
    return summary % VOCAB_SIZE


class Chains:
    """The true links of every sequence of a run, as far as somebody asked; also: whose link is this?"""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[list[int], list[int]]] = {}  # (request_id, choice) -> tokens, links
        self._owners: dict[int, str] = {}

    def links(self, key: tuple[str, int], tokens: list[int]) -> list[int]:
        known = self._known.get(key)
        if known is None or known[0] != tokens[: len(known[0])]:
            known = self._known[key] = ([], [])
        have, links = known
        for token in tokens[len(have) :]:
            links.append(_link(links[-1] if links else ROOT, token))
            self._owners.setdefault(links[-1], f"{key[0]}[{key[1]}] at {len(links) - 1}")
        have += tokens[len(have) :]
        return links[: len(tokens)]

    def cells(self, key: tuple[str, int], tokens: list[int]) -> np.ndarray:
        return _cells(self.links(key, tokens))

    def owner(self, link: int) -> str:
        return self._owners.get(link, "nobody")

    def answer(self, request_id: str, prompt: SequenceOf[int], choice: int, sampling: SamplingParams, num_tokens: int) -> list[int]:
        """The oracle: what this choice says, whatever happens to the machines."""
        tokens = list(prompt)
        key = (f"oracle of {request_id}", choice)
        while len(tokens) < len(prompt) + num_tokens:
            tokens.append(_token(_cells(self.links(key, tokens)), len(tokens), choice, sampling))
        return tokens[len(prompt) :]


class LightRunner:
    """What prefill/ and decode/ use of `engine.runner.ModelRunner`."""

    def __init__(
        self,
        kv: KVPool,
        chains: Chains,
        report: Callable[[str], None],
        on_step: Callable[[str], None],
        num_own_layers: int = NUM_LAYERS,
        push_of_others: Callable[[str, Any], object] = lambda grant_id, pairs: None,
    ) -> None:
        self._kv = kv.runs.view(np.uint64).reshape(NUM_LAYERS, kv.num_blocks, 2, BLOCK_SIZE)
        self._chains = chains
        self._report = report
        self._on_step = on_step  # told of each request that a step computes for
        self._num_own_layers = num_own_layers  # the first ones; the others lie on other ranks, each of which has one
        self._push_of_others = push_of_others

    def run(self, chunks: SequenceOf[Chunk], on_layer: Callable[[int], None] | None = None, extras: Any = None) -> StepResult:
        assert chunks, "a step without work"
        for source, target in getattr(extras, "copies", ()):
            self.copy_block(source, target)
        for chunk in chunks:
            self._on_step(chunk.sequence.request.request_id)
        fresh = [self._fresh(chunk) for chunk in chunks]
        for layer in range(NUM_LAYERS):
            for blocks, slots, cells in fresh:
                self._kv[layer, blocks, :, slots] = cells[:, layer]
            if layer >= self._num_own_layers:
                for grant_id, pairs in getattr(extras, "pushes", ()):
                    self._push_of_others(grant_id, pairs)
            elif on_layer is not None:
                on_layer(layer)
        samples = [sample for chunk in chunks if chunk.samples for sample in self._sample(chunk)]
        return StepResult(samples, {}, _STATS)

    def copy_block(self, source: int, target: int) -> None:
        self._kv[:, target] = self._kv[:, source]

    def _fresh(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the chunk's tokens go, and their cells. The parent's link comes out of the pool, as attention's context would."""
        sequence, begin = chunk.sequence, chunk.sequence.num_computed
        end = begin + chunk.num_tokens
        assert 0 < chunk.num_tokens <= sequence.num_uncomputed, (sequence, chunk.num_tokens)
        assert end <= len(sequence.blocks) * BLOCK_SIZE, f"{sequence} has no block for token {end - 1}"
        link = ROOT
        if begin:
            link = int(self._kv[0, sequence.blocks[(begin - 1) // BLOCK_SIZE], 0, (begin - 1) % BLOCK_SIZE])
        links = []
        for token in sequence.token_ids[begin:end]:
            link = _link(link, token)
            links.append(link)
        positions = np.arange(begin, end)
        return np.array(sequence.blocks)[positions // BLOCK_SIZE], positions % BLOCK_SIZE, _cells(links)

    def _sample(self, chunk: Chunk) -> list[Sample]:
        sequence = chunk.sequence
        end = sequence.num_computed + chunk.num_tokens
        blocks = sequence.blocks[: -(-end // BLOCK_SIZE)]
        # [layers, blocks, 2, slots] -> [tokens, layers, 2]
        read = np.ascontiguousarray(self._kv[:, blocks].transpose(1, 3, 0, 2).reshape(-1, NUM_LAYERS, 2)[:end])
        self._compare(sequence, read, end)
        sampling = sequence.request.sampling
        return [Sample(sampled, _token(read, end, sampled.choice, sampling)) for sampled in chunk.samples]

    def _compare(self, sequence: Sequence, read: np.ndarray, end: int) -> None:
        wanted = _cells(self._chains.links(sequence.key, sequence.token_ids[:end]))
        if not np.array_equal(read, wanted):
            position = int(np.nonzero((read != wanted).any(axis=(1, 2)))[0][0])
            block = sequence.blocks[position // BLOCK_SIZE]
            whose = self._chains.owner(int(read[position, 0, 0]))
            self._report(
                f"{sequence.request.request_id}[{sequence.choice}] reads wrong KV at {position}, block {block}: of {whose}"
            )
