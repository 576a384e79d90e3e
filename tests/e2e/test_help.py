"""Proves that every command explains itself in every spelling: exit code 0, its own name, nothing heavy imported for
it, and less than a second of this machine's CPU time; and that a plan costs no more. (tests/e2e/test_wheel.py: the same
of an installed wheel.)

On a machine that others share, a process is charged up to three times its own CPU time while they are busy: a command
that took longer may take half of what an import of torch is charged right after it (2 s where nothing disturbs).
"""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*REPOSITORY.glob("tools/*.py"), *(REPOSITORY / "examples").glob("[!_]*.py")])
CONVERT = ("import", "export", "verify")
INVOCATIONS = [
    ((), "megatron-sppo"),
    *(((name,), f"megatron-sppo {name}") for name in COMMANDS),
    *((("convert", name), f"megatron-sppo convert {name}") for name in CONVERT),
    *(((script,), script.name) for script in SCRIPTS),
    *(((REPOSITORY / "tools/convert.py", name), f"convert.py {name}") for name in CONVERT),
]
HEAVY = {"torch", "megatron", "vllm", "transformers", "datasets", "matplotlib", "tensorboard", "transformer_engine"}
LONGEST_CPU_SECONDS = 1.0
TRIES = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a process did."""

    stdout: str
    cpu_seconds: float
    imported: frozenset[str]


def run(*arguments: object, directory: Path = REPOSITORY, path: Path = REPOSITORY) -> Outcome:
    """Run Python with the package that lies in `path`, which must succeed -> what it said, imported and cost."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(done.stdout, cpu_seconds, frozenset(line.rpartition("|")[2].strip() for line in lines))


def run_lightly(*arguments: object, **where: Path) -> Outcome:
    """`run`, and assert that neither the libraries nor the time of a stage was spent, in the best of three tries."""
    for _ in range(TRIES):
        outcome = run(*arguments, **where)
        assert not HEAVY & {name.partition(".")[0] for name in outcome.imported}
        if outcome.cpu_seconds < LONGEST_CPU_SECONDS or outcome.cpu_seconds < run("-c", "import torch").cpu_seconds / 2:
            return outcome
    raise AssertionError(f"{arguments}: {outcome.cpu_seconds:.2f} CPU seconds, and no less in {TRIES} tries")


@pytest.mark.parametrize(("arguments", "usage"), INVOCATIONS, ids=[usage for _, usage in INVOCATIONS])
def test_help_reads_well_and_imports_nothing_heavy(arguments, usage):
    is_script = bool(arguments) and isinstance(arguments[0], Path)
    outcome = run_lightly(*(() if is_script else ("-m", "megatron_sppo")), *arguments, "--help")
    assert outcome.stdout.startswith(f"usage: {usage} ")
    assert "--help" in outcome.stdout
    assert "megatron_sppo.config" in outcome.imported


def test_a_plan_is_made_of_numbers_alone():
    outcome = run_lightly("-m", "megatron_sppo", "plan", "--model", "llama3-70b", "--tensor-model-parallel-size", "8")
    assert "70.554 billion weights" in outcome.stdout  # Meta: 70,553,706,496


def test_the_list_of_commands_has_a_line_for_each():
    lines = run("-m", "megatron_sppo", "--help").stdout.splitlines()
    for name, (_, summary) in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines), name


def test_versions_are_one_line_and_imported_from_nothing():
    outcome = run_lightly("-m", "megatron_sppo", "--version")
    (line,) = outcome.stdout.splitlines()
    names = [part.split()[0] for part in line.split(", ")]
    assert names == ["megatron-sppo", "Python", "torch", "megatron-core", "transformer-engine", "vllm", "transformers"]
    import torch

    assert f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})" in line
