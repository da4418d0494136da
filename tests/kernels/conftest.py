"""One thread: these models are so small that a second one only waits for the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import cpu


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of Triton kernels have no use for the CPU's compiled ones, and take a while in the interpreter."""
    is_of_cpu = not hasattr(metafunc.module, "DEVICE") and not metafunc.module.__name__.endswith("for_gpus")
    metafunc.parametrize("kernels", ["torch", "compiled"] if is_of_cpu else ["torch"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of an operation runs with torch alone and with the compiled kernels."""
    if request.param == "compiled":
        assert cpu.load()
    cpu.switch(request.param == "compiled")
    yield request.param
    cpu.switch(True)
