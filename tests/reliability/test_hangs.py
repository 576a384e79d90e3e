"""A rank that hangs ends the job in seconds, with a line that says which, where and in what, and the stacks of all.

Real gloo ranks are made to hang at a random step: asleep in the data, in front of a micro-batch or a save, waiting in a
collective that nobody else takes part in, or stopped by SIGSTOP; rank 0, which the others ask, among them. Not proven:
NCCL, whose messages hang on the device.
"""

import dataclasses
import random
import re
import shutil
from pathlib import Path

import pytest

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.test_layouts import PP2, TP2
from tests.distributed.test_pretrain import BASE
from tests.models import tiny_llama
from tests.reliability.hanging_ranks import Hang, train_and_hang
from tests.reliability.tally import Tally

PHASES = {
    "data": r"in data of step {step} on ",
    "micro-batch": r"in step {step}, before its first micro-batch on ",
    "collective": r"in step {step}, before its first micro-batch on ",
    "save": r"in save of step {step} on ",
    "stopped": r"in step {step}, before its first micro-batch on |in data of step {step} on |in .*",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    import_checkpoint(tiny_llama(root / "hf"), root / "megatron")
    write_dataset(root / "data", root / "hf")
    return root


def hang_of(number: int) -> tuple[Hang, str]:
    chance = random.Random(number)
    where = tuple(PHASES)[number % len(PHASES)]
    # A stopped rank 0 holds the store of these ranks, which no launcher started: its case is one of its own.
    rank = 1 if where == "stopped" and number % 2 == 0 else chance.randrange(2)
    return Hang(step=chance.randint(2, 4), rank=rank, where=where), chance.choice(["", TP2, PP2])


def test_a_rank_that_hangs_is_named_and_the_job_ends(tally: Tally, model: Path, tmp_path: Path) -> None:
    for number in tally.cases("hangs", 5, 20):
        hang, flags = hang_of(number)
        if flags == PP2 and hang.where == "collective":
            flags = ""  # stages talk one to one there, and such a message does not answer a collective
        with tally.case("hangs", f"{number}: {hang} under {flags or 'data parallelism'}"):
            root = tmp_path / str(number)
            root.mkdir()
            shutil.copytree(model / "data", root / "data")
            places = ["--load", str(model / "megatron"), "--data", str(root / "data"), "--save", str(root / "save")]
            holds_the_store = hang.where == "stopped" and hang.rank == 0
            settings = f"--no-tensorboard --save-interval {hang.step}"
            if holds_the_store:  # nobody tells the other rank how long it has hung: it waits itself
                settings += " --watchdog-seconds 30"
                hang = dataclasses.replace(hang, pretended=0)
            with pytest.raises(RankError) as error:
                run_ranks(
                    train_and_hang,
                    2,
                    [*places, *BASE.split(), *flags.split(), *settings.split()],
                    hang,
                    str(root / "stderr"),
                )
            said = {rank: Path(f"{root / 'stderr'}.{rank}").read_text().splitlines() for rank in range(2)}
            others = [rank for rank in range(2) if rank != hang.rank or hang.where != "stopped"]
            lines = [line for rank in others for line in said[rank] if "error: the job hangs" in line]
            assert lines, said
            assert "exit code 4" in str(error.value)
            if holds_the_store:
                assert "which rank 0 or its launcher holds, has not answered for 30 s" in lines[0]
                continue
            assert len(lines) == 1
            if hang.where == "stopped":
                assert f"late: rank {hang.rank} does not answer, " in lines[0]
            else:
                assert f"late: rank {hang.rank} at " in lines[0] and f"rank {1 - hang.rank}" not in lines[0]
                assert re.search(PHASES[hang.where].format(step=hang.step), lines[0]), lines[0]
            stacks = sorted(path.name for path in (root / "save" / "hangs").iterdir())
            assert stacks == [f"rank_{rank:05d}.txt" for rank in others]
            if hang.where not in ("stopped", "data"):  # the data are made by another thread
                text = (root / "save" / "hangs" / f"rank_{hang.rank:05d}.txt").read_text()
                assert "hanging_ranks.py" in text and "watchdog" in text
