"""Proves: a stage runs once, again only when it must, and never beside its own orphan. Stages are real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.selfplay.stages import Stage, StageFailed, StageMachine, read_state

COPY = """
import pathlib, sys
source, target, count = map(pathlib.Path, sys.argv[1:])
count.write_text(count.read_text() + "x" if count.exists() else "x")
target.mkdir(exist_ok=True)
(target / "copy.txt").write_text(source.read_text())
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "source.txt").write_text("one")
    return tmp_path / "run"


def copy_stage(run_dir: Path, **changes: object) -> Stage:
    source, target = run_dir / "source.txt", run_dir / "target"
    command = (sys.executable, "-c", COPY, str(source), str(target), str(run_dir.parent / "count"))
    values = {"name": "copy", "command": command, "inputs": (source,), "outputs": (target,), **changes}
    return Stage(**values)


def times_run(run_dir: Path) -> int:
    return len((run_dir.parent / "count").read_text())


def failing_stage(code: str, run_dir: Path) -> Stage:
    return copy_stage(run_dir, name="iter_1-train", command=(sys.executable, "-c", code))


def test_a_done_stage_is_skipped_by_the_next_command(run_dir: Path) -> None:
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is True
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is False
    assert times_run(run_dir) == 1
    entry = json.loads((run_dir / "state.json").read_text())["stages"]["copy"]
    assert entry["status"] == "done"
    assert entry["command"] == list(copy_stage(run_dir).command)
    assert set(entry["outputs"]) == {"target"}  # relative: a run that was moved is the same run


def test_a_touched_but_equal_input_is_no_change(run_dir: Path) -> None:
    StageMachine(run_dir).run(copy_stage(run_dir))
    os.utime(run_dir / "source.txt", ns=(1, 1))
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is False


def test_a_changed_input_runs_the_stage_again_from_nothing(run_dir: Path) -> None:
    StageMachine(run_dir).run(copy_stage(run_dir))
    (run_dir / "target" / "stale.txt").write_text("left by the first run")
    (run_dir / "source.txt").write_text("two")
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is True
    assert (run_dir / "target" / "copy.txt").read_text() == "two"
    assert not (run_dir / "target" / "stale.txt").exists()


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_harmed_output_is_made_again(run_dir: Path, harm: str) -> None:
    StageMachine(run_dir).run(copy_stage(run_dir))
    copy = run_dir / "target" / "copy.txt"
    copy.write_text("0ne") if harm == "change" else copy.unlink()
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is True
    assert copy.read_text() == "one"


def test_what_training_adds_to_a_dataset_is_no_harm(run_dir: Path) -> None:
    StageMachine(run_dir).run(copy_stage(run_dir))
    (run_dir / "target" / "reference.bin").write_text("log-probs")
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is False


def test_a_failed_stage_keeps_its_work_and_is_continued(run_dir: Path) -> None:
    half = f"import pathlib; p = pathlib.Path({str(run_dir / 'target')!r}); p.mkdir(exist_ok=True); "
    half += "(p / 'shard-0').write_text('done'); raise SystemExit(1)"
    with pytest.raises(StageFailed):
        StageMachine(run_dir).run(copy_stage(run_dir, command=(sys.executable, "-c", half)))
    assert read_state(run_dir)["stages"]["copy"]["status"] == "failed"
    assert StageMachine(run_dir).run(copy_stage(run_dir)) is True
    assert (run_dir / "target" / "shard-0").read_text() == "done"


def test_the_tool_s_error_line_its_stage_and_log_are_passed_on_with_exit_code_2(run_dir: Path) -> None:
    code = (
        "import sys; print('noise', file=sys.stderr); sys.stderr.write('pretrain_sppo.py: error: lr is 0. Use 1.\\n');"
    )
    with pytest.raises(StageFailed) as failure:
        StageMachine(run_dir).run(failing_stage(code + "sys.exit(2)", run_dir))
    assert failure.value.exit_code == 2
    message = str(failure.value)
    assert message.startswith("iter_1-train failed (exit code 2): pretrain_sppo.py: error: lr is 0. Use 1.")
    assert str(run_dir / "logs" / "iter_1-train.log") in message and "\n" not in message


def test_a_crash_is_passed_on_by_its_exception_with_exit_code_1(run_dir: Path) -> None:
    with pytest.raises(StageFailed, match=r"exit code 1.*ZeroDivisionError: division by zero") as failure:
        StageMachine(run_dir).run(failing_stage("1 / 0", run_dir))
    assert failure.value.exit_code == 1


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.kill(os.getpid(), 15)",
        "import sys; sys.exit(143)",
        "import sys; sys.exit(-15)",
        "import sys; sys.exit('Root Cause:\\n  exitcode  : 143 (pid: 7)')",
        "import sys; sys.exit('[rank1]:   exitcode  : -15 (pid: 7)')",
        "class SignalException(Exception): pass\nraise SignalException('Process 7 got signal: 15')",
    ],
)
def test_a_stage_that_somebody_else_has_stopped_ends_the_loop_with_143_and_goes_on(run_dir: Path, code: str) -> None:
    """Slurm sends SIGTERM to every process of a job; torchrun then ends with 1, in one of the two ways shown."""
    with pytest.raises(StageFailed, match="iter_1-train was stopped by SIGTERM. The same command goes on") as failure:
        StageMachine(run_dir).run(failing_stage(code, run_dir))
    assert failure.value.exit_code == 143
    assert read_state(run_dir)["stages"]["iter_1-train"]["status"] == "failed"
    assert StageMachine(run_dir).run(copy_stage(run_dir, name="iter_1-train")) is True


def test_torchrun_s_report_of_exit_code_2_counts_as_2(run_dir: Path) -> None:
    code = (
        "import sys; print('tool.py: error: fact. Remedy.'); "
        "print('torch.distributed.elastic.multiprocessing.errors.ChildFailedError: '); "
        "print('  exitcode  : 2 (pid: 7)'); sys.exit(1)"
    )
    with pytest.raises(StageFailed, match=r"tool\.py: error: fact\. Remedy\.") as failure:
        StageMachine(run_dir).run(failing_stage(code, run_dir))
    assert failure.value.exit_code == 2


def test_an_earlier_attempt_s_error_is_not_reported(run_dir: Path) -> None:
    for message in ("a.py: error: first.", "a.py: error: second."):
        code = f"import sys; print({message!r}); sys.exit(2)"
        with pytest.raises(StageFailed, match=message.split()[-1]):
            StageMachine(run_dir).run(failing_stage(code, run_dir))


def test_a_killed_stage_says_by_which_signal(run_dir: Path) -> None:
    with pytest.raises(StageFailed, match="was killed by signal 9"):
        StageMachine(run_dir).run(failing_stage("import os; os.kill(os.getpid(), 9)", run_dir))


def test_a_command_that_writes_nothing_is_not_done(run_dir: Path) -> None:
    with pytest.raises(StageFailed, match="wrote no target"):
        StageMachine(run_dir).run(failing_stage("pass", run_dir))


def test_a_missing_input_is_named(run_dir: Path) -> None:
    (run_dir / "source.txt").unlink()
    with pytest.raises(DataError, match=r"copy needs .*source\.txt"):
        StageMachine(run_dir).run(copy_stage(run_dir))


def test_a_damaged_state_is_refused(run_dir: Path) -> None:
    (run_dir / "state.json").write_text('{"schema_version": 99, "stages": {}}')
    with pytest.raises(DataError, match=r"state\.json is no state of version 1"):
        StageMachine(run_dir)


def test_what_was_retired_is_gone_and_neither_its_stage_nor_its_readers_run_again(run_dir: Path) -> None:
    def reader(machine: StageMachine) -> bool:
        target, copy = run_dir / "target", run_dir / "second"
        command = (sys.executable, "-c", COPY, str(target / "copy.txt"), str(copy), str(run_dir.parent / "count"))
        return machine.run(Stage(name="reader", command=command, inputs=(target,), outputs=(copy,)))

    machine = StageMachine(run_dir)
    assert machine.run(copy_stage(run_dir)) and reader(machine)
    machine.retire(run_dir / "target", parts=(run_dir / "target" / "copy.txt", run_dir / "target" / "never.txt"))
    assert (run_dir / "target").is_dir() and not (run_dir / "target" / "copy.txt").exists()
    assert read_state(run_dir)["retired"] == {"target": read_state(run_dir)["stages"]["copy"]["outputs"]["target"]}
    for again in (machine, StageMachine(run_dir)):
        assert not again.run(copy_stage(run_dir)) and not reader(again)
    assert times_run(run_dir) == 2


def test_a_stage_that_must_run_again_and_reads_what_was_retired_says_so(run_dir: Path) -> None:
    machine, source = StageMachine(run_dir), run_dir / "source.txt"
    machine.run(copy_stage(run_dir))
    machine.retire(source, parts=(source,))
    assert machine.run(copy_stage(run_dir)) is False
    (run_dir / "target" / "copy.txt").unlink()
    with pytest.raises(DataError, match=r"copy would have to run again, and --keep-last has removed .* source\.txt"):
        machine.run(copy_stage(run_dir))


def test_a_stage_that_makes_its_retired_output_again_has_it_back(run_dir: Path) -> None:
    machine = StageMachine(run_dir)
    machine.run(copy_stage(run_dir))
    machine.retire(run_dir / "target", parts=(run_dir / "target",))
    (run_dir / "source.txt").write_text("two")
    assert machine.run(copy_stage(run_dir)) is True
    assert read_state(run_dir)["retired"] == {}
    (run_dir / "target" / "copy.txt").write_text("harm")
    assert machine.run(copy_stage(run_dir)) is True


SLOW = """
import pathlib, signal, subprocess, sys, time
ready, ended = map(pathlib.Path, sys.argv[1:])
def leave(*_):
    ended.write_text("in order")
    sys.exit(143)
if ended.name != "never":
    signal.signal(signal.SIGTERM, leave)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
ready.write_text(str(helper.pid))
time.sleep(300)
"""

LOOP = """
import pathlib, sys
from megatron_sppo.selfplay.process import Interrupted, interruptible
from megatron_sppo.selfplay.stages import Stage, StageMachine
run_dir, *command = sys.argv[1:]
run_dir = pathlib.Path(run_dir)
try:
    with interruptible():
        machine = StageMachine(run_dir)
        machine.run(Stage(name="slow", command=tuple(command), inputs=(), outputs=(run_dir / "out",)))
except Interrupted as interruption:
    sys.exit(interruption.exit_code)
"""


def start_slow_loop(run_dir: Path, ended: str) -> tuple[subprocess.Popen, int, int]:
    """Start a loop with a stage that never ends -> (loop, pid of the stage, pid of the stage's own child)."""
    ready = run_dir / "ready"
    command = [sys.executable, "-c", SLOW, str(ready), str(run_dir / ended)]
    loop = subprocess.Popen([sys.executable, "-c", LOOP, str(run_dir), *command])
    wait_for(lambda: ready.exists() and ready.read_text())
    return loop, read_state(run_dir)["stages"]["slow"]["process"]["pid"], int(ready.read_text())


def wait_for(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_first_and_leaves_a_clean_state(run_dir: Path, signum: int, code: int) -> None:
    loop, stage, helper = start_slow_loop(run_dir, "ended")
    loop.send_signal(signum)
    assert loop.wait(timeout=20) == code
    assert (run_dir / "ended").read_text() == "in order"
    wait_for(lambda: not is_alive(stage) and not is_alive(helper))  # the kernel ends them in its own time
    entry = read_state(run_dir)["stages"]["slow"]
    assert entry["status"] == "interrupted" and "process" not in entry


def test_a_killed_loop_takes_its_stage_along(run_dir: Path) -> None:
    loop, stage, helper = start_slow_loop(run_dir, "ended")
    loop.kill()
    loop.wait()
    wait_for(lambda: not is_alive(stage))
    assert (run_dir / "ended").read_text() == "in order"
    StageMachine(run_dir).end_orphans()  # and what the stage left behind goes with the next command
    wait_for(lambda: not is_alive(helper))


def test_the_next_command_ends_a_stage_that_would_not_go(run_dir: Path) -> None:
    loop, stage, helper = start_slow_loop(run_dir, "never")
    loop.kill()
    loop.wait()
    assert is_alive(stage)
    with contextlib.suppress(ChildProcessError):
        StageMachine(run_dir, grace_seconds=0.5).end_orphans()
    wait_for(lambda: not is_alive(stage) and not is_alive(helper))
    assert "process" not in read_state(run_dir)["stages"]["slow"]
