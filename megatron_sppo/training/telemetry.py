"""What the GPU does, through NVML: read only, and silent after one line where there is no driver."""

import logging
from typing import Any

import pynvml
import torch

logger = logging.getLogger(__name__)


class GpuSampler:
    """Sample this rank's GPU for the metrics. Without an NVIDIA driver it samples nothing."""

    def __init__(self) -> None:
        self._device: Any = None
        self._unsupported: set[str] = set()
        if not torch.cuda.is_available():
            return
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            logger.warning("no GPU telemetry: %s", error)

    def sample(self) -> dict[str, float]:
        """Read the counters -> {"gpu/...": value}; W, degrees Celsius, MHz, percent, GiB, J."""
        if self._device is None:
            return {}
        device = self._device
        probes = {
            "gpu/utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu,
            "gpu/memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(device).used / 2**30,
            "gpu/power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(device) / 1000,
            "gpu/energy_joules": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
            "gpu/temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
            "gpu/sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM),
            "gpu/clock_event_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(device),
        }
        values = {"gpu/torch_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        for name, probe in probes.items():
            if name in self._unsupported:
                continue
            try:
                values[name] = float(probe())
            except pynvml.NVMLError as error:
                self._unsupported.add(name)
                logger.info("%s is not available on this GPU (%s)", name, error)
        return values
