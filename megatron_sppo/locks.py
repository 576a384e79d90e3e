"""Locks: an output directory has one writer at a time, also one on another host of a shared file system."""

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_sppo.errors import ConfigError
from megatron_sppo.storage import LOCK_NAME, explain_os_error, refuse_link, temporary_beside

logger = logging.getLogger(__name__)

LOCK_BEAT_SECONDS = 15.0
"""How often the holder of a lock touches its file."""
LOCK_STALE_SECONDS = 120.0
"""A lock of another host whose file was touched no later than this long ago counts as held."""


@contextlib.contextmanager
def locked(directory: Path, *, flag: str) -> Iterator[None]:
    """Have an output directory, which is made where there is none, to oneself for the block.

    Args:
        flag: the command-line flag that named the directory, for the error.

    Raises:
        ConfigError: another process has it; the message names the process and its host.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked_file(directory / LOCK_NAME, directory, remedy=f"give another directory with {flag}"):
        yield


@contextlib.contextmanager
def locked_place(path: Path, *, flag: str) -> Iterator[None]:
    """As `locked`, for an output that is replaced as a whole: the lock lies beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_file(path.with_name(f".{path.name}{LOCK_NAME}"), path, remedy=f"give another place with {flag}"):
        yield


_held: dict[tuple[int, Path], contextlib.AbstractContextManager[None]] = {}


def lock_until_exit(directory: Path, *, flag: str) -> None:
    """As `locked`, until this process ends; again by the process that has it is no fault."""
    key = (os.getpid(), Path(directory).resolve())
    if key not in _held:
        lock = locked(directory, flag=flag)
        lock.__enter__()
        _held[key] = lock
        atexit.register(lambda: lock.__exit__(None, None, None) if key[0] == os.getpid() else None)


@contextlib.contextmanager
def _locked_file(path: Path, subject: Path, *, remedy: str) -> Iterator[None]:
    """Hold a lock by the file `path` for the block; the file goes with it.

    The kernel's lock (`flock`) goes with the process that holds it, however that ends. Network file systems may not
    carry it from host to host, so the file also says who holds it, and the holder touches it again and again: a lock
    of another host counts as long as it is touched. Two hosts that ask in the same instant of such a file system may
    both pass.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                refuse_link(path)
                file = stack.enter_context(open(path, "a+", encoding="utf-8"))
                _take_lock(file, path, subject, remedy=remedy)
            except OSError as error:
                explain_os_error(error, subject)
                raise
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else its last holder has removed the file that we opened
        done = threading.Event()
        beat = threading.Thread(target=_keep_touching, args=(path, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            with contextlib.suppress(OSError):  # the disk may be gone; the kernel's lock goes in any case
                path.unlink(missing_ok=True)


def _take_lock(file: IO[str], path: Path, subject: Path, *, remedy: str) -> None:
    held_here = False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held_here = True
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks: its text alone decides
            raise
    file.seek(0)
    holder = file.read().split()
    host, pid = (holder[0], holder[1]) if len(holder) == 2 else ("", "")
    here = socket.gethostname()
    held_elsewhere = host not in ("", here) and _age(path) < LOCK_STALE_SECONDS
    if held_here or held_elsewhere:
        who = f"process {pid} on {host}" if host else "another process"
        waiting = f" If it is gone, wait {LOCK_STALE_SECONDS:.0f} s or remove {path}." if held_elsewhere else ""
        raise ConfigError(f"{subject} is in use by {who}. Wait for it, stop it, or {remedy}.{waiting}")
    if host:
        logger.warning("%s was left by process %s on %s, which is gone: taken over", path, pid, host)
    file.truncate(0)
    os.write(file.fileno(), f"{here} {os.getpid()}\n".encode())  # nothing is left that closing could fail to write


def _age(path: Path) -> float:
    """Measure how long ago a file was written, by the file system's own clock -> seconds."""
    probe = temporary_beside(path)
    probe.write_bytes(b"")
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _keep_touching(path: Path, done: threading.Event) -> None:
    while not done.wait(LOCK_BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a disk that is away for a while is the writer's trouble, not the lock's
            os.utime(path)
