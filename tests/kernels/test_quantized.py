"""Matrices of codes and in panels against their float twins: odd shapes, both ways of multiplying, other CPUs' code, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import ops, panels, reference
from kernels.panels import FLOAT32, INT4, INT8, INT8_ZEROS, PanelMatrix, StackedMatrix, pack_float32
from kernels.quantized import Codes, pack, quantize

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 1), (64, 32), (70, 100), (129, 33), (200, 1200)]  # out, in


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(bits: int, out_width: int, in_width: int, group_len: int, zeros: bool, order: bool = False) -> Codes:
    generator = torch.Generator().manual_seed(bits + out_width)
    num_groups = -(-in_width // group_len)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = (torch.rand(out_width, num_groups, generator=generator) + 0.1).half()
    permuted = torch.randperm(in_width, generator=generator) if order else None
    points = integers(out_width, num_groups) if zeros else None
    return Codes(bits, group_len, integers(out_width, in_width), scales, points, permuted)


def twin(codes: Codes) -> Tensor:
    zeros = torch.full_like(codes.scales, 2 ** (codes.bits - 1)) if codes.zeros is None else codes.zeros
    return reference.dequantize(codes.codes, codes.scales, zeros, codes.group_len, codes.order).float()


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(matrix: PanelMatrix | StackedMatrix, weight: Tensor, rows: int, tolerance: float = 1e-6) -> None:
    """With and without bias and residual, against the twin."""
    out_width, in_width = weight.shape
    x, bias, residual = random(rows, in_width), random(out_width, seed=1), random(rows, out_width, seed=2)
    wanted = reference.linear(x, weight, bias)
    assert error(ops.linear(x, matrix, bias), wanted) < tolerance
    assert error(ops.linear(x, matrix), reference.linear(x, weight)) < tolerance
    assert error(ops.linear(x, matrix, bias, residual.clone()), wanted + residual) < tolerance
    assert error(ops.linear(x, matrix, None, residual.clone()), reference.linear(x, weight) + residual) < tolerance


@pytest.fixture(params=["numba", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(panels, "has_kernel", lambda: False)
    elif not panels.has_kernel():
        pytest.skip("no numba here, or a CPU without AVX2")
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("way")
def test_float32_in_panels(rows: int, shape: tuple[int, int]) -> None:
    weight = random(*shape, seed=3)
    matrix = pack_float32(weight)
    assert matrix.kind == FLOAT32
    assert torch.equal(matrix.dequantized(), weight)
    check(matrix, weight, rows)


@pytest.mark.parametrize("rows", [1, 3, 7, 13])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "zeros", "kind"), [(8, False, INT8), (8, True, INT8_ZEROS), (4, False, INT4), (4, True, INT4)])
@pytest.mark.parametrize("group_len", [32, 128, 5000])
@pytest.mark.usefixtures("way")
def test_codes(rows: int, shape: tuple[int, int], bits: int, zeros: bool, kind: int, group_len: int) -> None:
    codes = codes_of(bits, *shape, min(group_len, shape[1]), zeros)
    matrix = pack([codes])
    if shape != (1, 1):
        assert matrix.kind == kind
    weight = twin(codes)
    assert error(codes.dequantized(), weight) < 1e-6
    assert torch.equal(matrix.dequantized(), codes.dequantized())
    check(matrix, weight, rows)


@pytest.mark.usefixtures("way")
def test_inputs_in_another_order() -> None:
    codes = codes_of(4, 96, 128, 32, True, order=True)
    assert not torch.equal(codes.dequantized(), Codes(4, 32, codes.codes, codes.scales, codes.zeros).dequantized())
    matrix = pack([codes])
    assert torch.equal(matrix.dequantized(), codes.dequantized())
    check(matrix, twin(codes), 3)


@pytest.mark.usefixtures("way")
def test_half_precision_activations() -> None:
    codes = codes_of(8, 96, 128, 128, False)
    x = random(5, 128).bfloat16()
    found = ops.linear(x, pack([codes]), random(96, seed=1).bfloat16(), random(5, 96, seed=2).bfloat16())
    assert found.dtype is torch.bfloat16
    wanted = x.double() @ codes.dequantized().double().T + random(96, seed=1) + random(5, 96, seed=2)
    assert error(found, wanted) < 1e-2


@pytest.mark.usefixtures("way")
def test_matrices_of_several_kinds_on_top_of_each_other() -> None:
    parts = [codes_of(4, 70, 64, 32, False), codes_of(8, 33, 64, 64, False)]
    kept = random(17, 64, seed=7)
    stacked = StackedMatrix((pack(parts[:1]), pack(parts[1:]), ops.pack(kept.clone())), (70, 33, 17))
    weight = torch.cat([parts[0].dequantized(), parts[1].dequantized(), kept])
    assert stacked.out_width == 120
    check(stacked, weight, 5)


def test_rows_of_several_codes_become_one_matrix() -> None:
    parts = [codes_of(4, 10, 64, 32, False), codes_of(4, 100, 64, 32, True)]
    assert parts[0].fits(parts[1])
    assert not parts[0].fits(codes_of(4, 10, 64, 64, False))
    assert not parts[0].fits(codes_of(4, 10, 64, 32, False, order=True))
    assert torch.equal(pack(parts).dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_columns_are_the_same_weights() -> None:
    codes = quantize(random(20, 128), 4)
    assert torch.equal(codes.columns(32, 96).dequantized(), codes.dequantized()[:, 32:96])
    whole_rows = quantize(random(20, 128), 8)
    assert torch.equal(whole_rows.columns(5, 17).dequantized(), whole_rows.dequantized()[:, 5:17])
    with pytest.raises(AssertionError):
        codes.columns(16, 96)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (4, 0.085)])  # of the weights' norm; normal numbers
@pytest.mark.parametrize("in_width", [32, 100, 1024])
def test_rounding_stays_near(bits: int, most: float, in_width: int) -> None:
    weight = random(200, in_width)
    found = quantize(weight, bits)
    assert error(found.dequantized(), weight) < most
    assert found.group_len == (min(32, in_width) if bits == 4 else in_width)
    assert torch.equal(quantize(weight.bfloat16(), bits).codes, quantize(weight.bfloat16().float(), bits).codes)


def test_int4_scales_are_better_than_those_of_the_largest_weight() -> None:
    weight = random(100, 256)
    groups = weight.view(100, 8, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).view(100, 256)
    assert error(quantize(weight, 4).dequantized(), weight) < 0.9 * error(plain, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_of_awkward_rows(bits: int) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 1e-7
    weight[2, 3] = 1000.0
    weight[3] = -0.5
    found = quantize(weight, bits).dequantized()
    assert torch.equal(found[0], weight[0])
    assert bool(torch.isfinite(found).all())
    assert abs(float(found[2, 3]) - 1000) < 1
    assert error(found[3], weight[3]) < 1e-3


def test_all_threads_share_one_job() -> None:
    if not panels.has_kernel():
        pytest.skip("no numba here, or a CPU without AVX2")
    codes = codes_of(8, 1000, 96, 96, False)
    matrix, x = pack([codes]), random(7, 96)
    alone = ops.linear(x, matrix)
    torch.set_num_threads(3)
    try:
        for _ in range(50):
            assert torch.equal(ops.linear(x, matrix), alone)
    finally:
        torch.set_num_threads(1)


AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2"
AVX512 = AVX2 + ",+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd"  # without VNNI and bf16
CHILD = """
import torch
torch.set_num_threads(1)
from kernels import cpu_linear, panels
from tests.kernels.test_quantized import check, codes_of, pack, pack_float32, random
assert cpu_linear.ROWS == {rows}, cpu_linear.ROWS
assert panels.has_kernel() is {usable}
for rows in (1, 2, 3, 4, 7, 13):
    check(pack_float32(random(70, 100)), random(70, 100), rows)
    for bits, zeros in ((8, False), (8, True), (4, False), (4, True)):
        codes = codes_of(bits, 70, 100, 32, zeros)
        check(pack([codes]), codes.dequantized(), rows)
"""


@pytest.mark.parametrize(
    ("name", "features", "rows", "usable"),
    [
        ("haswell", AVX2, 3, True),
        ("generic", "+sse,+sse2", 3, False),
        pytest.param("skylake-avx512", AVX512, 6, True, marks=pytest.mark.more),
    ],
)
def test_code_for_other_cpus(name: str, features: str, rows: int, usable: bool, tmp_path: Path) -> None:
    """As numba makes it when it is told so. An AVX-512 machine runs them all."""
    host = Path("/proc/cpuinfo").read_text()
    if any(f" {word}" not in host for word in ("avx2", "avx512f")[: 1 + (rows == 6)]):
        pytest.skip("this CPU cannot run that code")
    env = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    code = CHILD.format(rows=rows, usable=usable)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiled_code_is_kept_and_does_without_a_place_to_keep_it(tmp_path: Path) -> None:
    code = """
import sys, torch
from kernels import cpu_linear
calls = []
original = cpu_linear.cfunc
def cfunc(*args, **options):
    calls.append(options)
    if options.get("cache") and "refuse" in sys.argv:
        raise RuntimeError("cannot cache function: no locator available")
    return original(*args, **options)
cpu_linear.cfunc = cfunc
assert cpu_linear.compiled(1) > 0
print(len(calls))
"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for words, wanted in (((), "1"), (("refuse",), "2")):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == [wanted]
    assert list(tmp_path.rglob("*.nbc"))


def test_without_numba_float32_is_packed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "has_kernel", lambda: False)
    weight, x = random(70, 100), random(5, 100, seed=1)
    packed = ops.pack(weight.clone())
    assert isinstance(packed, Tensor)
    assert packed.is_mkldnn
    assert error(ops.linear(x, packed), reference.linear(x, weight)) < 1e-6


def test_numba_is_not_imported_before_it_is_wanted() -> None:
    code = "import sys, kernels.ops, models.load, models.llama; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
