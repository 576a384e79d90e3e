"""Ranks that train and hang: asleep in the data, asleep in a micro-batch, not there for a collective, stopped."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.distributed.worlds import pretrain

FOREVER = 3600.0


@dataclasses.dataclass(frozen=True)
class Hang:
    """What one rank does at a step."""

    step: int
    rank: int
    where: str
    """data: the batches never come. micro-batch: asleep in front of a forward pass. collective: it waits in one that
    nobody else takes part in. save: asleep in front of a save. stopped: SIGSTOP, no thread of it runs."""
    pretended: float = 1197
    """Seconds for which it says that it has hung already, of the 1200 that the watchdog waits: the test need not, and a
    machine that is slow is not taken for one that hangs."""


def train_and_hang(argv: list[str], hang: Hang, stderr: str) -> int:
    """Run the script on a rank that may hang; what it says goes to `stderr`, a file for each rank -> exit code."""
    from megatron_sppo.training import batches, loop, saving, watchdog

    watchdog._LONGEST_INTERVAL = 0.3
    rank = int(os.environ["RANK"])
    file = os.open(f"{stderr}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    if rank == hang.rank:
        original_step, original_plan = loop._step, batches.Batches.plan_of
        original_save = saving.Saver.save

        def hang_now() -> None:
            watchdog._beat = dataclasses.replace(watchdog._beat, at=watchdog._beat.at - hang.pretended)
            if hang.where == "stopped":
                time.sleep(1)  # its thread tells that yet
                os.kill(os.getpid(), signal.SIGSTOP)
            if hang.where == "collective":
                torch.distributed.all_reduce(torch.zeros(1))
            time.sleep(FOREVER)

        def step_that_hangs(*arguments: Any, step: int, **rest: Any) -> Any:
            if step == hang.step and hang.where in ("micro-batch", "collective", "stopped"):
                hang_now()
            return original_step(*arguments, step=step, **rest)

        def plan_that_hangs(self: Any, rows: Any, reference_GK: Any = None) -> Any:
            if hang.where == "data" and reference_GK is not None and (rows == self.rows_of(hang.step)).all():
                while watchdog._beat.phase != f"data of step {hang.step}":  # the steps before are under way yet
                    time.sleep(0.01)
                hang_now()
            return original_plan(self, rows, reference_GK)

        def save_that_hangs(self: Any, *, wait: bool) -> Path:
            if hang.where == "save":
                hang_now()
            return original_save(self, wait=wait)

        loop._step, saving.Saver.save = step_that_hangs, save_that_hangs
        batches.Batches.plan_of = plan_that_hangs  # type: ignore[method-assign]
    return pretrain(argv)
