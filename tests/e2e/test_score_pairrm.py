"""tools/score_pairrm.py as a user runs it: exit codes, resuming, rebuilding targets.

PairRM is the tiny random one, so nothing here says what the published weights prefer.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.judge import workers
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.judge.score import score
from megatron_sppo.report.page import write_report
from tests.commands import run_here
from tests.e2e import forked
from tests.models import byte_tokenizer
from tests.reliability.tally import Tally
from tests.unit.judge.rollout_files import encoded, random_rollouts, raw_row, write_raw_rollouts
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm
from tests.unit.selfplay.synthetic import write_run

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "score_pairrm.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
TIMEOUT_SECONDS = 240


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tool(*arguments: object) -> int:
    """Run the tool in this process, for what needs none of its own -> exit code; what it says is said here."""
    done = run_here("tools/score_pairrm.py", *arguments)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_rollouts(tmp_path_factory.mktemp("rollouts") / "r", num_prompts=48, num_responses=4, rows_per_shard=2)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pairrm(tmp_path_factory.mktemp("pairrm"))[0]


NUM_KILLS = 20
EVENTS = ("fsync", "replace", "rename", "rmdir")
"""Calls of `os` at which a run is killed, besides the judge's own."""


def run_main(arguments: dict, events_file: Path, last_event: int | None) -> None:
    """The stage: killed at event `last_event`, or leaves the number of its events in a file."""
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: who is killed with it would stop the others for good
    events = itertools.count(1)

    def counted(function):
        def call(*positional, **named):
            number = next(events)
            if number == last_event:
                os.kill(os.getpid(), signal.SIGKILL)
            if last_event is None:
                events_file.write_text(str(number))
            return function(*positional, **named)

        return call

    for name in EVENTS:
        setattr(os, name, counted(getattr(os, name)))
    load = workers.load_judge

    def load_judge(*positional, **named):
        judge = load(*positional, **named)
        judge.judge_logits = counted(judge.judge_logits)
        return judge

    workers.load_judge = load_judge
    score(ScoreConfig(**arguments))


def run_forked(arguments: dict, events_file: Path, last_event: int | None = None) -> int:
    """Run the stage in a forked process -> its exit code."""
    process = multiprocessing.get_context("fork").Process(target=run_main, args=(arguments, events_file, last_event))
    process.start()
    process.join()
    return process.exitcode


def test_killed_at_random_points_of_judging_merging_and_publishing_the_bytes_are_the_same(
    tmp_path: Path, tally: Tally
) -> None:
    """Every file of the directory, manifest and diagnostics too. A last run of the same command always completes."""
    rollouts = random_rollouts(tmp_path / "rollouts", num_prompts=12, num_responses=3, rows_per_shard=2)
    arguments = {"rollouts": rollouts, "judge": "rules:cyclic", "selection": "extremes"}
    events_file = tmp_path / "events"
    assert run_forked({**arguments, "output": tmp_path / "undisturbed"}, events_file) == 0
    num_events = int(events_file.read_text())
    assert num_events > 40, "six shards, five atomic files, one directory and a manifest"
    rng = random.Random(1)
    for number in tally.cases("kills", NUM_KILLS, NUM_KILLS):
        output, last_event = tmp_path / f"killed-{number}", rng.randint(1, num_events)
        with tally.case("kills", f"score at event {last_event}"):
            assert run_forked({**arguments, "output": output}, events_file, last_event) == -signal.SIGKILL
            if (output / "manifest.json").is_file():
                PreferenceDataset(output)  # what is there is whole
            assert run_forked({**arguments, "output": output}, events_file) == 0
            assert contents(output) == contents(tmp_path / "undisturbed"), f"killed at {last_event}"
        shutil.rmtree(output)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"rollouts", "undisturbed", "events"}, "something was left behind"


def test_under_torchrun_the_command_is_refused_with_the_one_that_shares_the_work(
    rollouts: Path, tmp_path: Path
) -> None:
    arguments = ["--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        env=ENVIRONMENT | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
    )  # fmt: skip
    assert done.returncode == 2 and "--workers 4" in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "d").exists()


def test_the_same_command_again_says_that_it_is_complete(
    rollouts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d"]
    assert tool(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    with caplog.at_level("INFO", logger="megatron_sppo"):
        assert tool(*arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    assert tool(*arguments, "--selection", "extremes") == 0
    assert PreferenceDataset(tmp_path / "d").manifest.selection == "extremes"


def test_rebuilt_targets_are_those_of_scoring_under_the_other_preset(rollouts: Path, tmp_path: Path) -> None:
    judged = ["--rollouts", rollouts, "--judge", "rules:cyclic"]
    assert tool(*judged, "--output", tmp_path / "paper") == 0
    official = ["--preset", "official", "--selection", "top-bottom:2"]
    assert tool(*judged, *official, "--output", tmp_path / "scored") == 0
    assert tool("--from-dataset", tmp_path / "paper", *official, "--output", tmp_path / "rebuilt") == 0
    scored, rebuilt = (PreferenceDataset(tmp_path / name) for name in ("scored", "rebuilt"))
    assert scored.dataset_hash == rebuilt.dataset_hash != PreferenceDataset(tmp_path / "paper").dataset_hash
    assert contents(tmp_path / "scored") == contents(tmp_path / "rebuilt")


def test_json_reports_what_was_judged_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [encoded(raw_row("a")), b"{", encoded(raw_row("b")), encoded(raw_row("c", responses=[]))]
    rollouts = write_raw_rollouts(tmp_path / "r", [rows], num_responses=2)
    assert tool("--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_prompts"], report["num_quarantined"], report["pairs"]) == (2, 2, 4)
    assert json.loads((tmp_path / "d" / "diagnostics.json").read_text())["cycle_rate"] is None
    reasons = PreferenceDataset(tmp_path / "d").manifest.quarantined
    assert [row["prompt_id"] for row in reasons] == ["shard-00000.jsonl:2", "c"]


def test_pairrm_writes_the_same_dataset_through_the_command_line_and_the_official_preset_needs_its_text(
    rollouts: Path, pairrm: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--judge", f"pairrm:{pairrm}", "--preset", "official", "--output", tmp_path / "d"]
    assert tool("--rollouts", rollouts, *arguments) == 0
    assert PreferenceDataset(tmp_path / "d").manifest.preset == "official"
    bare = write_raw_rollouts(tmp_path / "r", [[encoded(raw_row("a"))]], num_responses=2)
    shutil.rmtree(tmp_path / "d")
    assert tool("--rollouts", bare, *arguments) == 2
    assert "--preset paper" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "d").exists()


def test_one_order_reports_how_often_it_names_the_winner_of_both(
    pairrm: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first prompt is asked in both orders: its pairs are the sample."""
    rollouts = random_rollouts(tmp_path / "r", num_prompts=2, num_responses=4, rows_per_shard=2)
    arguments = ["--rollouts", rollouts, "--judge", f"pairrm:{pairrm}"]
    assert tool(*arguments, "--output", tmp_path / "both") == 0
    assert "one order" not in capsys.readouterr().out
    assert tool(*arguments, "--output", tmp_path / "one", "--one-order") == 0
    both = PreferenceDataset(tmp_path / "both").judge_logits(0)
    agreed = np.mean(
        [np.sign(both[i, j]) == np.sign(both[i, j] - both[j, i]) for i in range(4) for j in range(i + 1, 4)]
    )
    assert json.loads((tmp_path / "one" / "diagnostics.json").read_text())["one_order_agreement"] == pytest.approx(
        agreed
    )
    assert f"one order names the winner of both in {100 * agreed:.1f} %" in capsys.readouterr().out


def test_the_report_shows_how_a_judge_goes_in_circles_and_what_to_do_about_it(rollouts: Path, tmp_path: Path) -> None:
    """rules:cyclic has no best response, rules:concise scores each: the same rollouts tell them apart in one report."""
    run_dir = write_run(tmp_path / "run")
    rates = {}
    for iteration, judge in ((1, "rules:cyclic"), (2, "rules:concise")):
        output = tmp_path / f"iter_{iteration}"
        assert tool("--rollouts", rollouts, "--judge", judge, "--output", output) == 0
        shutil.copy(output / "diagnostics.json", run_dir / f"iter_{iteration}" / "dataset" / "diagnostics.json")
        rates[judge] = json.loads((output / "diagnostics.json").read_text())["cycle_rate"]
    assert rates["rules:cyclic"] > 0.1 and rates["rules:concise"] == 0
    page = re.sub("</?span>", "", write_report(run_dir).read_text())
    row = page.split("beat each other in a circle</td>")[1].split("</tr>")[0]
    cells = [cell.split(">", 1)[1].split("</td>")[0] for cell in row.split("<td")[1:]]
    assert cells[:2] == [f"{rates['rules:cyclic']:.4f} (!)", "0.0000"] and "--preset paper" in cells[2]
    assert "How the judge judges" in page


def test_imported_preferences_become_a_dataset_without_a_judge(tmp_path: Path) -> None:
    """uclaml's probabilities come out as they went in; the win rate of a response is the mean of its row."""
    byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 259}')
    probability = [[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]
    row = {"prompt": "why?", "generate_0": "a", "generate_1": "b", "generate_2": "c", "probability": probability}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given = ["--rows", tmp_path / "rows.jsonl", "--model", tmp_path / "model", "--output", tmp_path / "r", "--json"]
    imported = forked.run_forked(REPOSITORY / "tools" / "import_preferences.py", given)
    assert imported.returncode == 0, imported.stderr
    judge = json.loads(imported.stdout)["judge"]
    assert tool("--rollouts", tmp_path / "r", "--judge", judge, "--output", tmp_path / "d") == 0
    dataset = PreferenceDataset(tmp_path / "d")
    np.testing.assert_allclose(dataset.preferences(0), probability, atol=1e-6)
    np.testing.assert_allclose(dataset.win_rates(0), np.mean(probability, axis=1), atol=1e-6)
    assert dataset.response(0, 1).tolist()[-1] == 2, "the end of the turn"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--judge", "rules:concise"], "--rollouts is missing"),
        (["--rollouts", "R"], "--judge is missing"),
        (["--rollouts", "nowhere", "--judge", "rules:concise"], "nowhere"),
        (["--rollouts", "R", "--judge", "rules:fair"], "rules:concise"),
        (["--rollouts", "R", "--judge", "pairrm:./nowhere"], "not a directory"),
        (["--rollouts", "R", "--judge", "endpoint:nowhere"], "endpoint:http"),
        (["--rollouts", "R", "--judge", "matrices:nowhere"], "nowhere"),
        (["--rollouts", "R", "--judge", "reward:./nowhere"], "not a directory"),
        (["--rollouts", "R", "--judge", "rules:concise", "--max-requests", "0"], "max_requests is 0"),
        (["--rollouts", "R", "--judge", "rules:concise", "--selection", "best"], "extremes"),
        (["--rollouts", "R", "--judge", "rules:concise", "--selection", "top-bottom:3"], "--num-responses"),
        (["--rollouts", "R", "--judge", "rules:concise", "--preset", "mine"], "preset"),
        (["--rollouts", "R", "--judge", "rules:concise", "--from-dataset", "D"], "alone"),
        (["--from-dataset", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    rollouts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments,
    fragment,
) -> None:
    named = [str(rollouts) if argument == "R" else argument for argument in arguments]
    assert tool(*named, "--output", tmp_path / "d") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("score_pairrm.py: error: ") and fragment in last
    assert not (tmp_path / "d").exists()
