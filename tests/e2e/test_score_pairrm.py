"""tools/score_pairrm.py as a user runs it: exit codes, resuming, torchrun, rebuilding targets.

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
import time
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import FileStore
from tqdm import tqdm

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.judge import score as stage
from megatron_sppo.judge.config import ScoreConfig
from megatron_sppo.judge.work_list import WorkList
from megatron_sppo.report.page import write_report
from tests.commands import run_here
from tests.models import byte_tokenizer
from tests.unit.judge.rollout_files import encoded, random_rollouts, raw_row, write_raw_rollouts
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm
from tests.unit.selfplay.synthetic import write_run

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "score_pairrm.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT_SECONDS = 240


def start(*arguments: object, ranks: int = 1) -> subprocess.Popen:
    launcher = [] if ranks == 1 else TORCHRUN
    command = [sys.executable, *launcher, str(TOOL), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, ranks: int = 1) -> str:
    process = start(*arguments, ranks=ranks)
    try:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        kill(process.pid)
        raise
    assert process.returncode == 0, errors
    return output


def family_of(pid: int) -> list[int]:
    """Find a process and all of its descendants; torchrun's workers have sessions of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def kill(pid: int) -> None:
    """kill -9 a process with its descendants, the oldest first, so that nobody is left to clean up."""
    for member in family_of(pid):
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


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


def test_killed_under_torchrun_and_resumed_equals_one_undisturbed_process(
    rollouts: Path, pairrm: Path, tmp_path: Path
) -> None:
    arguments = ["--rollouts", rollouts, "--judge", f"pairrm:{pairrm}", "--selection", "extremes"]
    run(*arguments, "--output", tmp_path / "one")
    output, work_dir = tmp_path / "two", tmp_path / ".two.scores"
    process = start(*arguments, "--output", output, ranks=2)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(list(work_dir.glob("scores-*.npz"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    kill(process.pid)
    process.communicate()
    finished = sorted(work_dir.glob("scores-*.npz"))
    assert not output.exists() and 3 <= len(finished) < 24
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    replaced = []
    process = start(*arguments, "--output", output, ranks=2)
    while process.poll() is None:
        for path, stamp in stamps.items():
            try:
                if path.stat().st_mtime_ns != stamp:
                    replaced.append(path)
            except FileNotFoundError:
                break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.communicate() and process.returncode == 0
    assert not replaced, "finished shards were judged again"
    assert contents(output) == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "something was left behind"


NUM_KILLS = 20
EVENTS = ("fsync", "replace", "rename", "rmdir")
"""Calls of `os` at which a run is killed, besides the judge's own."""


def rank_main(arguments: dict, rank: int, world_size: int, store: Path, last_event: int | None) -> None:
    """One rank of the tool: killed at event `last_event`, or leaves the number of its events beside the store."""
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: who is killed with it would stop the others for good
    events = itertools.count(1)

    def counted(function):
        def call(*positional, **named):
            number = next(events)
            if number == last_event:
                os.kill(os.getpid(), signal.SIGKILL)
            if last_event is None:
                store.with_name(f"events-{rank}").write_text(str(number))
            return function(*positional, **named)

        return call

    for name in EVENTS:
        setattr(os, name, counted(getattr(os, name)))
    load = stage.load_judge

    def load_judge(*positional, **named):
        judge = load(*positional, **named)
        judge.judge_logits = counted(judge.judge_logits)
        return judge

    stage.load_judge = load_judge
    work = WorkList(rank=rank, world_size=world_size, store=FileStore(str(store), world_size))
    stage.score(ScoreConfig(**arguments), work)


def run_ranks(arguments: dict, world_size: int, store: Path, victim: tuple[int, int] | None = None) -> list[int]:
    """Fork the ranks, the victim = (rank, event) to be killed; then kill the others, as torchrun does -> exit codes."""
    store.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(world_size):
        last_event = victim[1] if victim and victim[0] == rank else (None if victim is None else 0)
        processes.append(context.Process(target=rank_main, args=(arguments, rank, world_size, store, last_event)))
        processes[-1].start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.002)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_killed_at_random_points_of_judging_merging_and_publishing_the_bytes_are_the_same(
    tmp_path: Path, world_size: int
) -> None:
    """Every file of the directory, manifest and diagnostics too. A last run of the same command always completes."""
    rollouts = random_rollouts(tmp_path / "rollouts", num_prompts=12, num_responses=3, rows_per_shard=2)
    arguments = {"rollouts": rollouts, "judge": "rules:cyclic", "selection": "extremes"}
    undisturbed = {**arguments, "output": tmp_path / "undisturbed"}
    assert run_ranks(undisturbed, 1, tmp_path / "store") == [0]
    num_events = int((tmp_path / "events-0").read_text())
    assert num_events > 40, "six shards, five atomic files, one directory and a manifest"
    rng, victims = random.Random(world_size), []
    while len(victims) < NUM_KILLS:
        output = tmp_path / f"killed-{len(victims)}"
        # The other ranks have but their share of the shards, and never write the dataset.
        rank = rng.choice([0, rng.randrange(world_size)])
        victim = (rank, rng.randint(1, num_events if rank == 0 else num_events // (8 * (world_size - 1))))
        exit_codes = run_ranks({**arguments, "output": output}, world_size, tmp_path / "store", victim)
        if exit_codes[rank] == -signal.SIGKILL:
            victims.append(victim)
            if (output / "manifest.json").is_file():
                PreferenceDataset(output)  # what is there is whole
            again = run_ranks({**arguments, "output": output}, world_size, tmp_path / "store")
            assert again == [0] * world_size
        assert contents(output) == contents(tmp_path / "undisturbed"), f"victim: {victim}"
        shutil.rmtree(output)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events-")}
    assert left - {"store"} == {"rollouts", "undisturbed"}, "something was left behind"


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
    importer = [sys.executable, REPOSITORY / "tools" / "import_preferences.py", "--rows", tmp_path / "rows.jsonl"]
    imported = subprocess.run(
        [*importer, "--model", tmp_path / "model", "--output", tmp_path / "r", "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
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
