"""Proves that every tool explains itself: exit code 0, its options with defaults, and nothing heavy imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = sorted([*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("examples/*.py")])
COMMANDS = [(tool, ()) for tool in TOOLS] + [
    (REPOSITORY / "tools/convert.py", (command,)) for command in ("import", "export", "verify")
]
HEAVY = {"vllm", "transformers", "datasets"}


@pytest.mark.parametrize(
    ("tool", "command"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)
)
def test_help_reads_well_and_exits_0(tool, command):
    arguments = [sys.executable, "-X", "importtime", str(tool), *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {tool.name}")
    assert "--help" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megatron_sppo.config" in imported
    assert not HEAVY & imported
