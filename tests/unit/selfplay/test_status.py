"""Proves what `self-play --status` says of a run, from its files alone: of a stage that lives, one cut off, or none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.cluster.progress import StageProgress, progress_file
from megatron_sppo.commands import self_play
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import write_json
from megatron_sppo.selfplay.process import identity_of


def entry(status: str, *command: object, **more: Any) -> dict[str, Any]:
    common = {"inputs_sha256": "", "inputs": {}, "outputs": {}, "seconds": 1.0}
    return {"status": status, "command": [str(token) for token in command], **common, **more}


@pytest.fixture
def process() -> "Iterator[subprocess.Popen[bytes]]":
    """A stage's process, as `run_logged` starts it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def run_dir(tmp_path: Path, process: "subprocess.Popen[bytes]") -> Path:
    """A run in its first iteration's rollouts."""
    run_dir = tmp_path / "run"
    rollouts = run_dir / "iter_1/rollouts"
    stages = {
        "import": entry("done"),
        "iter_1-rollouts": entry("running", "x", "--output", rollouts, process=asdict(identity_of(process.pid))),
    }
    write_json(run_dir / "state.json", {"schema_version": 1, "finished": False, "stages": stages})
    progress = StageProgress(
        progress_file(rollouts), stage="rollouts", unit="prompts", total=80, done=20, amount_unit="tokens"
    )
    progress.add(20, 1000)
    progress.workers(3, 4)
    return run_dir


def change(run_dir: Path, name: str, **values: Any) -> None:
    state = json.loads((run_dir / "state.json").read_text())
    state["stages"].setdefault(name, {}).update(values)
    write_json(run_dir / "state.json", state)


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    self_play.main("self_play.py", ["--status", *map(str, argv)])
    return capsys.readouterr().out


def test_the_stage_under_way_is_shown_with_its_numbers(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = said(capsys, "--output", run_dir).splitlines()
    assert first.startswith(f"{run_dir}: 1 stages done, 0 iterations; iter_1-rollouts is under way")
    assert second.startswith("rollouts: 40 of 80 prompts, ") and "3 of 4 workers alive" in second
    found = json.loads(said(capsys, "--output", run_dir, "--json"))
    assert (found["stage"]["name"], found["stage"]["is_alive"]) == ("iter_1-rollouts", True)
    numbers = found["stage"]["progress"]
    assert {name: numbers[name] for name in ("done", "total", "workers_alive")} == {
        "done": 40,
        "total": 80,
        "workers_alive": 3,
    }


def test_the_run_is_found_by_its_yaml_file_and_by_its_whole_command(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_dir.with_name("run.yaml")
    file.write_text(f"run:\n  output: {run_dir}\n  model: m\n  prompts: p\nscoring: {{judge: rules:concise}}\n")
    assert "iter_1-rollouts is under way" in said(capsys, "--config", file)
    whole = ("--model", "m", "--prompts", "p", "--judge", "rules:concise", "--training", "lr=1e-6", "--output", run_dir)
    assert "iter_1-rollouts is under way" in said(capsys, *whole)


def test_training_is_shown_by_its_last_whole_line_of_metrics(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = run_dir / "iter_1/checkpoint"
    save.mkdir(parents=True)
    (save / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 9}\n{"step": 7, "loss": 0.25, "lr": 5e-7}\n{"step": 8, "lo'
    )
    change(run_dir, "iter_1-rollouts", status="done")
    change(run_dir, "iter_1-train", **entry("running", "x", "--save", save))
    assert "step 7, loss 0.25, lr 5e-07" in said(capsys, "--output", run_dir)


def test_a_run_that_was_moved_shows_the_same(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run_dir, "iter_1-rollouts", writes=["iter_1/rollouts"], command=["x", "--output", "run/iter_1/rollouts"])
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert "rollouts: 40 of 80 prompts" in said(capsys, "--output", moved)


def test_iterations_are_counted_while_a_finished_run_is_extended(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = json.loads((run_dir / "state.json").read_text())
    write_json(run_dir / "state.json", state | {"iterations_done": 2, "summed_up": 3})
    assert "3 iterations; iter_1-rollouts is under way" in said(capsys, "--output", run_dir)


def test_status_in_the_yaml_file_starts_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir.with_name("run.yaml")
    file.write_text(
        f"run: {{output: {run_dir}, model: m, prompts: p}}\nscoring: {{judge: rules:concise}}\n"
        "training: {lr: 1e-6}\nstatus: true\n"
    )
    self_play.main("self_play.py", ["--config", str(file)])
    assert "iter_1-rollouts is under way" in capsys.readouterr().out


def test_a_stage_whose_process_is_gone_is_said_to_be_cut_off(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    change(run_dir, "iter_1-rollouts", process=asdict(identity_of(process.pid)))
    assert "is under way" in said(capsys, "--output", run_dir)
    process.kill()
    process.wait()
    assert "iter_1-rollouts was cut off: the same self-play command goes on" in said(capsys, "--output", run_dir)
    elsewhere = {**asdict(identity_of(os.getpid())), "namespace": "another machine"}
    change(run_dir, "iter_1-rollouts", process=elsewhere)
    assert json.loads(said(capsys, "--output", run_dir, "--json"))["stage"]["is_alive"] is None


@pytest.mark.parametrize(
    ("status", "words"), [("done", "no stage is under way"), ("failed", "iter_1-rollouts was stopped")]
)
def test_a_run_without_a_stage_under_way_says_so(
    run_dir: Path, capsys: pytest.CaptureFixture[str], status: str, words: str
) -> None:
    change(run_dir, "iter_1-rollouts", status=status)
    assert words in said(capsys, "--output", run_dir)


def test_where_no_run_is_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run was begun there"):
        self_play.main("self_play.py", ["--status", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="--output is missing|output"):
        self_play.main("self_play.py", ["--status"])


@pytest.mark.parametrize(
    "harm",
    [
        *({name: wrong} for name in ("command", "writes") for wrong in (None, 5, "--output x", ["--output", 5])),
        *({"process": wrong} for wrong in ("x", {"pid": 1}, {"pid": "1", "start_time": "", "namespace": ""})),
    ],
)
def test_a_damaged_state_is_named(run_dir: Path, harm: dict[str, Any]) -> None:
    change(run_dir, "iter_1-rollouts", **harm)
    with pytest.raises(DataError, match="state.json is no state of version 1"):
        self_play.main("self_play.py", ["--status", "--output", str(run_dir)])
