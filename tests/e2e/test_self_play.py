"""Proves: the whole loop, every stage its real command, on a tiny random Llama with a sampler that needs no model.

It runs, says so when it is finished, and after kill -9 in any stage the same command ends with the same files.
Loops and their stages are forked from a process that has imported what they need (forked.py), but where they fail or
meet what only a start can bring; test_self_play_bytes and test_wheel start them all. Not proved here: vLLM (other tests
of e2e), or that anything is learnt: the sampler does not read the weights.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import run_here
from tests.e2e.forked import Forked
from tests.models import tiny_llama
from tests.reliability.disturbances import ENDINGS, live
from tests.reliability.tally import Tally

ROOT = Path(__file__).resolve().parents[2]
STAGES_OF_AN_ITERATION = ("rollouts", "dataset", "train", "inspect", "export", "eval-rollouts", "eval")

CONFIG = f"""
run:
  iterations: 2
  seed: 3
  rollout_command: {sys.executable} {ROOT / "tests" / "e2e" / "fake_rollouts.py"}
rollout: {{num_responses: 3, max_tokens: 24, rollout_options: {{shard_size: 4}}}}
scoring: {{judge: rules:concise}}
evaluation: {{eval_num_responses: 2, inspected_prompts: 2}}
training:
  objective: sppo
  eta: 10
  params_dtype: float32
  optimization: {{optimizer: adam, lr: 1.0e-3, lr_warmup_fraction: 0.1}}
  micro_batch_size: 3
  global_batch_size: 6
  seq_length: 256
  save_interval: 2
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write model, prompts and config -> their directory."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), CONFIG)


def write_inputs(directory: Path, config: str) -> Path:
    tiny_llama(directory / "model")
    rows = [{"prompt_id": f"t{n}", "prompt": f"What is the number {n}?", "split": "train"} for n in range(16)]
    rows += [{"prompt_id": f"h{n}", "prompt": f"Is {n} held out?", "split": "heldout"} for n in range(5)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.yaml").write_text(config)
    return directory


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the loop once without disturbance -> (run directory, what it printed)."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    outcome = self_play(inputs, run_dir)
    assert outcome.returncode == 0, outcome.stderr
    return run_dir, outcome.stdout


# Every run is started beside its directory and names it relatively: files that hold paths can be equal then.


def command(inputs: Path, run_dir: Path, *flags: str) -> list[str]:
    fixed = ["--config", inputs / "run.yaml", "--model", inputs / "model", "--prompts", inputs / "prompts.jsonl"]
    return [sys.executable, str(ROOT / "tools" / "self_play.py"), *map(str, fixed), "--output", run_dir.name, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def refusal(inputs: Path, run_dir: Path, *flags: str) -> str:
    """Run the command in this process, which it must refuse -> its last line on stderr."""
    script, *arguments = command(inputs, run_dir, *flags)[1:]
    done = run_here(script, *arguments, directory=run_dir.parent)
    assert done.returncode == 2, done.stderr
    assert last_line(done).startswith("self_play.py: error: ")
    return last_line(done)


def self_play(inputs: Path, run_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the loop, forked as its stages are -> its exit code and what it said."""
    words = command(inputs, run_dir, *flags)
    loop = Forked(Path(words[1]), words[2:], environment(), directory=run_dir.parent)
    out, err = loop.communicate(timeout=500)
    return subprocess.CompletedProcess(words, loop.wait(), out, err)


def begin(words: list[str], *, said: Path, environment: Mapping[str, str], directory: Path) -> Forked:
    """Fork what `command` gives, its words on stderr into a file -> the loop under way."""
    return Forked(Path(words[1]), words[2:], environment, directory=directory, stderr=said)


def started_anew(inputs: Path, run_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the loop as a user starts it -> its exit code and what it said."""
    return subprocess.run(
        command(inputs, run_dir, *flags),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=run_dir.parent,
        timeout=500,
        check=False,
    )


def last_line(outcome: subprocess.CompletedProcess) -> str:
    return outcome.stderr.strip().splitlines()[-1]


def test_every_file_of_the_contract_is_there(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    for iteration in ("iter_1", "iter_2"):
        assert (run_dir / iteration / "rollouts" / "manifest.json").is_file()
        assert (run_dir / iteration / "dataset" / "win_rates.bin").is_file()
        assert (run_dir / iteration / "checkpoint" / "latest_checkpointed_iteration.txt").is_file()
        assert (run_dir / iteration / "hf" / "config.json").is_file()
        assert (run_dir / iteration / "eval" / "result.json").is_file()
        assert len((run_dir / iteration / "token_log_ratios.jsonl").read_text().splitlines()) == 2 * 3
        assert (run_dir / "logs" / f"{iteration}-train.log").is_file()
    for name in ("summary.json", "state.json", "metrics.jsonl", "report.html"):
        assert (run_dir / name).is_file()
    assert list((run_dir / "tensorboard").glob("events.*"))


def test_the_summary_has_both_iterations_in_the_documented_form(finished: tuple[Path, str]) -> None:
    iterations = json.loads((finished[0] / "summary.json").read_text())["iterations"]
    assert [entry["iteration"] for entry in iterations] == [1, 2]
    for entry in iterations:
        assert entry["judge"] == "rules:concise"
        for opponent in ("base", "previous"):
            rate = entry[f"win_rate_vs_{opponent}"]
            assert rate["num_prompts"] == 5 and 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert tuple(entry["seconds"]) == STAGES_OF_AN_ITERATION
        assert 1 <= entry["mean_response_tokens"] <= 24


def test_metrics_hold_every_step_of_both_iterations(finished: tuple[Path, str]) -> None:
    """8 prompts x 3 answers / 6 = 4 steps an iteration; each starts with no drift from its own reference."""
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["step"]) for row in rows] == [(i, s) for i in (1, 2) for s in (1, 2, 3, 4)]
    assert all(row["sppo/ref_drift_step0"] < 1e-6 for row in rows if row["step"] == 1)


def test_iterations_train_on_disjoint_prompts_and_each_moves_the_weights(
    finished: tuple[Path, str], inputs: Path
) -> None:
    run_dir, _ = finished
    parts = [
        {json.loads(line)["prompt_id"] for line in (run_dir / f"iter_{t}" / "dataset" / "prompts.jsonl").open()}
        for t in (1, 2)
    ]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {f"t{n}" for n in range(16)}
    directories = (inputs / "model", run_dir / "iter_1" / "hf", run_dir / "iter_2" / "hf")
    weights = [load_file(directory / "model.safetensors") for directory in directories]
    for before, after in ((0, 1), (1, 2)):
        assert weights[before].keys() == weights[after].keys()
        assert any(not weights[before][name].equal(weights[after][name]) for name in weights[before])


def test_the_table_and_the_report_are_named_on_stdout(finished: tuple[Path, str]) -> None:
    printed = finished[1]
    lines = printed.splitlines()
    assert lines[0].startswith("iteration") and lines[2].startswith("1 ") and lines[3].startswith("2 ")
    assert lines[-1] == "report: run/report.html"


def test_a_finished_run_says_so_at_once(finished: tuple[Path, str], inputs: Path) -> None:
    run_dir, printed = finished
    before = fingerprints(run_dir)
    outcome = self_play(inputs, run_dir)
    assert outcome.returncode == 0 and "is finished: nothing is left to do" in outcome.stderr
    assert outcome.stdout == printed
    assert fingerprints(run_dir) == before


def test_keep_last_removes_older_weights_and_the_run_stays_finished_and_can_be_reported(
    finished: tuple[Path, str], inputs: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    metrics, page = ((run_dir / name).read_bytes() for name in ("metrics.jsonl", "report.html"))
    for _ in range(2):
        outcome = self_play(inputs, run_dir, "--keep-last", "1")
        assert outcome.returncode == 0 and "is finished: nothing is left to do" in outcome.stderr
    assert not (run_dir / "iter_1" / "hf").exists()
    assert not list((run_dir / "iter_1").rglob("*.distcp"))
    assert (run_dir / "iter_1" / "checkpoint" / "responses.jsonl").is_file()
    for kept in ("base", "iter_2/checkpoint"):
        assert list((run_dir / kept).glob("iter_*/*.distcp"))
    assert (run_dir / "iter_2" / "hf" / "model.safetensors").is_file()
    (run_dir / "report.html").unlink()
    outcome = self_play(inputs, run_dir)
    assert outcome.returncode == 0, outcome.stderr
    done_again = [line for line in outcome.stderr.splitlines() if "done in" in line]
    assert len(done_again) == 1 and "report: done in" in done_again[0]
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert (run_dir / "report.html").read_bytes() == page


def test_what_a_finished_run_has_lost_is_made_again(finished: tuple[Path, str], inputs: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(run_dir / "iter_2" / "hf")
    (run_dir / "iter_1" / "eval" / "result.json").write_text("{}")
    outcome = self_play(inputs, run_dir)
    assert outcome.returncode == 0, outcome.stderr
    assert [line.split()[2] for line in outcome.stderr.splitlines() if "done in" in line] == [
        "iter_1-eval:",
        "report:",
        "iter_2-export:",
        "report:",
    ]
    for name in ("iter_2/hf/model.safetensors", "iter_1/eval/result.json"):
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_judge_that_was_never_asked_is_corrected_and_one_that_changes_is_told(inputs: Path, tmp_path: Path) -> None:
    run_dir, flags = tmp_path / "run", ("--iterations", "1", "--heldout-prompts", "0")
    outcome = self_play(inputs, run_dir, *flags, "--judge", "reward:nobody/nothing")
    assert outcome.returncode == 2 and "iter_1-dataset failed" in last_line(outcome)
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def score(answer, messages, columns):\n    return 1 / (1 + len(answer))\n")
    flags = (*flags, "--judge", f"python:{scorer}:score")
    outcome = self_play(inputs, run_dir, *flags, "--training", "lr=1e-4")
    assert outcome.returncode == 0, outcome.stderr
    assert "iter_1-rollouts: done before" in outcome.stderr and "other content" not in outcome.stderr
    (run_dir / "report.html").unlink()
    scorer.write_text("def score(answer, messages, columns):\n    return len(answer) / 1000\n")
    outcome = self_play(inputs, run_dir, *flags, "--training", "lr=1e-4")
    assert f"WARNING {scorer} has other content than when the run was begun" in outcome.stderr
    assert "training.lr is 0.001" in refusal(inputs, run_dir, *flags, "--training", "lr=1e-3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "rules:cyclic"), "scoring.judge is rules:cyclic"),
        (("--iterations", "3"), "run.iterations is 3"),
        (("--lr", "1"), "unknown flag --lr"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    finished: tuple[Path, str], inputs: Path, flags: tuple, message: str
) -> None:
    assert message in refusal(inputs, finished[0], *flags)


def test_other_prompts_under_the_same_name_are_refused(
    finished: tuple[Path, str], inputs: Path, tmp_path: Path
) -> None:
    other = tmp_path / "prompts.jsonl"
    other.write_text((inputs / "prompts.jsonl").read_text() + '{"prompt": "One more?"}\n')
    assert "has other content than when" in refusal(inputs, finished[0], "--prompts", str(other))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nowhere"), "nowhere holds no config.json"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--training", "lr=0"), "lr is 0"),
        (("--training", "lr=1e-5", "learning_rate=1"), "unknown key 'learning_rate'"),
        (("--judge", "rules:nice"), "rules:nice is unknown"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(inputs: Path, tmp_path: Path, flags: tuple, message: str) -> None:
    assert message in refusal(inputs, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_failing_stage_s_own_words_are_passed_on(inputs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    (model / "model.safetensors").write_bytes(b"no tensors")
    outcome = started_anew(inputs, tmp_path / "run", "--model", str(model))
    assert outcome.returncode == 2
    assert last_line(outcome).startswith(
        "self_play.py: error: import failed (exit code 2): megatron-sppo convert: error: "
    )
    assert "run/logs/import.log" in last_line(outcome)


def fingerprints(run_dir: Path) -> dict[str, str]:
    """Hash what a run must end with whatever happened on the way -> {relative name: sha256}."""
    patterns = ("iter_*/rollouts/*.json*", "iter_*/dataset/*", "iter_*/hf/*", "iter_*/eval/result.json", "prompts/*")
    files = [file for pattern in (*patterns, "base_eval/rollouts/*.json*") for file in run_dir.glob(pattern)]
    return {
        str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_loop_disturbed_in_every_stage_ends_with_the_same_files(
    finished: tuple[Path, str], inputs: Path, tmp_path: Path, tally: Tally
) -> None:
    """The loop is killed or stopped once in each kind of stage, or the stage is, on one run, and goes on each time.

    Then it meets a full disk and a clock that jumps. Without --soak every second one of these befalls it.

    What may differ is what tells time: seconds in state.json, summary.json and what is made of them, speeds in
    metrics.jsonl, zip containers of checkpoints. Weights, rollouts, datasets and results may not.
    """
    run_dir = tmp_path / "run"
    of_iterations = [*(f"iter_1-{stage}" for stage in STAGES_OF_AN_ITERATION), "iter_2-rollouts", "iter_2-train"]
    dice = random.Random(0)
    disturbances = itertools.cycle(("kill -9", "SIGTERM", "dead stage", "SIGINT", "SIGHUP"))
    stages = ["import", "base-eval-rollouts", *of_iterations, "report"]
    lives = [*zip(stages, disturbances), (None, "disk full"), (None, "jumping clock")]  # noqa: B905
    few = len(lives) // 2
    for name, disturbance in lives[:: len(lives) // len(tally.cases("signals", few, 2 * few))]:
        with tally.case("signals" if name else "loop", f"self-play: {disturbance} in {name}"):
            code, said = live(
                command(inputs, run_dir),
                run_dir,
                disturbance,
                dice,
                environment=environment(),
                seconds=0,
                operations=9,
                stage=name,
                begin=begin,
            )
            # The last stage may end before the signal is there; no clock stops a run.
            expected = (*ENDINGS[disturbance], *((0,) if name == stages[-1] or disturbance == "jumping clock" else ()))
            assert code in expected, f"{disturbance} in {name}: exit code {code}, {said}"
    outcome = self_play(inputs, run_dir)
    assert outcome.returncode == 0, outcome.stderr
    ours, undisturbed = fingerprints(run_dir), fingerprints(finished[0])
    assert ours.keys() == undisturbed.keys()
    assert [name for name in ours if ours[name] != undisturbed[name]] == []
