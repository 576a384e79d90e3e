"""Proves the pool's bookkeeping on numbers alone: every task is given until it is answered, and answered once."""

import random
from dataclasses import dataclass

import pytest

from megatron_sppo.cluster.schedule import MOST_LOSSES, Schedule
from megatron_sppo.errors import DataError


@dataclass(frozen=True)
class Task:
    index: int

    def __str__(self) -> str:
        return f"task {self.index}"


def test_tasks_are_read_as_they_are_given_out():
    read = []

    def tasks():
        for index in range(100):
            read.append(index)
            yield Task(index)

    schedule = Schedule(tasks())
    assert [task.index for task in schedule.give(0, 3)] == [0, 1, 2]
    assert len(read) <= 4


def test_a_dead_worker_s_tasks_are_given_out_first_and_in_order():
    schedule = Schedule(Task(index) for index in range(10))
    schedule.give(0, 2), schedule.give(1, 2)
    assert schedule.lose(1, why="killed") == 2
    assert [task.index for task in schedule.give(0, 3)] == [2, 3, 4]


def test_a_task_is_finished_once_however_often_it_was_given_out():
    schedule = Schedule([Task(0)])
    schedule.give(0, 1)
    schedule.lose(0, why="out of reach")
    schedule.give(1, 1)
    assert schedule.finish(0, 0) == Task(0)  # the first worker is back with it
    assert schedule.finish(1, 0) is None
    assert schedule.is_done


def test_a_task_that_was_answered_after_all_is_not_given_out_again():
    schedule = Schedule([Task(0), Task(1)])
    schedule.give(0, 1)
    schedule.lose(0, why="out of reach")
    schedule.finish(0, 0)
    assert [task.index for task in schedule.give(1, 5)] == [1]


def test_a_task_that_three_workers_die_at_is_named():
    schedule = Schedule(Task(index) for index in range(9))
    for worker in range(MOST_LOSSES - 1):
        assert Task(0) in schedule.give(worker, 1)
        schedule.lose(worker, why="killed")
    schedule.give(7, 1)
    with pytest.raises(DataError, match="^task 0: 3 workers have died at it.*: out of memory"):
        schedule.lose(7, why="out of memory")


def test_a_task_is_not_blamed_for_one_worker_that_always_dies_unless_there_is_no_other():
    schedule = Schedule([Task(0)])
    for _ in range(9):
        schedule.give(4, 1)
        schedule.lose(4, why="killed")
    schedule.give(4, 1)
    with pytest.raises(DataError, match="^task 0: 3 workers have died"):
        schedule.lose(4, why="killed", is_alone=True)


def test_no_task_is_blamed_while_workers_die_as_often_at_others():
    """Four deaths at each of two tasks; three more at one of them alone make it the reason."""
    schedule, workers = Schedule([Task(0), Task(1)]), iter(range(100))
    for _ in range(4):
        pair = next(workers), next(workers)
        assert [len(schedule.give(worker, 1)) for worker in pair] == [1, 1]
        for worker in pair:
            schedule.lose(worker, why="power")
    schedule.give(next(workers), 2)
    schedule.finish(8, 1)
    for _ in range(2):
        schedule.lose(8, why="power")
        assert schedule.give(8, 1) == (Task(0),)
    with pytest.raises(DataError, match="^task 0: 3 workers have died at it"):
        schedule.lose(8, why="out of memory")


def test_workers_without_tasks_may_die_as_they_like():
    schedule = Schedule([Task(0)])
    for _ in range(10):
        assert schedule.lose(3, why="killed") == 0
    assert [task.index for task in schedule.give(0, 1)] == [0]


@pytest.mark.parametrize("seed", range(20))
def test_under_random_deaths_every_task_is_finished_once(seed):
    chance = random.Random(seed)
    schedule = Schedule(Task(index) for index in range(50))
    held: dict[int, list[Task]] = {worker: [] for worker in range(4)}
    losses = dict.fromkeys(range(50), 0)
    finished = []
    while not schedule.is_done:
        worker = chance.randrange(4)
        if chance.random() < 0.05 and all(losses[task.index] < MOST_LOSSES - 1 for task in held[worker]):
            schedule.lose(worker, why="killed")
            for task in held[worker]:
                losses[task.index] += 1
            held[worker] = []
        elif held[worker] and chance.random() < 0.5:
            task = held[worker].pop(chance.randrange(len(held[worker])))
            if schedule.finish(worker, task.index) is not None:
                finished.append(task.index)
        else:
            held[worker] += schedule.give(worker, chance.randrange(3))
    assert sorted(finished) == list(range(50))
