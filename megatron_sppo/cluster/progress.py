"""How far a stage is, over all its workers: one line on the terminal, and a small file that another terminal reads."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json_as, write_json
from megatron_sppo.storage import remove_stale_temporaries

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FILES = 2.0
SECONDS_BETWEEN_LINES = 60.0
"""In a log, where nobody sees a bar."""
_LONGEST_SECONDS = 360000 * 3600 - 1.0
"""That is spelled out, of what a file says."""


@dataclass(frozen=True, kw_only=True)
class ProgressNumbers:
    """What the file holds."""

    stage: str
    unit: str
    """What is counted, such as prompts."""
    done: int
    total: int
    amount_unit: str
    """What the done ones amount to, such as tokens."""
    amount: int
    """In this run; what was done before it is not in it."""
    per_second: float
    """Amount per second of this run."""
    workers: int
    workers_alive: int
    seconds: float
    """Since this run of the stage began."""
    seconds_left: float | None
    """As long as the rest takes at this rate; None: not known yet."""
    updated: float
    """Seconds since 1970."""

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.stage}: {self.done} of {self.total} {self.unit}"]
        parts.append(f"{self.per_second:.0f} {self.amount_unit}/s")
        if self.workers > 1:
            parts.append(f"{self.workers_alive} of {self.workers} workers alive")
        if self.seconds_left is not None:
            parts.append(f"{clock_time(self.seconds_left)} left")
        return ", ".join(parts)


class StageProgress:
    """Counts, shows and records; `pool.ProgressReport`."""

    def __init__(
        self,
        file: Path,
        *,
        stage: str,
        unit: str,
        total: int,
        done: int,
        amount_unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            file: written beside the output, again and again; `progress_file` names it.
            unit: of done and total, in the plural.
            done: before this run.
        """
        self._file, self._clock = file, clock
        remove_stale_temporaries(file)
        self._names = {"stage": stage, "unit": unit, "amount_unit": amount_unit}
        self._total, self._done_before, self._done, self._amount = total, done, done, 0
        self._workers = self._workers_alive = 1
        self._start = self._filed = self._said = clock()
        self._bar = tqdm(total=total, initial=done, desc=stage, unit=unit.removesuffix("s"), disable=None)
        self._file_now()

    def add(self, units: int, amount: int) -> None:
        """Count what was done since the last call."""
        self._done += units
        self._amount += amount
        self._show()

    def workers(self, num_alive: int, num_workers: int) -> None:
        """Say how many workers live."""
        changes = (num_alive, num_workers) != (self._workers_alive, self._workers)
        self._workers_alive, self._workers = num_alive, num_workers
        self._show(at_once=changes)

    def numbers(self) -> ProgressNumbers:
        """Compute what the line and the file say."""
        seconds = max(self._clock() - self._start, 1e-9)
        here = self._done - self._done_before
        return ProgressNumbers(
            **self._names,
            done=self._done,
            total=self._total,
            amount=self._amount,
            per_second=self._amount / seconds,
            workers=self._workers,
            workers_alive=self._workers_alive,
            seconds=seconds,
            seconds_left=(self._total - self._done) * seconds / here if here > 0 else None,
            updated=time.time(),
        )

    def close(self, *, is_done: bool) -> None:
        """End the line; of a stage that is done, or has done nothing, the file goes too."""
        self._bar.close()
        if is_done or not self._done:
            self._file.unlink(missing_ok=True)
        else:
            self._file_now()

    def __enter__(self) -> "StageProgress":
        """Return itself."""
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close; the stage is done if no error came."""
        self.close(is_done=kind is None)

    def _show(self, *, at_once: bool = False) -> None:
        now = self._clock()
        self._bar.n = self._done
        if at_once or now - self._filed >= SECONDS_BETWEEN_FILES:
            self._filed = now
            numbers = self._file_now()
            if not self._bar.disable:
                self._bar.set_postfix_str(_postfix(numbers), refresh=False)
                self._bar.refresh()
            elif now - self._said >= SECONDS_BETWEEN_LINES:
                self._said = now
                logger.info("%s", numbers.line())

    def _file_now(self) -> ProgressNumbers:
        numbers = self.numbers()
        write_json(self._file, asdict(numbers))
        return numbers


def progress_file(output: Path) -> Path:
    """Name the file that tells of the stage that writes `output`: hidden, beside it."""
    output = Path(output)
    return output.with_name(f".{output.name}.progress.json")


def read_progress(output: Path) -> ProgressNumbers | None:
    """Read how far the stage that writes `output` is -> None where it is done, not begun, or just ended.

    Raises:
        DataError: the file is damaged.
    """
    file = progress_file(output)
    try:
        return read_json_as(file, ProgressNumbers, remedy=f"{file} is damaged. Remove it.")
    except DataError:
        if file.exists():
            raise
        return None


def clock_time(seconds: float) -> str:
    """Spell a duration -> H:MM:SS, or M:SS."""
    minutes, rest = divmod(round(min(max(0.0, seconds), _LONGEST_SECONDS)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _postfix(numbers: ProgressNumbers) -> str:
    text = f"{numbers.per_second:.0f} {numbers.amount_unit}/s"
    return text if numbers.workers == 1 else f"{text}, {numbers.workers_alive} of {numbers.workers} workers"
