"""A file system that fails where it is told to: below one directory, in this process and in what it forks.

Beneath every writer of the package lie `open`, `os`'s calls and what is built on them. Within `watched` each call that
changes something below the directory is an operation: it has a number, is noted with what it left behind, and at a
chosen number a fault strikes. Not seen: what C++ or Rust writes by itself (no writer of the package does: Torch and zip
archives write into Python's files, safetensors are written by our own code), and writes through mmap (there are none).
"""

import builtins
import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
FAULTS = ("error", "short", "torn", "killed", "full", "read-only", "files", *SIGNALS)
"""What strikes at an operation.

error       it fails with EIO; the next ones go well
short       a write takes half of its bytes and says so; nothing has failed
torn        a write takes half of its bytes, and the process dies by SIGKILL
killed      the process dies before it
full        from it on nothing that needs room goes well (ENOSPC); the first write takes half of its bytes
read-only   from it on nothing goes well (EROFS)
files       from it on no file can be opened (EMFILE)
SIG...      the process gets this signal before it
"""
GROWING = ("create", "write", "mkdir", "link", "symlink", "truncate")
"""Operations that need room."""


@dataclass(frozen=True)
class Fault:
    """What happens at which operation."""

    kind: str
    at: int


@dataclass(frozen=True)
class Operation:
    """One change below the directory."""

    name: str
    """create, write, truncate, fsync, rename, exchange, unlink, rmdir, link, symlink, mkdir."""
    path: str
    """Relative to the directory."""
    other: str = ""
    """Where it is renamed or linked to."""
    inode: int = 0
    content: bytes | None = field(default=None, repr=False)
    """All that the file holds after it; None for what is no file."""


class Watch:
    """Numbers operations, notes them, and lets the fault strike."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root = os.path.realpath(root)
        self.operations: list[Operation] = []
        self._fault = fault
        self._number = -1
        self._refused: str | None = None
        """Path of a copy that the kernel was to make (sendfile) and refused: Python makes it anew by writing."""

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Find a path's place below the directory -> relative path, or None."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        else:
            start = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            full = os.path.join(start, os.fsdecode(path))
            full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if full == self.root:
            return "."
        return full[len(self.root) + 1 :] if full.startswith(self.root + os.sep) else None

    def opening(self, path: str) -> None:
        """Hear of a file that is opened, to be read or to be written."""
        if self._fault and self._fault.kind == "files" and self._number + 1 >= self._fault.at:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.path.join(self.root, path))

    def take(
        self,
        name: str,
        path: str,
        act: Callable[[], Any],
        *,
        other: str = "",
        half: Callable[[], Any] | None = None,
        descriptor: int | None = None,
    ) -> Any:
        """Do one operation, or what the fault makes of it -> what `act` returns.

        Args:
            half: does half of a write.
            descriptor: of the file, once `act` has been done, to note what it holds.
        """
        if _changes_nothing(name, os.path.join(self.root, path)):
            return act()
        self._number += 1
        fault = self._fault
        if fault is not None and self._number >= fault.at:
            first = self._number == fault.at
            full = os.path.join(self.root, path)
            if first and fault.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if first and fault.kind in SIGNALS:
                os.kill(os.getpid(), signal.Signals[fault.kind])
            if fault.kind == "error" and (first or (name == "write" and path == self._refused)):
                is_copy = name == "write" and half is None
                self._refused = path if is_copy else None
                raise _error(errno.EIO, name, full)
            if fault.kind == "read-only":
                raise _error(errno.EROFS, name, full)
            if first and half is not None and fault.kind in ("short", "torn", "full"):
                count = half()
                if fault.kind == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)
                return count
            if fault.kind == "full" and name in GROWING:
                raise _error(errno.ENOSPC, name, full)
        result = act()
        if self._fault is None:
            self._note(name, path, other, result if name == "create" else descriptor)
        return result

    def _note(self, name: str, path: str, other: str, descriptor: int | None) -> None:
        inode, content = 0, None
        if descriptor is not None:
            status = os.fstat(descriptor)
            inode = status.st_ino
            if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                reading = _REAL["open"](f"/proc/self/fd/{descriptor}", os.O_RDONLY)
                content = os.pread(reading, status.st_size, 0)
                _REAL["close"](reading)
        elif name == "mkdir":
            inode = os.stat(os.path.join(self.root, path)).st_ino
        self.operations.append(Operation(name, path, other, inode, content))


def _changes_nothing(name: str, path: str) -> bool:
    """Tell whether a call can only say so itself: a directory that is there, a name that is not."""
    there = os.path.lexists(path)
    return there if name in ("mkdir", "link", "symlink") else not there and name in ("unlink", "rmdir", "rename")


def _error(number: int, name: str, path: str) -> OSError:
    """Make the error that Python would: what goes by a descriptor names no file."""
    named = () if name in ("write", "fsync", "truncate") else (path,)
    return OSError(number, os.strerror(number), *named)


_REAL: dict[str, Any] = {
    name: getattr(os, name)
    for name in (
        "open",
        "close",
        "write",
        "pwrite",
        "writev",
        "sendfile",
        "fsync",
        "fdatasync",
        "truncate",
        "ftruncate",
        "rename",
        "replace",
        "link",
        "symlink",
        "unlink",
        "remove",
        "rmdir",
        "mkdir",
    )
}


@contextlib.contextmanager
def watched(root: Path, fault: Fault | None = None) -> Iterator[Watch]:
    """Number what changes below `root` within the block, and let `fault` strike. Without one, note every operation."""
    watch = Watch(root, fault)
    opened, replaced = io.open, _functions(watch)
    exchanged = _exchange_of_storage(watch)
    builtins.open = io.open = _open_function(watch)
    for name, function in replaced.items():
        setattr(os, name, function)
    try:
        with exchanged:
            yield watch
    finally:
        builtins.open = io.open = opened
        for name in replaced:
            setattr(os, name, _REAL[name])


@contextlib.contextmanager
def _exchange_of_storage(watch: Watch) -> Iterator[None]:
    """Count storage's exchange of two directories, which Python has no call of its own for."""
    from megatron_sppo import storage

    real = storage.exchange

    def exchange(one: Path, other: Path) -> bool:
        place = watch.inside(one)
        if place is None:
            return real(one, other)
        return bool(watch.take("exchange", place, lambda: real(one, other), other=watch.inside(other) or ""))

    storage.exchange = exchange
    try:
        yield
    finally:
        storage.exchange = real


def _functions(watch: Watch) -> dict[str, Callable[..., Any]]:
    real = _REAL

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = watch.inside(path, dir_fd)
        act = lambda: real["open"](path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        if place is None:
            return act()
        watch.opening(place)
        writes = flags & (os.O_CREAT | os.O_TRUNC) and flags & (os.O_WRONLY | os.O_RDWR)
        return watch.take("create", place, act) if writes else act()

    def by_descriptor(name: str, kind: str) -> Callable[..., Any]:
        def function(descriptor: int, *rest: Any) -> Any:
            place = watch.inside(descriptor)
            if place is None:
                return real[name](descriptor, *rest)
            half = None
            if name in ("write", "pwrite"):
                block, *at = rest
                half = lambda: real[name](descriptor, bytes(memoryview(block).cast("B"))[: _half(block)], *at)  # noqa: E731
            act = lambda: real[name](descriptor, *rest)  # noqa: E731
            return watch.take(kind, place, act, half=half, descriptor=descriptor)

        return function

    def by_path(name: str, kind: str) -> Callable[..., Any]:
        def function(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            place = watch.inside(path, dir_fd)
            if dir_fd is not None:
                named["dir_fd"] = dir_fd
            act = lambda: real[name](path, *rest, **named)  # noqa: E731
            return act() if place is None else watch.take(kind, place, act)

        return function

    def by_two_paths(name: str, kind: str) -> Callable[..., Any]:
        def function(source: Any, target: Any, **named: Any) -> Any:
            place, other = watch.inside(source, named.get("src_dir_fd")), watch.inside(target, named.get("dst_dir_fd"))
            act = lambda: real[name](source, target, **named)  # noqa: E731
            if other is None and place is None:
                return act()
            return watch.take(kind, place or os.fsdecode(source), act, other=other or "")

        return function

    return {
        "open": open_,
        "write": by_descriptor("write", "write"),
        "pwrite": by_descriptor("pwrite", "write"),
        "writev": by_descriptor("writev", "write"),
        "sendfile": by_descriptor("sendfile", "write"),
        "fsync": by_descriptor("fsync", "fsync"),
        "fdatasync": by_descriptor("fdatasync", "fsync"),
        "ftruncate": by_descriptor("ftruncate", "truncate"),
        "truncate": by_path("truncate", "truncate"),
        "unlink": by_path("unlink", "unlink"),
        "remove": by_path("remove", "unlink"),
        "rmdir": by_path("rmdir", "rmdir"),
        "mkdir": by_path("mkdir", "mkdir"),
        "rename": by_two_paths("rename", "rename"),
        "replace": by_two_paths("replace", "rename"),
        "link": by_two_paths("link", "link"),
        "symlink": by_two_paths("symlink", "symlink"),
    }


def _half(block: Any) -> int:
    return (memoryview(block).nbytes + 1) // 2


def _open_function(watch: Watch) -> Callable[..., Any]:
    real = io.open

    class Raw(io.FileIO):
        """A file that is written below the directory."""

        def write(self, block: Any) -> int:
            place = watch.inside(self.fileno()) or self.place
            return watch.take(
                "write",
                place,
                lambda: super(Raw, self).write(block),
                half=lambda: super(Raw, self).write(bytes(memoryview(block).cast("B"))[: _half(block)]),
                descriptor=self.fileno(),
            )

        def truncate(self, size: int | None = None) -> int:
            place = watch.inside(self.fileno()) or self.place
            return watch.take("truncate", place, lambda: super(Raw, self).truncate(size), descriptor=self.fileno())

    def open_(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        place = watch.inside(file) if isinstance(file, (str, bytes, os.PathLike)) else None
        if place is None or named.get("opener"):
            return real(file, mode, buffering, *rest, **named)
        watch.opening(place)
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, *rest, **named)
        bare = mode.replace("b", "").replace("t", "")
        if set(mode) & set("wx") or not os.path.exists(file):
            raws: list[Raw] = []

            def create() -> int:
                raws.append(Raw(file, bare))
                return raws[0].fileno()

            watch.take("create", place, create)
            raw = raws[0]
        else:
            raw = Raw(file, bare)
        raw.place = place
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, *rest, **named)
        text.mode = mode
        return text

    return open_
