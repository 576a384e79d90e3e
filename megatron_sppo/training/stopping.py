"""SIGTERM, remembered until the ranks have told each other between two steps."""

import signal
import time
from types import FrameType

SIGTERM_EXIT_CODE = 143
"""What a run that was asked to stop exits with, after it saved what it had (128 + SIGTERM)."""


class StopRequest:
    """Whether this rank was asked to stop, from when this is made on: SIGTERM no longer ends the process by itself."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        """`time.monotonic()` of the first signal; None: there was none."""
        self._previous = signal.signal(signal.SIGTERM, self._remember)

    @property
    def asked(self) -> bool:
        """A signal came."""
        return self.asked_at is not None

    def _remember(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()

    def ignore_the_next(self) -> None:
        """Let no further signal end the process while it ends by itself: whoever asked may ask again."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python takes its own handlers away before it is gone

    def restore(self) -> None:
        """Give the signal back to whoever had it."""
        signal.signal(signal.SIGTERM, self._previous)
