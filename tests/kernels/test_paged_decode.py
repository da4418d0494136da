"""Paged decode attention against float64: the Triton kernel (in its interpreter where there is no GPU) and its twin.

Everything that must not be read is NaN, and every table entry that must not be followed is far outside the pool.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import paged_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR_OUTSIDE = 2**30
# Relative RMS error against float64: a few roundings of the output type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

Attention = Callable[..., torch.Tensor]


class Case:
    """A poisoned pool, and random sequences of the given lengths scattered over it."""

    def __init__(
        self,
        seq_lens: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        spare_blocks: int = 3,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        num_heads, num_kv_heads = heads
        num_used = [-(-length // block_size) for length in seq_lens]
        num_blocks = sum(num_used) + spare_blocks
        width = max(num_used, default=0) + 2
        order = generator.permutation(num_blocks)
        pool = np.full((num_blocks, 2, num_kv_heads, block_size, head_dim), np.nan)
        tables = np.full((len(seq_lens), width), FAR_OUTSIDE)
        for row, length in enumerate(seq_lens):
            for i in range(num_used[row]):
                block, order = int(order[0]), order[1:]
                tables[row, i] = block
                filled = min(block_size, length - i * block_size)
                pool[block, :, :, :filled] = generator.standard_normal((2, num_kv_heads, filled, head_dim))
        self.scale = head_dim**-0.5
        self.q = torch.tensor(generator.standard_normal((len(seq_lens), num_heads, head_dim)), dtype=dtype, device=DEVICE)
        self.kv_layer = torch.tensor(pool, dtype=dtype, device=DEVICE)
        self.block_tables = torch.tensor(tables, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)

    def run(self, attention: Attention, **more: int | None) -> torch.Tensor:
        return attention(self.q, self.kv_layer, self.block_tables, self.seq_lens, self.scale, **more)

    def expected(self) -> np.ndarray:
        """Plain softmax attention in float64, one sequence and one head at a time."""
        q, pool = self.q.double().cpu().numpy(), self.kv_layer.double().cpu().numpy()
        out = np.zeros(q.shape)
        block_size, group = pool.shape[3], q.shape[1] // pool.shape[2]
        for row, length in enumerate(self.seq_lens.tolist()):
            blocks = self.block_tables[row, : -(-length // block_size)].tolist()
            for head in range(q.shape[1] if length else 0):
                k, v = (np.concatenate([pool[b, half, head // group] for b in blocks])[:length] for half in (0, 1))
                scores = self.scale * k @ q[row, head]
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v / weights.sum()
        return out


def relative_rms(got: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    got64 = got.double().cpu().numpy()
    assert np.isfinite(got64).all(), "something that must not be read was read"
    return float(np.sqrt(np.mean((got64 - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def test_ragged_lengths_around_blocks_tiles_and_splits() -> None:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]
    case = Case(lengths, block_size=16)
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 7, 64])
def test_any_number_of_splits_gives_the_same_answer(num_splits: int | None) -> None:
    case = Case([1, 40, 129, 200], block_size=16)
    got = case.run(paged_decode.paged_decode_attention, num_splits=num_splits)
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]


def test_a_context_longer_than_one_split() -> None:
    lengths = [paged_decode.SPLIT_LEN - 1, paged_decode.SPLIT_LEN, paged_decode.SPLIT_LEN + 1, 3]
    case = Case(lengths, heads=(2, 1), block_size=32)
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((1, 1), 16), ((3, 3), 64), ((9, 3), 60), ((8, 1), 80), ((20, 1), 8), ((6, 2), 96)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"dim{value}",
)
def test_head_shapes(heads: tuple[int, int], head_dim: int) -> None:
    """One head, no grouping, groups that fill a part of a tile or more than one tile's 16 rows, odd dimensions."""
    case = Case([5, 37], heads=heads, head_dim=head_dim)
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
def test_block_sizes(block_size: int) -> None:
    case = Case([1, block_size, block_size + 1, 70], block_size=block_size)
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


def test_half_precision() -> None:
    """float16; the interpreter computes bfloat16 products as integers, so that type is left to the GPU test below."""
    case = Case([1, 17, 90], heads=(8, 2), head_dim=64, dtype=torch.float16)
    got = case.run(paged_decode.paged_decode_attention, num_splits=3)
    assert got.dtype == torch.float16
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float16]


def test_large_scores_do_not_overflow() -> None:
    case = Case([50, 3])
    case.q *= 300.0
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < 2e-5


def test_scores_that_grow_along_the_context_rescale_earlier_splits() -> None:
    """Every later split has the larger maximum, so each step of both launches has to shrink what it has."""
    case = Case([128], heads=(1, 1))
    for i in range(8):
        case.kv_layer[int(case.block_tables[0, i]), 0] *= 1.0 + i
    got = case.run(paged_decode.paged_decode_attention, num_splits=4)
    assert relative_rms(got, case.expected()) < 2e-5


def test_strided_queries() -> None:
    """q as it comes out of one fused projection: rows of q, k and v side by side."""
    case = Case([9, 33])
    fused = torch.full((2, 3, *case.q.shape[1:]), float("nan"), device=DEVICE)
    fused[:, 0] = case.q
    case.q = fused[:, 0]
    assert not case.q.is_contiguous()
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


def test_an_empty_row_is_zero_and_an_empty_batch_is_empty() -> None:
    case = Case([0, 7])
    got = case.run(paged_decode.paged_decode_attention)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]
    assert Case([]).run(paged_decode.paged_decode_attention).shape == (0, 4, 16)


def test_the_rest_of_the_batch_changes_no_bit() -> None:
    """The order of the additions is fixed by the sequence alone."""
    together = Case([700, 30, 1], heads=(2, 1))
    got = together.run(paged_decode.paged_decode_attention)
    for row in range(3):
        length = int(together.seq_lens[row])
        alone = paged_decode.paged_decode_attention(
            together.q[row : row + 1],
            together.kv_layer,
            together.block_tables[row : row + 1, : -(-length // 16)].contiguous(),
            together.seq_lens[row : row + 1],
            together.scale,
        )
        assert torch.equal(alone[0], got[row])


def test_poisoned_memory_is_overwritten_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result and the scratch space come from torch.empty: fill both with NaN first."""
    real_empty, real_empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real_empty_like(*a, **k).fill_(float("nan")))
    case = Case([1, 40, 0, 129])
    got = case.run(paged_decode.paged_decode_attention, num_splits=5)
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_and_its_twin_agree(seed: int) -> None:
    from kernels import reference

    case = Case([1, 16, 17, 77], heads=(6, 3), head_dim=24, seed=seed)
    rows = []
    for row, length in enumerate(case.seq_lens.tolist()):
        k, v = reference.read_kv(case.kv_layer, case.block_tables[row].tolist(), length)
        rows.append(reference.attend(case.q[row : row + 1], k, v, case.scale))
    twin = torch.cat(rows)
    assert relative_rms(twin, case.expected()) < TOLERANCE[torch.float32]
    kernel = case.run(paged_decode.paged_decode_attention)
    assert relative_rms(kernel, twin.double().cpu().numpy()) < TOLERANCE[torch.float32]


def test_wrong_arguments_are_named() -> None:
    case = Case([4])
    case.block_tables = case.block_tables.long()
    with pytest.raises(AssertionError, match="int32"):
        case.run(paged_decode.paged_decode_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_at_serving_shapes(dtype: torch.dtype) -> None:
    case = Case([1, 511, 2048, 3000], heads=(32, 8), head_dim=128, dtype=dtype)
    assert relative_rms(case.run(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[dtype]
