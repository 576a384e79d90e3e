"""What a disk may hold after a crash of the machine, from the log of operations of a writer (file_faults.py).

A file's bytes are there once the file was fsynced, and its name once the directory was; a change of two names (a
rename, an exchange) is one change. What was not synced may be there or not, each change for itself, in any order: of
what is new in a file all, half or none. So renames overtake each other, and names come before their bytes. A directory
that is synced keeps its own name too, as on every journalling file system.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.file_faults import Operation


@dataclass(eq=False)
class _File:
    now: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class _Directory:
    now: dict[str, "_Node"] = field(default_factory=dict)
    synced: dict[str, "_Node"] = field(default_factory=dict)


_Node = _File | _Directory
_Change = list[tuple[_Directory, str, _Node | None]]


class Disk:
    """A directory as programs see it, and as it would be found after a crash."""

    def __init__(self, start: Path) -> None:
        """Begin with what `start` holds, all of it synced."""
        self._root = _loaded(start)
        self._pending: list[_Change] = []

    def apply(self, operation: Operation) -> None:
        """Go on by one operation."""
        name, path, other = operation.name, operation.path, operation.other
        if path.endswith(" (deleted)"):
            return
        if name in ("create", "write", "truncate", "fsync"):
            node = self._at(path)
            if name == "create" and node is None:
                self._change([(*self._place(path), _File())])
            elif isinstance(node, _Directory):
                self._sync(path, node)
            elif node is not None and name == "fsync":
                node.synced = node.now
            elif node is not None:
                node.now = operation.content or b""
        elif name == "mkdir":
            self._change([(*self._place(path), _Directory())])
        elif name in ("unlink", "rmdir"):
            self._change([(*self._place(path), None)])
        elif name == "link":
            self._change([(*self._place(other), self._at(path))])
        elif name == "rename":
            self._change([(*self._place(other), self._at(path)), (*self._place(path), None)])
        elif name == "exchange":
            self._change([(*self._place(other), self._at(path)), (*self._place(path), self._at(other))])
        else:
            raise AssertionError(f"{name} is not simulated")

    def crash(self, dice: random.Random, into: Path) -> None:
        """Write what one crash at this point leaves into an empty directory."""
        kept = [change for change in self._pending if dice.random() < 0.5]
        names = {id(directory): dict(directory.synced) for directory in _directories(self._root, kept)}
        for change in kept:
            for directory, name, node in change:
                _set(names[id(directory)], name, node)
        _write(self._root, names, dice, into)

    def _change(self, change: _Change) -> None:
        for directory, name, node in change:
            _set(directory.now, name, node)
        self._pending.append(change)

    def _sync(self, path: str, node: _Directory) -> None:
        synced = [node]
        if path != ".":
            synced.append(self._place(path)[0])  # its own name
        for change in [change for change in self._pending if any(place in synced[:1] for place, _, _ in change)]:
            self._settle(change)
        for change in [change for change in self._pending if any(new is node for _, _, new in change)]:
            self._settle(change)
        if path != "." and synced[1] is not self._root:
            self._sync(str(Path(path).parent), synced[1])

    def _settle(self, change: _Change) -> None:
        self._pending.remove(change)
        for directory, name, node in change:
            _set(directory.synced, name, node)

    def _at(self, path: str) -> _Node | None:
        node: _Node | None = self._root
        for part in () if path == "." else path.split("/"):
            node = node.now.get(part) if isinstance(node, _Directory) else None
        return node

    def _place(self, path: str) -> tuple[_Directory, str]:
        parent, _, name = path.rpartition("/")
        directory = self._at(parent or ".")
        assert isinstance(directory, _Directory), path
        return directory, name


def crashes(start: Path, operations: Sequence[Operation], numbers: Sequence[int], into: Path) -> Iterator[int]:
    """Crash by each of the numbers, at a random operation -> the number of operations that were done; `into` has it."""
    for number in numbers:
        dice = random.Random(number)
        done = dice.randint(1, len(operations)) if number else len(operations)  # the first: right after the command
        disk = Disk(start)
        for operation in operations[:done]:
            disk.apply(operation)
        disk.crash(dice, into)
        yield done


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _loaded(path: Path) -> _Directory:
    directory = _Directory()
    for entry in path.iterdir():
        content = b"" if entry.is_dir() else entry.read_bytes()
        directory.now[entry.name] = _loaded(entry) if entry.is_dir() else _File(content, content)
    directory.synced = dict(directory.now)
    return directory


def _directories(root: _Directory, kept: Sequence[_Change]) -> list[_Directory]:
    """Find every directory that can be met: from the root as it was synced, and by the changes that were kept."""
    found: list[_Directory] = []
    waiting: list[_Node | None] = [root]
    for place, _, node in itertools.chain.from_iterable(kept):
        waiting += [place, node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Directory) and node not in found:
            found.append(node)
            waiting += node.synced.values()
    return found


def _write(directory: _Directory, names: dict[int, dict[str, _Node]], dice: random.Random, into: Path) -> None:
    into.mkdir(exist_ok=True)
    for name, node in names[id(directory)].items():
        if isinstance(node, _Directory):
            _write(node, names, dice, into / name)
        else:
            (into / name).write_bytes(dice.choice((node.now, _half_written(node), node.synced)))


def _half_written(file: _File) -> bytes:
    """Take half of what is new in a file: bytes at its beginning that were synced and are the same have stayed."""
    pairs = enumerate(zip(file.now, file.synced, strict=False))
    same = next((place for place, (new, old) in pairs if new != old), min(len(file.now), len(file.synced)))
    return file.now[: same + (len(file.now) - same) // 2]
