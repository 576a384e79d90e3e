"""Answers checked in a process of their own: a check that hangs or crashes costs the judge that answer alone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import megatron_sppo
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.rollout.records import Turn

_START_SECONDS = 300.0
"""Libraries are imported in it, on a machine that may be busy."""


class CheckProcess:
    """The parent's side of `check_child`: started when it is made, and again after a check that had to be ended."""

    def __init__(self, target: str, *, seconds: float) -> None:
        """Start the child and load the checks in it.

        Args:
            target: "ifeval", "math" or FILE:FUNCTION.
            seconds: longest time for one answer.

        Raises:
            ConfigError: a package is missing, or a file that cannot be imported or has no such function.
        """
        self._target, self._seconds = target, seconds
        self._child: _Child | None = None
        self.versions = self._started().versions
        """Of what decides the verdicts."""

    def check(self, answer: str, messages: list[Turn], columns: dict[str, Any]) -> list[float]:
        """Check one answer -> how far it passes each check, in [0, 1].

        Raises:
            UncheckedAnswer: it cannot be checked, or its check hangs or crashes.
        """
        child = self._started()
        try:
            child.send({"answer": answer, "messages": messages, "columns": columns})
            reply = child.receive(self._seconds)
        except TimeoutError:
            self._end()
            raise UncheckedAnswer(
                f"its check took longer than {self._seconds:g} s and was ended: --scorer-seconds gives it more"
            ) from None
        except (EOFError, OSError):
            reason = child.last_words()
            self._end()
            raise UncheckedAnswer(f"its check ended the process it ran in ({reason})") from None
        if "unjudged" in reply:
            raise UncheckedAnswer(reply["unjudged"])
        return [float(value) for value in reply["passed"]]

    def _started(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._target, self._seconds)
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
        self._child = None


class _Child:
    """One child process, loaded and waiting."""

    def __init__(self, target: str, seconds: float) -> None:
        package = str(Path(megatron_sppo.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sppo.judge.check_child", target, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # what a scorer starts itself is ended with it
        )
        self.end = weakref.finalize(self, _kill, self._process)
        """Kill it and what it has started."""
        self._rest = b""
        self._said: deque[bytes] = deque(maxlen=20)
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._said.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        try:
            reply = self.receive(_START_SECONDS)
        except (TimeoutError, EOFError, OSError) as error:
            reason = f"nothing in {_START_SECONDS:g} s" if isinstance(error, TimeoutError) else self.last_words()
            self.end()
            remedy = "Run" if target in ("ifeval", "math") else "Mend the file, and run"
            raise ConfigError(
                f"the checks of {target} do not start ({reason}). {remedy} the same command again."
            ) from None
        if "refused" in reply:
            self.end()
            raise ConfigError(reply["refused"])
        self.versions: dict[str, str] = reply["ready"]

    def send(self, request: dict[str, Any]) -> None:
        """Ask for the check of an answer. An idle child reads at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """Wait for the reply -> its content.

        Raises:
            TimeoutError: there is none yet.
            EOFError: there will be none.
        """
        assert self._process.stdout is not None
        deadline, file = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._rest:
            readable, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError
            if not (more := os.read(file, 1 << 16)):
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def last_words(self) -> str:
        """Say how the process ended, and the last line that it wrote -> one clause."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._reader.join(timeout=5)
        code = self._process.returncode
        how = "it still runs" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        lines = [line.decode(errors="replace").strip() for line in self._said]
        said = next((line for line in reversed(lines) if line), "")
        return f"{how}: {said[:160]}" if said else how


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
