"""The first minute of docs/one-hopper.md on the emulated H100: the script takes it for a Hopper, the smoke test passes.

Errors are those of rounding to bfloat16, E4M3 and E5M2, which the emulation does; kernels are not shown.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import hopper, record


def test_the_script_takes_the_emulated_gpu_for_a_hopper() -> None:
    gpu = hopper.find_gpu()
    assert gpu["name"].startswith("NVIDIA H100") and hopper.fault_of(gpu) == ""


def test_the_smoke_test_passes_and_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["smoke", "--tokens", "256", "--hidden", "256", "--vocab", "1024"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("benchmarks.smoke", run_name="__main__")
    assert left.value.code == 0
    figure = json.loads((tmp_path / "h100/smoke.json").read_text())
    assert len(figure["rows"]) == 20 and all(row["met"] for row in figure["rows"])
    assert figure["gpu"]["name"].startswith("NVIDIA H100")
    assert figure["gpu"]["power_limit_watts"] is None  # there is no NVML


def test_a_kernel_s_process_that_dies_says_how_and_hides_no_other() -> None:
    from benchmarks import smoke  # the test above runs it as the program that it is

    rows = smoke.of_each({"dies": lambda: os._exit(7), "lives": lambda: [smoke._row("it", 0.0, 1.0)]})
    assert [(row.metric, row.met) for row in rows] == [("dies: the process died (exit code 7)", False), ("it", True)]
