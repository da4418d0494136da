"""The fused pieces of a layer against their twins: in Triton's interpreter where there is no GPU; odd widths, poisoned memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import fused, ops, reference, reference_fused
from tests.kernels.poisoned import DEVICE

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    assert bool(torch.isfinite(found.float()).all())
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    real_empty, real_empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real_empty_like(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 576), (5, 1000)], ids=str)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, adds: bool) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], seed=1, dtype=dtype)
    residual = random(*shape, seed=2, dtype=dtype) * 3 if adds else None
    before = None if residual is None else residual.clone()
    wanted_hidden, wanted = reference_fused.add_rms_norm(x, before, weight, 1e-5)
    hidden, normed = fused.add_rms_norm(x, residual, weight, 1e-5)
    assert hidden is (x if residual is None else residual)
    assert error(hidden, wanted_hidden) < TOLERANCE[dtype]
    assert error(normed, wanted) < TOLERANCE[dtype]
    assert torch.equal(fused.add_rms_norm(hidden, None, weight, 1e-5)[1], normed), "fused or not, the same bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 17, 1024, 1537])
@pytest.mark.usefixtures("poisoned")
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    x = random(3, 2 * width, dtype=dtype) * 4
    wanted = reference.silu_mul(x)
    assert error(fused.silu_mul(x), wanted) < TOLERANCE[dtype]


def test_large_gates_do_not_overflow() -> None:
    x = torch.tensor([[200.0, -200.0, 2.0, 3.0]], device=DEVICE)
    assert torch.equal(fused.silu_mul(x), torch.tensor([[400.0, -0.0]], device=DEVICE))


def check_qkv(heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype, norms: bool, fp8: bool) -> None:
    num_heads, num_kv_heads = heads
    slots = [3 * block_size, 0, -1, 2 * block_size - 1, 4 * block_size + block_size // 2]
    qkv = random(len(slots), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 1, 5, 77, 4001], device=DEVICE)
    turn = ops.rotation(positions, (10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))).to(DEVICE))
    q_norm, k_norm = (random(head_dim, seed=s, dtype=dtype) if norms else None for s in (1, 2))
    scales = random(2, num_kv_heads, seed=3).abs() * 0.01 + 0.002 if fp8 else None
    pool = torch.full((6, 2, num_kv_heads, block_size, head_dim), -7.0, device=DEVICE)
    pool = pool.to(torch.float8_e4m3fn if fp8 else dtype)
    wanted_pool = pool.clone()
    wanted = reference_fused.rotate_and_write(qkv, turn, q_norm, k_norm, 1e-6, wanted_pool, slots, num_heads, scales)
    wide = torch.tensor(slots, device=DEVICE)[:, None].repeat(1, 3)  # a column of something wider
    fused.rotate_and_write(qkv, turn, q_norm, k_norm, 1e-6, pool, wide[:, 0], num_heads, scales)
    assert error(qkv, wanted) < TOLERANCE[dtype]
    untouched = wanted_pool.float() == -7.0
    assert torch.equal(pool.float() == -7.0, untouched), "what is not this batch's was written, or a row was not"
    # To e4m3 the interpreter truncates, a GPU rounds, and that may fall either way.
    tolerance = TOLERANCE[dtype] if not fp8 else 5e-3 if DEVICE == "cuda" else 6e-2
    assert error(pool.float(), wanted_pool.float()) < tolerance


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_rotate_and_write(dtype: torch.dtype, norms: bool) -> None:
    check_qkv((4, 2), 16, 4, dtype, norms, fp8=False)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((1, 1), 2, 1), ((9, 3), 60, 3), ((8, 1), 128, 16), ((20, 5), 10, 7)]
)
def test_rotate_and_write_shapes(heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    check_qkv(heads, head_dim, block_size, torch.float32, norms=True, fp8=False)


@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write_into_an_fp8_pool(norms: bool) -> None:
    """Scales so small that some values saturate."""
    check_qkv((4, 2), 16, 4, torch.float32, norms, fp8=True)


def test_rotate_and_write_is_what_the_model_does_in_steps() -> None:
    """The door's separate operations, one after the other, on the CPU."""
    num_heads, num_kv_heads, dim = 4, 2, 16
    qkv = random(3, (num_heads + 2 * num_kv_heads) * dim)
    stepped = qkv.clone().view(3, -1, dim)
    turn = ops.rotation(torch.tensor([4, 9, 2], device=DEVICE), (10_000.0 ** (-torch.arange(8) / 8)).to(DEVICE))
    q_norm, k_norm = random(dim, seed=1), random(dim, seed=2)
    pool = torch.zeros(2, 2, num_kv_heads, 4, dim, device=DEVICE)
    fused.rotate_and_write(qkv, turn, q_norm, k_norm, 1e-6, pool, torch.tensor([1, 2, 5], device=DEVICE), num_heads)
    stepped[:, :4] = ops.rms_norm(stepped[:, :4], q_norm, 1e-6)
    stepped[:, 4:6] = ops.rms_norm(stepped[:, 4:6], k_norm, 1e-6)
    ops.rotate(stepped[:, :6], turn)
    assert error(qkv.view_as(stepped), stepped) < 1e-6
    written = torch.stack((pool[0, :, :, 1], pool[0, :, :, 2], pool[1, :, :, 1]))
    assert error(written, stepped[:, 4:].view(3, 2, num_kv_heads, dim)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_serving_shapes_on_a_gpu(fp8: bool) -> None:
    check_qkv((32, 8), 128, 16, torch.bfloat16, norms=True, fp8=fp8)
    x, weight = random(300, 8192, dtype=torch.bfloat16), random(8192, seed=1, dtype=torch.bfloat16)
    residual = random(300, 8192, seed=2, dtype=torch.bfloat16)
    _, wanted = reference_fused.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert error(fused.add_rms_norm(x, residual, weight, 1e-5)[1], wanted) < 1e-2
