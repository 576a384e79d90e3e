"""Ranks that convert together write the bytes of one process, and nothing where one of them fails or dies.

Ranks are forks of this process that meet by gloo, with torchrun's variables. Not shown here: several machines, which
need a file system that all of them see.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from megatron_sppo.checkpoints import distcp_writer, transfer
from megatron_sppo.command_line import run
from megatron_sppo.commands import convert
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConversionError, DataError
from tests.models import MIXTURES, tiny_llama
from tests.ports import free_ports
from tests.unit.conversion.test_convert import shard

SIZE = 3


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def in_ranks(argv: list[str], directory: Path, *, before: Callable[[int], object] = lambda rank: None) -> list[int]:
    """Run `convert` in forked ranks, stderr into files -> exit codes; those of signals are negative."""
    (port,), children = free_ports(1), []
    for rank in range(SIZE):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                # Its own lock is shared by forks.
                tqdm.set_lock(threading.RLock())
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                sys.stderr = open(directory / f"stderr.{rank}", "w", buffering=1)
                before(rank)
                run(partial(convert.main, "convert", argv), name="convert")
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def last_lines(directory: Path) -> list[str]:
    return [
        line
        for rank in range(SIZE)
        for line in (directory / f"stderr.{rank}").read_text().splitlines()
        if "error" in line
    ]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distcp_writer, "_MAX_FILE_BYTES", 30_000)
        patch.setattr(transfer, "BLOCK_BYTES", 4096)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model in three files, and its Megatron checkpoint of many, by one process."""
    root = tmp_path_factory.mktemp("crew")
    with small_files():
        shard(tiny_llama(root / "hf", **MIXTURES["qwen3_moe"]), 3)
        import_checkpoint(root / "hf", root / "megatron")
        yield root


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_ranks_write_what_one_process_writes(dtype: str | None, place: Path, tmp_path: Path) -> None:
    """What is moved, and what is computed; the same command again finds its work done."""
    cast = [] if dtype is None else ["--dtype", dtype]
    alone = import_checkpoint(place / "hf", tmp_path / "alone", dtype=dtype)
    command = ["import", "--hf", str(place / "hf"), "--megatron", str(tmp_path / "ranks"), *cast]
    for _ in range(2):
        assert in_ranks(command, tmp_path) == [0] * SIZE, last_lines(tmp_path)
    assert len(list(alone.glob("*.distcp"))) > SIZE
    assert files_of(tmp_path / "ranks") == files_of(tmp_path / "alone")
    export_checkpoint(place / "megatron", tmp_path / "one", dtype=dtype, max_shard_size="50KB")
    command = ["export", "--megatron", str(place / "megatron"), "--hf", str(tmp_path / "many"), *cast]
    for _ in range(2):
        assert in_ranks([*command, "--max-shard-size", "50KB"], tmp_path) == [0] * SIZE, last_lines(tmp_path)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def fail(rank: int, *, at: int, how: Callable[[], object]) -> None:
    """Let one rank fail in the middle of its share."""
    real, calls = os.pwrite, iter(range(10**6))

    def counting(descriptor: int, block: object, offset: int) -> int:
        if next(calls) == 3:
            how()
        return real(descriptor, block, offset)  # type: ignore[arg-type]

    if rank == at:
        os.pwrite = counting  # type: ignore[assignment]


def full_disk() -> None:
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("direction", ["import", "export"])
def test_where_a_rank_fails_there_is_one_line_and_nothing_is_written(
    direction: str, rank: int, place: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target" / "model"
    flags = ("--hf", "--megatron") if direction == "import" else ("--megatron", "--hf")
    source = place / flags[0].removeprefix("--")
    command = [direction, flags[0], str(source), flags[1], str(target)]
    assert in_ranks(command, tmp_path, before=partial(fail, at=rank, how=full_disk)) == [2] * SIZE
    (line,) = last_lines(tmp_path)
    assert line.startswith("convert: error: " + ("rank 1: " if rank else ""))
    assert ("Free some space", "No space left on device")[rank] in line
    assert not [path for path in target.rglob("*") if path.is_file()]


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_that_is_killed_leaves_nothing_that_loads_and_the_command_again_completes(
    rank: int, place: Path, tmp_path: Path
) -> None:
    command = ["import", "--hf", str(place / "hf"), "--megatron", str(tmp_path / "megatron")]
    die = partial(fail, at=rank, how=lambda: os.kill(os.getpid(), signal.SIGKILL))
    codes = in_ranks(command, tmp_path, before=die)
    assert codes[rank] == -signal.SIGKILL and all(code == 2 for other, code in enumerate(codes) if other != rank)
    assert all("another rank of this conversion ended" in line for line in last_lines(tmp_path))
    with pytest.raises((ConversionError, DataError)):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert in_ranks(command, tmp_path) == [0] * SIZE
    assert files_of(tmp_path / "megatron") == files_of(place / "megatron")


def test_a_bad_model_is_refused_by_each_rank_and_nobody_waits(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "hf", tmp_path / "hf")
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    command = ["import", "--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path / "megatron")]
    assert in_ranks(command, tmp_path) == [2] * SIZE
    assert all("which is missing" in line for line in last_lines(tmp_path))
    assert not (tmp_path / "megatron").exists()
