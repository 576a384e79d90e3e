"""Runs a command of this repository in this process, as its file would run: what it would cost in imports is paid once.

For refusals and other short work. What is killed, launched by torchrun or must find nothing imported needs a process.
"""

import contextlib
import io
import logging
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run_here(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None, directory: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a script such as "tools/convert.py" -> exit code, what it printed, and its log with what it said on stderr.

    An exception that leaves the script is raised here: a process would show its traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    log = logging.StreamHandler(err)
    root = logging.getLogger()
    argv = [str(REPOSITORY / script), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        patch.chdir(directory)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        root.addHandler(log)
        try:
            runpy.run_path(argv[0], run_name="__main__")
            code: object = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            root.removeHandler(log)
    assert isinstance(code, int), f"{shlex.join(argv)} left with {code!r}"
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def run_process(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None, directory: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, as a user does -> the same."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
