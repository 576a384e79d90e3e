"""Proves a process that is kept for the workers of several stages: what one leaves the next finds, an error of one does
not reach the next, and the process is gone with its owner's block, or with a stage that goes away in mid-work.

With workers that count; vLLM's engine in their place is in tests/e2e/test_self_play_adapters.py.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from megatron_sppo.cluster.kept import kept_address, run_kept
from megatron_sppo.cluster.worker import left_behind
from megatron_sppo.errors import DataError
from megatron_sppo.selfplay.process import kept_process


@dataclass(frozen=True)
class Task:
    index: int


@dataclass(frozen=True)
class Result:
    index: int
    pid: int
    num_before: int
    """Workers that this process has had before."""


class Counter:
    """Refuses task 13."""

    def __init__(self) -> None:
        place = left_behind()
        assert place is not None
        self.num_before = place.pop("workers", 0)

    def run(self, tasks: Iterator[Task], on_progress: Callable[[int, int], None]) -> Iterator[Result]:
        for task in tasks:
            if task.index == 13:
                raise DataError("task 13")
            if task.index == 99:
                time.sleep(600)
            on_progress(1, 10)
            yield Result(task.index, os.getpid(), self.num_before)

    def close(self) -> None:
        place = left_behind()
        assert place is not None
        place["workers"] = self.num_before + 1


def work_off(*numbers: int) -> tuple[list[Result], int]:
    """Have a worker do tasks -> their results, what they amount to."""
    address, amounts = kept_address(), list[int]()
    assert address is not None
    done = [*run_kept(address, Counter, [Task(number) for number in numbers], lambda _, amount: amounts.append(amount))]
    assert all(task.index == result.index for task, result in done)
    return [result for _, result in done], sum(amounts)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_of_three_stages_live_in_one_process_which_ends_with_the_block(tmp_path: Path) -> None:
    pids: list[int] = []
    with kept_process(tmp_path / "logs/engine.log", on_start=pids.append):
        first, amount = work_off(0, 1, 2, 3, 4)
        assert [result.index for result in first] == [0, 1, 2, 3, 4] and amount == 50
        with pytest.raises(DataError, match="task 13"):
            work_off(0, 13)
        last, _ = work_off(0)
        nothing, _ = work_off()
        assert not nothing
    assert {result.pid for result in (*first, *last)} == set(pids)
    assert [first[0].num_before, last[0].num_before] == [0, 2]
    assert kept_address() is None and not is_alive(pids[0])


def test_a_stage_that_goes_away_in_mid_work_takes_the_process_along_and_the_next_stage_is_told(tmp_path: Path) -> None:
    pids: list[int] = []
    with kept_process(tmp_path / "engine.log", on_start=pids.append):
        address = kept_address()
        assert address is not None
        with Client(address, "AF_UNIX") as stage:
            stage.send(Counter)
            stage.send(((Task(99),), False))
            stage.recv()
        deadline = time.monotonic() + 60
        while is_alive(pids[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(pids[0])
        with pytest.raises(DataError, match="has ended: see logs/engine.log"):
            work_off(0)


def test_the_process_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            with kept_process(
                tmp_path / "engine.log", on_start=lambda pid: print(pid, file=open(writes, "w"), flush=True)
            ):
                time.sleep(600)
        finally:
            os._exit(1)
    kept = int(os.read(reads, 20))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    deadline = time.monotonic() + 60
    while is_alive(kept) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(kept)
