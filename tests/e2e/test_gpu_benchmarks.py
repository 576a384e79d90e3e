"""Proves that what is prepared for a GPU machine starts: the script explains itself, the figures run dry on a CPU.

The dry figures are of no meaning and go to a folder that is thrown away.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "benchmarks/h200.sh")


def test_the_script_explains_itself_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "benchmarks/h200.sh PART..." in done.stdout
    environment = {"PATH": "/usr/bin:/bin", "BUNDLES": str(tmp_path), "SITE": str(tmp_path / "site")}
    done = subprocess.run([SCRIPT, "smoke"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Set BUNDLES" in done.stderr
    (tmp_path / "site" / ".unpacked" / "te-.tar.xz").touch()
    done = subprocess.run([SCRIPT, "g9"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no part g9" in done.stderr


@pytest.mark.parametrize(
    ("module", "flags", "name"),
    [
        ("head_gpu", ["--tokens", "64", "--hidden", "64", "--vocab", "512", "--repeats", "1"], "head_gpu"),
        ("train_gpu", ["--shape", "tiny", "--repeats", "1"], "train_gpu_tiny"),
        (
            "train_throughput",  # its other parts need TRL, which has an environment of its own
            ["--setup", "dry", "--part", "curve", "--peer-python", sys.executable, "--steps", "2"],
            "train_throughput_dry_curve",
        ),
    ],
)
def test_a_figure_runs_dry(module: str, flags: list[str], name: str, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, runpy; from benchmarks import record; record.RESULTS = pathlib.Path(sys.argv.pop(1)); "
        f"sys.argv[0] = {module!r}; runpy.run_module('benchmarks.{module}', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *flags, "--machine", "dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "dry" / f"{name}.json").read_text())
    assert content["rows"] and set(content["rows"][0]) == set(record.Row.__dataclass_fields__)
