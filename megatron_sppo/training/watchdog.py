"""Ends a job in which a rank hangs, and says first which one, where and in what: NCCL's and gloo's time-outs do not.

Every rank counts what it begins (`beat`): micro-batches, the optimizer, saves. All ranks count alike, so whoever has
counted least is who the others wait for. A thread of each rank tells its count through the launcher's store, by a
connection of its own; rank 0's, or another's where rank 0 does not answer, judges. Nobody waits in a step. Where the
store's holder is frozen, that thread waits for its answer as well: a second one, which asks nobody, ends the process.

On a GPU a kernel or a message that hangs shows as all ranks waiting for the gradient's norm: then all are named, and
their stacks are there.
"""

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from megatron_sppo.command_line import launch
from megatron_sppo.errors import some_of
from megatron_sppo.hangs import end_hanging, write_stacks
from megatron_sppo.training import parallel
from megatron_sppo.training.config import TrainingConfig

logger = logging.getLogger(__name__)

STACKS_DIRECTORY = "hangs"
"""Under --save: a file of stacks for each rank of a job that hung."""
_LONGEST_INTERVAL, _POLL_SECONDS = 10.0, 0.05
_WAITS_IN = (f"torch{os.sep}distributed", f"pipeline_parallel{os.sep}p2p_communication")
"""Parts of the files of functions that wait for other ranks."""

_at_work = threading.Lock()
"""Held while the thread works: a checkpoint's writers are forked, and of a lock that a thread holds just then a forked
process would wait for ever (as in `ahead`)."""
os.register_at_fork(before=_at_work.acquire, after_in_parent=_at_work.release, after_in_child=_at_work.release)


@dataclasses.dataclass(frozen=True)
class _Beat:
    """How far a rank is."""

    count: int
    phase: str
    at: float
    """`time.monotonic()`."""


_beat = _Beat(0, "start", time.monotonic())


def beat(phase: str) -> None:
    """Note that this rank begins something else, such as "optimizer of step 5". All ranks do so equally often."""
    global _beat
    _beat = _Beat(_beat.count + 1, phase, time.monotonic())


@contextlib.contextmanager
def watching(name: str, config: TrainingConfig) -> Iterator[None]:
    """Watch this job's ranks while the block runs; the process ends with EXIT_HANG where one hangs. Collective.

    Args:
        name: of the command, for the last line.
    """
    seconds = min(config.safety.watchdog_seconds, 40.0 * config.parallel.distributed_timeout_minutes)
    if not seconds:
        yield
        return
    beat("start")
    watch = _Watch(name, config.save / STACKS_DIRECTORY, parallel.store_of_its_own(), seconds=seconds)
    watch.start()
    try:
        yield
    finally:
        watch.end()


class _Watch:
    """The thread of one rank."""

    def __init__(self, name: str, directory: Path, store: Store, *, seconds: float) -> None:
        self._name, self._directory, self._store, self._seconds = name, Path(directory), store, seconds
        self._interval = min(seconds / 8, _LONGEST_INTERVAL)
        self._place, self._host = launch(), socket.gethostname()
        self._done = threading.Event()
        self._heard: dict[int, tuple[Any, float]] = {}
        self._number = 0
        self._answers, self._refusal = 0, "no reply"
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._second = threading.Thread(target=self._watch_the_store, name="watchdog of the store", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()
        self._second.start()

    def end(self) -> None:
        """Stop; whoever still watches is told that this rank has done."""
        self._done.set()
        self._thread.join(timeout=self._interval)
        with contextlib.suppress(RuntimeError):
            self._tell(has_done=True)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            with _at_work:
                try:
                    self._look()
                except RuntimeError as error:  # of the store: whoever holds it has ended, or does not answer
                    self._refusal = str(error).splitlines()[0]

    def _watch_the_store(self) -> None:
        """End this process where the store has not answered for too long: torch waits for a frozen one without end.

        Time is counted by turns of this thread: none goes by while this process itself is stopped.
        """
        silent, heard = 0, 0
        while not self._done.wait(self._interval):
            silent, heard = (silent + 1 if self._answers == heard else 0), self._answers
            if silent * self._interval > self._seconds:
                self._end_without_store()

    def _has(self, key: str) -> bool:
        has = bool(self._store.check([key]))
        self._answers += 1
        return has

    def _look(self) -> None:
        if sys.__stderr__ is not None:  # where even this thread cannot run: Python's own lock is held by what hangs
            faulthandler.dump_traceback_later(self._seconds + 3 * self._interval, file=sys.__stderr__)
        self._tell()
        if self._has("verdict"):
            self._end_with(json.loads(self._store.get("verdict")))
        ranks = range(self._place.world_size) if self._place.rank == 0 else range(1)
        self._listen(ranks)
        if not (late := self._late_of(ranks)):
            return
        if self._place.rank != 0:
            self._listen(range(self._place.world_size))
            late = self._late_of(range(self._place.world_size))
        verdict = {"judge": self._place.rank, "ages": late}
        self._store.compare_set("verdict", "", json.dumps(verdict))
        self._end_with(json.loads(self._store.get("verdict")))

    def _tell(self, *, has_done: bool = False) -> None:
        self._number += 1
        now = _beat
        words = [self._number, now.count, now.phase, time.monotonic() - now.at, self._host, has_done]
        self._store.set(f"beat {self._place.rank}", json.dumps(words))

    def _listen(self, ranks: range) -> None:
        """Read what ranks told last, and note when it was that they told something new."""
        told = list(ranks) if len(self._heard) >= len(ranks) else self._known("beat", ranks)
        for rank, text in zip(told, self._store.multi_get([f"beat {rank}" for rank in told]), strict=True):
            words = json.loads(text)
            if rank not in self._heard or self._heard[rank][0][0] != words[0]:
                self._heard[rank] = words, time.monotonic()

    def _known(self, what: str, ranks: range) -> list[int]:
        return [rank for rank in ranks if self._has(f"{what} {rank}")]

    def _late_of(self, ranks: range) -> dict[int, float]:
        """Find ranks that have not counted for too long -> {rank: seconds}."""
        now, late = time.monotonic(), {}
        for rank in ranks:
            words, at = self._heard.get(rank, (None, now))
            if words is not None and not words[5]:
                age = words[3] + now - at
                if age > self._seconds:
                    late[rank] = age
        return late

    def _end_with(self, verdict: dict[str, Any]) -> None:
        """Write this rank's stacks, tell where it is, let the judge speak, and end the process."""
        self._write_stacks()
        self._store.set(f"stack {self._place.rank}", json.dumps(self._position()))
        patience = time.monotonic() + min(10.0, max(2.0, 2 * self._interval))
        if verdict["judge"] == self._place.rank:
            ranks = range(self._place.world_size)
            while time.monotonic() < patience and len(self._known("stack", ranks)) < len(ranks):
                time.sleep(_POLL_SECONDS)
            self._listen(ranks)
            self._say(verdict["ages"])
            self._store.set("said", "")
            time.sleep(4 * _POLL_SECONDS)  # the others end by themselves, rather than by this one's messages
        with contextlib.suppress(RuntimeError):  # the store's holder has left already
            while time.monotonic() < patience + 1 and not self._has("said"):
                time.sleep(_POLL_SECONDS)
        end_hanging("")  # forked writers die with this process (saving.py)

    def _say(self, ages: dict[str, float]) -> None:
        """Name the ranks that the others wait for, with their stacks: the last line of the job."""
        stacks: dict[int, dict[str, Any] | None] = {}
        for rank in range(self._place.world_size):
            stacks[rank] = json.loads(self._store.get(f"stack {rank}")) if self._has(f"stack {rank}") else None
        silent = [rank for rank, stack in stacks.items() if stack is None and not self._has_done(rank)]
        found = silent or self._furthest_behind({rank: stack for rank, stack in stacks.items() if stack is not None})
        clauses, age = [], max(ages.values())
        for rank in found:
            words, stack = self._heard.get(rank, (None, 0.0))[0], stacks[rank]
            phase = f"in {words[2]} on {words[4]}" if words is not None else "before its first word"
            where = "does not answer" if stack is None else f"at {stack['where']}"
            clauses.append(f"rank {rank} {where}, {phase}")
            if stack is not None:
                sys.stderr.write(f"rank {rank} on {stack['host']}, {stack['phase']}:\n{stack['text']}\n")
        verb = "is" if len(found) == 1 else "are"
        sys.stderr.write(
            f"{self._name}: error: the job hangs: no progress for {age:.0f} s (--watchdog-seconds "
            f"{self._seconds:g}), and {verb} late: {some_of(clauses)}. The stacks of all ranks are in "
            f"{self._directory}. Look at that machine, or take it out of the job, and run the same command again.\n"
        )
        sys.stderr.flush()

    def _has_done(self, rank: int) -> bool:
        return rank in self._heard and bool(self._heard[rank][0][5])

    @staticmethod
    def _furthest_behind(stacks: dict[int, dict[str, Any]]) -> list[int]:
        """Find who has counted least, of those who do not wait for others if there are such -> ranks."""
        least = min(stack["count"] for stack in stacks.values())
        behind = [rank for rank, stack in stacks.items() if stack["count"] == least]
        return [rank for rank in behind if not stacks[rank]["waits"]] or behind

    def _position(self) -> dict[str, Any]:
        """Tell where the main thread is -> JSON dict."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        waits = any(part in entry.filename for entry in stack[-4:] for part in _WAITS_IN)
        last = stack[-1] if stack else None
        return {
            "count": _beat.count,
            "phase": _beat.phase,
            "host": self._host,
            "waits": waits,
            "where": f"{Path(last.filename).name}:{last.lineno} ({last.name})" if last is not None else "its end",
            "text": "".join(traceback.format_list(stack[-12:])).rstrip(),
        }

    def _write_stacks(self) -> None:
        title = f"rank {self._place.rank} on {self._host}, pid {os.getpid()}, in {_beat.phase}"
        write_stacks(self._directory / f"rank_{self._place.rank:05d}.txt", title=title)

    def _end_without_store(self) -> None:
        """Say that nobody can be asked; every rank does."""
        self._write_stacks()
        holder = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        end_hanging(
            f"{self._name}: error: the job hangs: the store at {holder}, which rank 0 or its launcher holds, has not "
            f"answered for {self._seconds:.0f} s ({self._refusal}), and rank {self._place.rank} is in {_beat.phase}. "
            f"Its stacks are in {self._directory}. Look at that machine, and run the same command again."
        )
