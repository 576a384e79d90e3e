"""Fake workers and a team of them in threads, for tests of the pool."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sppo.cluster.worker import Desk, Lost, Reply


@dataclass(frozen=True)
class Task:
    index: int

    def __str__(self) -> str:
        return f"task {self.index}"


@dataclass(frozen=True)
class Result:
    index: int
    square: int


class Squarer:
    """Answers one task after the other."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def run(self, tasks: Iterator[Task], on_progress: Callable[[int, int], None]) -> Iterator[Result]:
        for task in tasks:
            time.sleep(self._seconds)
            on_progress(1, 10)
            yield Result(task.index, task.index**2)

    def close(self) -> None:
        pass


class Stream:
    """Has several tasks at work at once, as an engine does, and steps them all.

    It makes no step before its slots were full once, so that what the test sees is no race with the driver; a driver
    that never fills them is waited for a while.
    """

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self.most_at_work = 0

    def run(self, tasks: Iterator[Task], on_progress: Callable[[int, int], None]) -> Iterator[Result]:
        at_work: dict[int, int] = {}
        patience = time.monotonic() + 30
        while True:
            while len(at_work) < self._slots and (task := next(tasks, None)) is not None:
                at_work[task.index] = 3
            self.most_at_work = max(self.most_at_work, len(at_work))
            if not at_work:
                return
            time.sleep(0.002)
            if self.most_at_work < self._slots and time.monotonic() < patience:
                continue
            for index in list(at_work):
                at_work[index] -= 1
                if not at_work[index]:
                    del at_work[index]
                    on_progress(1, 10)
                    yield Result(index, index**2)

    def close(self) -> None:
        pass


class Progress:
    def __init__(self) -> None:
        self.units = self.amount = 0
        self.seen: list[tuple[int, int]] = []

    def add(self, units: int, amount: int) -> None:
        self.units += units
        self.amount += amount

    def workers(self, num_alive: int, num_workers: int) -> None:
        self.seen.append((num_alive, num_workers))


class ThreadTeam:
    """Desks in this process; `kill` drops one as a dead process would, and the next is back at once."""

    def __init__(self, make_worker: Callable[[], Any], num_workers: int, *, ahead: int = 0) -> None:
        self.num_workers, self._make, self._ahead = num_workers, make_worker, ahead
        self.desks = {number: Desk(make_worker, ahead=ahead) for number in range(num_workers)}
        self._came: queue.SimpleQueue[tuple[int, Desk, Reply]] = queue.SimpleQueue()
        self._dead: list[int] = []
        self.dismissed: list[int] = []
        self.is_closed = False

    def exchange(self, worker: int, life: str | None, tasks: tuple = (), *, has_more: bool, is_end: bool) -> None:
        desk = self.desks[worker]

        def call() -> None:
            self._came.put((worker, desk, desk.exchange(life, tasks, has_more=has_more, is_end=is_end, seconds=0.2)))

        threading.Thread(target=call, daemon=True).start()

    def kill(self, worker: int) -> None:
        """A call that is under way never comes back; the caller learns it at the next `replies`."""
        self.desks[worker] = Desk(self._make, ahead=self._ahead)
        self._dead.append(worker)

    def replies(self, seconds: float) -> list[tuple[int, Reply | Lost]]:
        came: list[tuple[int, Reply | Lost]] = []
        while self._dead:
            worker = self._dead.pop()
            came.append((worker, Lost(why="killed")))
            self.exchange(worker, None, has_more=True, is_end=False)
        if not came:
            try:
                worker, desk, reply = self._came.get(timeout=seconds)
            except queue.Empty:
                return came
            if desk is self.desks[worker]:
                came.append((worker, reply))
        return came

    def restart(self, worker: int) -> None:
        self.desks[worker] = Desk(self._make, ahead=self._ahead)
        self.exchange(worker, None, has_more=True, is_end=False)

    def missing(self) -> str:
        return "nothing"

    def dismiss(self, worker: int) -> None:
        self.dismissed.append(worker)

    def close(self, *, is_orderly: bool) -> None:
        self.is_closed = True
        for desk in self.desks.values():
            desk.exchange(None, is_end=True, seconds=0.0)
