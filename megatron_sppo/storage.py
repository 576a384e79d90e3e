"""Artefacts on disk: a reader sees the complete old state or the complete new one, never a mix.

Everything is written under a temporary name beside its place, fsynced and renamed. Files name their temporaries
`.<name>.tmp-<pid>`, so a later run of the same command can tell and remove what a killed one left behind.
"""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_sppo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent

LOCK_NAME = ".lock"
"""The file in an output directory by which one writer has it (`locks`)."""


_BLOCK_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """Hash a file's bytes -> 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def temporary_beside(path: Path) -> Path:
    """Name this process's temporary for `path`: in the same directory, so that the rename is atomic."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends well; on any error nothing changes."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a disk that became read-only: the first error says it
            temporary.unlink(missing_ok=True)
        explain_os_error(error, path)
        raise


@contextlib.contextmanager
def atomic_directory(path: Path, *, replaces: str) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends well; an old `path` is replaced.

    Args:
        replaces: glob pattern of a file that an old `path` has if it is of the kind that is written now.

    Raises:
        ConfigError: `path` holds something else.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()  # the link stays, and what it leads to is replaced: it may lie on another disk
    refuse_foreign(path, ours=(replaces,), is_replaced=True)
    remove_stale_temporaries(path)
    temporary = temporary_beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        publish_directory(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        explain_os_error(error, path)
        raise


def publish_directory(temporary: Path, path: Path) -> None:
    """Fsync all of `temporary` and rename it to `path`; an old `path` is removed.

    Both change places in one step where the file system can. Elsewhere the old one is moved aside first, so that for a
    moment there is none: `remove_stale_temporaries` puts it back for one who was killed in it.
    """
    for directory, _, names in os.walk(temporary):
        for name in names:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))
    if path.exists() and exchange(temporary, path):
        fsync_path(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
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


def exchange(one: Path, other: Path) -> bool:
    """Let two names of one file system change places in one step -> False where the system or the disk cannot.

    Raises:
        OSError: it can, and did not.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux: glibc 2.28, musl 1.2.6
    if renameat2 is None:
        return False
    here, swapped = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), swapped) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def remove_stale_temporaries(*paths: Path) -> None:
    """Remove what killed writers of `paths` left beside them, except the temporaries of processes that still run.

    Each directory is listed once, however many of its files are named. A directory whose writer was killed between
    moving the old one aside and naming the new one is put back first.
    """
    names_in: dict[Path, set[str]] = {}
    for path in map(Path, paths):
        names_in.setdefault(path.parent, set()).add(path.name)
    for directory, names in names_in.items():
        stale = [(kind, name, place) for kind, name, place in _left_behind(directory) if name in names]
        for kind, name, aside in stale:
            if kind == "old" and not Path(directory, name).exists():
                os.rename(aside, Path(directory, name))
        for _, _, place in stale:
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)


_found_left: dict[Path, dict[str, list[Path]]] = {}


def _remove_left_behind(path: Path) -> None:
    """Remove what killed writers of one file left; a process lists a directory once, however often it writes there."""
    if path.parent not in _found_left:
        found = _found_left[path.parent] = {}
        for kind, name, place in _left_behind(path.parent):
            if kind == "tmp":
                found.setdefault(name, []).append(place)
    for place in _found_left[path.parent].pop(path.name, ()):
        with contextlib.suppress(OSError):  # it is a directory's, or went by itself
            place.unlink()


def _left_behind(directory: Path) -> list[tuple[str, str, Path]]:
    """List a directory once -> ("tmp" or "old", the name that it is of, its path) of what no process writes."""
    names = os.listdir(directory) if directory.is_dir() else []
    found = filter(None, (re.fullmatch(r"\.(.+)\.(tmp|old)-(.*)", name) for name in names))
    return [(left[2], left[1], Path(directory, left[0])) for left in found if not _process_runs(left[3])]


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


def refuse_foreign(
    directory: Path, *, ours: Sequence[str], inputs: Sequence[Path] = (), flag: str = "", is_replaced: bool = False
) -> None:
    """Refuse to write into a directory that is somebody else's; nothing is touched. A missing or an empty one will do.

    Args:
        ours: glob patterns of which one matches where the directory was written by the command that asks.
        inputs: what the command reads; the output may neither be nor hold one of them.
        flag: the command-line flag that named the directory, for the error.
        is_replaced: it is replaced as a whole (`atomic_directory`), for which it has to have a name beside others.

    Raises:
        ConfigError: the directory holds other things, is a file, is an input, or cannot be replaced as a whole.
    """
    directory, place = Path(directory), Path(directory).resolve()
    by_flag = f" with {flag}" if flag else ""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file. Choose a directory{by_flag}.")
    if is_replaced and directory.name in ("", ".."):
        raise ConfigError(
            f"{place} is the directory that you are in, or above it, which is replaced as a whole. "
            f"Name it from outside{by_flag}: cd {place.parent}"
        )
    if is_replaced and os.path.ismount(place):
        raise ConfigError(
            f"{directory} is a mount point, which cannot be replaced as a whole. Choose a directory in it{by_flag}."
        )
    for source in inputs:
        read = Path(source).resolve()
        if place == read or place in read.parents:
            verb = "is" if place == read else "holds"
            raise ConfigError(f"{directory} {verb} the input {source}. Choose another directory{by_flag}.")
    if not directory.is_dir() or any(next(directory.glob(pattern), None) is not None for pattern in ours):
        return
    names = (path.name for path in directory.iterdir())
    if others := sorted(name for name in names if name != LOCK_NAME and not re.fullmatch(r"\..*\.tmp-\d+", name)):
        raise ConfigError(
            f"{directory} holds {others[0]}{' and more' if len(others) > 1 else ''}, which this command did not "
            f"write. Choose an empty or a new directory{by_flag}."
        )


def refuse_foreign_file(path: Path, *, ours: str, flag: str) -> None:
    """Refuse to write a report over a file that is none: its place may have been a typing error.

    Args:
        ours: a key that every such report has in its first megabyte, as JSON spells it.
        flag: the command-line flag that named the file, for the error.

    Raises:
        ConfigError: the file is there and is something else, or is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory. Give a file with {flag}.")
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if f'"{ours}"'.encode() not in file.read(1 << 20):
                raise ConfigError(f"{path} is there and is no report of this command. Give another file with {flag}.")


def damage(path: Path, otherwise: str) -> str:
    """Say what stands in a file's place and what to do, where that can be told -> "FACT. REMEDY.", else `otherwise`."""
    start = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the file that it stands for. Fetch the file: git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path} is a web page, not a file of the model. Log in where it came from, and fetch it again."
    return otherwise


def own_or_packaged(path: Path) -> Path:
    """Find a file that a user names: their own, or where they have none at examples/..., the package's -> its path."""
    packaged = _PACKAGE / path
    if path.parts[:1] != ("examples",) or path.exists() or not packaged.is_file():
        return path
    logger.info("%s: taken from the installed package (%s)", path, packaged)
    return packaged


def packaged_examples(pattern: str) -> str:
    """List the package's files that anyone can name, such as `configs/*.yaml` -> text for a message."""
    return ", ".join(sorted(str(path.relative_to(_PACKAGE)) for path in (_PACKAGE / "examples").glob(pattern)))


def named_inside(root: Path, name: str) -> Path:
    """Join a file name that was read from a file to its root, and refuse one that leads out of it -> path.

    Raises:
        DataError: it is absolute, or goes up.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{root} names the file {name!r}, which lies outside it. Do not use this directory.")
    return Path(root, name)


def contained(root: Path, name: str) -> Path:
    """Find a file whose name was read from a file, and refuse what leads out of `root`, by a link too -> path.

    The hub's cache is the exception: models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.

    Raises:
        DataError: it does.
    """
    path = named_inside(root, name)
    if "\0" in name:
        return path  # no file is called so
    home, target = os.path.realpath(root), os.path.realpath(path)
    if target != home and not target.startswith(os.path.join(home, "")):
        parent = os.path.dirname(home)
        blobs = os.path.join(os.path.dirname(parent), "blobs", "")
        if os.path.basename(parent) != "snapshots" or not target.startswith(blobs):
            raise DataError(
                f"{path} is a link to {target}, outside of {root}. Put the file itself there: "
                f"cp --remove-destination {target} {path}"
            )
    return path


def packed_member(archive: zipfile.ZipFile) -> str | None:
    """Find a compressed member of an archive of a kind that is never compressed -> its name, or None.

    A small one could fill the memory.
    """
    packed = (info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED)
    return next(packed, None)


def refuse_link(path: Path) -> None:
    """Refuse to write into a file in place where it is another one too, by a symbolic or a hard link.

    For logs and locks, which alone are not replaced as a whole: in a directory that a stranger has packed they may
    lead to any file of the user's.

    Raises:
        DataError: it is.
    """
    path = Path(path)
    if path.is_symlink():
        raise DataError(f"{path} is a link to {os.readlink(path)}, which would be written into. Remove it: rm {path}")
    try:
        names = path.stat().st_nlink
    except FileNotFoundError:
        return
    if names > 1:
        raise DataError(
            f"{path} has {names} names on this disk (hard links), and all would be written into. Make it a file of its "
            f"own: cp {path} {path}.own && mv {path}.own {path}"
        )


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
    if error.errno == errno.EIO and _is_of(error.filename, path):
        raise DataError(
            f"{path} could not be written: {error.strerror}. Check the disk, then run the same command again."
        ) from error


def _is_of(name: str | None, path: Path) -> bool:
    """Tell whether an error is of writing `path`: of its temporaries or directory, or of an open file, with no name."""
    if name is None or Path(name) == path.parent:
        return True
    within = Path(os.path.relpath(name, path.parent)).parts[0]
    return within == path.name or within.startswith(f".{path.name}.")
