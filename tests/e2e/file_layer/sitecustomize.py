"""Counts what a process and its children read, write and hash of files below a directory, for tests.

Python imports a module of this name before anything else where its folder is on PYTHONPATH. Beneath every reader and
writer of the package lie `open`, `os`'s calls and hashlib: each is told what it moves, and adds a line to a file,

    PID WHAT BYTES PATH      WHAT is read, write or hash; hashes of less than 4096 bytes are left out, and have no path

which holds whatever ends the process. Not seen: what is read through mmap, and what C++ or Rust opens by itself.
"""

import builtins
import hashlib
import io
import os
import posix
import sys
from typing import Any

_ROOT, _LOG = os.environ["COUNTED_ROOT"] + os.sep, os.environ["COUNTED_LOG"]
_LEAST_HASHED = 4096

_write, _open, _close = posix.write, posix.open, posix.close
_paths: dict[int, str] = {}


def _note(what: str, num_bytes: int, path: str = "") -> None:
    if num_bytes:  # the file is opened for each, as a process that is forked may close what it has from its parent
        log = _open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        _write(log, f"{os.getpid()} {what} {num_bytes} {path}\n".encode())
        _close(log)


def _counted(path: Any) -> str | None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    full = os.path.abspath(os.fsdecode(path))
    return full if full.startswith(_ROOT) else None


class _Raw(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        block = super().read(-1 if size is None else size)
        _note("read", len(block), self.place)
        return block

    def readall(self) -> bytes:
        block = super().readall()
        _note("read", len(block), self.place)
        return block

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        _note("read", count, self.place)
        return count

    def write(self, block: Any) -> int:
        count = super().write(block)
        _note("write", count, self.place)
        return count

    def close(self) -> None:
        if not self.closed:
            _paths.pop(self.fileno(), None)
        super().close()


_io_open = io.open


def _counting_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
    place = _counted(file)
    if place is None or named.get("opener"):  # tempfile gives its directory, and a function that opens another
        return _io_open(file, mode, buffering, *rest, **named)
    raw = _Raw(file, mode.replace("b", "").replace("t", ""))
    raw.place = place
    _paths[raw.fileno()] = place
    if buffering == 0:
        return raw
    kind = io.BufferedRandom if "+" in mode else io.BufferedReader if mode[0] == "r" else io.BufferedWriter
    buffered = kind(raw)
    if "b" in mode:
        return buffered
    text = io.TextIOWrapper(buffered, *rest, **named)
    text.mode = mode
    return text


def _opened(path: Any, *rest: Any, **named: Any) -> int:
    descriptor = _open(path, *rest, **named)
    if place := _counted(path):
        _paths[descriptor] = place
    return descriptor


def _closed(descriptor: int) -> None:
    _paths.pop(descriptor, None)
    _close(descriptor)


def _told(name: str, what: str) -> None:
    """Count a call of `os` on a descriptor, whose result is bytes or their number."""
    call = getattr(os, name)

    def counting(descriptor: int, *rest: Any) -> Any:
        result = call(descriptor, *rest)
        if descriptor in _paths:
            _note(what, result if isinstance(result, int) else len(result), _paths[descriptor])
        return result

    setattr(os, name, counting)


def _sent(to: int, source: int, *rest: Any) -> int:
    count: int = _sendfile(to, source, *rest)
    for what, descriptor in (("read", source), ("write", to)):
        if descriptor in _paths:
            _note(what, count, _paths[descriptor])
    return count


_sha256 = hashlib.sha256


class _Hash:
    """hashlib's sha256 object, which cannot be derived from."""

    def __init__(self, block: Any = b"", **named: Any) -> None:
        self._hash, self._bytes = _sha256(block, **named), memoryview(block).nbytes

    def update(self, block: Any) -> None:
        self._bytes += memoryview(block).nbytes
        self._hash.update(block)

    def _end(self) -> None:
        if self._bytes >= _LEAST_HASHED:
            _note("hash", self._bytes)
        self._bytes = 0

    def hexdigest(self) -> str:
        self._end()
        return self._hash.hexdigest()

    def digest(self) -> bytes:
        self._end()
        return self._hash.digest()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hash, name)


_note("command", 1, " ".join(sys.orig_argv).replace("\n", " "))
if not isinstance(builtins.open, type(_counting_open)):  # a process that was forked has the layer of its parent
    os.register_at_fork(after_in_child=lambda: _note("forked", os.getppid()))
    builtins.open = io.open = _counting_open
    os.open, os.close, _sendfile, os.sendfile = _opened, _closed, os.sendfile, _sent
    hashlib.sha256 = _Hash
    for _name in ("read", "pread", "preadv"):
        _told(_name, "read")
    for _name in ("write", "pwrite", "pwritev"):
        _told(_name, "write")
