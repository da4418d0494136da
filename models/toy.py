"""A model without weights whose next token is a hash of every KV byte it reads: one wrong byte, or a block of another
request, changes its output. For tests of everything around a model; `tandem serve toy` serves it.

KV at position p is a hash chain over the tokens up to p, so equal prefixes have equal KV (prefix caching is right) and a
chunk continues from the KV before it. The result depends on no block id, chunk size or batch. `toy_next_token` is its
oracle and needs no KV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from models.config import ModelConfig
from models.interface import ForwardBatch, OnLayer

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
NUM_CELLS = NUM_LAYERS * 2 * NUM_KV_HEADS  # of 8 bytes per token
VOCAB_SIZE = 512
ROOT = 0x9E3779B97F4A7C15
# What greedy decoding can say: printable ASCII and the syllables above the special tokens; never a special token.
SAYABLE = np.array([*range(32, 127), *range(260, VOCAB_SIZE)], dtype=np.int64)
TOP_LOGIT, NOISE_LOGIT = 6.0, 4.0

# Multiplication by an odd number is a bijection of 64 bits; the first cell is multiplied by 1.
_ODD = np.array([1, *(0xD1342543DE82EF95 * (2 * i + 1) % 2**64 for i in range(1, NUM_CELLS))], dtype=np.uint64)


def toy_hash() -> str:
    """Stands for weights and configuration; changes with whatever changes the outputs."""
    return xxhash.xxh3_128_hexdigest(f"toy 1 {NUM_LAYERS} {NUM_KV_HEADS} {HEAD_DIM} {VOCAB_SIZE} {ROOT}".encode())


def _chain(parent: int, token_ids: Sequence[int]) -> np.ndarray:
    """uint64, one link per token."""
    links = np.empty(len(token_ids), dtype=np.uint64)
    for index, token in enumerate(token_ids):
        parent = xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + int(token).to_bytes(4, "little"))
        links[index] = parent
    return links


def _kv_bytes(links: np.ndarray) -> np.ndarray:
    """uint8 [layers, 2, kv_heads, tokens, head_dim]; a token's first cell is its link, each other one a bijection of it."""
    cells = links[None, :] * _ODD[:, None]
    return cells.astype("<u8").view(np.uint8).reshape(NUM_LAYERS, 2, NUM_KV_HEADS, len(links), HEAD_DIM)


def _token(summary: int) -> int:
    return int(SAYABLE[summary % len(SAYABLE)])


def toy_next_token(token_ids: Sequence[int]) -> int:
    """What greedy decoding says after these tokens. Pure: no pool, no batch."""
    return _token(xxhash.xxh3_64_intdigest(_kv_bytes(_chain(ROOT, token_ids)).tobytes()))


def toy_continuation(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What greedy decoding says next, so many tokens of it: `toy_next_token` again and again, without beginning anew each time."""
    links = _chain(ROOT, token_ids)
    out: list[int] = []
    for _ in range(num_tokens):
        out.append(_token(xxhash.xxh3_64_intdigest(_kv_bytes(links).tobytes())))
        links = np.append(links, _chain(int(links[-1]) if len(links) else ROOT, out[-1:]))
    return out


class ToyModel:
    """models.interface.Model on the CPU. Its KV pool is uint8; hidden states are int64 [num_tokens, 1], hashes."""

    def __init__(self, config: ModelConfig) -> None:
        expected = (NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, VOCAB_SIZE)
        given = (config.num_layers, config.num_kv_heads, config.head_dim, config.vocab_size)
        assert given == expected, f"the toy's config.json says {given}, its code {expected}"
        self.config = config

    def forward(self, batch: ForwardBatch, kv: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        assert kv.dtype is torch.uint8, kv.dtype
        spans = batch.attention.spans
        token_ids = batch.token_ids.tolist()
        fresh = []
        for span in spans:
            parent = ROOT
            if span.context_len:
                parent = int(_read(kv, span.index, span.context_len - 1, span.context_len)[0, 0, 0, 0].view("<u8")[0])
            fresh.append(_kv_bytes(_chain(parent, token_ids[span.start : span.start + span.length])))
        for layer in range(NUM_LAYERS):
            rows = np.concatenate([new[layer] for new in fresh], axis=2)  # [2, kv_heads, num_tokens, head_dim]
            kv[layer].view(-1, HEAD_DIM)[batch.attention.slots] = torch.from_numpy(rows.transpose(2, 0, 1, 3).copy())
            if on_layer is not None:
                on_layer(layer)
        hidden = np.zeros((len(token_ids), 1), dtype=np.uint64)
        wanted = set(batch.logit_rows.tolist())
        for span in spans:
            rows_wanted = [row for row in range(span.start, span.start + span.length) if row in wanted]
            if rows_wanted:
                read = _read(kv, span.index, 0, span.context_len + rows_wanted[-1] - span.start + 1)
                for row in rows_wanted:
                    known = read[:, :, :, : span.context_len + row - span.start + 1]
                    hidden[row] = xxhash.xxh3_64_intdigest(np.ascontiguousarray(known).tobytes())
        return torch.from_numpy(hidden.view(np.int64))

    def logits(self, hidden: Tensor) -> Tensor:
        """The hashed token on top; the others get deterministic noise below it."""
        summaries = hidden.numpy().view(np.uint64)  # [rows, 1]
        mixed: np.ndarray = (summaries + np.arange(VOCAB_SIZE, dtype=np.uint64)) * np.uint64(0x9FB21C651E98DF25)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        logits = (mixed >> np.uint64(40)).astype(np.float32) * np.float32(NOISE_LOGIT / 2**24)
        logits[np.arange(len(summaries)), [_token(int(summary)) for summary in summaries[:, 0]]] = TOP_LOGIT
        return torch.from_numpy(logits)


def _read(kv: Tensor, index: Tensor, start: int, end: int) -> np.ndarray:
    """Tokens [start, end) of a sequence: uint8 [layers, 2, kv_heads, end - start, head_dim], contiguous tokens."""
    block_size = kv.shape[4]
    first = start // block_size
    gathered = kv[:, index[first : -(-end // block_size)]].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
    return gathered[:, :, :, start - first * block_size : end - first * block_size].contiguous().numpy()
