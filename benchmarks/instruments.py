"""What a piece of work costs, by counts that a busy machine does not change: calls, files, bytes; and time and memory.

    with Instruments(functions_of=package_directory) as costs:
        work()
    print(costs.total)

Bytes read and written are the kernel's count of system calls, those of children that have ended among them. Bytes
that are memory-mapped are in none of the counts. Bytes hashed are those that sha256 was given, in forked children too.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import sharedctypes
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

COUNTS = ("calls", "opens", "listings", "entries", "bytes_read", "bytes_written", "bytes_hashed")
"""The figures that decide: the same on every machine, whatever else runs there."""

_LISTINGS = ("os.listdir", "os.scandir")
_SLOTS = 4096


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one piece of work cost."""

    calls: int
    """Of Python functions of the package, generators' resumptions among them; 0 where they were not counted."""
    opens: int
    """Files opened by this process."""
    listings: int
    """Directories listed by this process."""
    entries: int
    """Files in them; 0 where functions were not counted."""
    bytes_read: int
    bytes_written: int
    bytes_hashed: int
    bytes_hashed_waiting: int
    """Of them, by this process's main thread: a step waits for these."""
    cpu_seconds: float
    """Of this process, all threads, and of children that have ended."""
    peak_bytes: int
    """Resident memory at its highest, over what there was before."""

    def to_json(self) -> dict[str, float]:
        """Spell it by names."""
        return asdict(self)


class Instruments:
    """Counts from the beginning of a block to its end; one at a time in a process."""

    _audited: list[Instruments] = []  # noqa: RUF012  # an audit hook stays for ever: what it counts for is here

    def __init__(self, *, functions_of: Path | None = None) -> None:
        """Prepare to count.

        Args:
            functions_of: package whose functions' calls are counted, at a multiple of their time; None: none are.
        """
        self._package = None if functions_of is None else f"{Path(functions_of)}{os.sep}"
        self._calls: list[int] = [0]
        self._inside: dict[Any, bool] = {}
        self._events = {"opens": 0, "listings": 0, "entries": 0}
        self._stopped_seconds = 0.0
        self._looks = False

    def __enter__(self) -> Instruments:
        """Begin to count."""
        install()
        _waiting[0] = os.getpid()
        Instruments._audited.append(self)
        if self._package is not None:
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)
        self._before = _bytes_counted()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._resident = _status("VmRSS")
        self._began = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and sum up in `total`."""
        seconds = _cpu_seconds() - self._began - self._stopped_seconds
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        peak = max(0, _status("VmHWM") - self._resident)
        after = _bytes_counted()
        Instruments._audited.remove(self)
        self.total = Costs(
            calls=self._calls[0],
            **self._events,
            **{name: after[name] - self._before[name] for name in after},
            cpu_seconds=seconds,
            peak_bytes=peak,
        )

    def leave_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what stands in for a network, so that its own seconds and calls do not count -> the function."""

        def uncounted(*arguments: Any, **settings: Any) -> Any:
            profile = sys.getprofile()
            sys.setprofile(None)
            began = time.thread_time()
            try:
                return function(*arguments, **settings)
            finally:
                self._stopped_seconds += time.thread_time() - began
                sys.setprofile(profile)

        return uncounted

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            code = frame.f_code
            inside = self._inside.get(code)
            if inside is None:
                assert self._package is not None
                inside = self._inside[code] = code.co_filename.startswith(self._package)
            if inside:
                self._calls[0] += 1

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._events["opens"] += 1
        elif event in _LISTINGS and not self._looks:
            self._events["listings"] += 1
            if self._package is not None:
                self._looks = True
                self._events["entries"] += len(os.listdir(arguments[0]))
                self._looks = False


class CountedArray(np.ndarray):
    """An array that counts the elements which ufuncs and look-ups on it and on what is made from it go through."""

    touched = 0
    """Elements, of all arrays of this kind."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        """Count the elements of all inputs, and compute."""
        CountedArray.touched += sum(value.size for value in inputs if isinstance(value, np.ndarray))
        if "out" in settings:
            settings["out"] = tuple(_plain(value) for value in settings["out"])
        result = getattr(ufunc, method)(*map(_plain, inputs), **settings)
        return result.view(CountedArray) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function: Any, types: Any, arguments: Any, settings: Any) -> Any:
        """Count the elements that are handed to a function of numpy, and compute."""
        CountedArray.touched += sum(value.size for value in _arrays(arguments))
        return super().__array_function__(function, types, arguments, settings)

    def __getitem__(self, key: Any) -> Any:
        """Count the elements that are taken out."""
        found = super().__getitem__(key)
        CountedArray.touched += getattr(found, "size", 1)
        return found


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, CountedArray) else value


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _arrays(part)


_hashed: Any = sharedctypes.RawArray("Q", _SLOTS)
"""Bytes given to sha256, a place for each process: children that are forked write into the same memory."""
_waiting = [0, 0]
"""This process's number, and bytes that its main thread gave to sha256."""
_installed: list[bool] = []


class _CountedHash:
    """A sha256 that counts what it is given."""

    def __init__(self, data: bytes = b"", **settings: Any) -> None:
        self._hash = _sha256(**settings)
        self.update(data)

    def update(self, data: Any) -> None:
        self._hash.update(data)
        size = memoryview(data).nbytes
        _hashed[os.getpid() % _SLOTS] += size
        if threading.current_thread() is threading.main_thread() and os.getpid() == _waiting[0]:
            _waiting[1] += size

    def copy(self) -> _CountedHash:
        twin = _CountedHash()
        twin._hash = self._hash.copy()
        return twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hash, name)


_sha256, _new = hashlib.sha256, hashlib.new


def install() -> None:
    """Put the counters in their places, for ever; before what is measured takes `hashlib.sha256` by name."""
    if _installed:
        return
    _installed.append(True)

    def new(name: str, data: bytes = b"", **settings: Any) -> Any:
        return _CountedHash(data, **settings) if name == "sha256" else _new(name, data, **settings)

    hashlib.sha256 = _CountedHash  # type: ignore[assignment, misc]
    hashlib.new = new

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        for instruments in Instruments._audited:
            instruments._audit(event, arguments)

    sys.addaudithook(audit)


def _bytes_counted() -> dict[str, int]:
    """Ask the kernel what system calls have read and written so far, and the hashes what they were given -> bytes."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    moved = {"bytes_read": values["rchar"], "bytes_written": values["wchar"]}
    return moved | {"bytes_hashed": sum(_hashed), "bytes_hashed_waiting": _waiting[1]}


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
