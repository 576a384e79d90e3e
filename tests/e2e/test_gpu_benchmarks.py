"""Proves that what is prepared for a GPU machine starts: the script checks, runs and reports; figures run dry on a CPU.

The dry figures are of no meaning and go to a folder that is thrown away.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hopper, record
from tests.e2e.forked import run_forked

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "benchmarks/hopper.sh")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the script find an H100, with nothing missing -> the card's folder."""
    folder = tmp_path / "results/h100"
    monkeypatch.setattr(hopper, "RESULTS", folder.parent)
    monkeypatch.setattr(hopper, "LOG", tmp_path / "hopper.log")
    monkeypatch.setattr(hopper, "REPOSITORY", tmp_path)
    monkeypatch.setattr(hopper, "NEEDED", (hopper.Requirement(module="json", install="unknown"),))
    gpu = {"torch": "2.11", "cuda": "13.0", "name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "fault": None}
    gpu["head_kernels_lack"] = "a C compiler"
    monkeypatch.setattr(hopper, "find_gpu", lambda: gpu)
    return folder


def run_script(monkeypatch: pytest.MonkeyPatch, parts: dict[str, hopper.Part], *names: str) -> int:
    """Run the script's Python with parts of a test's own -> exit code."""
    monkeypatch.setattr(hopper, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["hopper.sh", *names])
    with pytest.raises(SystemExit) as left:
        hopper.main()
    return int(left.value.code or 0)


def part(folder: Path, code: str, **settings: Any) -> hopper.Part:
    """Make a part of one line of Python, which is written to a file as commands are split at blanks."""
    script = folder.parent.parent / f"part_{len(code)}.py"
    script.write_text(code)
    return hopper.Part(proves="a test", commands=(str(script),), **settings)


ABSENT = hopper.Requirement(module="no_such_module", install="pip install that")
FIGURE = """
import json, pathlib
rows = [{"met": True}, {"met": False}, {"met": None}]
pathlib.Path("results/h100/figure.json").write_text(json.dumps({"rows": rows}))
"""


def test_parts_go_on_after_one_fails_and_the_table_tells(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "writes": part(machine, FIGURE),
        "breaks": part(machine, "raise RuntimeError('no kernel image')"),
        "hangs": part(machine, "import time; print('in the middle', flush=True); time.sleep(60)"),
        "works": part(machine, "print('fine')"),
        "peer": part(machine, "", needs=(ABSENT,)),
    }
    monkeypatch.setenv("LIMIT", "5")
    out = machine.parent.parent / "out"
    monkeypatch.setenv("OUT", str(out))
    assert run_script(monkeypatch, parts, "all") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index(["part", "outcome", "seconds", "targets", "met", "figures"]) :]
    outcomes = {line[0]: line[1] for line in table if line and line[0] in parts}
    met = {line[0]: line[3:] for line in table if line and line[0] in parts}
    assert outcomes == {"writes": "passed", "breaks": "failed", "hangs": "failed", "peer": "skipped", "works": "passed"}
    assert met["writes"] == ["1", "of", "2", "figure.json"]
    summary = json.loads((machine / "hopper.json").read_text())
    reasons = {result["part"]: result["reason"] for result in summary["parts"]}
    assert reasons["breaks"] == "exit code 1: RuntimeError: no kernel image"
    assert reasons["hangs"] == "took more than LIMIT=5 seconds: in the middle"
    assert reasons["peer"] == "missing: no_such_module"
    assert any("lack a C compiler: g1 and g2 measure torch's own operators" in " ".join(line) for line in lines)
    assert any(line[:2] == ["Send", "back"] and line[2] == "results/h100/*.json" for line in lines)
    assert "no kernel image" in (out / "hopper.log").read_text()
    assert {path.name for path in (out / "results/h100").iterdir()} == {"figure.json", "hopper.json"}


def test_an_interrupted_part_ends_the_run_and_the_table_stands(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupts = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    parts = {
        "works": part(machine, "print('fine')"),
        "stops": part(machine, interrupts),
        "never": part(machine, FIGURE),
    }
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert run_script(monkeypatch, parts, "all") == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    printed = capsys.readouterr().out
    (_, stopped) = json.loads((machine / "hopper.json").read_text())["parts"]
    assert (stopped["part"], stopped["outcome"], stopped["reason"]) == ("stops", "failed", "interrupted")
    assert "interrupted" in printed and "Send back" in printed and not (machine / "figure.json").exists()


def test_nothing_runs_while_an_import_is_missing(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hopper, "find_gpu", lambda: pytest.fail("looked at the GPU"))
    parts = {"peer": part(machine, FIGURE, needs=(ABSENT,))}
    assert run_script(monkeypatch, parts, "peer") == 2  # asked for by name, it is not skipped
    assert capsys.readouterr().err.splitlines()[-1].strip() == "pip install that"
    monkeypatch.setattr(hopper, "NEEDED", (ABSENT,))
    parts = {"writes": part(machine, FIGURE)}
    assert run_script(monkeypatch, parts, "all") == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().out
    assert not machine.exists()


def test_what_is_optional_is_said_and_not_waited_for(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hopper, "NEEDED", (replace(ABSENT, optional="power will be null"),))
    assert run_script(monkeypatch, {"works": part(machine, "print('fine')")}, "works") == 0
    assert "without it power will be null" in capsys.readouterr().out


def test_tests_are_counted_and_those_that_fail_are_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = "def test_good(): pass\ndef test_bad(): assert False\n"
    machine.mkdir(parents=True)
    (machine.parent.parent / "test_x.py").write_text(cases)
    parts = {"tests": hopper.Part(proves="a test", commands=("-m pytest -q -p no:cacheprovider test_x.py",))}
    assert run_script(monkeypatch, parts, "tests") == 1
    (result,) = json.loads((machine / "hopper.json").read_text())["parts"]
    assert result["tests"] == {"passed": 1, "skipped": 0, "failed": ["test_x::test_bad"]}


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        ({"torch": "2.13", "cuda": None}, "a build without CUDA, finds no GPU"),
        ({"torch": "2.13", "cuda": "13.0"}, "a build for CUDA 13.0, finds no GPU"),
        ({"torch": "2.13", "cuda": "13.0", "name": "NVIDIA A100", "capability": [8, 0]}, "capability 8.0"),
        ({"torch": "2.9.1+cu128", "cuda": "12.8", "name": "NVIDIA H100", "capability": [9, 0]}, "torch>=2.11"),
        ({"fault": "libcuda is broken"}, "libcuda is broken"),
    ],
)
def test_another_machine_is_refused(gpu: dict[str, Any], says: str) -> None:
    assert says in hopper.fault_of(gpu)


def test_the_door_explains_itself_and_refuses_here(tmp_path: Path) -> None:
    """This machine has no CUDA build of torch: the script itself says so, or names the imports that it misses."""
    environment = {**os.environ, "PYTHON": sys.executable, "BUNDLES": str(tmp_path), "SITE": str(tmp_path / "site")}
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "benchmarks/hopper.sh PART..." in done.stdout and "  fit " in done.stdout
    done = subprocess.run([SCRIPT, "g9"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "invalid choice: 'g9'" in done.stderr
    done = subprocess.run([SCRIPT, "smoke"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "hopper.sh: error: " in done.stderr


@pytest.mark.parametrize(
    ("module", "flags", "name"),
    [
        ("head_gpu", ["--tokens", "64", "--hidden", "64", "--vocab", "512", "--repeats", "1"], "head_gpu"),
        ("train_gpu", ["--shape", "tiny", "--repeats", "1"], "train_gpu_tiny"),
        (
            "train_throughput",  # its other parts need TRL, which has an environment of its own
            ["--setup=dry", "--part=curve", "--steps=2", "--pairs-per-rank=1", "--peer-python", sys.executable],
            "train_throughput_dry_curve",
        ),
    ],
)
def test_a_figure_runs_dry(module: str, flags: list[str], name: str, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, runpy; from benchmarks import record; record.RESULTS = pathlib.Path(sys.argv.pop(1)); "
        f"sys.argv[0] = {module!r}; runpy.run_module('benchmarks.{module}', run_name='__main__')"
    )
    (script := tmp_path / "script.py").write_text(code)
    done = run_forked(script, [tmp_path, *flags, "--machine", "dry"])
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "dry" / f"{name}.json").read_text())
    assert content["rows"] and set(content["rows"][0]) == set(record.Row.__dataclass_fields__)
