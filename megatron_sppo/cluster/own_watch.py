"""Ends this process where its only worker makes no progress: an engine that hangs here has nobody else to end it."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from megatron_sppo.hangs import end_hanging, write_stacks

STACKS_NAME = "hang.txt"
"""In the directory of the workers' logs."""
_LONGEST_INTERVAL = 10.0


class OwnWatch:
    """Watches from a thread while its `with` block runs, but for what `paused` encloses."""

    def __init__(self, logs: Path, *, seconds: float) -> None:
        """Prepare to watch.

        Args:
            logs: directory for the stacks, made when there are any.
            seconds: without a `note`, after which the worker hangs; 0: nobody watches.
        """
        self._logs, self._seconds = Path(logs), seconds
        self._noted = time.monotonic()
        self._is_paused = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker's watchdog", daemon=True)

    def __enter__(self) -> OwnWatch:
        self.note()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._done.set()

    def note(self) -> None:
        """Note that the worker made progress."""
        self._noted = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the worker in peace: its work waits for somebody else."""
        self._is_paused = True
        try:
            yield
        finally:
            self.note()
            self._is_paused = False

    def _run(self) -> None:
        while not self._done.wait(min(self._seconds / 8, _LONGEST_INTERVAL)):
            late = time.monotonic() - self._noted
            if late > self._seconds and not self._is_paused and not self._done.is_set():
                self._end(late)

    def _end(self, late: float) -> None:
        path = self._logs / STACKS_NAME
        sys.stderr.write(write_stacks(path))
        for child in multiprocessing.active_children():  # an engine's processes
            child.kill()
        end_hanging(
            f"{Path(sys.argv[0]).name}: error: the worker in this process has made no progress for {late:.0f} s "
            f"(--worker-timeout) and is taken to hang; its stacks are in {path}. Finished work is kept: run the same "
            "command again."
        )
