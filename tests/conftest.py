"""What every test may rely on: markers that skip with a reason, and the folders of other people's data."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HAS_CUDA_DRIVER = os.path.exists("/dev/nvidiactl")

# Triton decides when it is first imported whether kernels are compiled or interpreted, and transformers may import it
# before any test of a kernel does; so the choice is made here.
if not HAS_CUDA_DRIVER:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray: no usage statistics from a test run.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = _no_gpu_because()
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_because() -> str | None:
    if not HAS_CUDA_DRIVER:
        return "no CUDA device on this machine"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "this build of torch sees no CUDA device"


def _data_folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names a folder with data of others that this test reads")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of real workload traces (TANDEM_TRACES); skips when unset."""
    return _data_folder("TANDEM_TRACES")


@pytest.fixture(scope="session")
def crds() -> Path:
    """The folder of KubeRay's resource definitions (TANDEM_CRDS); skips when unset."""
    return _data_folder("TANDEM_CRDS")
