"""A paged pool in which everything that must not be read is NaN, and what attention over it must give, in float64.

Every table entry that must not be followed is far outside the pool. Used by the tests of the paged attention kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR_OUTSIDE = 2**30
# Relative RMS error against float64: a few roundings of the output type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

Attention = Callable[..., torch.Tensor]


class Case:
    """Random sequences of the given lengths scattered over a poisoned pool; the newest num_queries of each are queries.

    num_queries: one number, or one for each sequence. window: tokens that no query sees are poison too, and the table says
    nothing about blocks of such tokens only. fp8: the pool's dtype is float8_e4m3fn, with scales of its own per KV head.
    """

    def __init__(
        self,
        seq_lens: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        num_queries: int | list[int] = 1,
        window: int | None = None,
        soft_cap: float | None = None,
        fp8: bool = False,
        spare_blocks: int = 3,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        num_heads, num_kv_heads = heads
        self.counts = [num_queries] * len(seq_lens) if isinstance(num_queries, int) else num_queries
        self.window, self.soft_cap = window, soft_cap
        num_used = [-(-length // block_size) for length in seq_lens]
        num_blocks = sum(num_used) + spare_blocks
        order = generator.permutation(num_blocks)
        pool = np.full((num_blocks, 2, num_kv_heads, block_size, head_dim), np.nan)
        tables = np.full((len(seq_lens), max(num_used, default=0) + 2), FAR_OUTSIDE)
        for row, length in enumerate(seq_lens):
            begin = 0 if window is None else max(0, length - self.counts[row] + 1 - window)
            for i in range(num_used[row]):
                block, order = int(order[0]), order[1:]
                filled = range(max(begin - i * block_size, 0), min(block_size, length - i * block_size))
                if filled:
                    tables[row, i] = block
                    pool[block, :, :, list(filled)] = generator.standard_normal((len(filled), 2, num_kv_heads, head_dim))
        self.scale = head_dim**-0.5
        q = generator.standard_normal((sum(self.counts), num_heads, head_dim))
        self.q = torch.tensor(q, dtype=dtype, device=DEVICE)
        self.kv_layer = torch.tensor(pool, dtype=dtype, device=DEVICE)
        self.kv_scales = None
        if fp8:
            self.kv_scales = torch.tensor(generator.uniform(0.5, 2.0, (2, num_kv_heads)), dtype=torch.float32, device=DEVICE)
            self.kv_layer = self.kv_layer.to(torch.float8_e4m3fn)
        self.block_tables = torch.tensor(tables, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
        starts = np.concatenate(([0], np.cumsum(self.counts))).astype(np.int32)
        self.query_starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)

    @property
    def options(self) -> dict[str, object]:
        return {"window": self.window, "soft_cap": self.soft_cap, "kv_scales": self.kv_scales}

    def decode(self, attention: Attention, **more: object) -> torch.Tensor:
        return attention(self.q, self.kv_layer, self.block_tables, self.seq_lens, self.scale, **self.options, **more)

    def prefill(self, attention: Attention, **more: object) -> torch.Tensor:
        return attention(
            self.q, self.kv_layer, self.block_tables, self.query_starts, self.seq_lens, self.scale, **self.options, **more
        )

    def expected(self) -> np.ndarray:
        """Plain softmax attention in float64, one query and one head at a time."""
        q, pool = self.q.double().cpu().numpy(), self.kv_layer.double().cpu().numpy()
        if self.kv_scales is not None:
            pool = pool * self.kv_scales.double().cpu().numpy()[None, :, :, None, None]
        out = np.zeros(q.shape)
        block_size, group = pool.shape[3], q.shape[1] // pool.shape[2]
        at = 0
        for row, (length, count) in enumerate(zip(self.seq_lens.tolist(), self.counts, strict=True)):
            for query in range(count):
                end = length - count + query + 1
                begin = 0 if self.window is None else max(0, end - self.window)
                tokens = range(begin, end) if length else range(0)
                places = [(int(self.block_tables[row, t // block_size]), t % block_size) for t in tokens]
                for head in range(q.shape[1] if places else 0):
                    k, v = (np.stack([pool[b, half, head // group, slot] for b, slot in places]) for half in (0, 1))
                    scores = self.scale * k @ q[at, head]
                    if self.soft_cap is not None:
                        scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                    weights = np.exp(scores - scores.max())
                    out[at, head] = weights @ v / weights.sum()
                at += 1
        return out


def relative_rms(got: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    got64 = got.double().cpu().numpy()
    assert np.isfinite(got64).all(), "something that must not be read was read"
    return float(np.sqrt(np.mean((got64 - expected) ** 2)) / np.sqrt(np.mean(expected**2)))
