"""Proves: what can be typed behind `megatron-sppo` is what there is, and what cannot is refused in one line.

What each command does with its flags, and what --help costs, is proved of processes (tests/e2e).
"""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo import __main__ as door
from megatron_sppo import storage

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_module_of_commands_is_a_command() -> None:
    modules = {path.stem for path in (REPOSITORY / "megatron_sppo/commands").glob("[!_]*.py")}
    assert modules == {module for module, _ in door.COMMANDS.values()}
    for name in modules:
        parameters = inspect.signature(importlib.import_module(f"megatron_sppo.commands.{name}").main).parameters
        assert list(parameters) == ["name", "argv"]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("tools/*.py")), ids=lambda path: path.name)
def test_a_tool_can_be_loaded_as_a_module(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert path.name == module.NAME and callable(module.main)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["scor"], "megatron-sppo: error: no command 'scor'. Did you mean score? Use one of: megatron-sppo self-play,"),
        ([], "megatron-sppo: error: a command is missing. Use one of: megatron-sppo self-play,"),
        (["convert"], "megatron-sppo convert: error: a command is missing. Use one of: megatron-sppo convert import,"),
        (["--nothing"], "megatron-sppo: error: no command '--nothing'. Use one of:"),
        (["convert", "imprt"], "megatron-sppo convert: error: no command 'imprt'. Did you mean import? Use one of:"),
        (["convert", "import"], "megatron-sppo convert: error: --megatron is missing."),
        (["report", "--runs", "x"], "megatron-sppo report: error: unknown flag --runs. Did you mean --run?"),
        (
            ["train", "--config", "examples/configs/nothing.yaml"],
            "megatron-sppo train: error: examples/configs/nothing",
        ),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-sppo", *arguments])
    with pytest.raises(SystemExit) as left:
        door.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(line)


def test_examples_are_the_users_own_before_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path("examples/configs/smollm2_demo.yaml")
    packaged = storage.own_or_packaged(config)
    assert packaged.is_absolute() and packaged.read_bytes() == (REPOSITORY / config).read_bytes()
    for foreign in (
        Path("smollm2_demo.yaml"),
        Path("examples/configs/none.yaml"),
        Path("/examples/data/prompts.jsonl"),
    ):
        assert storage.own_or_packaged(foreign) == foreign
    config.parent.mkdir(parents=True)
    config.write_text("lr: 1")
    assert storage.own_or_packaged(config) == config


def test_a_missing_file_is_answered_with_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = storage.packaged_examples("configs/*.yaml").split(", ")
    assert names == sorted(names) and "examples/configs/smollm2_demo.yaml" in names
    assert all((REPOSITORY / name).is_file() for name in names)


@pytest.mark.parametrize("arguments", [["--debug"], ["--debug", "--debug"], ["convert", "--debug"]])
def test_debug_alone_is_a_missing_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-sppo", *arguments])
    with pytest.raises(SystemExit) as left:
        door.main()
    assert left.value.code == 2
    assert "error: a command is missing. Use one of:" in capsys.readouterr().err.splitlines()[-1]


def test_modules_of_the_current_directory_stand_in_for_none(tmp_path: Path) -> None:
    """As self-play starts its stages, from wherever its user is."""
    for name in ("queue", "tyro", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the current directory')\n")
    command = [sys.executable, "-m", "megatron_sppo", "report", "--run", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("megatron-sppo report: error: nowhere")
