"""Figures of a GPU: none without one, the right device with one, and nothing ever raised."""

from __future__ import annotations

import sys
import types

import pytest

from cluster.gpu import GpuReader
from cluster.metric_table import GPU_SERIES


class NVMLError(Exception):
    pass


def driver(monkeypatch: pytest.MonkeyPatch, power_is_told: bool = True) -> list[object]:
    """A stand-in for pynvml; the list of what devices were asked for."""
    asked: list[object] = []

    def power(handle: object) -> int:
        if not power_is_told:
            raise NVMLError("not supported")
        return 70_000

    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: asked.append(i) or i,
        nvmlDeviceGetHandleByUUID=lambda u: asked.append(u) or u,
        nvmlDeviceGetUtilizationRates=lambda h: types.SimpleNamespace(gpu=50),
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(used=10, total=100),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda h, kind: 40,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)  # type: ignore[arg-type]
    return asked


def test_a_cpu_has_none_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = driver(monkeypatch)
    assert GpuReader("cpu").read() == {}
    assert asked == []


def test_without_the_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuReader("cuda:0").read() == {}


def test_every_figure_has_a_series(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    found = GpuReader("cuda:0").read()
    assert found.keys() == GPU_SERIES.keys()
    assert (found["utilization"], found["power_watts"]) == (0.5, 70.0)


def test_what_a_device_does_not_tell_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, power_is_told=False)
    assert GpuReader("cuda").read().keys() == GPU_SERIES.keys() - {"power_watts"}


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [("", "cuda:1", 1), ("3,5", "cuda:1", 5), ("3", "cuda", 3), ("GPU-aa,GPU-bb", "cuda:1", "GPU-bb")],
)
def test_torch_counts_what_is_visible(monkeypatch: pytest.MonkeyPatch, visible: str, device: str, expected: object) -> None:
    asked = driver(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    GpuReader(device)
    assert asked == [expected]


@pytest.mark.gpu
def test_a_real_gpu_tells() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = GpuReader("cuda:0").read()
    assert found["memory_total_bytes"] == pytest.approx(torch.cuda.mem_get_info(0)[1], rel=0.05)
