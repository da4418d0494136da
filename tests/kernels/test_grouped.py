"""Experts and adapters against their twins: in Triton's interpreter where there is no GPU; odd shapes, empty groups, poison."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import grouped, reference_grouped
from tests.kernels.poisoned import DEVICE

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    assert bool(torch.isfinite(found.float()).all()), "a row was not written, or poison was read"
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(real_empty_like(*a, **k)))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (5, 5), (128, 8), (1, 1), (60, 4)])
def test_route(num_experts: int, top_k: int, renormalise: bool) -> None:
    logits = random(7, num_experts) * 3
    logits[3, : num_experts // 2] = 1.0  # equals: the first ones
    experts, shares = grouped.route(logits, top_k, renormalise)
    wanted_experts, wanted_shares = reference_grouped.route(logits, top_k, renormalise)
    assert torch.equal(experts, wanted_experts)
    assert error(shares, wanted_shares) < 1e-6


@pytest.mark.parametrize(("num_pairs", "num_matrices", "tile_rows"), [(1, 1, 16), (40, 3, 16), (5, 64, 16), (3000, 4, 32)])
def test_groups_hold_every_pair_once_in_order(num_pairs: int, num_matrices: int, tile_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_pairs)
    matrices = torch.randint(-1, num_matrices, (num_pairs,), generator=generator, dtype=torch.int32)
    groups = grouped.group_pairs(matrices.to(DEVICE), num_matrices, tile_rows)
    order, found = groups.order.view(-1, tile_rows).tolist(), []
    for tile, matrix in enumerate(groups.matrix.tolist()):
        if matrix < 0:
            continue
        pairs = [pair for pair in order[tile] if pair < num_pairs]
        assert pairs
        assert order[tile] == pairs + [num_pairs] * (tile_rows - len(pairs))
        assert {int(matrices[pair]) for pair in pairs} == {matrix}
        found += [(matrix, pair) for pair in pairs]
    wanted = sorted((int(matrix), pair) for pair, matrix in enumerate(matrices.tolist()) if matrix >= 0)
    assert found == wanted


@pytest.mark.parametrize(
    ("rows", "num_experts", "top_k", "hidden", "width"),
    [(1, 8, 2, 48, 40), (5, 4, 2, 33, 17), (20, 3, 3, 64, 100), (70, 2, 1, 20, 24)],
)
def test_mixture(rows: int, num_experts: int, top_k: int, hidden: int, width: int) -> None:
    x, logits = random(rows, hidden), random(rows, num_experts, seed=1)
    gate_up, down = random(num_experts, 2 * width, hidden, seed=2) / 6, random(num_experts, hidden, width, seed=3) / 6
    found = grouped.mixture(x, logits, gate_up, down, top_k)
    wanted = reference_grouped.mixture(x, logits, gate_up, down, top_k)
    assert error(found, wanted) < TOLERANCE[torch.float32]
    alone = grouped.mixture(x[:1], logits[:1], gate_up, down, top_k)
    assert error(alone, wanted[:1]) < TOLERANCE[torch.float32]


def test_mixture_in_half_precision_without_renormalising() -> None:
    x, logits = random(9, 64, dtype=torch.float16), random(9, 6, seed=1)
    gate_up, down = random(6, 96, 64, seed=2, dtype=torch.float16) / 8, random(6, 64, 48, seed=3, dtype=torch.float16) / 8
    wanted = reference_grouped.mixture(x, logits, gate_up, down, 2, False)
    assert error(grouped.mixture(x, logits, gate_up, down, 2, False), wanted) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rank", [4, 16, 40])
def test_lora(rank: int) -> None:
    """Rows without an adapter are left to the bit; an adapter that nobody uses costs nothing and changes nothing."""
    x, out = random(11, 50), random(11, 30, seed=1)
    down, up, scales = random(3, rank, 50, seed=2), random(3, 30, rank, seed=3), torch.tensor([0.5, 2.0, 9.0], device=DEVICE)
    adapters = torch.tensor([0, -1, 1, 1, -1, 0, 1, 1, 1, 0, -1], dtype=torch.int32, device=DEVICE)
    wanted = reference_grouped.lora(x, out, down, up, scales, adapters)
    before = out.clone()
    assert grouped.lora(x, out, down, up, scales, adapters) is out
    assert error(out, wanted) < TOLERANCE[torch.float32]
    assert torch.equal(out[adapters < 0], before[adapters < 0])


def test_nothing_to_do() -> None:
    assert grouped.mixture(random(0, 16), random(0, 4), random(4, 32, 16), random(4, 16, 16), 2).shape == (0, 16)


def test_wrong_arguments_are_named() -> None:
    groups = grouped.group_pairs(torch.zeros(4, dtype=torch.int32, device=DEVICE), 1, 16)
    with pytest.raises(AssertionError, match="4 pairs are not 1 for each of 3 rows"):
        grouped.grouped_linear(random(3, 16), random(1, 8, 16), groups)
    with pytest.raises(AssertionError, match="top_k 3 of 2 experts"):
        grouped.route(random(1, 2), 3, True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_qwen3_moe_shapes_on_a_gpu(rows: int) -> None:
    x, logits = random(rows, 2048, dtype=torch.bfloat16), random(rows, 128, seed=1)
    gate_up = random(128, 2 * 768, 2048, seed=2, dtype=torch.bfloat16) / 45
    down = random(128, 2048, 768, seed=3, dtype=torch.bfloat16) / 28
    found = grouped.mixture(x, logits, gate_up, down, 8)
    some = slice(0, 40)
    assert error(found[some], reference_grouped.mixture(x[some], logits[some], gate_up, down, 8)) < TOLERANCE[torch.bfloat16]
