"""Which worker has which task. Knows nothing of processes, machines or clocks; holds the tasks under way alone."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic

from megatron_sppo.cluster.worker import TaskT
from megatron_sppo.errors import DataError, some_of

MOST_LOSSES = 3
"""Deaths of workers at a task by which the task is held to be the reason."""


class Schedule(Generic[TaskT]):
    """The tasks of one stage, each given out until it has a result."""

    def __init__(self, tasks: Iterable[TaskT]) -> None:
        """Take the tasks, which are read one by one, each when it is given out."""
        self._next: Iterator[TaskT] = iter(tasks)
        self._returned: deque[TaskT] = deque()
        self._held: dict[int, dict[int, TaskT]] = {}
        self._unfinished: dict[int, TaskT] = {}
        self._losses: dict[int, list[int]] = {}
        self._deaths_elsewhere: dict[int, int] = {}
        self._spare: TaskT | None = None

    @property
    def has_more(self) -> bool:
        """Whether a task waits to be given out."""
        if not self._returned and self._spare is None:
            self._spare = next(self._next, None)
        return bool(self._returned) or self._spare is not None

    @property
    def is_done(self) -> bool:
        """Whether every task has its result."""
        return not self._unfinished and not self.has_more

    def has_work(self, worker: int) -> bool:
        """Tell whether a worker has tasks that it has not answered."""
        return bool(self._held.get(worker))

    def give(self, worker: int, number: int) -> tuple[TaskT, ...]:
        """Give out the next tasks, those first that a dead worker had -> `number` of them, or as many as there are."""
        given: list[TaskT] = []
        while len(given) < number and self.has_more:
            if self._returned:
                task = self._returned.popleft()
            else:
                assert self._spare is not None
                task, self._spare = self._spare, None
                assert task.index not in self._unfinished, f"there are two tasks {task.index}"
                self._unfinished[task.index] = task
            self._held.setdefault(worker, {})[task.index] = task
            given.append(task)
        return tuple(given)

    def finish(self, worker: int, index: int) -> TaskT | None:
        """Enter that a worker has answered a task -> the task, or None where another has answered it before."""
        self._held.get(worker, {}).pop(index, None)
        task = self._unfinished.pop(index, None)
        if task is not None:
            self._losses.pop(index, None)
            self._deaths_elsewhere.pop(index, None)
            # A worker that was out of reach for a while may answer what has been given to another meanwhile.
            self._returned = deque(other for other in self._returned if other.index != index)
        return task

    def lose(self, worker: int, *, why: str, is_alone: bool = False) -> int:
        """Take back what a worker has, which died -> how many tasks that are.

        Args:
            why: what is known of it, for the error.
            is_alone: there is no other worker, so that it cannot be told whether it is the worker or the task.

        Raises:
            DataError: workers, more than one where there are more, have died three times at a task, and as many times
                more as others have died since elsewhere: where machines fail all over, no task is the reason.
        """
        lost = [task for task in self._held.pop(worker, {}).values() if task.index in self._unfinished]
        for task in lost:
            self._losses.setdefault(task.index, []).append(worker)
        for index in self._losses.keys() - {task.index for task in lost} if lost else ():
            self._deaths_elsewhere[index] = self._deaths_elsewhere.get(index, 0) + 1
        self._returned.extendleft(reversed(lost))
        if deadly := [task for task in lost if self._is_deadly(task.index, is_alone=is_alone)]:
            names = some_of([str(task) for task in deadly])
            raise DataError(
                f"{names}: {MOST_LOSSES} workers have died at it, the last by: {why}. "
                "See the workers' logs; finished work is kept: mend the cause and run the same command again."
            )
        return len(lost)

    def _is_deadly(self, index: int, *, is_alone: bool) -> bool:
        workers = self._losses[index]
        most = MOST_LOSSES + self._deaths_elsewhere.get(index, 0)
        return len(workers) >= most and (is_alone or len(set(workers)) > 1)
