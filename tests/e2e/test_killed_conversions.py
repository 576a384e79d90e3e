"""Proves: an import or an export that is killed (SIGKILL) anywhere never leaves a directory that loads and is wrong.

Twenty seeded points each: after so many bytes, at a given fsync or rename, or after a time. About half replace another
model. The same command then completes, with the files of a run that nobody killed, and leaves no temporaries.
"""

import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from megatron_sppo.checkpoints import distcp_writer
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConversionError, DataError
from tests.models import tiny_llama
from tests.reliability.tally import Tally

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 2000, "dtype": "bfloat16"}
SHARD = "2MB"
STEPS = ("fsync", "fdatasync", "rename", "replace")


@dataclass(frozen=True, kw_only=True)
class Point:
    """When to kill: after `bytes` written, at the `call`-th use of os.`step`, or after `seconds`."""

    replaces: bool
    bytes: int | None = None
    step: str | None = None
    call: int = 0
    seconds: float | None = None


def points(seed: int, nbytes: int) -> list[Point]:
    chance = random.Random(seed)
    by_bytes = [Point(bytes=chance.randrange(nbytes), replaces=number % 2 == 0) for number in range(7)]
    by_step = [
        Point(step=STEPS[number % len(STEPS)], call=chance.randrange(4), replaces=number % 3 > 0) for number in range(8)
    ]
    by_time = [Point(seconds=chance.uniform(0.0, 0.3), replaces=number % 2 == 0) for number in range(5)]
    return by_bytes + by_step + by_time


def kill_after_bytes(limit: int) -> None:
    """Let this process die as soon as it has written so many bytes; the last write is cut short."""
    write, written = os.pwrite, 0

    def counting(descriptor: int, block: Any, offset: int) -> int:
        nonlocal written
        view = memoryview(block)
        if written + len(view) > limit:
            write(descriptor, view[: max(0, limit - written)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        written += len(view)
        return write(descriptor, block, offset)

    os.pwrite = counting  # type: ignore[assignment]


def kill_at(step: str, call: int) -> None:
    """Let this process die just before (even) or just after (odd) the `call // 2`-th use of os.<step>."""
    real, calls = getattr(os, step), iter(range(10**6))

    def counting(*arguments: Any, **keywords: Any) -> Any:
        is_it = next(calls) == call // 2
        if is_it and call % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, step, counting)


def run_and_kill(convert: Callable[[], object], point: Point) -> bool:
    """Convert in a forked process that dies at the point -> whether it did, or was done before."""
    pid = os.fork()
    if pid == 0:
        try:
            # Its own lock is shared by forks: killed with it, this process would stop its parent.
            tqdm.set_lock(threading.RLock())
            if point.bytes is not None:
                kill_after_bytes(point.bytes)
            if point.step is not None:
                kill_at(point.step, point.call)
            convert()
        finally:
            os._exit(0)
    if point.seconds is not None:
        time.sleep(point.seconds)
        os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def temporaries(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".*") if ".tmp-" in path.name or ".old-" in path.name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of several shards: Hugging Face `old` and `new`, and both as Megatron checkpoints."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distcp_writer, "_MAX_FILE_BYTES", 2_000_000)
        for seed, name in enumerate(("old", "new")):
            single = tiny_llama(root / f"single_{name}", seed=seed, **SHAPE)
            import_checkpoint(single, root / f"single_megatron_{name}")
            export_checkpoint(root / f"single_megatron_{name}", root / name, max_shard_size=SHARD)
            import_checkpoint(root / name, root / f"megatron_{name}")
    assert len(list((root / "new").glob("*.safetensors"))) > 3
    assert len(list((root / "megatron_new").rglob("*.distcp"))) > 3
    return root


def test_a_killed_import_is_old_new_or_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.setattr(distcp_writer, "_MAX_FILE_BYTES", 2_000_000)
    old, new, whole = (files_of(models / name) for name in ("old", "new", "megatron_new"))
    size = sum(path.stat().st_size for path in (models / "megatron_new").rglob("*.distcp"))
    killed = 0
    for number, point in enumerate(points(4, size)):
        megatron = tmp_path / str(number) / "megatron"
        if point.replaces:
            shutil.copytree(models / "megatron_old", megatron)

        def convert(megatron: Path = megatron, overwrite: bool = point.replaces) -> None:
            import_checkpoint(models / "new", megatron, overwrite=overwrite, workers=2)

        with tally.together("kills") as kills:
            if run_and_kill(convert, point):
                kills.append(f"import: {point}")
            killed += len(kills)
            try:
                seen = files_of(export_checkpoint(megatron, tmp_path / "seen"))
            except (DataError, ConversionError) as error:
                assert re.search("no usable Megatron checkpoint|is not a directory", str(error)), (point, error)
            else:
                assert seen == new or (point.replaces and seen == old), point
                shutil.rmtree(tmp_path / "seen")
            convert()
            assert files_of(megatron) == whole, point
            assert temporaries(tmp_path) == [], point
        shutil.rmtree(tmp_path / str(number))
    assert killed >= 12


def test_a_killed_export_is_old_new_or_nothing(models: Path, tmp_path: Path, tally: Tally) -> None:
    old, new = files_of(models / "old"), files_of(models / "new")
    size = sum(path.stat().st_size for path in (models / "new").glob("*.safetensors"))
    killed = 0
    for number, point in enumerate(points(5, size)):
        hf = tmp_path / str(number)
        if point.replaces:
            shutil.copytree(models / "old", hf)

        def convert(hf: Path = hf, overwrite: bool = point.replaces) -> None:
            export_checkpoint(models / "megatron_new", hf, overwrite=overwrite, workers=2)

        with tally.together("kills") as kills:
            if run_and_kill(convert, point):
                kills.append(f"export: {point}")
            killed += len(kills)
            if hf.exists():
                assert files_of(hf) == new or (point.replaces and files_of(hf) == old), point
            convert()
            assert files_of(hf) == new, point
            assert temporaries(tmp_path) == [], point
        shutil.rmtree(hf)
    assert killed >= 12
