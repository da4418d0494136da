"""Paged decode attention against float64: the Triton kernel (in its interpreter where there is no GPU) and its twin.

Everything that must not be read is NaN, and every table entry that must not be followed is far outside the pool.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import paged_decode
from tests.kernels.poisoned import DEVICE, TOLERANCE, Case, relative_rms


def test_ragged_lengths_around_blocks_tiles_and_splits() -> None:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]
    case = Case(lengths, block_size=16)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("max_splits", [1, 2, 3, 7, 64])
def test_any_number_of_splits_gives_the_same_answer(max_splits: int) -> None:
    case = Case([1, 40, 129, 200], block_size=16)
    got = case.decode(paged_decode.paged_decode_attention, max_splits=max_splits)
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]


def test_a_context_longer_than_one_split() -> None:
    length = paged_decode.MIN_SPLIT_LEN
    case = Case([length - 1, length, length + 1, 3], heads=(2, 1), block_size=32)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((1, 1), 16), ((3, 3), 64), ((9, 3), 60), ((8, 1), 80), ((20, 1), 8), ((6, 2), 96)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"dim{value}",
)
def test_head_shapes(heads: tuple[int, int], head_dim: int) -> None:
    """One head, no grouping, groups that fill a part of a tile or more than one tile's 16 rows, odd dimensions."""
    case = Case([5, 37], heads=heads, head_dim=head_dim)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
def test_block_sizes(block_size: int) -> None:
    case = Case([1, block_size, block_size + 1, 70], block_size=block_size)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


def test_half_precision() -> None:
    """float16; the interpreter computes bfloat16 products as integers, so that type is left to the GPU test below."""
    case = Case([1, 17, 90], heads=(8, 2), head_dim=64, dtype=torch.float16)
    got = case.decode(paged_decode.paged_decode_attention, max_splits=3)
    assert got.dtype == torch.float16
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float16]


def test_large_scores_do_not_overflow() -> None:
    case = Case([50, 3])
    case.q *= 300.0
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < 2e-5


def test_scores_that_grow_along_the_context_rescale_earlier_splits() -> None:
    """Every later split has the larger maximum, so each step of both launches has to shrink what it has."""
    case = Case([128], heads=(1, 1))
    for i in range(8):
        case.kv_layer[int(case.block_tables[0, i]), 0] *= 1.0 + i
    got = case.decode(paged_decode.paged_decode_attention, max_splits=4)
    assert relative_rms(got, case.expected()) < 2e-5


def test_strided_queries() -> None:
    """q as it comes out of one fused projection: rows of q, k and v side by side."""
    case = Case([9, 33])
    fused = torch.full((2, 3, *case.q.shape[1:]), float("nan"), device=DEVICE)
    fused[:, 0] = case.q
    case.q = fused[:, 0]
    assert not case.q.is_contiguous()
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


def test_an_empty_row_is_zero_and_an_empty_batch_is_empty() -> None:
    case = Case([0, 7])
    got = case.decode(paged_decode.paged_decode_attention)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]
    assert Case([]).decode(paged_decode.paged_decode_attention).shape == (0, 4, 16)


def test_the_rest_of_the_batch_changes_no_bit() -> None:
    """The order of the additions is fixed by the sequence alone."""
    together = Case([700, 30, 1], heads=(2, 1))
    got = together.decode(paged_decode.paged_decode_attention)
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
    got = case.decode(paged_decode.paged_decode_attention, max_splits=5)
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
    kernel = case.decode(paged_decode.paged_decode_attention)
    assert relative_rms(kernel, twin.double().cpu().numpy()) < TOLERANCE[torch.float32]


def test_wrong_arguments_are_named() -> None:
    case = Case([4])
    case.block_tables = case.block_tables.long()
    with pytest.raises(AssertionError, match="int32"):
        case.decode(paged_decode.paged_decode_attention)


@pytest.mark.parametrize("window", [1, 5, 16, 33, 70, 500])
def test_sliding_window(window: int) -> None:
    """What has left the window is poison, and its blocks are in no table."""
    case = Case([1, 15, 33, 64, 200], window=window)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap: float) -> None:
    case = Case([1, 33, 130], soft_cap=soft_cap)
    case.q *= 20.0
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < 5e-6


@pytest.mark.parametrize(("count", "window"), [(2, None), (3, 20), (5, None), (4, 1)])
def test_several_queries_per_sequence(count: int, window: int | None) -> None:
    """As when drafted tokens are verified: causal among each other, each with its own window."""
    case = Case([count, 16, 65, 131], heads=(6, 2), num_queries=count, window=window)
    got = case.decode(paged_decode.paged_decode_attention, num_queries=count)
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_fp8_pool(soft_cap: float | None) -> None:
    case = Case([1, 31, 129], heads=(4, 2), head_dim=32, fp8=True, soft_cap=soft_cap, dtype=torch.float32)
    assert relative_rms(case.decode(paged_decode.paged_decode_attention), case.expected()) < 5e-6


def test_everything_at_once() -> None:
    case = Case([3, 40, 77, 150], heads=(6, 2), head_dim=24, num_queries=3, window=50, soft_cap=5.0, fp8=True, block_size=8)
    got = case.decode(paged_decode.paged_decode_attention, num_queries=3)
    assert relative_rms(got, case.expected()) < 5e-6


def test_the_width_of_the_table_changes_no_bit() -> None:
    """A captured graph has a table for the longest context; the grid grows with it, the split of a context does not."""
    case = Case([70, 9, 260])
    narrow = case.decode(paged_decode.paged_decode_attention)
    wide = torch.full((3, 200), 2**30, dtype=torch.int32, device=DEVICE)
    wide[:, : case.block_tables.shape[1]] = case.block_tables
    case.block_tables = wide
    assert torch.equal(case.decode(paged_decode.paged_decode_attention), narrow)


def test_writes_where_it_is_told() -> None:
    case = Case([70, 9])
    out = torch.full_like(case.q, float("nan"))
    assert case.decode(paged_decode.paged_decode_attention, out=out) is out
    assert relative_rms(out, case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"window": 700}, {"soft_cap": 20.0}, {"num_queries": 4}, {"fp8": True}, {"fp8": True, "window": 100, "num_queries": 2}],
    ids=str,
)
def test_on_a_gpu_at_serving_shapes(dtype: torch.dtype, more: dict) -> None:
    case = Case([4, 511, 2048, 3000], heads=(32, 8), head_dim=128, dtype=dtype, **more)
    got = case.decode(paged_decode.paged_decode_attention, num_queries=more.get("num_queries", 1))
    assert relative_rms(got, case.expected()) < max(TOLERANCE[dtype], 5e-6)
