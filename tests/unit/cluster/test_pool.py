"""Proves the pool's loop with workers in threads: every task once, whatever dies; errors of workers end the stage.

Real processes and Ray are in tests/e2e/test_cluster_pool.py.
"""

import random
import subprocess
import sys
import threading
import time

import pytest

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.pool import drive, run_tasks
from megatron_sppo.cluster.worker import WorkerCrashed
from megatron_sppo.errors import ConfigError, DataError
from tests.unit.cluster.workers import Progress, Squarer, Stream, Task, ThreadTeam


def tasks(number):
    return (Task(index) for index in range(number))


def squares(number):
    return {index: index**2 for index in range(number)}


def collected(pairs):
    found = {}
    for task, result in pairs:
        assert task.index == result.index and task.index not in found
        found[task.index] = result.square
    return found


def test_one_worker_works_in_this_process_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    progress = Progress()
    pairs = run_tasks(Squarer, tasks(7), pool=PoolConfig(), num_gpus=1, progress=progress, logs=tmp_path / "logs")
    assert collected(pairs) == squares(7)
    assert (progress.units, progress.amount) == (7, 70)
    assert not (tmp_path / "logs").exists()


def test_several_workers_answer_every_task_once_and_report_all_of_it():
    progress, all_there = Progress(), threading.Barrier(3, timeout=30)

    class Punctual(Squarer):
        """Answers nothing before each worker has a task: on a busy machine two could be done before the third is up."""

        def run(self, tasks, on_progress):
            for number, task in enumerate(tasks):
                if number == 0:
                    all_there.wait()
                yield from super().run(iter([task]), on_progress)

    team = ThreadTeam(Punctual, 3)
    assert collected(drive(team, tasks(40), progress=progress)) == squares(40)
    assert (progress.units, progress.amount) == (40, 400)
    assert team.is_closed
    assert max(progress.seen) == (3, 3)


def test_a_worker_that_streams_has_its_slots_filled_while_others_are_at_work():
    streams = []

    def make():
        streams.append(Stream(slots=5))
        return streams[-1]

    assert collected(drive(ThreadTeam(make, 2, ahead=1), tasks(60), progress=Progress())) == squares(60)
    assert [stream.most_at_work for stream in streams] == [5, 5]


@pytest.mark.parametrize("seed", range(8))
def test_what_dead_workers_had_is_given_out_again_and_progress_ends_whole(seed):
    chance, progress = random.Random(seed), Progress()
    team = ThreadTeam(lambda: Squarer(seconds=0.005), 3, ahead=1)
    found = {}
    for number, (task, result) in enumerate(drive(team, tasks(60), progress=progress)):
        assert task.index not in found
        found[task.index] = result.square
        if number in (10, 30):  # a third death could be held against a task
            team.kill(chance.randrange(3))
    assert found == squares(60)
    assert progress.units == 60


class Deadly(Squarer):
    """Its process dies at task 5: the team is told, which is all that a thread can do of it."""

    team: ThreadTeam
    number = 0

    def run(self, tasks, on_progress):
        for task in tasks:
            if task.index == 5:
                Deadly.team.kill(
                    next(n for n, desk in Deadly.team.desks.items() if desk._thread.ident == threading.get_ident())
                )
                return
            yield from super().run(iter([task]), on_progress)


def test_a_task_that_three_workers_die_at_ends_the_stage_and_is_named():
    Deadly.team = team = ThreadTeam(Deadly, 2)
    with pytest.raises(DataError, match="^task 5: 3 workers have died at it"):
        collected(drive(team, tasks(20), progress=Progress()))
    assert team.is_closed


@pytest.mark.parametrize(
    "error", [ConfigError("no model. Use --model DIR."), DataError("bad"), FileNotFoundError(2, "no", "x")]
)
def test_an_error_at_a_worker_s_start_is_raised_as_it_was(error):
    def make():
        raise error

    with pytest.raises(type(error)) as raised:
        collected(drive(ThreadTeam(make, 2), tasks(3), progress=Progress()))
    assert str(raised.value) == str(error)


def test_a_fault_in_a_worker_is_raised_with_its_traceback():
    class Faulty(Squarer):
        def run(self, tasks, on_progress):
            next(tasks)
            yield 1 / 0

    with pytest.raises(WorkerCrashed, match=r"(?s)yield 1 / 0.*ZeroDivisionError"):
        collected(drive(ThreadTeam(Faulty, 2), tasks(3), progress=Progress()))


def test_a_worker_that_breaks_down_is_started_anew_and_nothing_is_lost(caplog):
    broken = []

    class Fragile(Squarer):
        """An engine that dies once, in a process that lives."""

        def run(self, tasks, on_progress):
            for task in tasks:
                if task.index == 7 and not broken:
                    broken.append(task)
                    raise RuntimeError("EngineDeadError: the device fell off the bus")
                yield from super().run(iter([task]), on_progress)

    assert collected(drive(ThreadTeam(Fragile, 2), tasks(20), progress=Progress())) == squares(20)
    assert "the device fell off the bus): 1 tasks are given out again" in caplog.text


def test_a_worker_that_dies_where_others_work_is_given_up_and_its_tasks_are_not_blamed(caplog):
    made = []

    class Sick(Squarer):
        """The first worker's machine is broken, before and after its restarts; the second's task takes until then."""

        def run(self, tasks, on_progress):
            for task in tasks:
                first = team.desks[0]._thread  # None between two lives
                if first is not None and first.ident == threading.get_ident():
                    raise RuntimeError("ECC error")
                patience = time.monotonic() + 30
                while not team.dismissed and time.monotonic() < patience:
                    time.sleep(0.002)
                yield from super().run(iter([task]), on_progress)

    def make():
        made.append(1)
        return Sick()

    team = ThreadTeam(make, 2)
    assert collected(drive(team, tasks(40), progress=Progress())) == squares(40)
    assert team.dismissed == [0]
    assert "worker 0 is given up: it died 5 times" in caplog.text


def test_a_worker_that_leaves_a_task_unanswered_is_a_fault():
    class Lazy(Squarer):
        def run(self, tasks, on_progress):
            next(tasks)
            return iter(())

    with pytest.raises(WorkerCrashed, match="left 1 tasks without a result"):
        collected(drive(ThreadTeam(Lazy, 1), tasks(3), progress=Progress()))


class HangsOnce(Squarer):
    """The first of them answers nothing, and reports nothing, of its second task."""

    num_made = 0

    def __init__(self):
        super().__init__()
        HangsOnce.num_made += 1
        self._is_first = HangsOnce.num_made == 1

    def run(self, tasks, on_progress):
        for number, task in enumerate(tasks):
            if self._is_first and number == 1:
                threading.Event().wait()
            yield from super().run(iter([task]), on_progress)


@pytest.mark.counts("hangs")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_without_progress_is_started_anew_and_nothing_is_lost(num_workers, caplog):
    HangsOnce.num_made, team = 0, ThreadTeam(HangsOnce, num_workers)
    clock, progress = iter(range(0, 10**9, 10)), Progress()
    found = collected(drive(team, tasks(9), progress=progress, clock=lambda: next(clock), timeout=300))
    assert found == squares(9) and (progress.units, progress.amount) == (9, 90)
    assert HangsOnce.num_made == num_workers + 1
    assert "it made no progress with its work for 3" in caplog.text and "(--worker-timeout)): 1 tasks" in caplog.text


@pytest.mark.counts("hangs")
def test_a_worker_that_does_not_answer_is_started_anew_and_nothing_is_lost(caplog):
    class Silent(ThreadTeam):
        """The first desk's replies to calls with tasks are lost: its process stands still."""

        first = None

        def replies(self, seconds):
            self.first = self.first or self.desks[0]
            came = super().replies(0.05)
            return [(n, r) for n, r in came if r.life != self.first.ping() or not r.is_ready or not r.results]

    clock, team = iter(range(0, 10**9, 10)), Silent(Squarer, 1)
    found = collected(drive(team, tasks(5), progress=Progress(), clock=lambda: next(clock), timeout=300))
    assert found == squares(5) and "it has not answered for 3" in caplog.text


@pytest.mark.counts("hangs")
def test_a_worker_that_hangs_in_this_process_ends_it_with_its_stacks(tmp_path):
    """Exit code 4; a stage whose results are slow to be written does not hang."""
    script = """
import sys, time
from pathlib import Path
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.pool import run_tasks
from tests.unit.cluster.test_pool import HangsOnce
from tests.unit.cluster.workers import Progress, Task

pool = PoolConfig(worker_timeout=1.0)
pairs = run_tasks(HangsOnce, map(Task, range(3)), pool=pool, num_gpus=0, progress=Progress(), logs=Path(sys.argv[1]))
next(pairs)
time.sleep(3)
print("slow, and no hang", flush=True)
next(pairs)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "logs")], capture_output=True, text=True)
    assert ended.returncode == 4 and ended.stdout == "slow, and no hang\n"
    line = ended.stderr.splitlines()[-1]
    assert "error: the worker in this process has made no progress for " in line and "--worker-timeout" in line
    assert "test_pool.py" in (tmp_path / "logs" / "hang.txt").read_text()


def test_a_stage_without_workers_is_said_and_ended(caplog):
    class Nobody(ThreadTeam):
        def exchange(self, *args, **kwargs):
            pass

        def replies(self, seconds):
            self.now += 20
            return []

        now = 0.0

        def missing(self):
            return "no node has 8 GPUs"

    team = Nobody(Squarer, 2)
    with pytest.raises(DataError, match=r"no worker has answered for 15 minutes: no node has 8 GPUs\."):
        collected(drive(team, tasks(3), progress=Progress(), clock=lambda: team.now))
    assert "no worker answers: no node has 8 GPUs" in caplog.text


def test_settings_that_name_no_pool_are_refused():
    for text in (
        "",
        " ",
        "local",
        "head",
        "head:",
        "head:0",
        "head:65536",
        "ray://head:10001",
        "a:1 ",
        "[::1:1",
        "::1",
    ):
        with pytest.raises(ConfigError, match="Use --ray auto on one of the cluster's nodes, --ray HOST:PORT"):
            PoolConfig(ray=text)
    for text in ("auto", "head:6379", "10.0.0.1:65535", "[::1]:6379", "a-b.example:1"):
        assert PoolConfig(ray=text).ray == text
    with pytest.raises(ConfigError, match="workers is 0"):
        PoolConfig(workers=0)
    assert PoolConfig(workers=1).is_embedded and not PoolConfig(workers=1, ray="auto").is_embedded
