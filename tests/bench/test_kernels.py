"""`bench kernels` without a GPU: it refuses with a sentence, and its cases, made small, are right in Triton's interpreter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

import engine.batch
from bench import kernel_cases, kernels
from bench.kernel_cases import Case, Shape
from bench.kernel_ceilings import Ceilings
from kernels import ops

SMALL = Shape("small", 64, 4, 2, 16, 48, 80)
CEILINGS = Ceilings(read=4e12, copy=4e12, bf16=8e14, fp8=None, gap_s=1e-6, from_host=5e10, to_host=5e10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list of shapes, small, and float32 on the CPU."""
    for name, value in {
        "DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
        "DTYPE": torch.float32,
        "ROTATED_BYTES": 1,
        "DECODE": [(SMALL, 2, 40, False), (SMALL, 1, 70, True)],
        "PREFILL": [(SMALL, 2, 20, 20), (SMALL, 1, 5, 33)],
        "LINEAR": [SMALL],
        "LINEAR_ROWS": (3,),
        "QUANTISED_ROWS": (2,),
        "ROWS": (5,),
        "SAMPLED": SMALL,
        "SAMPLING": [(3, 0.9)],
        "EXPERTS": (4, 2, SMALL),
        "EXPERT_ROWS": (5,),
        "STEPS": [(SMALL, 1, (2,), 20)],
    }.items():
        monkeypatch.setattr(kernel_cases, name, value)
    for module in (ops, engine.batch):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    real = kernel_cases.quantised_weight
    monkeypatch.setattr(kernel_cases, "quantised_weight", lambda kind, out, inner: real(kind, out, inner, 32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")
def test_it_refuses_without_cuda() -> None:
    with pytest.raises(SystemExit, match="bench kernels measures a CUDA device, and torch sees none here"):
        kernels.run(argparse.Namespace(only=["rows"], quick=True, sweep=False, repeats=1, tune=None))


@pytest.mark.parametrize("group", [group for group in kernels.GROUPS if group != "step"])
@pytest.mark.usefixtures("small")
def test_cases_are_right(group: str) -> None:
    found = list(kernel_cases.cases([group], quick=False))
    assert found
    for case in found:
        assert case.error() <= case.tolerance, case.name
        assert case.nbytes > 0
        case.calls[0]()
        for name, calls in case.peers.items():
            if name not in ("cudnn", "flash"):
                calls[0]()


@pytest.mark.usefixtures("small")
def test_a_step_is_one_call() -> None:
    (case,) = kernel_cases.cases(["step"], quick=False)
    first, second = case.calls[0](), case.calls[0]()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first is not second
    assert bool((first >= 0).all())
    assert torch.equal(first, second), "a replay is the same step again"


def test_a_wrong_kernel_has_no_time() -> None:
    case = Case("broken", [lambda: None], lambda: float("nan"), nbytes=4e6)
    row = kernels._measure(case, CEILINGS, 3)
    assert "us" not in row
    assert "not timed" in row["failed"]
    assert row["floor_us"] == pytest.approx(1.0)
    json.dumps(row)


def test_a_kernel_that_cannot_run_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> float:
        raise RuntimeError("out of shared memory\nand more")

    kernels._print(kernels._measure(Case("large", [], fail, nbytes=1.0), CEILINGS, 1))
    assert "FAILED: RuntimeError: out of shared memory" in capsys.readouterr().out


def test_ceilings_give_floors_and_rows() -> None:
    assert CEILINGS.floor_s(8e12, 1.0) == pytest.approx(2.0)
    assert CEILINGS.floor_s(1.0, 8e14, fp8=True) == pytest.approx(1.0), "without a measured fp8 ceiling the bf16 one stands"
    assert dict(CEILINGS.rows())["fp8 product 8192^3"] == "does not run here"


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path: Path) -> None:
    result = kernels.run(argparse.Namespace(only=["decode", "rows"], quick=True, sweep=False, repeats=3, tune=None))
    assert not [row for row in result["rows"] if "failed" in row]
    json.dumps(result)
