"""Proves scoring on a real Ray of three nodes: whatever is killed, the dataset has the bytes of one process.

PairRM is the tiny random one; judges rest before each shard, so that a stage lasts long enough to be killed in.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from megatron_sppo.cluster.progress import read_progress
from megatron_sppo.rollout.records import read_rollouts
from tests.commands import run_here
from tests.e2e.forked import Forked, run_forked
from tests.e2e.ray_cluster import ThreeNodes, kill, three_nodes, wait_until
from tests.reliability.tally import Tally
from tests.unit.judge.rollout_files import random_rollouts, write_rollouts
from tests.unit.judge.tiny_pairrm import make_tiny_pairrm

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_SHARDS = 60


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreeNodes]:
    yield from three_nodes()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rollouts") / "r"
    return random_rollouts(directory, num_prompts=2 * NUM_SHARDS, num_responses=3, rows_per_shard=2)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pairrm(tmp_path_factory.mktemp("pairrm"))[0]


SLOW_SCORING = REPOSITORY / "tests/e2e/slow_scoring.py"


def start(*arguments: object, seconds: float, **settings: object) -> "subprocess.Popen[str]":
    """Start a stage that starts a Ray of its own: nothing of Ray's may be imported before."""
    command = [sys.executable, str(SLOW_SCORING), *map(str, arguments)]
    environment = {**os.environ, **_settings(seconds, settings)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin(nodes: ThreeNodes, *arguments: object, seconds: float, **settings: object) -> Forked:
    """Begin a stage on the three nodes."""
    return Forked(SLOW_SCORING, [*arguments, "--ray", nodes.address], _settings(seconds, settings))


def _settings(seconds: float, settings: Mapping[str, object]) -> dict[str, str]:
    return {"SLOW_SECONDS": str(seconds), **{name: str(value) for name, value in settings.items()}}


def ended(process: "subprocess.Popen[str] | Forked") -> str:
    """Wait for a stage that must end well -> what it said."""
    _, errors = process.communicate(timeout=500)
    assert process.poll() == 0, errors
    return errors


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def alone(output: Path, *arguments: object) -> dict[str, bytes]:
    """What one process without Ray writes."""
    done = run_here("tools/score_pairrm.py", *arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    return files_of(output)


class Stage:
    """A stage under way, whose workers are killed while each of them is at a shard."""

    def __init__(self, nodes: ThreeNodes, output: Path, *arguments: object) -> None:
        self.nodes, self.output, self.num_kills = nodes, output, 0
        self.work_dir = output.with_name(f".{output.name}.scores")
        self._most = output.with_name(f"{output.name}.most")
        self._most.write_text("0")
        self.process = begin(nodes, *arguments, "--output", output, seconds=0.02, SLOW_MOST=self._most)

    def num_done(self) -> int:
        return len(list(self.work_dir.glob("scores-*.npz")))

    def kill_workers(self, chance: random.Random, *, rounds: int, num_workers: int) -> None:
        """Kill all workers, one after the other, several times. Between two times what they were at is judged."""
        for _ in range(rounds):
            self.judge_some(num_workers=num_workers)
            # The driver may not have noticed yet that one of the last time's is away.
            wait_until(lambda: len(self.nodes.actors()) == num_workers, f"{num_workers} workers' processes")
            for pid in chance.sample(pids := self.nodes.actors(), len(pids)):
                time.sleep(chance.uniform(0, 0.2))
                kill(pid)
                self.num_kills += 1
            assert self.num_done() < NUM_SHARDS

    def judge_some(self, *, num_workers: int) -> None:
        """Let all workers judge two shards each, or one more and another less; afterwards each is at a shard."""
        wait_until(lambda: self._num_alive() == num_workers, f"{num_workers} workers")
        enough = self.num_done() + 2 * num_workers
        self._allow(enough)
        wait_until(lambda: self._is_under_way() and self.num_done() >= enough, "shards")

    def end(self) -> str:
        """Let it go on to its end -> what it said."""
        self._allow(sys.maxsize)
        words = ended(self.process)
        for file in (self._most, self._most.with_name(f"{self._most.name}.ended")):
            file.unlink()
        return words

    def _allow(self, number: int) -> None:
        new = self._most.with_suffix(".new")
        new.write_text(str(number))
        new.rename(self._most)

    def _is_under_way(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        return True

    def _num_alive(self) -> int:
        assert self._is_under_way()
        progress = read_progress(self.output)
        return progress.workers_alive if progress else 0


def test_workers_a_node_and_the_driver_are_killed_and_the_bytes_are_those_of_one_process(
    nodes: ThreeNodes, rollouts: Path, pairrm: Path, tmp_path: Path, tally: Tally
) -> None:
    """A shard that is judged is not judged again; nothing is left beside the dataset but logs."""
    chance, rounds = random.Random(7), len(tally.cases("kills", 2, 6))
    rules = ["--rollouts", rollouts, "--judge", "rules:cyclic", "--selection", "extremes"]
    stage = Stage(nodes, tmp_path / "rules", *rules)
    with tally.together("kills") as kills:
        stage.kill_workers(chance, rounds=rounds, num_workers=3)
        kills += [f"scoring worker {number}" for number in range(stage.num_kills)]
        assert stage.num_kills == 3 * rounds and "died" in stage.end()
        assert files_of(stage.output) == alone(tmp_path / "rules_alone", *rules)

    neural = ["--rollouts", rollouts, "--judge", f"pairrm:{pairrm}"]
    first = Stage(nodes, tmp_path / "neural", *neural)
    first.judge_some(num_workers=3)
    nodes.remove_a_node()
    kill(first.process.pid)
    first.process.communicate()
    assert 0 < first.num_done() < NUM_SHARDS and not first.output.exists()
    stamps = {path: path.stat().st_mtime_ns for path in first.work_dir.glob("scores-*.npz")}
    wait_until(lambda: not nodes.actors(), "the end of the dead driver's workers")
    second = Stage(nodes, tmp_path / "neural", *neural)
    second.kill_workers(chance, rounds=1, num_workers=2)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "a judged shard was judged again"
    second.end()
    assert second.num_kills == 2
    assert files_of(second.output) == alone(tmp_path / "neural_alone", *neural)
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {"rules.logs", "neural.logs"} == {"rules", "rules_alone", "neural", "neural_alone"}


def test_workers_of_a_ray_that_starts_here_wait_for_no_other(rollouts: Path, tmp_path: Path) -> None:
    """One of two workers is at its shard until the other has judged all that is left but what lies ready with it."""
    arguments = ["--rollouts", rollouts, "--judge", "rules:concise"]
    log = tmp_path / "log"
    process = start(
        *arguments, "--output", tmp_path / "two", "--workers", "2", seconds=0, SLOW_LOG=log, SLOW_FIRST=NUM_SHARDS - 1
    )
    ended(process)
    calls = log.read_text().split()
    assert Counter(calls) == {calls[0]: 2, calls[1]: NUM_SHARDS - 2} and len(calls) == NUM_SHARDS
    assert files_of(tmp_path / "two") == alone(tmp_path / "one", *arguments)


def test_a_ray_that_starts_here_is_nobody_else_s_and_ends_with_the_command(rollouts: Path, tmp_path: Path) -> None:
    """It listens on the loopback alone and asks for a word; SIGTERM ends all with what shells and Slurm know it by."""
    process = start(
        *("--rollouts", rollouts, "--judge", "rules:concise", "--output", tmp_path / "d", "--workers", "2"),
        seconds=0.5,
    )
    scores = tmp_path / ".d.scores"
    wait_until(lambda: process.poll() is not None or list(scores.glob("scores-*.npz")), "a shard")
    family = psutil.Process(process.pid).children(recursive=True)
    ports = [port for member in (psutil.Process(process.pid), *family) for port in listening(member)]
    guarded = [member for member in family if "raylet" in member.name() or "gcs_server" in member.name()]
    words = {member.environ().get("RAY_AUTH_TOKEN") for member in guarded}
    process.terminate()
    _, errors = process.communicate(timeout=500)
    assert ports and {port.laddr.ip.removeprefix("::ffff:") for port in ports} == {"127.0.0.1"}
    assert len(guarded) == 2 and len(words) == 1 and len(words.pop() or "") == 64
    assert process.returncode == -signal.SIGTERM, errors
    assert "SIGTERM received" not in errors and not (tmp_path / "d").exists()
    wait_until(lambda: not [member for member in family if is_alive(member)], "the end of Ray's processes")


def listening(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return [port for port in process.net_connections("tcp") if port.status == psutil.CONN_LISTEN]
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_evaluation_on_a_cluster_writes_the_result_of_one_process(
    nodes: ThreeNodes, pairrm: Path, tmp_path: Path
) -> None:
    groups = list(read_rollouts(random_rollouts(tmp_path / "r", num_prompts=40, num_responses=2, rows_per_shard=40)))
    for shift, name in enumerate(("policy", "base", "previous")):
        answers = [group.responses for group in groups[shift:] + groups[:shift]]
        sampled = [replace(group, responses=given) for group, given in zip(groups, answers, strict=True)]
        write_rollouts(tmp_path / name, sampled, rows_per_shard=10)
    sides = [part for name in ("policy", "base", "previous") for part in (f"--{name}", tmp_path / name)]
    arguments = [*sides, "--judge", f"pairrm:{pairrm}", "--judge-after", "</think>"]
    pool = ("evaluate", *arguments, "--output", tmp_path / "pool.json", "--ray", nodes.address)
    done = run_forked("megatron_sppo", pool, timeout=500)
    assert done.returncode == 0, done.stderr
    one = run_here("megatron_sppo/__main__.py", "evaluate", *arguments, "--output", tmp_path / "one.json")
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "pool.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_a_judge_that_a_worker_cannot_load_is_one_line(nodes: ThreeNodes, rollouts: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    output = tmp_path / "d"
    process = begin(nodes, "--rollouts", rollouts, "--judge", f"pairrm:{empty}", "--output", output, seconds=0)
    _, errors = process.communicate(timeout=500)
    assert process.poll() == 2, errors
    assert "error: " in errors.splitlines()[-1] and str(empty) in errors.splitlines()[-1] and not output.exists()
