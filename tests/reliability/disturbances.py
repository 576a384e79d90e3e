"""One life of a self-play run, disturbed: killed, stopped, on a disk that fails, by a clock that jumps."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STARTUP = Path(__file__).with_name("startup")
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
DISKS = {"disk full": "full", "read-only disk": "read-only", "out of files": "files", "failing disk": "error"}
DISTURBANCES = (*SIGNALS, *DISKS, "dead stage", "jumping clock")
"""What may happen to a life; "dead stage": the stage's process is killed, and the loop is not."""
ENDINGS = {
    "kill -9": (-signal.SIGKILL,),
    "SIGTERM": (143, -signal.SIGTERM),
    "SIGINT": (130, -signal.SIGINT),
    "SIGHUP": (-signal.SIGHUP,),
    "dead stage": (1,),
    "jumping clock": (),
    **dict.fromkeys(DISKS, (2,)),
}
"""Exit codes of a life that was disturbed before it was done; 0 is always possible. A signal may come before the
command listens."""


def live(
    command: Sequence[str],
    run_dir: Path,
    disturbance: str,
    dice: random.Random,
    *,
    environment: Mapping[str, str],
    seconds: float,
    operations: int = 120,
    stage: str | None = None,
    begin: Callable[..., Any] | None = None,
) -> tuple[int, str]:
    """Run the loop's command and disturb it -> its exit code, the last line that it said.

    Args:
        seconds: within which a signal comes.
        operations: of a process, within which a disk begins to fail.
        stage: when it has begun, the signal comes, or the stage dies, or the next one if it was quicker; None: at any
            time.
        begin: another way to start the command, as `_start`, of a life that nothing befalls at its start.
    """
    extra = {}
    if disturbance in DISKS:
        extra = {
            "FAULT_ROOT": str(run_dir),
            "FAULT_KIND": DISKS[disturbance],
            "FAULT_AT": str(dice.randrange(operations)),
        }
    elif disturbance == "jumping clock":
        extra = {"CLOCK_JUMPS": str(dice.randint(0, 10**6))}
    if extra:
        extra["PYTHONPATH"] = os.pathsep.join([str(STARTUP), environment["PYTHONPATH"]])
    said = run_dir.with_name(f"{run_dir.name}.said")
    start = _start if begin is None or extra else begin
    loop = start(command, said=said, environment={**environment, **extra}, directory=run_dir.parent)
    if disturbance in SIGNALS or disturbance == "dead stage":
        _wait(loop, run_dir, stage, until=time.monotonic() + (300 if stage else dice.random() * seconds))
        if stage is None:
            time.sleep(dice.random() * 0.5)
        if disturbance in SIGNALS:
            loop.send_signal(SIGNALS[disturbance])
        else:
            _kill_a_stage(loop, run_dir)
    code = loop.wait(timeout=900)
    return code, (said.read_text().splitlines() or [""])[-1]


def _start(
    command: Sequence[str], *, said: Path, environment: Mapping[str, str], directory: Path
) -> subprocess.Popen[bytes]:
    with open(said, "w") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            cwd=directory,
            preexec_fn=_hear_signals,
        )


def _hear_signals() -> None:
    """Hear SIGINT and SIGHUP as a process that a person started: tests may run under nohup, which is inherited."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _wait(loop: Any, run_dir: Path, stage: str | None, *, until: float) -> None:
    while loop.poll() is None and time.monotonic() < until:
        if stage is not None and _stage_process(run_dir, stage) is not None:
            return
        time.sleep(0.01)


def _kill_a_stage(loop: Any, run_dir: Path) -> None:
    """Kill the stage that runs, or the next one, until the loop has ended: what is killed may have been at its end."""
    while loop.poll() is None:
        if (pid := _stage_process(run_dir, None)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _stage_process(run_dir: Path, stage: str | None) -> int | None:
    """Find the process of the stage that runs, or of the one that is named -> its id, None where there is none."""
    path = run_dir / "state.json"
    stages = json.loads(path.read_text())["stages"] if path.is_file() else {}
    for name, entry in stages.items():
        if entry.get("status") == "running" and "process" in entry and stage in (None, name):
            return int(entry["process"]["pid"])
    return None
