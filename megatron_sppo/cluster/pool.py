"""A stage's tasks, worked off by a pool: by one worker in this process, or by Ray actors on one machine or many.

The driver hands tasks out, takes results back and is the only one to write. What a dead worker had is given out again,
first of all; a task that three workers died at ends the stage. Who worked off a task shows nowhere in its result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.kept import run_kept
from megatron_sppo.cluster.own_watch import OwnWatch
from megatron_sppo.cluster.schedule import MOST_LOSSES, Schedule
from megatron_sppo.cluster.worker import Lost, Numbered, Reply, ResultT, TaskT, Worker, WorkerCrashed
from megatron_sppo.errors import DataError

logger = logging.getLogger(__name__)

MOST_DEATHS = 5
"""Of a worker that finishes nothing in between; then it is the worker, or its machine."""
NO_WORKER_WARNING_SECONDS = 30.0
NO_WORKER_SECONDS = 900.0
"""A stage without any living worker warns, and ends, after so long."""


class ProgressReport(Protocol):
    """What a stage shows of its progress. `StageProgress` is one."""

    def add(self, units: int, amount: int) -> None:
        """Count what was done since the last call; units are negative where a dead worker's are to be done again."""
        ...

    def workers(self, num_alive: int, num_workers: int) -> None:
        """Say how many workers live."""
        ...


class Team(Protocol):
    """Workers out of this process, each with a desk, by numbers from 0. At most one call to each is under way."""

    num_workers: int

    def exchange(
        self, worker: int, life: str | None, tasks: tuple[Numbered, ...] = (), *, has_more: bool, is_end: bool
    ) -> None:
        """Begin a call of a worker's `Desk.exchange`."""
        ...

    def replies(self, seconds: float) -> list[tuple[int, Reply | Lost]]:
        """Wait for calls to end, no longer than that -> (worker, what came). Of a lost worker the next is when it is
        back: a Reply of its new life."""
        ...

    def missing(self) -> str:
        """Say what is missing where no worker lives -> text."""
        ...

    def restart(self, worker: int) -> None:
        """End a worker's process, whether it answers or hangs, and start it anew; its next reply is of its new life."""
        ...

    def dismiss(self, worker: int) -> None:
        """Give a worker up."""
        ...

    def close(self, *, is_orderly: bool) -> None:
        """End all workers."""
        ...


def run_tasks(
    make_worker: Callable[[], Worker[TaskT, ResultT]],
    tasks: Iterable[TaskT],
    *,
    pool: PoolConfig,
    num_gpus: int,
    progress: ProgressReport,
    logs: Path,
    ahead: int = 0,
    size_of: Callable[[TaskT], int] = lambda _: 1,
    kept: str | None = None,
) -> Generator[tuple[TaskT, ResultT], None, None]:
    """Work a stage off -> (task, its result), each once, as soon as it is there, in any order.

    Args:
        make_worker: makes a worker in the process that it is to live in; picklable where that is another.
        tasks: read one by one, each when it is given out.
        num_gpus: GPUs that a worker takes, where there are any.
        progress: told what the workers report.
        logs: directory for what each worker writes to stdout and stderr; a worker in this process writes to ours.
        ahead: tasks that lie ready with a worker beside those that it has taken.
        size_of: units of progress that a task is.
        kept: where a process is kept for the one worker that would live in this one (`kept.kept_address`).

    Raises:
        ConfigError, DataError, ConversionError, OSError: what a worker raises, at its start or later; a pool that
            cannot be had; a task that three workers died at; no worker left.
        WorkerCrashed: a fault of the program, three times at the same task, or wherever it starts.
    """
    if pool.is_embedded and kept is not None:
        progress.workers(1, 1)
        yield from run_kept(kept, make_worker, tasks, progress.add, seconds=pool.worker_timeout)
        return
    if pool.is_embedded:
        yield from _run_here(make_worker, tasks, progress, watch=OwnWatch(logs, seconds=pool.worker_timeout))
        return
    from megatron_sppo.cluster.ray_team import RayTeam

    team = RayTeam(make_worker, pool=pool, num_gpus=num_gpus, logs=logs, ahead=ahead)
    yield from drive(team, tasks, progress=progress, size_of=size_of, timeout=pool.worker_timeout)


def logs_directory(output: Path) -> Path:
    """Name the directory of the workers' logs: beside the output that they work for."""
    output = Path(output)
    return output.with_name(f"{output.name}.logs")


def _run_here(
    make_worker: Callable[[], Worker[TaskT, ResultT]],
    tasks: Iterable[TaskT],
    progress: ProgressReport,
    *,
    watch: OwnWatch,
) -> Iterator[tuple[TaskT, ResultT]]:
    at_work = dict[int, TaskT]()

    def taken() -> Iterator[TaskT]:
        for task in tasks:
            at_work[task.index] = task
            watch.note()
            yield task

    def report(units: int, amount: int) -> None:
        watch.note()
        progress.add(units, amount)

    with watch:
        worker = make_worker()
        try:
            progress.workers(1, 1)
            for result in worker.run(taken(), report):
                with watch.paused():
                    yield at_work.pop(result.index), result
        finally:
            worker.close()


@dataclass(kw_only=True)
class _Member:
    """What the driver knows of a worker."""

    life: str | None = None
    is_ready: bool = False
    num_deaths: int = 0
    """Since it has finished a task."""
    open_units: int = 0
    """Reported units of tasks that it has not finished."""
    heard_at: float = 0.0
    progressed_at: float = 0.0
    """By the driver's clock."""

    def hangs(self, now: float, timeout: float, *, has_work: bool) -> str | None:
        """Say why it is taken to hang, if it is -> one clause, or None."""
        if not timeout or self.life is None:  # one that has not answered yet may wait for its place
            return None
        if now - self.heard_at > timeout:
            return f"it has not answered for {now - self.heard_at:.0f} s (--worker-timeout)"
        if now - self.progressed_at > timeout and (has_work or not self.is_ready):
            doing = "its work" if self.is_ready else "its start"
            return f"it made no progress with {doing} for {now - self.progressed_at:.0f} s (--worker-timeout)"
        return None


@dataclass(kw_only=True)
class _Roll:
    """The members of a team."""

    members: dict[int, _Member] = field(default_factory=dict)

    @property
    def num_ready(self) -> int:
        """Workers that have started."""
        return sum(member.is_ready for member in self.members.values())

    @property
    def num_alive(self) -> int:
        """Workers whose process answers, be it that they are still starting."""
        return sum(member.life is not None for member in self.members.values())


def drive(
    team: Team,
    tasks: Iterable[TaskT],
    *,
    progress: ProgressReport,
    size_of: Callable[[TaskT], int] = lambda _: 1,
    clock: Callable[[], float] = time.monotonic,
    timeout: float = 0.0,
) -> Iterator[tuple[TaskT, Any]]:
    """Work a stage off with a team -> as `run_tasks`. The team is closed at the end, however it comes.

    Args:
        timeout: seconds after which a worker that has said or done nothing is ended and started anew; 0: never.
    """
    schedule, roll = Schedule(tasks), _Roll(members={number: _Member() for number in range(team.num_workers)})
    is_orderly = False
    try:
        for worker in roll.members:
            team.exchange(worker, None, has_more=True, is_end=False)
        patience = _Patience(clock)
        progress.workers(0, len(roll.members))
        while not schedule.is_done:
            replies, now = team.replies(1.0), clock()  # what is done with them may take long
            silent = roll.members.keys() - {worker for worker, _ in replies}
            _end_those_that_hang(silent, now, timeout, schedule, roll, team, progress)
            for worker, reply in replies:
                member = roll.members.get(worker)
                if member is None:
                    continue
                if isinstance(reply, Lost):
                    _lose(worker, member, reply, schedule, roll, team, progress)
                    continue
                is_idle = reply.is_ready and not schedule.has_work(worker)
                member.heard_at = clock()
                if reply.units or reply.amount or reply.results or is_idle or reply.life != member.life:
                    member.progressed_at = member.heard_at
                _accept(worker, member, reply, schedule, progress)
                for result in reply.results:
                    task = schedule.finish(worker, result.index)
                    if task is not None:
                        member.open_units -= size_of(task)
                        member.num_deaths = 0
                        yield task, result
                if reply.failure is not None:
                    if not isinstance(reply.failure, WorkerCrashed):
                        raise reply.failure
                    team.restart(worker)  # an engine may break down in a process that lives
                    _lose(
                        worker, member, Lost(why=reply.failure.summary), schedule, roll, team, progress, reply.failure
                    )
                    continue
                if _end_those_that_hang([worker], now, timeout, schedule, roll, team, progress):
                    continue
                given = schedule.give(worker, reply.num_wanted)
                team.exchange(worker, member.life, given, has_more=schedule.has_more, is_end=False)
                progress.workers(roll.num_ready, len(roll.members))
            patience.check(roll.num_alive, team)
        is_orderly = True
    finally:
        team.close(is_orderly=is_orderly)


def _accept(worker: int, member: _Member, reply: Reply, schedule: Schedule[TaskT], progress: ProgressReport) -> None:
    """Enter what a reply says of the worker, but its results."""
    if member.life is not None and reply.life != member.life:  # it died and is back, between two calls
        schedule.lose(worker, why="its process ended between two calls")
        progress.add(-member.open_units, 0)
        member.open_units, member.is_ready = 0, False
        member.num_deaths += 1
    member.life, member.is_ready = reply.life, reply.is_ready
    assert reply.failure is not None or not reply.has_ended, "a worker ended before it was told to"
    member.open_units += reply.units
    if reply.units or reply.amount:
        progress.add(reply.units, reply.amount)


def _end_those_that_hang(
    workers: Iterable[int],
    now: float,
    timeout: float,
    schedule: Schedule[TaskT],
    roll: _Roll,
    team: Team,
    progress: ProgressReport,
) -> bool:
    """End those of some workers that have said or done nothing for too long -> whether there were any."""
    found = False
    for worker in workers:
        member = roll.members[worker]
        why = member.hangs(now, timeout, has_work=schedule.has_work(worker))
        if why is not None:
            team.restart(worker)
            _lose(worker, member, Lost(why=why), schedule, roll, team, progress)
            found = True
    return found


def _lose(
    worker: int,
    member: _Member,
    lost: Lost,
    schedule: Schedule[TaskT],
    roll: _Roll,
    team: Team,
    progress: ProgressReport,
    fault: WorkerCrashed | None = None,
) -> None:
    """Take back what a dead worker had; give up one that does not start, or dies where others work.

    Args:
        fault: of the program, in the worker's process: raised in place of what says no more than that workers die.
    """
    try:
        num_lost = schedule.lose(worker, why=lost.why, is_alone=len(roll.members) == 1)
    except DataError as error:
        raise fault or error from None
    progress.add(-member.open_units, 0)
    member.num_deaths += 1
    logger.warning("worker %d died (%s): %d tasks are given out again", worker, lost.why, num_lost)
    cannot_start = not member.is_ready and member.num_deaths >= MOST_LOSSES
    dies_alone = len(roll.members) > 1 and member.num_deaths >= MOST_DEATHS
    member.life, member.is_ready, member.open_units = None, False, 0
    if lost.is_final or cannot_start or dies_alone:
        team.dismiss(worker)
        del roll.members[worker]
        logger.warning("worker %d is given up: it died %d times and finished nothing", worker, member.num_deaths)
        if not roll.members:
            raise fault or DataError(
                f"no worker is left; the last died before it had started: {lost.why}. See its log."
            )
    progress.workers(roll.num_ready, len(roll.members))


class _Patience:
    """With how long a stage without workers is borne."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = self._said = clock()

    def check(self, num_alive: int, team: Team) -> None:
        """Say from time to time that no worker lives, and give up at last.

        Raises:
            DataError: none has lived for too long.
        """
        now = self._clock()
        if num_alive:
            self._since = self._said = now
        elif now - self._since > NO_WORKER_SECONDS:
            raise DataError(
                f"no worker has answered for {NO_WORKER_SECONDS / 60:.0f} minutes: {team.missing()}. Finished work "
                "is kept: mend the cluster and run the same command again."
            )
        elif now - self._said > NO_WORKER_WARNING_SECONDS:
            self._said = now
            logger.warning("no worker answers: %s", team.missing())
