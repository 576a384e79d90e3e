"""A Python process of our own that answers a JSON object a line with a JSON object a line, and may hang or die."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_sppo


class LineProcess:
    """The parent's side of `python -m MODULE ARGUMENTS`."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Start it; nothing is waited for.

        Args:
            environment: variables beside this process's own.
        """
        package = str(Path(megatron_sppo.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            start_new_session=True,  # what it starts itself is ended with it
        )
        self.end = weakref.finalize(self, _kill, self._process, os.getpid())
        """Kill it and what it has started."""
        self._rest = b""
        self._said: deque[bytes] = deque(maxlen=20)
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._said.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def send(self, request: dict[str, Any]) -> None:
        """Ask for something. An idle process reads at once.

        Raises:
            OSError: it is gone.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """Wait for the next reply -> its content.

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
            if not (more := os.read(file, 1 << 20)):
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def returncode(self) -> int | None:
        """Wait a moment for its end -> exit code, negative for a signal; None: it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return self._process.returncode

    def last_words(self) -> str:
        """Say how the process ended, and the last line that it wrote -> one clause."""
        code = self.returncode()
        self._reader.join(timeout=5)
        how = "it still runs" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        lines = [line.decode(errors="replace").strip() for line in self._said]
        said = next((line for line in reversed(lines) if line), "")
        return f"{how}: {said[:160]}" if said else how


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that it belongs to
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
