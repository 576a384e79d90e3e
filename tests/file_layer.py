"""Counts what a piece of work costs the file layer: bytes read by system calls, and bytes given to sha256.

Pages that are mapped are not counted as read; nothing that the tests count maps its files.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = 400_000
"""What manifests, `.metadata`, zip directories, model.json and a tokenizer of the tests' models add up to, at most."""


@dataclass
class Counts:
    """Bytes, of this process."""

    read: int = 0
    hashed: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count within the block; the counts are there after it."""
    counts, real = Counts(), hashlib.sha256

    class Counting:
        def __init__(self, content: Any = b"", **settings: Any) -> None:
            self._real = real(**settings)
            self.update(content)

        def update(self, content: Any) -> None:
            counts.hashed += memoryview(content).nbytes
            self._real.update(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    setattr(hashlib, "sha256", Counting)  # noqa: B010 mypy knows that it is a function
    before = _bytes_read()
    try:
        yield counts
    finally:
        counts.read = _bytes_read() - before
        setattr(hashlib, "sha256", real)  # noqa: B010


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
