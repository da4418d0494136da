"""Quantised matrices as a GPU takes them, made from the same codes as the CPU's: the same numbers, the same products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

from kernels import quantized
from kernels.cuda_matrix import CudaMatrix
from kernels.quantized import Codes
from tests.kernels.poisoned import DEVICE


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "on_gpu", lambda device: True)


def codes(bits: int, group_len: int, out: int = 70, inner: int = 128, zeros: bool = False, order: bool = False) -> Codes:
    generator = torch.Generator().manual_seed(bits + group_len)
    groups = inner // group_len
    return Codes(
        bits,
        group_len,
        torch.randint(0, 2**bits, (out, inner), generator=generator, dtype=torch.uint8).to(DEVICE),
        (torch.rand(out, groups, generator=generator) + 0.1).half().to(DEVICE),
        torch.randint(0, 2**bits, (out, groups), generator=generator, dtype=torch.uint8).to(DEVICE) if zeros else None,
        torch.randperm(inner, generator=generator).to(DEVICE) if order else None,
    )


@pytest.mark.parametrize(
    "given",
    [codes(8, 128), codes(4, 32), codes(4, 128, zeros=True), codes(4, 64, zeros=True, order=True), codes(8, 128, order=True)],
    ids=["int8", "int4", "int4 zeros", "int4 zeros order", "int8 order"],
)
def test_the_same_numbers_and_products(given: Codes) -> None:
    matrix = quantized.pack([given])
    assert isinstance(matrix, CudaMatrix)
    wanted = given.dequantized()
    assert torch.equal(matrix.dequantized(), wanted)
    assert matrix.nbytes < wanted.nbytes / 3
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias, residual = torch.ones(70, device=DEVICE), torch.full((3, 70), 2.0, device=DEVICE)
    found = matrix.linear(x, bias, residual).double()
    expected = x.double() @ wanted.double().T + 3.0
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("given", [codes(8, 64), codes(8, 128, zeros=True), codes(4, 16)], ids=["groups", "zeros", "short groups"])
def test_what_no_kernel_takes_stays_panels(given: Codes) -> None:
    matrix = quantized.pack([given])
    assert not isinstance(matrix, CudaMatrix)
    assert torch.allclose(matrix.dequantized(), given.dequantized())
