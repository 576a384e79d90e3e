"""A worker, and its desk: what stands between a worker and the driver that is somewhere else.

The worker is the same in the driver's process and in a Ray actor. It takes tasks when it has room for them and answers
each whole; an engine takes the next one before the last has drained.

The desk has a thread for the worker and one method for the driver, `exchange`: tasks in, results out. All that passes
between the two is in its reply, so that one outstanding call per worker is enough, and nothing is lost unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError, ConversionError, DataError

LOG_BYTES_PER_REPLY = 1 << 18


class Numbered(Protocol):
    """A task or the result of one, which has its number."""

    @property
    def index(self) -> int:
        """The task's number, which no other task of the stage has."""
        ...


TaskT = TypeVar("TaskT", bound=Numbered)
TaskIn = TypeVar("TaskIn", bound=Numbered, contravariant=True)
ResultT = TypeVar("ResultT", bound=Numbered)
ResultOut = TypeVar("ResultOut", bound=Numbered, covariant=True)


class Worker(Protocol, Generic[TaskIn, ResultOut]):
    """Works tasks off, in its own process. A picklable function makes it there; heavy imports belong into that."""

    def run(self, tasks: Iterator[TaskIn], on_progress: Callable[[int, int], None]) -> Iterator[ResultOut]:
        """Work off what `tasks` has -> each task's result, once, in any order.

        Args:
            tasks: taken one by one, each when there is room. With nothing at work, taking waits for the next task; with
                something at work it never waits, and ends where nothing lies ready: finish what is at work, or ask
                again meanwhile. Where all is done, `run` is called again for what comes later.
            on_progress: call it with (units of the task finished, what they amount to) since the last call, such as
                (prompts, tokens).
        """
        ...

    def close(self) -> None:
        """Release what the worker holds."""
        ...


class WorkerCrashed(RuntimeError):
    """A fault of the program in a worker; the message holds the traceback from there."""

    @property
    def summary(self) -> str:
        """The traceback's last line."""
        return str(self).rpartition("\n")[2]


_left_behind: dict[str, Any] | None = None


def left_behind() -> dict[str, Any] | None:
    """What the worker before has left here, to be taken or added to -> None: this process ends with its worker."""
    return _left_behind


def keep_what_workers_leave() -> None:
    """Say that other workers will live in this process after the first."""
    global _left_behind
    _left_behind = {}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of a worker since its last reply."""

    life: str
    """Names the process that the worker lives in: after a restart it is another."""
    is_ready: bool = False
    """Whether the worker has started."""
    results: tuple[Any, ...] = ()
    units: int = 0
    amount: int = 0
    """Progress, as `Worker.run` reports it."""
    num_wanted: int = 0
    """Tasks that it would take now."""
    failure: Exception | None = None
    """Why the worker has ended, if it has by a fault."""
    has_ended: bool = False
    log: bytes = b""
    """What the process has written to its stdout and stderr."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A worker's process died, or cannot be reached; it may come back."""

    why: str
    is_final: bool = False
    """It will not."""


@dataclass(kw_only=True)
class _News:
    """What the next reply will hold."""

    results: list[Any] = field(default_factory=list)
    units: int = 0
    amount: int = 0
    failure: Exception | None = None
    just_ready: bool = False


class Desk:
    """Holds one worker; a Ray actor is made of it. Only `exchange` and `ping` are called from outside."""

    def __init__(
        self,
        make_worker: Callable[[], Worker[Any, Any]],
        *,
        ahead: int = 0,
        environment: Mapping[str, str | None] = MappingProxyType({}),
        log_name: str | None = None,
    ) -> None:
        """Make the desk; the worker starts, in a thread, at the first `exchange`.

        So a process whose worker dies at once has answered `ping` before, and its death is seen.

        Args:
            ahead: tasks that lie ready here beside those that the worker has taken.
            environment: variables to set, or with None to unset, before the worker's imports.
            log_name: of a file in the temporary directory, for what this process writes to stdout and stderr until a
                reply has it; None: it is left where it goes.
        """
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._make_worker, self._ahead = make_worker, ahead
        self._life = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._ready: deque[Any] = deque()
        self._news = _News()
        self._at_work: set[int] = set()
        self._is_hungry = self._is_ready = self._is_ending = self._has_ended = False
        self._log = _Log(log_name)
        self._thread: threading.Thread | None = None

    def ping(self) -> str:
        """Say that this process lives."""
        return self._life

    def exchange(
        self,
        life: str | None,
        tasks: tuple[Any, ...] = (),
        *,
        has_more: bool = True,
        is_end: bool = False,
        seconds: float = 2.0,
    ) -> Reply:
        """Take tasks; wait until there is something to say -> Reply.

        Args:
            life: the process that the driver believes to talk to. To another one tasks mean nothing, and it says so.
            has_more: whether the driver has more tasks to give, so that wanting some is something to say.
            is_end: no task will come; the worker ends when it has none.
            seconds: longest wait.
        """
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, daemon=True, name="worker")
                self._thread.start()
            if life is not None and life != self._life:
                return Reply(life=self._life, is_ready=self._is_ready, log=self._log.take())
            self._ready.extend(tasks)
            self._is_ending = self._is_ending or is_end
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_news(has_more), timeout=seconds)
            if self._has_ended:
                self._log.remove()
            news, self._news = self._news, _News()
            return Reply(
                life=self._life,
                is_ready=self._is_ready,
                results=tuple(news.results),
                units=news.units,
                amount=news.amount,
                num_wanted=self._num_wanted,
                failure=news.failure,
                has_ended=self._has_ended,
                log=self._log.take(),
            )

    @property
    def _num_wanted(self) -> int:
        return max(0, self._is_hungry + self._ahead - len(self._ready)) if self._is_ready else 0

    def _has_news(self, has_more: bool) -> bool:
        news = self._news
        wants = has_more and self._num_wanted > 0
        return bool(news.results or news.failure or news.just_ready or self._has_ended or wants)

    def _live(self) -> None:
        """Start the worker and let it work until there is nothing more."""
        worker = failure = None
        try:
            worker = self._make_worker()
            with self._changed:
                self._is_ready = self._news.just_ready = True
                self._changed.notify_all()
            while not self._is_done():
                for result in worker.run(_Tasks(self._take), self._report):
                    with self._changed:
                        assert result.index in self._at_work, (
                            f"the worker answered task {result.index}, which it had not"
                        )
                        self._at_work.remove(result.index)
                        self._news.results.append(result)
                        self._changed.notify_all()
                assert not self._at_work, f"the worker left {len(self._at_work)} tasks without a result"
        except BaseException as error:  # noqa: BLE001 (it is raised where the driver is; sys.exit ends a thread alone)
            failure = _portable(error)
        finally:
            if worker is not None:
                with contextlib.suppress(Exception):
                    worker.close()
        with self._changed:
            self._news.failure, self._has_ended = failure, True
            self._changed.notify_all()

    def _is_done(self) -> bool:
        with self._changed:
            return self._is_ending and not self._ready

    def _take(self) -> Any:
        """Take the next task; with none at work, wait for it -> None where none will come, or none lies ready."""
        with self._changed:
            if self._is_hungry == bool(self._ready):  # an engine asks at every step
                self._is_hungry = not self._ready
                self._changed.notify_all()
            if not self._at_work:
                self._changed.wait_for(lambda: self._ready or self._is_ending)
            if not self._ready:
                return None
            self._is_hungry = False
            task = self._ready.popleft()
            self._at_work.add(task.index)
            self._changed.notify_all()
            return task

    def _report(self, units: int, amount: int) -> None:
        with self._changed:
            self._news.units += units
            self._news.amount += amount


class _Tasks:
    """The tasks as the worker takes them. It may be asked again after it has ended, as iterators are not."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take = take

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        task = self._take()
        if task is None:
            raise StopIteration
        return task


class _Log:
    """What this process writes to stdout and stderr, until the driver has it.

    It lies in a named file, so that the next process of this worker on the same machine can hand on the last words of
    one that was killed.
    """

    def __init__(self, name: str | None) -> None:
        """Send both, those of C libraries and child processes too, to the file of that name; None: leave them."""
        self._path = None if name is None else Path(tempfile.gettempdir(), name)
        if self._path is None:
            return
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._offset = 0
        for descriptor in (1, 2):
            os.dup2(self._file, descriptor)

    def take(self) -> bytes:
        """Take what was written since -> the beginning of it. What was taken does not stay on the disk."""
        if self._path is None:
            return b""
        text = os.pread(self._file, LOG_BYTES_PER_REPLY, self._offset)
        self._offset += len(text)
        if text and os.fstat(self._file).st_size == self._offset:
            os.ftruncate(self._file, 0)  # writers append
            self._offset = 0
        return text

    def remove(self) -> None:
        """Remove the file: no other process will want it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _portable(error: BaseException) -> Exception:
    """Make an error of what the driver can raise: those that a user can mend as they are, others with traceback."""
    for kind in (ConfigError, DataError, ConversionError):
        if isinstance(error, kind):
            return kind(str(error))
    if isinstance(error, OSError):
        is_plain = type(error).__module__ == "builtins"
        return error if is_plain else OSError(one_line(error))  # others do not all come back out of a pickle
    return WorkerCrashed("".join(traceback.format_exception(error)).rstrip())
