"""A model without weights whose next token is a hash of every KV byte it reads: one wrong byte, or a block of another
request, changes its output. For tests of everything around a model; `tandem serve toy` serves it.

KV at position p is a hash chain over the tokens up to p, so equal prefixes have equal KV (prefix caching is right) and a
chunk continues from the KV before it. The result depends on no block id, chunk size or batch. `toy_next_token` is its
oracle and needs no KV.

A *lane* is the K or the V of one head of one layer: 8 bytes per token, the link of the chain times the lane's own odd number.
What a row says is the sum over all lanes of (hash of the lane's bytes up to the row) * (another odd number), modulo 2^64: a
sum, so that ranks and stages can each add their own lanes. A head that lies on c ranks counts c times on the first and -1 times
on each of the others, which is once if they agree and something else if one of them has a wrong byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from kernels.ops import Span
from models.config import ModelConfig
from models.interface import WHOLE, ForwardBatch, NoOtherRanks, OnLayer, Shard, TensorRanks
from models.split import num_copies, split
from protocol.parallel import part

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
NUM_LANES = NUM_LAYERS * 2 * NUM_KV_HEADS
VOCAB_SIZE = 512
ROOT = 0x9E3779B97F4A7C15
# What greedy decoding can say: printable ASCII and the syllables above the special tokens; never a special token.
SAYABLE = np.array([*range(32, 127), *range(260, VOCAB_SIZE)], dtype=np.int64)
TOP_LOGIT, NOISE_LOGIT = 6.0, 4.0

_MODULUS = 1 << 64
# Multiplication by an odd number is a bijection of 64 bits: a byte that is wrong stays wrong, and a link can be read back.
_CELL_FACTORS = np.array([0xD1342543DE82EF95 * (2 * i + 1) % _MODULUS for i in range(NUM_LANES)], dtype=np.uint64)
_LANE_FACTORS = np.array([0xAF251AF3B0F025B5 * (2 * i + 1) % _MODULUS for i in range(NUM_LANES)], dtype=np.uint64)


def toy_hash() -> str:
    """Stands for weights and configuration; changes with whatever changes the outputs."""
    return xxhash.xxh3_128_hexdigest(f"toy 2 {NUM_LAYERS} {NUM_KV_HEADS} {HEAD_DIM} {VOCAB_SIZE} {ROOT}".encode())


def _chain(parent: int, token_ids: Sequence[int]) -> list[int]:
    """One link per token."""
    links = []
    for token in token_ids:
        parent = xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + token.to_bytes(4, "little"))
        links.append(parent)
    return links


def _token(summary: int) -> int:
    return int(SAYABLE[summary % len(SAYABLE)])


def toy_next_token(token_ids: Sequence[int]) -> int:
    """What greedy decoding says after these tokens. Pure: no pool, no batch, no ranks."""
    return _said(np.array(_chain(ROOT, [int(token) for token in token_ids]), dtype=np.uint64))


def toy_answer(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """toy_next_token again and again: the whole greedy answer, without chaining the beginning anew for each token."""
    links = np.empty(len(token_ids) + num_tokens, dtype=np.uint64)
    links[: len(token_ids)] = _chain(ROOT, [int(token) for token in token_ids])
    answer: list[int] = []
    for place in range(len(token_ids), len(links)):
        answer.append(_said(links[:place]))
        links[place] = _chain(int(links[place - 1]) if place else ROOT, answer[-1:])[0]
    return answer


def _said(links: np.ndarray) -> int:
    lanes = (links * _CELL_FACTORS[:, None]).astype("<u8")  # [NUM_LANES, number of tokens]
    hashes = np.array([xxhash.xxh3_64_intdigest(lane) for lane in lanes], dtype=np.uint64)
    return _token(int((hashes * _LANE_FACTORS).sum(dtype=np.uint64)))


class ToyModel:
    """models.interface.Model on the CPU. Its KV pool is uint8; hidden states are int64 [num_tokens, 1], sums of lane hashes."""

    def __init__(self, config: ModelConfig, shard: Shard = WHOLE, ranks: TensorRanks | None = None) -> None:
        expected = (NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, VOCAB_SIZE)
        given = (config.num_layers, config.num_kv_heads, config.head_dim, config.vocab_size)
        assert given == expected, f"the toy's config.json says {given}, its code {expected}"
        self.config = config
        self.ranks: TensorRanks = ranks if ranks is not None else NoOtherRanks()
        own = split(config, shard)
        lanes = np.arange(NUM_LANES).reshape(NUM_LAYERS, 2, NUM_KV_HEADS)
        lanes = lanes[own.layers.start : own.layers.stop, :, own.kv_heads.start : own.kv_heads.stop]
        copies = num_copies(config, shard.parallel)
        weight = copies if shard.tp_rank % copies == 0 else _MODULUS - 1
        self._num_layers = len(own.layers)
        self._cell_factors = _CELL_FACTORS[lanes]  # [own layers, 2, own heads]
        self._lane_factors = _LANE_FACTORS[lanes.ravel()] * np.uint64(weight)
        self._link_factor = pow(int(self._cell_factors[0, 0, 0]), -1, _MODULUS)
        self._vocab = own.vocab
        self._vocab_widths = tuple(len(part(VOCAB_SIZE, shard.parallel.tp_size, t)) for t in range(shard.parallel.tp_size))

    def embed(self, batch: ForwardBatch) -> Tensor:
        return torch.zeros(len(batch.token_ids), 1, dtype=torch.int64)

    def new_hidden(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, 1, dtype=torch.int64)

    def forward(self, batch: ForwardBatch, hidden: Tensor, kv: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        assert kv.dtype is torch.uint8, kv.dtype
        spans = batch.attention.spans
        words = kv.view(torch.int64).squeeze(-1)  # [own layers, num_blocks, 2, own heads, block_size]
        links = self._links(spans, batch.token_ids.tolist(), words.numpy())
        slots = batch.attention.slots.numpy()  # [num_tokens, 2, own heads]
        for layer in range(self._num_layers):
            words[layer].numpy().view(np.uint64).reshape(-1)[slots] = links[:, None, None] * self._cell_factors[layer]
            if on_layer is not None:
                on_layer(layer)
        own = torch.zeros_like(hidden)
        wanted = batch.logit_rows.tolist()
        if wanted:
            own[batch.logit_rows, 0] = torch.from_numpy(self._sums(spans, wanted, words).view(np.int64))
        return hidden + self.ranks.all_reduce(own)

    def _links(self, spans: Sequence[Span], token_ids: list[int], words: np.ndarray) -> np.ndarray:
        """uint64 [num_tokens]: each span's chain goes on from the KV before it, read from the first lane that is here."""
        block_size = words.shape[4]
        links: list[int] = []
        for span in spans:
            parent = ROOT
            if span.context_len:
                block, slot = divmod(span.context_len - 1, block_size)
                parent = int(words[0, span.blocks[block], 0, 0, slot]) * self._link_factor % _MODULUS
            links += _chain(parent, token_ids[span.start : span.start + span.length])
        return np.array(links, dtype=np.uint64)

    def _sums(self, spans: Sequence[Span], wanted: list[int], words: Tensor) -> np.ndarray:
        """uint64 [wanted rows]: the weighted hashes of this rank's lanes, each over all tokens up to the row."""
        block_size = words.shape[4]
        ends: list[list[int]] = []  # for each span, how many tokens its wanted rows read
        reading = []
        rows = iter(wanted)
        row = next(rows, None)
        for span in spans:
            mine = []
            while row is not None and row < span.start + span.length:
                mine.append(span.context_len + row - span.start + 1)
                row = next(rows, None)
            if mine:
                ends.append(mine)
                reading.append(span.index[: -(-mine[-1] // block_size)])
        # One copy puts every lane's tokens side by side: [own layers, 2, own heads, blocks of all spans, block_size].
        gathered = words.permute(0, 2, 3, 1, 4).index_select(3, torch.cat(reading))
        stride = gathered.shape[3] * block_size * 8
        data = gathered.numpy().reshape(-1).data.cast("B")
        hashes: list[int] = []
        digest = xxhash.xxh3_64_intdigest
        first = 0
        lanes = range(0, len(data), stride)
        for mine, index in zip(ends, reading, strict=True):
            for end in mine:
                hashes += [digest(data[lane + first : lane + first + end * 8]) for lane in lanes]
            first += len(index) * block_size * 8
        weighed: np.ndarray = np.array(hashes, dtype=np.uint64).reshape(len(wanted), -1) * self._lane_factors
        sums: np.ndarray = weighed.sum(axis=1, dtype=np.uint64)
        return sums

    def logits(self, hidden: Tensor) -> Tensor | None:
        """The hashed token on top; the others get deterministic noise below it."""
        summaries = hidden.numpy().view(np.uint64)  # [rows, 1]
        vocab = np.arange(self._vocab.start, self._vocab.stop, dtype=np.uint64)
        mixed: np.ndarray = (summaries + vocab) * np.uint64(0x9FB21C651E98DF25)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        logits = (mixed >> np.uint64(40)).astype(np.float32) * np.float32(NOISE_LOGIT / 2**24)
        tokens = SAYABLE[summaries[:, 0] % np.uint64(len(SAYABLE))] - self._vocab.start
        here = np.flatnonzero((tokens >= 0) & (tokens < len(vocab)))
        logits[here, tokens[here]] = TOP_LOGIT
        return self.ranks.gather(torch.from_numpy(logits), self._vocab_widths)
