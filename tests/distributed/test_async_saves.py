"""Saves shared by data-parallel ranks, saves in the background, and saves of earlier versions: all resume bit for bit.

Each run is examples/pretrain_sppo.py itself, forked from what the harness has imported, so that many lives cost
little. What one rank writes is in tests/unit/training/test_saving.py; SIGTERM is in tests/e2e.
"""

import contextlib
import errno
import math
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import SHARDED, SP, TP2
from tests.distributed.test_pretrain import BASE, forget_after, losses, metrics, responses
from tests.distributed.worlds import pretrain
from tests.reliability.tally import Tally
from tests.sharded_saves import save_by_megatron_core

STEPS = 8
RUN = "--lr 1e-4 --eta 100 --no-tensorboard"

Start = Callable[..., list[int]]


@pytest.fixture
def run(untied: Path, tmp_path: Path) -> Start:
    """Run a function of the command line in a world of ranks -> what each returned."""
    write_dataset(tmp_path / "data", untied.parent / "hf")

    def start(save: Path, flags: str, *, world_size: int = 1, function: Callable[..., int] = pretrain) -> list[int]:
        places = ["--load", str(untied), "--data", str(tmp_path / "data"), "--save", str(save)]
        return run_ranks(function, world_size, [*places, *BASE.split(), *RUN.split(), *with_steps(flags)])

    return start


def with_steps(flags: str) -> list[str]:
    return ["--train-iters", str(STEPS), *flags.split()]


def numbers(save: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in metrics(save)]


def written_by(checkpoint: Path) -> dict[str, int]:
    """Bytes of the data files that each kind and rank has written, such as {"__0": 1, "optimizer__1": 2}."""
    sizes: dict[str, int] = {}
    for path in checkpoint.glob("*.distcp"):
        writer = path.name.rpartition("_")[0]
        sizes[writer] = sizes.get(writer, 0) + path.stat().st_size
    return sizes


@pytest.mark.parametrize("flags", ["", SHARDED])
def test_data_parallel_ranks_share_what_is_to_be_written_and_nothing_is_written_twice(
    run: Start, tmp_path: Path, flags: str
) -> None:
    run(tmp_path / "one", f"{flags} --train-iters 1")
    run(tmp_path / "two", f"{flags} --train-iters 1", world_size=2)
    one, two = (written_by(tmp_path / name / "iter_0000001") for name in ("one", "two"))
    assert one.keys() == {"__0", "optimizer__0"} and two.keys() == {*one, "__1", "optimizer__1"}
    for kind in ("", "optimizer"):
        whole, parts = one[f"{kind}__0"], [two[f"{kind}__{rank}"] for rank in (0, 1)]
        # A chunk that is cut in two has two headers of some 1 KiB.
        assert whole <= sum(parts) < 1.1 * whole
        assert max(parts) < 0.7 * whole
    places = pickle.loads((tmp_path / "two/iter_0000001/.metadata").read_bytes()).storage_data.values()
    assert sum(place.length for place in places) == sum(two.values())


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, "--async-save"),
        (2, f"--async-save {SHARDED} --params-dtype bfloat16"),
        (2, f"--async-save --tensor-model-parallel-size 2 {SP}"),
    ],
)
def test_a_run_resumed_from_a_save_in_the_background_is_bit_exact(
    run: Start, tmp_path: Path, world_size: int, flags: str
) -> None:
    save = tmp_path / "save"
    flags += " --save-interval 3"
    run(save, flags, world_size=world_size)
    expected, order = numbers(save), responses(save)
    assert len(list(save.glob("iter_*"))) == math.ceil(STEPS / 3) and len(expected) == STEPS
    assert not list(save.glob(".iter_*"))
    forget_after(save, 3)
    assert run(save, flags, world_size=world_size) == [0] * world_size
    assert numbers(save) == expected and responses(save) == order


def test_a_run_resumes_in_another_layout_from_a_save_in_the_background(run: Start, tmp_path: Path) -> None:
    save = tmp_path / "save"
    run(save, f"--async-save --save-interval 3 {SHARDED}", world_size=2)
    expected, order = losses(save), responses(save)
    forget_after(save, 3)
    assert run(save, f"--async-save --save-interval 3 {SHARDED} {TP2}", world_size=4) == [0] * 4
    assert losses(save) == pytest.approx(expected, rel=1e-5) and responses(save) == order


def pretrain_as_saved_before(argv: list[str]) -> int:
    """Run the script with saves as they were: Megatron-Core's own writer, one kind of file, no `.digests`."""
    from megatron_sppo.training import saving

    saving._plan = lambda state, directory, *, validate: save_by_megatron_core(
        state, directory, async_sharded_save=True
    )
    return pretrain(argv)


@pytest.mark.parametrize("flags", ["", SHARDED])
def test_a_checkpoint_of_an_earlier_version_is_resumed_bit_exactly(run: Start, tmp_path: Path, flags: str) -> None:
    save = tmp_path / "save"
    run(save, f"--save-interval 3 {flags}", world_size=2, function=pretrain_as_saved_before)
    expected = numbers(save)
    assert not list(save.rglob("*.digests")) and not list(save.rglob("optimizer*.distcp"))
    forget_after(save, 3)
    assert run(save, f"--save-interval 3 {flags}", world_size=2) == [0, 0]
    assert list(save.glob("iter_0000008/*.digests")) and numbers(save) == expected


def pretrain_on_a_disk_that_fills_up(argv: list[str]) -> int:
    """Run the script where the second rank's files take no more than a little of the save of step 6."""
    from megatron_sppo.command_line import launch
    from megatron_sppo.training import digesting_strategy

    write = digesting_strategy._write_file

    def refuse(bucket: tuple) -> list:
        if launch().rank == 1 and ".iter_0000006.partial" in bucket[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(bucket)

    digesting_strategy._write_file = refuse
    return pretrain(argv)


def pretrain_on_a_disk_that_fills_up_at_the_end(argv: list[str]) -> int:
    """Run the script where what the first rank alone writes last, the manifest of step 6, finds no room."""
    from megatron_sppo.checkpoints import megatron_checkpoint

    write = megatron_checkpoint.write_manifest

    def refuse(directory: Path) -> None:
        if ".iter_0000006.partial" in str(directory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory)

    megatron_checkpoint.write_manifest = refuse
    return pretrain(argv)


@pytest.mark.parametrize(
    ("flags", "full"),
    [
        ("", pretrain_on_a_disk_that_fills_up),
        ("--async-save", pretrain_on_a_disk_that_fills_up),
        ("--async-save", pretrain_on_a_disk_that_fills_up_at_the_end),
    ],
    ids=["second rank", "second rank, background", "first rank, background"],
)
def test_a_disk_that_refuses_one_rank_ends_all_with_exit_code_2_and_leaves_the_checkpoint_before(
    run: Start, tmp_path: Path, flags: str, full: Callable[..., int]
) -> None:
    steps = "--train-iters 12"  # beyond the save after the one that fails
    save, flags = tmp_path / "save", f"{flags} {steps} --save-interval 3"
    assert run(save, flags, world_size=2, function=full) == [2, 2]
    assert [path.name for path in save.glob("*iter_0*")] == ["iter_0000003"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert 6 <= len(numbers(save)) <= 9  # a save in the background is waited for by the next
    run(tmp_path / "whole", steps, world_size=2)
    assert run(save, flags, world_size=2) == [0, 0]
    assert numbers(save) == numbers(tmp_path / "whole")


def forked(argv: list[str]) -> int:
    """Start the run in a child -> its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = pretrain(argv)
        finally:
            os._exit(code)
    return process


def stop_while_saving(save: str, argv: list[str]) -> int:
    """Start the run and send it SIGTERM as soon as it saves -> its exit code."""
    process = forked(argv)
    while not list(Path(save).glob(".iter_*.partial")):
        time.sleep(0.001)
    os.kill(process, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_sigterm_in_the_midst_of_a_save_in_the_background_publishes_it_and_one_of_the_last_step(
    run: Start, untied: Path, tmp_path: Path
) -> None:
    save, flags = tmp_path / "save", "--train-iters 24 --save-interval 4 --async-save"
    places = ["--load", str(untied), "--data", str(tmp_path / "data"), "--save", str(save)]
    argv = [*places, *BASE.split(), *RUN.split(), *flags.split()]
    assert run_ranks(stop_while_saving, 1, str(save), argv) == [143]
    done = len(numbers(save))
    assert 4 <= done < 24
    published = [int(path.name.removeprefix("iter_")) for path in sorted(save.glob("iter_*"))]
    assert published == [*range(4, done, 4), done] and not list(save.glob(".iter_*"))
    assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{done}\n"
    run(tmp_path / "whole", "--train-iters 24")
    assert run(save, flags) == [0]
    assert numbers(save) == numbers(tmp_path / "whole")


def live_and_die(save: str, seed: int, most: int, argv: list[str]) -> int:
    """Start the run again and again, and kill each life by SIGKILL while it saves -> how many were killed."""
    dice, kills = random.Random(seed), 0
    while kills < most:
        process = forked(argv)
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(Path(save).glob(".iter_*.partial")):
            if os.waitpid(process, os.WNOHANG)[0]:
                return kills  # it is complete
            time.sleep(0.001)
        time.sleep(dice.random() * 0.15)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
    return kills


def still_running(save: Path) -> list[str]:
    """Processes with an open file of the run: a writer that outlived its parent."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(save) in os.readlink(link):
                found.append(os.readlink(link))
    return found


def test_kills_in_the_midst_of_saves_lose_nothing(run: Start, untied: Path, tmp_path: Path, tally: Tally) -> None:
    """A life that is killed before it has published anything saves the same step again, to be killed elsewhere."""
    lives = len(tally.cases("kills", 6, 20))
    steps = f"--train-iters {3 * lives}"  # more than the lives can do, most of which publish no save or one
    run(tmp_path / "whole", steps)
    for number in tally.cases("kills", 1, 5):
        save, flags = tmp_path / f"killed-{number}", f"{steps} --save-interval 1 --async-save"
        places = ["--load", str(untied), "--data", str(tmp_path / "data"), "--save", str(save)]
        argv = [*places, *BASE.split(), *RUN.split(), *flags.split()]
        with tally.together("kills") as kills:
            kills += [f"training, in save {life} of run {number}" for life in range(lives)]
            assert run_ranks(live_and_die, 1, str(save), 5 + number, lives, argv, timeout=600) == [lives]
            assert still_running(save) == []
            published = len(list(save.glob("iter_*")))
            assert published < 3 * lives
            assert run(save, flags) == [0]
            assert numbers(save) == numbers(tmp_path / "whole")
            assert len(list(save.glob("iter_*"))) == 3 * lives and not list(save.glob(".iter_*"))


def live_and_die_together(save: str, seed: int, lives: int, argv: list[str]) -> int:
    """As one of four ranks, die as often, all in one instant or one alone, whose end then ends the others -> lives.

    Half of the lives end in a save, the others at any time.
    """
    from megatron_sppo.command_line import launch

    rank, dice, root = launch().rank, random.Random(seed), Path(save)
    for life in range(lives):
        in_save, victim, pause = life % 2 == 0, dice.choice([None, 0, 1, 2, 3]), dice.random()
        saved = len(list(root.glob("iter_*")))
        meet(root, f"begin-{life}", rank)
        process = forked(argv)
        until = time.monotonic() + 120
        while time.monotonic() < until and len(list(root.glob("iter_*"))) == saved:
            if in_save and list(root.glob(".iter_*.partial")):
                break
            time.sleep(0.001)
        time.sleep(pause * (0.2 if in_save else 1.0))
        if rank == victim:
            os.kill(process, signal.SIGKILL)
        if victim is not None:
            meet(root, f"dead-{life}", rank)  # as a launcher that sees one of them gone
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        meet(root, f"end-{life}", rank)
    return lives


def meet(root: Path, name: str, rank: int) -> None:
    """Wait until all four ranks are here."""
    root.with_name(f"{root.name}-{name}-{rank}").touch()
    while len(list(root.parent.glob(f"{root.name}-{name}-*"))) < 4:
        time.sleep(0.001)


def test_ranks_of_tp2_pp2_that_are_killed_resume_bit_exactly(
    run: Start, untied: Path, tmp_path: Path, tally: Tally
) -> None:
    """With the distributed optimizer and saves in the background; whichever rank is killed, none outlives it."""
    lives = len(tally.cases("kills", 2, 20))
    steps = f"--train-iters {2 * lives} --save-interval 1 --async-save {SHARDED} --tensor-model-parallel-size 2 "
    steps += "--pipeline-model-parallel-size 2"
    run(tmp_path / "whole", steps, world_size=4)
    save = tmp_path / "killed"
    places = ["--load", str(untied), "--data", str(tmp_path / "data"), "--save", str(save)]
    argv = [*places, *BASE.split(), *RUN.split(), *steps.split()]
    with tally.together("kills") as kills:
        kills += [f"training under TP2 x PP2, life {life}" for life in range(lives)]
        assert run_ranks(live_and_die_together, 4, str(save), 7, lives, argv, timeout=900) == [lives] * 4
        assert still_running(save) == []
        assert run(save, steps, world_size=4) == [0] * 4
        assert numbers(save) == numbers(tmp_path / "whole")
        assert not list(save.glob(".iter_*"))
