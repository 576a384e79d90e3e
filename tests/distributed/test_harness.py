"""Proves the harness itself: results by rank, collectives, failures, hangs, nothing left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor, int]:
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return int(os.environ["RANK"]), total, torch.get_num_threads()


def _raise_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def _exit_hard() -> None:
    os._exit(7)


def _hang_here() -> None:
    print("about to sleep", flush=True)
    time.sleep(600)


def _start_grandchild() -> int:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return process.pid


def _has_ended(pid: int) -> bool:
    """Whether no process has this id, or only a zombie that its reaper has not collected yet."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_every_rank_returns_its_result_in_order():
    results = run_ranks(_sum_of_ranks, 4, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]
    assert all(torch.equal(total, torch.tensor([46.0])) for _, total, _ in results)
    assert [threads for _, _, threads in results] == [1, 1, 1, 1]


def test_a_raising_rank_shows_its_traceback_and_the_others_are_killed():
    started = time.monotonic()
    with pytest.raises(RankError, match="(?s)rank 1 raised.*rank one has had enough"):
        run_ranks(_raise_on_rank_one, 2)
    assert time.monotonic() - started < 60


def test_a_rank_that_dies_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(_exit_hard, 2)


def test_a_hanging_rank_is_killed_and_shows_where_it_hangs():
    with pytest.raises(RankError, match="(?s)did not finish within 5 s.*_hang_here"):
        run_ranks(_hang_here, 1, timeout=5)


def test_processes_that_a_rank_started_do_not_outlive_it():
    (grandchild,) = run_ranks(_start_grandchild, 1)
    assert _has_ended(grandchild)


def test_ranks_end_when_the_test_process_is_killed(tmp_path):
    """kill -9 of the caller in the middle of a job: server and ranks are gone seconds later."""
    program = (
        f"from tests.distributed import test_harness as t\nt.run_ranks(t._note_pid_and_hang, 2, {str(tmp_path)!r})\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    caller.kill()
    caller.wait()
    assert all(_has_ended(pid) for pid in pids)


def _note_pid_and_hang(directory: str) -> None:
    Path(directory, str(os.getpid())).touch()
    time.sleep(600)
