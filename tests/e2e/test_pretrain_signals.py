"""examples/pretrain_sppo.py as a process that is killed and stopped: what it leaves resumes to the same numbers.

kill -9 at random moments, saves included, and SIGTERM. One process on the tiny Llama; layouts are in tests/distributed.
The one that gets SIGTERM up to its end is started as a user starts it, the others are forked (forked.py).
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.e2e.forked import SCRIPT, Training, open_files
from tests.models import tiny_llama
from tests.reliability.tally import Tally

STEPS = 24
FLAGS = (
    f"--params-dtype float32 --lr 1e-4 --eta 10 --global-batch-size 8 --micro-batch-size 2 --num-epochs {STEPS // 4} "
    "--save-interval 2 --no-tensorboard"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signals")
    import_checkpoint(tiny_llama(root / "hf"), root / "megatron")
    write_dataset(root / "data", root / "hf")
    assert train(root, root / "whole").wait() == 0
    return root


def train(root: Path, save: Path, *flags: str, **environment: str) -> Training:
    return Training([*places(root, save), *FLAGS, *flags], environment)


def places(root: Path, save: Path) -> list[str]:
    return ["--load", str(root / "megatron"), "--data", str(root / "data"), "--save", str(save)]


def numbers(save: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def wait_for_step(save: Path, process: subprocess.Popen | Training, step: int) -> None:
    while process.poll() is None:
        if (save / "metrics.jsonl").exists() and len((save / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)


def test_a_run_killed_at_random_moments_ends_with_the_numbers_of_an_undisturbed_one(world: Path, tally: Tally) -> None:
    """Each life is killed a few steps after it began, at a random point of a step or of a save."""
    for number in tally.cases("kills", 1, 8):
        save, dice = world / f"killed-{number}", random.Random(5 + number)
        with tally.together("kills") as kills:
            for life in range(20):
                process = train(world, save)
                done = len(numbers(save)) if (save / "metrics.jsonl").exists() else 0
                wait_for_step(save, process, min(STEPS, done + dice.randint(3, 7)))
                time.sleep(dice.random() * 0.2)
                process.kill()
                if process.wait() == 0:
                    break
                kills.append(f"training, run {number}, life {life}")
            assert len(kills) >= 3
            assert train(world, save).wait() == 0
            assert numbers(save) == numbers(world / "whole")
            assert not list(save.glob(".iter_*"))
            assert open_files(save) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP], ids=["int", "hup"])
def test_a_run_that_is_interrupted_or_hung_up_leaves_what_the_same_command_goes_on_from(
    world: Path, tally: Tally, signum: int
) -> None:
    """SIGINT is one line and exit code 130; a terminal that goes ends the process by SIGHUP."""
    for number in tally.cases("signals", 1, 10):
        save, dice = world / f"signal-{signum}-{number}", random.Random(number)
        with tally.case("signals", f"training: {signal.Signals(signum).name}, run {number}"):
            process = train(world, save)
            wait_for_step(save, process, dice.randint(1, 9))
            time.sleep(dice.random() * 0.2)
            process.send_signal(signum)
            said = process.communicate(timeout=120)[1].splitlines()
            assert process.wait() == (130 if signum == signal.SIGINT else -signum), said[-5:]
            if signum == signal.SIGINT:
                assert said[-1] == "pretrain_sppo.py: interrupted"
            assert open_files(save) == []
            assert train(world, save).wait() == 0
            assert numbers(save) == numbers(world / "whole")
            assert not list(save.glob(".iter_*"))


def test_sigterm_saves_and_exits_with_143_and_the_same_command_goes_on(world: Path) -> None:
    save = world / "stopped"
    process = train(world, save)
    wait_for_step(save, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    stopped_at = len(numbers(save))
    assert 3 <= stopped_at < STEPS
    assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{stopped_at}\n"
    assert train(world, save).wait() == 0
    assert numbers(save) == numbers(world / "whole")


def test_a_second_sigterm_changes_nothing_and_trackers_hear_of_each_step_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals every process of a job, and torchrun, which has it too, hands it on: ranks hear it twice, at any
    moment up to their end."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader here: the run sees to itself
    save, trackers = world / "stopped-twice", ("--tracker", "mlflow", "--tracker-offline")
    command = [sys.executable, str(SCRIPT), *places(world, save), *FLAGS, *trackers]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    wait_for_step(save, process, 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    for line in process.stderr:
        if "stopped by a signal after step" in line:
            break
    while process.poll() is None:  # until it is gone
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.wait() == 143
    stopped_at = len(numbers(save))
    assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{stopped_at}\n"
    client = mlflow.MlflowClient(tracking_uri=(save / "trackers" / "mlruns").as_uri())
    run_id = json.loads((save / "trackers.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "KILLED"
    assert train(world, save, *trackers).wait() == 0
    assert numbers(save) == numbers(world / "whole")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["optimization.lr"] == "0.0001"
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")]
    assert losses == [(number, line["loss"]) for number, line in enumerate(numbers(save), start=1)]


def test_a_tracker_that_cannot_be_started_is_refused_before_anything_is_computed(world: Path) -> None:
    save = world / "untracked"
    address = {"MLFLOW_TRACKING_URI": "http://me:hidden-word@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    process = train(world, save, "--tracker", "mlflow", **address)
    said = process.communicate()[1]
    assert process.wait() == 2 and "hidden-word" not in said
    assert "error: tracker mlflow cannot be started: " in said.splitlines()[-1]
    assert not (save / "metrics.jsonl").exists()


def test_a_second_run_on_the_same_save_is_refused_and_the_first_is_untouched(world: Path) -> None:
    save = world / "shared"
    first = train(world, save)
    wait_for_step(save, first, 2)
    first.send_signal(signal.SIGSTOP)
    second = train(world, save)
    last_line = second.communicate(timeout=120)[1].splitlines()[-1]
    first.send_signal(signal.SIGCONT)
    assert second.wait() == 2
    assert f"{save} is in use by process {first.pid} on " in last_line and "--save" in last_line
    assert first.wait(timeout=120) == 0
    assert numbers(save) == numbers(world / "whole")


def test_a_save_directory_that_holds_something_else_is_left_alone(world: Path) -> None:
    (world / "notes").mkdir()
    (world / "notes" / "diary.txt").write_text("dear")
    process = train(world, world / "notes")
    last_line = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.wait() == 2 and "holds diary.txt, which this command did not write" in last_line
    assert [path.name for path in (world / "notes").iterdir()] == ["diary.txt"]
