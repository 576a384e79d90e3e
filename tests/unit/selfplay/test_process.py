"""Proves: on a terminal a stage's progress bar is seen and its log stays readable; elsewhere nothing but the log."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.selfplay.process import last_error, run_logged

STAGE = """
import os, sys, time
assert sys.argv[1] == str(sys.stderr.isatty()), sys.stderr.isatty()
print("a line for the log", file=sys.stderr)
for percent in (10, 60, 100):
    sys.stderr.write(f"\\rprogress {percent} %"); sys.stderr.flush()
    while percent < 100 and "SEEN" in os.environ and not os.path.exists(f"{os.environ['SEEN']}/{percent}"):
        time.sleep(0.01)
sys.stderr.write("\\nlast words\\n")
"""

RUNNER = """
import pathlib, sys
from megatron_sppo.selfplay.process import run_logged
log = pathlib.Path(sys.argv[2])
command = [sys.executable, "-c", sys.argv[1], "True"]
sys.exit(run_logged(command, log, on_start=lambda pid: None, grace_seconds=30))
"""


def last_lines(path: Path, count: int) -> list[str]:
    return path.read_text().splitlines()[-count:]  # before them stands the command


def test_on_a_terminal_the_bar_is_shown_and_the_log_keeps_its_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage goes on when its bar was seen."""
    monkeypatch.setenv("SEEN", str(tmp_path))
    log, (ours, theirs) = tmp_path / "stage.log", pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", RUNNER, STAGE, str(log)], stderr=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:
            break
        if not block:
            break
        seen += block
        for percent in (10, 60):
            if f"progress {percent} %".encode() in seen:
                (tmp_path / str(percent)).touch()
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert b"a line for the log" not in seen and b"last words" not in seen
    assert last_lines(log, 3) == ["a line for the log", "progress 100 %", "last words"]


def test_without_a_terminal_the_output_goes_to_the_log_alone(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "stage.log"
    assert run_logged([sys.executable, "-c", STAGE, "False"], log, on_start=lambda pid: None, grace_seconds=30) == 0
    assert last_lines(log, 1) == ["last words"]
    assert last_error(log) == "last words"


def test_torchrun_is_told_the_grace_that_the_stage_has(tmp_path: Path) -> None:
    log = tmp_path / "logs/stage.log"
    command = ["sh", "-c", "echo told $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert run_logged(command, log, on_start=lambda pid: None, grace_seconds=9.5) == 0
    assert log.read_text().endswith("told 10\n")


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    assert run_logged(["/no/such/sampler", "--model", "m"], log, on_start=lambda pid: None, grace_seconds=30) == 2
    assert last_error(log) == "self_play: error: /no/such/sampler does not exist."


def test_attempts_are_kept_one_after_the_other(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    for word in ("first", "second"):
        run_logged([sys.executable, "-c", f"print({word!r})"], log, on_start=lambda pid: None, grace_seconds=30)
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["first", "second"]
    assert last_error(log) == "second"


def test_a_launcher_that_cannot_be_started_says_so_in_the_log(tmp_path: Path) -> None:
    launcher, log = tmp_path / "launcher.sh", tmp_path / "stage.log"
    launcher.write_text("#!/bin/sh\n")  # and no right to execute it
    assert run_logged([str(launcher)], log, on_start=lambda pid: None, grace_seconds=1) == 2
    assert last_error(log) == f"self_play: error: {launcher} cannot be started (Permission denied)."
