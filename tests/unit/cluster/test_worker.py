"""Proves the desk: what it says and when, that another process's tasks are refused, and where output goes."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from megatron_sppo.cluster.worker import Desk, WorkerCrashed
from tests.unit.cluster.workers import Result, Squarer, Stream, Task


def replies_until(desk, condition, tasks=(), **settings):
    results = []
    life = desk.ping()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        reply = desk.exchange(life, tasks, seconds=1.0, **settings)
        tasks = ()
        results += reply.results
        if condition(reply, results):
            return reply, results
    raise AssertionError("nothing came")


def test_a_worker_wants_a_task_when_it_is_ready_and_again_when_it_has_room():
    desk = Desk(Squarer)
    reply, _ = replies_until(desk, lambda reply, _: reply.num_wanted)
    assert reply.is_ready and reply.num_wanted == 1
    reply, results = replies_until(desk, lambda _, results: len(results) == 2, (Task(3), Task(4)))
    assert [result.square for result in results] == [9, 16]
    assert replies_until(desk, lambda reply, _: reply.num_wanted)[0].num_wanted == 1


def test_tasks_lie_ahead_where_they_are_asked_for():
    desk = Desk(lambda: Stream(slots=3), ahead=2)
    assert replies_until(desk, lambda reply, _: reply.num_wanted)[0].num_wanted == 3
    _, results = replies_until(desk, lambda _, results: len(results) == 9, tuple(map(Task, range(9))))
    assert {result.index for result in results} == set(range(9))


def test_a_call_that_means_a_dead_process_gives_no_task_and_learns_the_new_one():
    desk = Desk(Squarer)
    replies_until(desk, lambda reply, _: reply.is_ready)
    reply = desk.exchange("another", (Task(1),), seconds=0.1)
    assert reply.life == desk.ping() and not reply.results
    assert not desk.exchange(reply.life, has_more=False, seconds=0.1).results


def test_it_ends_when_it_is_told_and_has_nothing_left():
    desk = Desk(Squarer)
    reply, results = replies_until(desk, lambda reply, _: reply.has_ended, (Task(2),), is_end=True)
    assert [result.square for result in results] == [4] and reply.failure is None


@pytest.mark.parametrize("fault", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), ValueError("odd")])
def test_whatever_a_worker_ends_by_is_told(fault):
    """What leaves a thread without a word, as sys.exit in a library does, would be waited for without end."""

    def make():
        raise fault

    reply, _ = replies_until(Desk(make), lambda reply, _: reply.has_ended)
    assert isinstance(reply.failure, WorkerCrashed) and type(fault).__name__ in reply.failure.summary


def test_a_result_of_what_nobody_asked_is_a_fault_and_not_waited_past():
    class Other(Squarer):
        def run(self, tasks, on_progress):
            for task in tasks:
                yield Result(task.index + 1, 0)

    reply, _ = replies_until(Desk(Other), lambda reply, _: reply.has_ended, (Task(3),))
    assert isinstance(reply.failure, WorkerCrashed) and "answered task 4, which" in str(reply.failure)


def test_a_process_answers_before_its_worker_starts():
    """One that dies in its worker's start is then known to have lived: Ray calls a dead one again without end."""
    started = threading.Event()
    desk = Desk(lambda: started.set() or Squarer())
    assert desk.ping() and not started.wait(0.1)
    desk.exchange(None, seconds=0.0)
    assert started.wait(30)


SCRIPT = """
import os, sys
import pytest

from megatron_sppo.cluster.worker import Desk, WorkerCrashed
from tests.unit.cluster.workers import Result, Squarer

def make():
    print("from python"); sys.stdout.flush()
    os.system("echo from a child >&2")
    if sys.argv[3] == "die":
        os._exit(9)
    return Squarer()

desk = Desk(make, log_name=sys.argv[1], environment={"SET": "1", "UNSET": None})
words = b""
while not (reply := desk.exchange(None, is_end=True)).has_ended:
    words += reply.log
open(sys.argv[2], "wb").write(words + reply.log)
assert os.environ["SET"] == "1" and "UNSET" not in os.environ
"""


def test_output_of_a_process_that_died_is_handed_on_by_the_next(tmp_path):
    name = f"test-{os.getpid()}.log"
    environment = {**os.environ, "UNSET": "x"}
    ends = []
    for end in ("die", "live"):
        command = [sys.executable, "-c", SCRIPT, name, str(tmp_path / "log"), end]
        ends.append(subprocess.run(command, env=environment, check=False).returncode)
    assert ends == [9, 0]
    assert (tmp_path / "log").read_text().split("\n") == 2 * ["from python", "from a child"] + [""]
    assert not Path(tempfile.gettempdir(), name).exists()
