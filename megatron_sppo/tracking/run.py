"""One run, told to all its trackers at once, and never held up or stopped by one of them."""

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sppo.command_line import without_secrets
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.tracking.config import OFFLINE_NAME, TrackingConfig
from megatron_sppo.tracking.trackers import TRACKERS, Introduction, Outcome, Tracker

logger = logging.getLogger(__name__)

ID_FILE = "trackers.json"
_MOST_WAITING = 10_000
"""Steps that a tracker may be behind."""
_FINISH_SECONDS = 60.0
"""For all trackers together to take what they have not yet, at the end."""


class TrackedRun:
    """A run and its trackers, each on a thread: the run only puts down what it has to say. A `with` block ends it.

    A tracker that fails, or falls far behind, is said once and left out from then on.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.is_stopped = False
        """Set where the run was asked to stop and is to go on."""
        self._lanes = [_Lane(name, tracker) for name, tracker in trackers.items()]
        if self._lanes:
            atexit.register(self._finish, "stopped")  # of a process that ends before its `with` block begins

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell a step's metrics."""
        for lane in self._lanes:
            lane.put(lambda tracker: tracker.log(step, metrics))

    def attach(self, path: Path) -> None:
        """Hand over a file that stays as it is until the run has ended; one that does not exist is passed over."""
        for lane in self._lanes if path.is_file() else ():
            lane.put(lambda tracker: tracker.attach(path))

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish("failed" if kind else "stopped" if self.is_stopped else "finished")

    def _finish(self, outcome: Outcome) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.put(lambda tracker: tracker.finish(outcome), is_last=True)
        for lane in lanes:
            lane.join(_FINISH_SECONDS / len(lanes))


def start(
    config: TrackingConfig,
    *,
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    first_step: int = 1,
    keeps_id: bool = True,
) -> TrackedRun:
    """Start the trackers of a run, or go on with those that know it -> TrackedRun.

    Args:
        directory: that the run writes: TensorBoard's events go into its `tensorboard`, what trackers call the run into
            its trackers.json.
        kind: train, self-play or evaluate.
        settings: the run's config, as `megatron_sppo.config.to_dict` spells it.
        first_step: that will be told.
        keeps_id: a later start in the same directory goes on with the same run.

    Raises:
        ConfigError: a tracker's library is missing, or what it writes to cannot be reached.
    """
    directory = Path(directory)
    ids = _read_ids(directory / ID_FILE) if keeps_id else {}
    started: dict[str, Tracker] = {}
    for name in dict.fromkeys(config.tracker):
        introduction = Introduction(
            name=config.tracker_run_name or directory.absolute().name,
            project=config.tracker_project,
            group=config.tracker_group,
            kind=kind,
            settings=without_secrets(settings),
            first_step=first_step,
            event_dir=directory / "tensorboard",
            offline_dir=config.tracker_dir or directory / OFFLINE_NAME,
            is_offline=config.tracker_offline,
            known_as=ids.get(name),
        )
        started[name] = TRACKERS[name](introduction)
    known = ids | {name: tracker.id for name, tracker in started.items() if tracker.id}
    if keeps_id and known != ids:
        write_json(directory / ID_FILE, known, seal=True)
    return TrackedRun(started)


def _read_ids(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except DataError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ConfigError(f"{path} does not say what the trackers call this run. Remove it: they begin a new one.")
    return content


class _Lane:
    """A tracker's thread and what waits for it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._waiting: queue.Queue[tuple[Callable[[Tracker], None], bool]] = queue.Queue(maxsize=_MOST_WAITING)
        self._is_alive = True
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Tracker], None], *, is_last: bool = False) -> None:
        """Put a call down for the thread to make."""
        if not self._is_alive:
            return
        try:
            self._waiting.put_nowait((call, is_last))
        except queue.Full:
            self._give_up(f"it is {_MOST_WAITING} steps behind")

    def join(self, seconds: float) -> None:
        """Wait until the tracker has taken everything, but not for ever."""
        self._thread.join(seconds if self._is_alive else 0.0)
        if self._is_alive and self._thread.is_alive():
            self._give_up(f"it has not taken everything within {seconds:.0f} s")

    def _work(self) -> None:
        is_last = False
        while not is_last and self._is_alive:
            call, is_last = self._waiting.get()
            try:
                call(self._tracker)
            except Exception as error:  # noqa: BLE001 (another's library, on its own thread: the run does not depend on it)
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self._is_alive = False
        line = without_secrets(reason).strip().partition("\n")[0].rstrip(".")
        logger.warning(
            "tracker %s has failed and is told no more (%s). The run goes on; its files have everything",
            self._name,
            line,
        )
