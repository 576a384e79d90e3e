"""Every change that a training run makes on a disk fails once, or is its last: the run ends with the same numbers.

Two steps with a save after each, beside a reference pass: checkpoint, digests, metadata, manifest, tracker, step files,
resolved config, lock. What befalls rank 0 alone ends all ranks with the one line, and at once: nobody waits for it.
"""

import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_sppo.checkpoints.megatron_checkpoint import resolve_checkpoint, verify_checkpoint
from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_async_saves import numbers
from tests.distributed.worlds import pretrain
from tests.models import tiny_llama
from tests.reliability.file_faults import Fault, Operation, watched
from tests.reliability.tally import Tally
from tests.reliability.test_writes import temporaries

FLAGS = (
    "--params-dtype float32 --lr 1e-4 --eta 10 --global-batch-size 8 --micro-batch-size 4 --train-iters 2 "
    "--save-interval 1 --no-tensorboard"
)


def live(run: str, argv: list[str], fault: Fault | None, log: str | None) -> tuple[int, str]:
    """Train in a forked process, on a file system with a fault -> exit code (negative: a signal), last line."""
    said = Path(f"{run}.said")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", closefd=False)
            with watched(Path(run), fault) as watch:
                code = pretrain(argv)
            if log is not None:
                Path(log).write_bytes(pickle.dumps(watch.operations))
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = said.read_text(errors="replace").splitlines()
    return code, "\n".join(lines[-30:]) if code == 1 else (lines or [""])[-1]


class World:
    """A model, a dataset, and an undisturbed run."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        import_checkpoint(tiny_llama(root / "hf", num_hidden_layers=1), root / "megatron")
        write_dataset(root / "data", root / "hf")
        self.begin()
        assert self.live(log=root / "operations")[0] == 0
        self.expected = numbers(self.save)
        self.operations: list[Operation] = pickle.loads((root / "operations").read_bytes())

    @property
    def save(self) -> Path:
        return self.run / "save"

    @property
    def argv(self) -> list[str]:
        places = ["--load", str(self.root / "megatron"), "--data", str(self.run / "data"), "--save", str(self.save)]
        return [*places, *FLAGS.split()]

    def begin(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.root / "data", self.run / "data")

    def live(self, fault: Fault | None = None, log: Path | None = None) -> tuple[int, str]:
        (ended,) = run_ranks(live, 1, str(self.run), self.argv, fault, log and str(log))
        return ended

    def check_resumes(self, what: str) -> None:
        """Hold what is there against the undisturbed run: what is published is whole, the same command ends alike."""
        if list(self.save.glob("iter_*")):
            verify_checkpoint(resolve_checkpoint(self.save))
        again = self.live()
        assert again[0] == 0, f"{what}; again: {again}"
        assert numbers(self.save) == self.expected, what
        assert temporaries(self.run) == [], what


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("training"))


def test_every_change_of_a_run_fails_once_or_is_its_last(world: World, tally: Tally) -> None:
    """One after the other: every second change fails, at the others the process dies. Of the writes of one file the
    first, of both saves and both steps one."""
    alike: dict[tuple[str, str], int] = {}
    for at, operation in enumerate(world.operations):
        alike.setdefault((operation.name, re.sub(r"\d+", "", operation.path)), at)
    changes = list(alike.values())
    numbers_ = tally.cases("writes", 6, len(changes))
    for number in numbers_:
        at = changes[number * len(changes) // len(numbers_)]
        kind = "killed" if number % 2 else "error"
        operation = world.operations[at]
        what = f"training: {kind} at {at} of {len(world.operations)}, {operation.name} {operation.path}"
        with tally.case("writes", what):
            world.begin()
            code, said = world.live(Fault(kind, at))
            removes = operation.name in ("unlink", "rmdir", "link")
            assert code in ((-9,) if kind == "killed" else (0, 2) if removes else (2,)), f"{what}: {code} {said}"
            if code == 2:
                assert "error: " in said and str(world.root) in said, f"{what}: {said}"
                assert removes or temporaries(world.run) == [], what
            world.check_resumes(what)


def fail_on_rank_zero(run: str, name: str, kind: str, argv: list[str]) -> int:
    """Train as one of two ranks; on rank 0 the first write into a file with that in its name fails -> exit code."""
    from megatron_sppo.command_line import launch

    with watched(Path(run)) as watch:
        if launch().rank == 0:
            take = watch.take

            def strike(operation: str, path: str, act: Callable[[], object], **named: object) -> object:
                if operation in ("write", "rename") and name in Path(path).name and not watch_fault:
                    watch_fault.append(True)
                    watch._fault = Fault(kind, watch._number + 1)
                return take(operation, path, act, **named)

            watch_fault: list[bool] = []
            watch.take = strike
        return pretrain(argv)


ALONE = (
    "metrics.jsonl",
    "common.pt",
    ".metadata.tmp",
    "metadata.json",
    "manifest.json",
    "iteration.txt",
    "config.yaml",
)


def test_what_befalls_rank_zero_alone_ends_all_ranks_with_the_one_line(world: World, tally: Tally) -> None:
    names = [name for name in ALONE if any(name in operation.path for operation in world.operations)]
    assert len(names) >= 6, "megatron-core 0.19 writes no common.pt"
    for number in tally.cases("full disk", 4, 2 * len(names)):
        name, kind = names[number % len(names)], ("error", "full")[number // len(names)]
        with tally.case("full disk", f"training: {kind} at {name} on rank 0 of 2"):
            world.begin()
            codes = run_ranks(fail_on_rank_zero, 2, str(world.run), name, kind, world.argv, timeout=120)
            assert codes == [2, 2], name
            world.check_resumes(name)
