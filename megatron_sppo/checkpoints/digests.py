"""What a data file of a checkpoint holds, range by range: `NAME.digests` beside `NAME.distcp`, by whom wrote that.

    {"schema_version": 1, "sha256": of the whole file, "bytes": its size, "items": [[offset, length, sha256], ...]}

An item is what a reader asks for at once: one tensor's chunk, or one object. Who reads it checks it by itself, without
reading the rest of the file; the manifest, which has the sha256 of every file, has that of `NAME.digests` too. Where
there is none (a checkpoint of an earlier version) the file's own sha256 in the manifest must do.
"""

import bisect
import dataclasses
import functools
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import msgspec

from megatron_sppo.errors import DataError
from megatron_sppo.storage import read_json_as

SUFFIX = ".digests"
BLOCK_BYTES = 1 << 20
"""Hashed for the item, hashed for the file and written while it lies in a core's cache: memory is read once."""

_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Item(NamedTuple):
    """One range of a data file."""

    offset: _Count
    length: _Count
    sha256: _Sha256


@dataclass(frozen=True, kw_only=True)
class FileDigests:
    """Digests of one data file: of the whole, and of each item in it."""

    schema_version: Literal[1] = 1
    sha256: _Sha256
    bytes: _Count
    items: tuple[Item, ...]

    @functools.cached_property
    def _by_range(self) -> dict[tuple[int, int], str]:
        return {(item.offset, item.length): item.sha256 for item in self.items}

    @functools.cached_property
    def _in_order(self) -> list[Item]:
        return sorted(self.items)

    def expected(self, path: Path, *, offset: int, length: int) -> str:
        """Find the sha256 that an item of `path` must have -> hexadecimal.

        Raises:
            DataError: no item lies there.
        """
        found = self._by_range.get((offset, length))
        if found is None:
            raise DataError(
                f"{digests_path(path)} lists no item of {length} bytes at {offset}. "
                "The checkpoint is damaged: use another one."
            )
        return found

    def item_at(self, path: Path, offset: int, length: int) -> tuple[int, int]:
        """Find the item of `path` that a range lies in -> (offset, length).

        Raises:
            DataError: it lies in none.
        """
        position = bisect.bisect_right(self._in_order, offset, key=lambda item: item.offset) - 1
        if position < 0 or offset + length > sum(self._in_order[position][:2]):
            raise DataError(
                f"{digests_path(path)} lists no item around {length} bytes at {offset}. "
                "The checkpoint is damaged: use another one."
            )
        return self._in_order[position][:2]

    def check(self, path: Path, *, offset: int, length: int, found: str) -> None:
        """Compare the sha256 of an item that was read from `path` with what was written.

        Raises:
            DataError: they differ, or no item lies there.
        """
        if found != self.expected(path, offset=offset, length=length):
            raise DataError(
                f"{path} is not what was written (sha256 of the {length} bytes at {offset} differs). "
                "The checkpoint is damaged: use another one."
            )


def digests_path(path: Path) -> Path:
    """Name the file beside a data file that holds its digests."""
    return Path(path).with_suffix(SUFFIX)


def read_digests(path: Path) -> FileDigests:
    """Read the digests of the data file `path`; that they are what was written is the manifest's to say.

    Raises:
        DataError: missing, or damaged.
    """
    return read_json_as(digests_path(path), FileDigests, remedy="The checkpoint is damaged: use another one.")


class ItemDigests:
    """Digests of a file in the making: told every byte that goes into it, in order, and where each item ends."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._item: Any = None
        """None in the first item, which is all that there is: its digest is the whole's so far."""
        self._start = self._position = 0
        self._items: list[Item] = []

    @property
    def position(self) -> int:
        """Bytes told so far: where the next will lie."""
        return self._position

    def update(self, block: Any) -> None:
        """Take the next bytes; cheapest in blocks of `BLOCK_BYTES` that are written right after."""
        if self._item is not None:
            self._item.update(block)
        self._whole.update(block)
        self._position += memoryview(block).nbytes

    def end_item(self) -> None:
        """End the item that began where the one before it ended."""
        digest = (self._item or self._whole).hexdigest()
        self._items.append(Item(self._start, self._position - self._start, digest))
        self._start, self._item = self._position, hashlib.sha256()

    def finish(self) -> FileDigests:
        """Return the digests of all that was told."""
        assert self._start == self._position, "the last item did not end"
        return FileDigests(sha256=self._whole.hexdigest(), bytes=self._position, items=tuple(self._items))

    def write(self, path: Path) -> FileDigests:
        """Write the digests beside the data file `path`, on the disk when this returns -> what was written."""
        digests = self.finish()
        with open(digests_path(path), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(digests), file, separators=(",", ":"))
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        return digests


class DigestingStream(io.RawIOBase):
    """Writes one item into an open file and tells `digests` its bytes; closing it ends the item, not the file."""

    def __init__(self, raw: IO[bytes], digests: ItemDigests) -> None:
        super().__init__()
        self._raw, self._digests = raw, digests
        self.failure: OSError | None = None
        """What the file said of a write that failed: a caller in between may raise something else."""

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def write(self, block: Any) -> int:
        """Hash and write, block by block -> the number of bytes."""
        view = memoryview(block).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            part = view[start : start + BLOCK_BYTES]
            self._digests.update(part)
            try:
                self._raw.write(part)
            except OSError as error:
                self.failure = error
                raise
        return len(view)

    def close(self) -> None:
        """End the item; the file stays open for the next."""
        if not self.closed:
            self._digests.end_item()
        super().close()


def digested_files(directory: Path) -> dict[str, tuple[str, int]]:
    """List the data files of a directory that was just written with their digests -> {name: (sha256, bytes)}.

    Raises:
        DataError: a `.digests` is damaged.
    """
    found = {}
    for beside in sorted(Path(directory).glob(f"*{SUFFIX}")):
        path = beside.with_suffix(".distcp")
        digests = read_digests(path)
        found[path.name] = digests.sha256, digests.bytes
    return found
