"""The Triton kernels are compiled down to machine code for real GPUs on any machine: the compiler needs no device.

What this shows is that they compile, use the matrix units, spill nothing and fit into shared memory. What they compute is tested
in the interpreter and, where there is a GPU, on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on Linux)")

ROOT = Path(__file__).resolve().parents[2]
AMPERE, HOPPER, BLACKWELL = 80, 90, 100
SHARED_BYTES = {AMPERE: 163 * 1024, HOPPER: 227 * 1024, BLACKWELL: 227 * 1024}  # of one block
WITH_MATRIX_UNITS = {"_attend_split", "_attend_chunk", "_linear", "_grouped_linear"}


def compiled(capability: int, names: list[str], cache: Path) -> list[dict[str, Any]]:
    """In a process of its own, since it must not run under TRITON_INTERPRET."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", str(capability), *names],
        cwd=ROOT,
        env=env | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(capability: int, names: list[str], cache: Path) -> None:
    built = compiled(capability, names, cache)
    assert {one["call"] for one in built} == set(names)
    for one in built:
        where = f"{one['kernel']} of {one['call']!r} on sm_{capability}"
        assert one["shared"] <= SHARED_BYTES[capability], f"{where} needs {one['shared']} bytes of shared memory"
        exact = "fp32" in one["call"]  # no tf32
        if not exact:
            assert one["stack"] == 0, f"{where} spills {one['stack']} bytes"
        uses = one["wgmma"] or one["mma"] or one["tcgen05"]
        assert uses == (one["kernel"] in WITH_MATRIX_UNITS and not exact), where


def test_the_longest_kernels_for_hopper(tmp_path: Path) -> None:
    """One of each file that has a matrix product, and the two that are longest without."""
    check(HOPPER, ["decode fp8 kv", "prefill", "rotate norms fp8", "linear int4 1", "experts 1", "sampling penalised"], tmp_path)


@pytest.mark.more
@pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])
def test_everything_for_every_generation(capability: int, tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "from tests.kernels.compiled import CALLS; print(*CALLS, sep='\\n')"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    names = listed.stdout.splitlines()
    assert len(names) > 20
    if capability == AMPERE:  # e4m3 numbers need sm_89
        names = [name for name in names if "fp8" not in name]
    check(capability, names, tmp_path)
