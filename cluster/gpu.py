"""What a worker's GPU is doing, through nvidia-ml-py, where there is one and that package is installed. Called by `agent.py`.

Optional by nature: without a GPU, without the package or without the driver's leave it says nothing, and nothing fails.
"""

from __future__ import annotations

import logging
import os
from typing import Any

log = logging.getLogger(__name__)


class GpuReader:
    """Figures of one device ("cuda:0" as torch counts). `read()` is quick (well below a millisecond) and never raises."""

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if not device.startswith("cuda"):
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = _handle_of(pynvml, int(device.partition(":")[2] or 0))
            self._nvml = pynvml
        except Exception as error:  # no package, no driver, no permission: each its own type, all the same to us
            log.info("no figures of %s: %s", device, error)

    def read(self) -> dict[str, float]:
        """The keys of `metric_table.GPU_SERIES`; those that this device does not tell are missing."""
        nvml, handle, out = self._nvml, self._handle, dict[str, float]()
        if nvml is None:
            return out

        def memory(field: str) -> float:
            return float(getattr(nvml.nvmlDeviceGetMemoryInfo(handle), field))

        for name, ask in (
            ("utilization", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            ("memory_used_bytes", lambda: memory("used")),
            ("memory_total_bytes", lambda: memory("total")),
            ("power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            ("temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ):
            try:
                out[name] = float(ask())
            except nvml.NVMLError as error:
                log.debug("%s: %s", name, error)
        return out


def _handle_of(nvml: Any, index: int) -> Any:
    """torch counts what CUDA_VISIBLE_DEVICES leaves; NVML counts all."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[index] if index < len(visible) else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
