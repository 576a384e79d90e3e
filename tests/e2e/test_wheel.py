"""Proves: with the wheel alone, from an empty directory, every command is there, so are the examples, and self-play
runs its stages. No file of the clone is opened, by any of the processes.

Left to `make demo` from a wheel: vLLM and a real model. The environment's other packages are the tests' own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.__main__ import COMMANDS
from tests.e2e.test_help import CONVERT, run, run_lightly
from tests.models import tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("megatron_sppo", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")
WITNESS = '''
"""Write down each file of {clone} that Python opens in any process of this environment."""

import sys

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith({clone!r}):
        if not arguments[0].startswith({own!r}):
            with open({log!r}, "a") as log:
                log.write(arguments[0] + chr(10))

sys.addaudithook(note)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, and install it without anything else -> its site directory."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        copy = shutil.copy if source.is_file() else shutil.copytree
        copy(source, root / "source" / name, **({} if source.is_file() else {"symlinks": True}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, root / "source"]
    subprocess.run(build, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", root / "site", wheel], check=True)
    shutil.rmtree(root / "source")
    # The environment may lie in the clone, and its link to the clone is read at every start of Python.
    own = str(Path(sys.prefix))
    witness = WITNESS.format(clone=str(REPOSITORY) + os.sep, own=own, log=str(root / "opened"))
    (root / "site" / "sitecustomize.py").write_text(witness)
    return root / "site"


@pytest.fixture
def empty(tmp_path: Path, installed: Path) -> Path:
    """An empty directory to work in; afterwards nothing of the clone has been opened."""
    directory = tmp_path / "empty"
    directory.mkdir()
    yield directory
    opened = installed.parent / "opened"
    assert not opened.exists(), opened.read_text()


def test_the_witness_sees_what_is_opened(installed: Path, tmp_path: Path) -> None:
    run("-c", f"open({str(REPOSITORY / 'setup.py')!r})", directory=tmp_path, path=installed)
    opened = installed.parent / "opened"
    assert opened.read_text().splitlines() == [str(REPOSITORY / "setup.py")]
    opened.unlink()


def test_the_installed_script_says_its_versions(installed: Path, empty: Path) -> None:
    outcome = run(installed / "bin" / "megatron-sppo", "--version", directory=empty, path=installed)
    assert outcome.stdout.startswith("megatron-sppo ")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"convert {name}" for name in CONVERT)])
def test_help_of_an_installed_command(command: str, installed: Path, empty: Path) -> None:
    outcome = run_lightly("-m", "megatron_sppo", *command.split(), "--help", directory=empty, path=installed)
    assert outcome.stdout.startswith(f"usage: megatron-sppo {command} ")


def test_the_packaged_files_are_the_clones(installed: Path) -> None:
    files = [
        path for path in (REPOSITORY / "examples").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 10
    for path in files:
        copy = installed / "megatron_sppo" / path.relative_to(REPOSITORY)
        assert copy.read_bytes() == path.read_bytes(), copy


def test_the_demos_model_is_built_by_the_package(installed: Path, empty: Path) -> None:
    outcome = run("-m", "megatron_sppo.examples.build_smollm2", "--help", directory=empty, path=installed)
    assert outcome.stdout.startswith("usage: build_smollm2.py ")


def test_a_round_of_self_play_on_the_packaged_config_and_prompts(installed: Path, empty: Path) -> None:
    """Everything but the sampler is real; evaluation, left out, is other work of the same commands."""
    sampler = empty / "sampler"
    for name in ("tests/e2e/fake_rollouts.py", "tests/unit/rollout/fake_sampler.py"):
        (sampler / name).parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / name, sampler / name)
    tiny_llama(empty / "model")
    given = {
        "--config": "examples/configs/smollm2_demo.yaml",
        "--prompts": "examples/data/instructions.jsonl",
        "--judge": "rules:concise",  # the sampler's bytes hold no instruction
        "--model": "model",
        "--output": "runs/demo",
        "--rollout-command": f"{sys.executable} {sampler / 'tests/e2e/fake_rollouts.py'}",
        "--iterations": 1,
        "--max-prompts-per-iteration": 8,
        "--max-tokens": 24,
        "--heldout-prompts": 0,
        "--inspected-prompts": 0,
    }
    outcome = subprocess.run(
        [sys.executable, "-m", "megatron_sppo", "self-play", *(str(part) for pair in given.items() for part in pair)],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{sampler}", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "examples/configs/smollm2_demo.yaml: taken from the installed package" in outcome.stderr
    (iteration,) = json.loads((empty / "runs/demo/summary.json").read_text())["iterations"]
    assert {"rollouts", "dataset", "train", "export"} <= set(iteration["seconds"])
    assert (empty / "runs/demo/iter_1/hf/model.safetensors").is_file()
    assert (empty / "runs/demo/report.html").is_file()
