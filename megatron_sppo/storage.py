"""Artefacts on disk: a reader sees the complete old state or the complete new one, never a mix.

Everything is written under a temporary name beside its place, fsynced and renamed. Files name their temporaries
`.<name>.tmp-<pid>`, so a later run of the same command can tell and remove what a killed one left behind.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_sppo.errors import DataError

_BLOCK_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """Hash a file's bytes -> 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash a JSON value independently of key order and white space -> 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def temporary_beside(path: Path) -> Path:
    """Name this process's temporary for `path`: in the same directory, so that the rename is atomic."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends well; on any error nothing changes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        explain_os_error(error, path)
        raise


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends well; an old `path` is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        publish_directory(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        explain_os_error(error, path)
        raise


def publish_directory(temporary: Path, path: Path) -> None:
    """Fsync all of `temporary` and rename it to `path`. An old `path` is moved aside first and then removed."""
    for directory, _, names in os.walk(temporary):
        for name in names:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if aside.exists():
            os.rename(aside, path)
        raise
    fsync_path(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` left beside it, except the temporaries of processes that still run.

    A directory whose writer was killed between moving the old one aside and naming the new one is put back first.
    """
    path = Path(path)
    for aside in path.parent.glob(f".{path.name}.old-*"):
        if not path.exists() and not _process_runs(aside.name.rpartition("-")[2]):
            os.rename(aside, path)
    for pattern in (f".{path.name}.tmp-*", f".{path.name}.old-*"):
        for stale in path.parent.glob(pattern):
            if _process_runs(stale.name.rpartition("-")[2]):
                continue
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)


def _process_runs(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, a newline at the end."""
    with atomic_file(Path(path)) as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or no JSON; the message names it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Check the path, or run the step that writes it.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). It is damaged: write it again.") from None


def contained(root: Path, name: str) -> Path:
    """Resolve a file name that was read from a file, and refuse one that leads out of `root`."""
    path = Path(root, name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{root} names the file {name!r}, which lies outside it. Do not use this directory.")
    return path


def explain_os_error(error: BaseException, path: Path) -> None:
    """Turn a full, read-only or exhausted disk into one line that says what and where."""
    if not isinstance(error, OSError):
        return
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        raise DataError(
            f"{path} could not be written: the disk is full ({free / 2**20:.1f} MiB free in {path.parent}). "
            "Free some space and run the same command again; nothing was lost."
        ) from error
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        raise DataError(f"{path} could not be written: {error.strerror}. Choose a writable place.") from error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise DataError(f"{path} could not be written: {error.strerror}. Raise the limit with `ulimit -n`.") from error
