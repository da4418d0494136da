"""Paged prefill attention against float64: chunks behind contexts, in Triton's interpreter where there is no GPU, and its twin.

Everything that must not be read is NaN, and every table entry that must not be followed is far outside the pool.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import paged_prefill, reference
from tests.kernels.poisoned import DEVICE, TOLERANCE, Case, relative_rms

ROWS = 32  # of a program: small, so that short chunks have several


def run(case: Case, **more: object) -> torch.Tensor:
    return case.prefill(paged_prefill.paged_prefill_attention, **{"tile_rows": ROWS, **more})


def test_chunks_around_blocks_and_tiles() -> None:
    case = Case([1, 16, 17, 40, 70, 129], num_queries=[1, 16, 5, 40, 3, 33])
    assert relative_rms(run(case), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((1, 1), 16), ((3, 3), 64), ((9, 3), 60), ((8, 1), 80), ((40, 1), 8), ((6, 2), 96)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"dim{value}",
)
def test_head_shapes(heads: tuple[int, int], head_dim: int) -> None:
    """No grouping, groups that fill a part of a tile, or more than the tile asked for; odd dimensions."""
    case = Case([5, 37], heads=heads, head_dim=head_dim, num_queries=[5, 20])
    assert relative_rms(run(case), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(block_size: int) -> None:
    case = Case([1, block_size, block_size + 1, 70], block_size=block_size, num_queries=[1, 1, 2, 60])
    assert relative_rms(run(case), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [1, 7, 64, 90, 1000])
def test_sliding_window(window: int) -> None:
    case = Case([30, 150, 200], num_queries=[30, 40, 3], window=window)
    assert relative_rms(run(case), case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap: float) -> None:
    case = Case([40, 70], num_queries=[30, 5], soft_cap=soft_cap)
    case.q *= 20.0
    assert relative_rms(run(case), case.expected()) < 5e-6


def test_fp8_pool_with_everything() -> None:
    case = Case([40, 90], heads=(6, 2), head_dim=24, num_queries=[30, 9], fp8=True, soft_cap=5.0, window=50)
    assert relative_rms(run(case), case.expected()) < 5e-6


def test_half_precision() -> None:
    """float16; the interpreter computes bfloat16 products as integers, so that type is left to the GPU test below."""
    case = Case([40, 90], heads=(8, 2), head_dim=64, num_queries=[40, 9], dtype=torch.float16)
    got = run(case, tile_rows=paged_prefill.TILE_ROWS)
    assert got.dtype == torch.float16
    assert relative_rms(got, case.expected()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("window", [None, 50])
def test_how_a_prompt_is_chunked_changes_no_bit(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what else is in the batch: every row walks the same tiles in the same order.

    The interpreter multiplies with BLAS, where a row's bits depend on its place in the tile; a tensor core's do not. So here
    the products are rounded from float64.
    """
    real_matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: real_matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype))
    whole = Case([150], num_queries=150, window=window)
    expected = run(whole)
    begin = 0
    for length in (1, 40, 7, 64, 38):
        end = begin + length
        got = paged_prefill.paged_prefill_attention(
            whole.q[begin:end],
            whole.kv_layer,
            whole.block_tables.repeat(2, 1)[:, : -(-end // 16)].contiguous(),
            torch.tensor([0, 0, length], dtype=torch.int32, device=DEVICE),  # an empty chunk beside it
            torch.tensor([3, end], dtype=torch.int32, device=DEVICE),
            whole.scale,
            window=window,
            tile_rows=ROWS,
        )
        assert torch.equal(got, expected[begin:end])
        begin = end


def test_rows_behind_the_last_chunk_are_left_alone() -> None:
    """Padding of a captured graph: empty sequences at the end of the table, rows at the end of q."""
    case = Case([40, 20], num_queries=[7, 20])
    expected = case.expected()
    case.q = torch.cat((case.q, torch.full_like(case.q[:5], float("nan"))))
    nothing = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    case.seq_lens = torch.cat((case.seq_lens, nothing))
    case.query_starts = torch.cat((case.query_starts, case.query_starts[-1] + nothing))
    case.block_tables = torch.cat((case.block_tables, torch.full_like(case.block_tables[:1], 2**30).repeat(3, 1)))
    out = torch.full_like(case.q, 7.0)
    assert relative_rms(run(case, out=out)[:27], expected) < TOLERANCE[torch.float32]
    assert bool((out[27:] == 7.0).all())


def test_strided_queries_and_poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """q as it comes out of one fused projection, and every row of a result that starts as NaN is written."""
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(float("nan")))
    case = Case([9, 33], num_queries=[9, 4])
    fused = torch.full((13, 3, *case.q.shape[1:]), float("nan"), device=DEVICE)
    fused[:, 1] = case.q
    case.q = fused[:, 1]
    assert relative_rms(run(case), case.expected()) < TOLERANCE[torch.float32]


def test_nothing_to_do() -> None:
    assert run(Case([], num_queries=[])).shape == (0, 4, 16)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_kernel_and_its_twin_agree(soft_cap: float | None) -> None:
    case = Case([20, 77], heads=(6, 3), head_dim=24, num_queries=[20, 9], window=30, soft_cap=soft_cap)
    case.kv_layer = case.kv_layer.nan_to_num(7.0)  # the twin gathers whole contexts and multiplies hidden keys by zero
    case.block_tables[case.block_tables == 2**30] = 0
    rows = []
    for row, (length, count) in enumerate(zip(case.seq_lens.tolist(), case.counts, strict=True)):
        k, v = reference.read_kv(case.kv_layer, case.block_tables[row].tolist(), length)
        start = int(case.query_starts[row])
        rows.append(reference.attend(case.q[start : start + count], k, v, case.scale, 30, soft_cap))
    twin = torch.cat(rows)
    assert relative_rms(twin, case.expected()) < TOLERANCE[torch.float32]
    assert relative_rms(run(case), twin.double().cpu().numpy()) < 5e-6


def test_wrong_arguments_are_named() -> None:
    case = Case([4])
    case.query_starts = case.query_starts.long()
    with pytest.raises(AssertionError, match="query_starts must be int32"):
        run(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [{}, {"window": 200}, {"soft_cap": 20.0}, {"fp8": True}], ids=str)
def test_on_a_gpu_at_serving_shapes(dtype: torch.dtype, more: dict) -> None:
    case = Case([1, 511, 700, 400], heads=(32, 8), head_dim=128, num_queries=[1, 200, 3, 400], dtype=dtype, **more)
    assert relative_rms(run(case, tile_rows=128), case.expected()) < max(TOLERANCE[dtype], 5e-6)
