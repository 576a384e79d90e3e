"""The GPU's metrics from a stand-in for NVML (there is no driver here) that has nvidia-ml-py's own names and errors.

What a real driver answers is for tests/gpu. Stragglers and MFU are arithmetic.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from megatron_sppo.training import telemetry
from megatron_sppo.training.telemetry import GpuSampler, Stragglers, clock_event_reasons, flops_metrics


class FakeNvml:
    """Answers as one H100 would; `missing` functions it does not support. Whatever else is asked is pynvml's own."""

    def __init__(self, missing: tuple[str, ...] = ()) -> None:
        self.missing, self.asked = missing, list[str]()
        self.energy_millijoules, self.reasons = 5_000_000, pynvml.nvmlClocksEventReasonSwPowerCap

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # a name that nvidia-ml-py does not have fails here
        if not name.startswith("nvml") or isinstance(real, int):
            return real
        self.asked.append(name)
        if name in self.missing:
            return self._not_supported
        return getattr(self, f"_{name.removeprefix('nvmlDeviceGet')}")

    def _not_supported(self, *_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _nvmlInit(self) -> None: ...

    def _HandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def _UtilizationRates(self, _: Any) -> Any:
        return SimpleNamespace(gpu=97, memory=41)

    def _MemoryInfo(self, _: Any) -> Any:
        return SimpleNamespace(used=3 << 30)

    def _PowerUsage(self, _: Any) -> int:
        return 650_500

    def _TotalEnergyConsumption(self, _: Any) -> int:
        return self.energy_millijoules

    def _Temperature(self, _: Any, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 61

    def _FieldValues(self, _: Any, fields: list[int]) -> list[Any]:
        assert fields == [pynvml.NVML_FI_DEV_MEMORY_TEMP]
        return [SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(uiVal=72))]

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def _EnforcedPowerLimit(self, _: Any) -> int:
        return 700_000

    def _MaxClockInfo(self, _: Any, kind: int) -> int:
        assert kind == pynvml.NVML_CLOCK_SM
        return 1980

    def _ClockInfo(self, _: Any, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 2619}[kind]

    def _CurrentClocksEventReasons(self, _: Any) -> int:
        return self.reasons

    def _TotalEccErrors(self, _: Any, kind: int, counter: int) -> int:
        assert counter == pynvml.NVML_VOLATILE_ECC
        return {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 3, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 0}[kind]

    def _RemappedRows(self, _: Any) -> tuple[int, int, int, int]:
        return 2, 1, 1, 0

    def _NvLinkState(self, _: Any, link: int) -> int:
        if link >= 4:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return pynvml.NVML_FEATURE_ENABLED if link < 2 else pynvml.NVML_FEATURE_DISABLED

    def _NvLinkErrorCounter(self, _: Any, link: int, counter: int) -> int:
        return 5 if (link, counter) == (1, pynvml.NVML_NVLINK_ERROR_DL_REPLAY) else 0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine with one GPU."""
    fake = FakeNvml()
    monkeypatch.setattr(telemetry, "pynvml", fake)
    properties = SimpleNamespace(uuid="1234")
    for name, answer in {
        "is_available": True,
        "current_device": 0,
        "memory_allocated": 1 << 30,
        "memory_reserved": 2 << 30,
        "max_memory_allocated": 3 << 29,
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return fake


def test_every_counter_has_its_unit(nvml: FakeNvml) -> None:
    sampler = GpuSampler()
    first = sampler.sample()
    assert "gpu/energy_joules" not in first  # there is nothing before the first sample
    nvml.energy_millijoules += 12_500
    assert sampler.sample() == {
        "gpu/torch_allocated_gib": 1.0,
        "gpu/torch_reserved_gib": 2.0,
        "gpu/torch_peak_gib": 1.5,
        "gpu/utilisation_percent": 97.0,
        "gpu/memory_utilisation_percent": 41.0,
        "gpu/memory_used_gib": 3.0,
        "gpu/power_watts": 650.5,
        "gpu/energy_joules": 12.5,
        "gpu/temperature_celsius": 61.0,
        "gpu/memory_temperature_celsius": 72.0,
        "gpu/sm_clock_mhz": 1755.0,
        "gpu/memory_clock_mhz": 2619.0,
        "gpu/clock_event_reasons": 4.0,
        "gpu/throttled": 0.0,
        "gpu/ecc_corrected": 3.0,
        "gpu/ecc_uncorrected": 0.0,
        "gpu/remapped_rows": 3.0,
        "gpu/remapping_pending": 1.0,
        "gpu/remapping_failed": 0.0,
        "gpu/nvlink_errors": 5.0,
    }


def test_what_the_gpu_does_not_support_is_asked_for_once(nvml: FakeNvml) -> None:
    nvml.missing = ("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetNvLinkErrorCounter")
    sampler = GpuSampler()
    for _ in range(3):
        assert not any("ecc" in name or "nvlink" in name for name in sampler.sample())
    assert nvml.asked.count("nvmlDeviceGetTotalEccErrors") == 1
    assert nvml.asked.count("nvmlDeviceGetPowerUsage") == 3


def test_a_slowdown_is_said_when_it_begins_and_a_power_cap_is_not(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = GpuSampler()
    with caplog.at_level(logging.WARNING):
        sampler.sample()
        assert not caplog.records
        nvml.reasons |= pynvml.nvmlClocksEventReasonHwThermalSlowdown
        assert sampler.sample()["gpu/throttled"] == 1.0
        sampler.sample()
    assert [record.getMessage() for record in caplog.records] == [
        "this GPU slows down: HwThermalSlowdown. Look at its cooling and power supply"
    ]


def test_reasons_are_nvml_s_names() -> None:
    mask = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonSwPowerCap
    assert set(clock_event_reasons(mask)) == {"GpuIdle", "SwPowerCap"}
    assert clock_event_reasons(0) == ()


def test_limits_are_null_where_they_are_denied(nvml: FakeNvml) -> None:
    limits = {"driver": "580.95.05", "power_limit_watts": 700.0, "sm_clock_limit_mhz": 1980}
    assert GpuSampler().limits() == limits
    nvml.missing = ("nvmlDeviceGetEnforcedPowerLimit",)
    assert GpuSampler().limits() == {**limits, "power_limit_watts": None}


@pytest.mark.parametrize("is_installed", [True, False])
def test_without_nvml_there_is_one_line_and_torch_s_memory(
    nvml: FakeNvml, is_installed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the real NVML is asked: it finds no library, or no device of that name."""
    monkeypatch.setattr(telemetry, "pynvml", pynvml if is_installed else None)
    with caplog.at_level(logging.WARNING):
        sampler = GpuSampler()
        for _ in range(2):
            assert sampler.sample() == {
                "gpu/torch_allocated_gib": 1.0,
                "gpu/torch_reserved_gib": 2.0,
                "gpu/torch_peak_gib": 1.5,
            }
        assert set(sampler.limits().values()) == {None}
    (record,) = caplog.records
    assert record.getMessage().startswith("no GPU telemetry but torch's memory")


def test_without_a_gpu_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert GpuSampler().sample() == {} and not caplog.records


def test_a_rank_is_named_that_is_the_slowest_for_ten_steps_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    """1.15 over the median 1.05 is below the limit, 3.0 over 1.0 above it."""
    stragglers = Stragglers(["a", "b", "c", "d"])
    with caplog.at_level(logging.WARNING):
        assert stragglers.note([1.0, 1.1, 1.0, 1.15])["perf/slowest_rank_over_median"] == pytest.approx(1.15 / 1.05)
        for step in range(40):
            stragglers.note([1.0, 3.0, 1.0, 1.0] if step % 2 else [1.0, 1.0, 1.0, 3.0])
        assert not caplog.records  # never the same rank twice
        for _ in range(99):
            assert stragglers.note([1.0, 1.0, 3.0, 1.0]) == {"perf/slowest_rank_over_median": 3.0}
        assert [record.getMessage()[:44] for record in caplog.records] == [
            "rank 2 on c is the slowest for 10 steps: 3.0"
        ]
        stragglers.note([1.0, 1.0, 3.0, 1.0])
    assert "for 100 steps" in caplog.records[1].getMessage() and len(caplog.records) == 2


def test_mfu_is_the_share_of_the_peak_on_paper() -> None:
    """8 GPUs do 8 x 989e12 x 0.4 x 2 FLOPs in two seconds: 40 %."""
    done = {"seconds": 2.0, "world_size": 8}
    metrics = flops_metrics(8 * 989e12 * 0.4 * 2, device_name="NVIDIA H100 80GB HBM3", **done)
    assert metrics == {"perf/tflops_per_gpu": pytest.approx(395.6), "perf/mfu": pytest.approx(0.4)}
    assert set(flops_metrics(1e15, device_name="NVIDIA A10", **done)) == {"perf/tflops_per_gpu"}
    assert flops_metrics(1e15, device_name=None, **done) == {}
