"""What the GPU does: torch's memory, and NVML's counters, read only. Where NVML is denied, that is said once."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

try:
    import pynvml
except ImportError:  # a bare machine; training goes on without it
    pynvml = None

logger = logging.getLogger(__name__)

STRAGGLER_RATIO = 1.2
"""A rank that computes this many times as long as the median one is worth a warning ..."""
STRAGGLER_STEPS = 10
"""... when it does so for as many steps in a row."""
PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "GH200": 989.0}
"""Dense bfloat16 on paper, by a part of the device's name; MFU is quoted against it."""

_REASONS = {
    name.removeprefix("nvmlClocksEventReason"): value
    for name, value in (vars(pynvml).items() if pynvml is not None else ())
    if name.startswith("nvmlClocksEventReason") and isinstance(value, int) and not name.endswith(("None", "All"))
}
_HARMFUL = ("HwSlowdown", "HwThermalSlowdown", "SwThermalSlowdown", "HwPowerBrakeSlowdown")
"""Reasons that mean heat or a failing supply; a power cap (SwPowerCap) is how these GPUs usually run."""
_NVLINK_COUNTERS = ("DL_REPLAY", "DL_RECOVERY", "DL_CRC_FLIT", "DL_CRC_DATA")


class GpuSampler:
    """Sample this rank's GPU for the metrics: without NVML only torch's memory, without a GPU nothing."""

    def __init__(self) -> None:
        self._has_gpu = torch.cuda.is_available()
        self._device: Any = None
        self._unsupported: set[str] = set()
        self._energy_joules: float | None = None
        self._warned: tuple[str, ...] = ()
        if not self._has_gpu:
            return
        if pynvml is None:
            logger.warning(
                "no GPU telemetry but torch's memory: nvidia-ml-py is missing. Use: pip install nvidia-ml-py"
            )
            return
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            logger.warning("no GPU telemetry but torch's memory: %s", error)

    def sample(self) -> dict[str, float]:
        """Read the counters -> {"gpu/...": value}; W, degrees Celsius, MHz, percent, GiB, J since the last sample.

        A counter that the GPU does not have is asked for once. Errors and remapped rows count since the driver's start.
        """
        if not self._has_gpu:
            return {}
        values = {
            "gpu/torch_allocated_gib": torch.cuda.memory_allocated() / 2**30,
            "gpu/torch_reserved_gib": torch.cuda.memory_reserved() / 2**30,
            "gpu/torch_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        for name, probe in self._probes().items() if self._device is not None else ():
            if name in self._unsupported:
                continue
            try:
                values |= probe()
            except pynvml.NVMLError as error:
                self._unsupported.add(name)
                logger.info("%s is not available on this GPU (%s)", name, error)
        self._warn_of_slowdown(int(values.get("gpu/clock_event_reasons", 0)))
        return values

    def limits(self) -> dict[str, Any]:
        """Read what does not change -> {"driver", "power_limit_watts", "sm_clock_limit_mhz"}; None: NVML denies it."""
        limits: dict[str, Callable[[], Any]] = {
            "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_watts": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._device) / 1000,
            "sm_clock_limit_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(self._device, pynvml.NVML_CLOCK_SM),
        }
        values: dict[str, Any] = dict.fromkeys(limits)
        for name, limit in limits.items() if self._device is not None else ():
            with contextlib.suppress(pynvml.NVMLError):
                values[name] = limit()
        return values

    def _probes(self) -> dict[str, Callable[[], dict[str, float]]]:
        return {
            "utilisation": self._utilisation,
            "memory": lambda: {"gpu/memory_used_gib": pynvml.nvmlDeviceGetMemoryInfo(self._device).used / 2**30},
            "power": lambda: {"gpu/power_watts": pynvml.nvmlDeviceGetPowerUsage(self._device) / 1000},
            "energy": self._energy,
            "temperature": self._temperature,
            "memory temperature": self._memory_temperature,
            "clocks": self._clocks,
            "clock event reasons": self._reasons,
            "ECC errors": self._ecc,
            "remapped rows": self._remapped_rows,
            "NVLink errors": self._nvlink,
        }

    def _utilisation(self) -> dict[str, float]:
        rates = pynvml.nvmlDeviceGetUtilizationRates(self._device)
        return {"gpu/utilisation_percent": float(rates.gpu), "gpu/memory_utilisation_percent": float(rates.memory)}

    def _energy(self) -> dict[str, float]:
        now = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000
        before, self._energy_joules = self._energy_joules, now
        return {} if before is None else {"gpu/energy_joules": now - before}

    def _temperature(self) -> dict[str, float]:
        return {
            "gpu/temperature_celsius": float(pynvml.nvmlDeviceGetTemperature(self._device, pynvml.NVML_TEMPERATURE_GPU))
        }

    def _memory_temperature(self) -> dict[str, float]:
        (field,) = pynvml.nvmlDeviceGetFieldValues(self._device, [pynvml.NVML_FI_DEV_MEMORY_TEMP])
        if field.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(field.nvmlReturn)
        return {"gpu/memory_temperature_celsius": float(field.value.uiVal)}

    def _clocks(self) -> dict[str, float]:
        return {
            f"gpu/{name}_clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._device, kind))
            for name, kind in (("sm", pynvml.NVML_CLOCK_SM), ("memory", pynvml.NVML_CLOCK_MEM))
        }

    def _reasons(self) -> dict[str, float]:
        mask = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
        throttled = any(reason in _HARMFUL for reason in clock_event_reasons(mask))
        return {"gpu/clock_event_reasons": float(mask), "gpu/throttled": float(throttled)}

    def _ecc(self) -> dict[str, float]:
        kinds = {
            "corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        return {
            f"gpu/ecc_{name}": float(pynvml.nvmlDeviceGetTotalEccErrors(self._device, kind, pynvml.NVML_VOLATILE_ECC))
            for name, kind in kinds.items()
        }

    def _remapped_rows(self) -> dict[str, float]:
        corrected, uncorrected, pending, failed = pynvml.nvmlDeviceGetRemappedRows(self._device)
        return {
            "gpu/remapped_rows": float(corrected + uncorrected),
            "gpu/remapping_pending": float(pending),
            "gpu/remapping_failed": float(failed),
        }

    def _nvlink(self) -> dict[str, float]:
        errors = 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                active = pynvml.nvmlDeviceGetNvLinkState(self._device, link) == pynvml.NVML_FEATURE_ENABLED
            except pynvml.NVMLError_InvalidArgument:
                break  # there are no more
            for counter in _NVLINK_COUNTERS if active else ():
                kind = getattr(pynvml, f"NVML_NVLINK_ERROR_{counter}")
                errors += pynvml.nvmlDeviceGetNvLinkErrorCounter(self._device, link, kind)
        return {"gpu/nvlink_errors": float(errors)}

    def _warn_of_slowdown(self, mask: int) -> None:
        """Warn when the GPU begins to slow down for another reason than before."""
        reasons = tuple(reason for reason in clock_event_reasons(mask) if reason in _HARMFUL)
        if reasons and reasons != self._warned:
            logger.warning("this GPU slows down: %s. Look at its cooling and power supply", ", ".join(reasons))
        self._warned = reasons


def clock_event_reasons(mask: int) -> tuple[str, ...]:
    """Decode NVML's bit mask of why clocks are what they are -> names, such as ("SwPowerCap",)."""
    return tuple(name for name, bit in _REASONS.items() if mask & bit)


class Stragglers:
    """Says which rank computes longer than the others step after step: one slow step is nothing."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Begin to count.

        Args:
            hosts: the machine of each rank.
        """
        self._hosts, self._rank, self._num_steps = hosts, -1, 0

    def note(self, seconds_by_rank: list[float]) -> dict[str, float]:
        """Hold the slowest rank's computation against the median -> metrics.

        Warns, on whichever rank shows warnings, of a rank that was the slowest, and above `STRAGGLER_RATIO`, for
        `STRAGGLER_STEPS` steps in a row, and again after ten times as many.

        Args:
            seconds_by_rank: until each rank began to reduce gradients; what follows all ranks do together.
        """
        slowest, middle = max(seconds_by_rank), median(seconds_by_rank)
        rank, ratio = seconds_by_rank.index(slowest), slowest / middle if middle > 0 else 1.0
        self._num_steps = self._num_steps + 1 if rank == self._rank else 1
        self._rank = rank
        if ratio <= STRAGGLER_RATIO:
            self._num_steps = 0
        elif self._num_steps % STRAGGLER_STEPS == 0 and _is_power_of_ten(self._num_steps // STRAGGLER_STEPS):
            logger.warning(
                "rank %d on %s is the slowest for %d steps: %.2f s a step, the median rank %.2f s. Look at its clocks "
                "and its share of the tokens",
                rank,
                self._hosts[rank],
                self._num_steps,
                slowest,
                middle,
            )
        return {"perf/slowest_rank_over_median": ratio}


def _is_power_of_ten(number: int) -> bool:
    return number > 0 and str(number).strip("0") == "1"


def flops_metrics(model_flops: float, *, seconds: float, world_size: int, device_name: str | None) -> dict[str, float]:
    """Say how fast a GPU works -> model TFLOP/s, and the share of the peak on paper where it is known.

    Args:
        model_flops: forward and backward of the whole step; what is computed again does not count.
        device_name: of the GPU; None on a CPU, where nothing is said.
    """
    if device_name is None:
        return {}
    achieved = model_flops / seconds / world_size / 1e12
    peak = next((tflops for part, tflops in PEAK_BF16_TFLOPS.items() if part in device_name), None)
    metrics = {"perf/tflops_per_gpu": achieved}
    return metrics if peak is None else metrics | {"perf/mfu": achieved / peak}
