"""What a data file of a checkpoint holds, range by range: `NAME.digests` beside `NAME.distcp`, by whom wrote that.

    {"schema_version": 2, "bytes": size of the file, "items": [[offset, length, sha256], ...]}

An item is what a reader asks for at once: one tensor's chunk, or one object. Who reads it checks it by itself, without
reading the rest of the file. Items follow each other without gaps and make up the file: the manifest has the sha256 of
`NAME.digests` in place of the file's own, and who writes a byte hashes it once. Version 1 has the file's sha256 beside.
Where there are no digests (an import of an earlier version) the file's sha256 in the manifest must do.
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
from megatron_sppo.json_files import read_json_as

SUFFIX = ".digests"
BLOCK_BYTES = 1 << 20
"""Hashed and written while it lies in a core's cache: memory is read once."""

_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Item(NamedTuple):
    """One range of a data file."""

    offset: _Count
    length: _Count
    sha256: _Sha256


@dataclass(frozen=True, kw_only=True)
class FileDigests:
    """Digests of all items of one data file."""

    schema_version: Literal[1, 2] = 2
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

    def check_file(self, path: Path) -> None:
        """Read a file once, from end to end, and compare each of its items with what was written.

        Raises:
            DataError: one differs, or the file is not made of these items.
        """
        with open(path, "rb") as file:
            for offset, length, _ in self._in_order:
                if offset != file.tell():
                    break
                digest = hashlib.sha256()
                while left := offset + length - file.tell():
                    block = file.read(min(left, BLOCK_BYTES))
                    if not block:
                        break
                    digest.update(block)
                self.check(path, offset=offset, length=length, found=digest.hexdigest())
            if file.tell() != self.bytes or file.read(1):
                raise DataError(
                    f"{digests_path(path)} does not list all of {path.name}. The checkpoint is damaged: use another "
                    "one."
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
        self._item = hashlib.sha256()
        self._start = self._position = 0
        self._items: list[Item] = []

    @property
    def position(self) -> int:
        """Bytes told so far: where the next will lie."""
        return self._position

    def update(self, block: Any) -> None:
        """Take the next bytes; cheapest in blocks of `BLOCK_BYTES` that are written right after."""
        self._item.update(block)
        self._position += memoryview(block).nbytes

    def end_item(self) -> None:
        """End the item that began where the one before it ended."""
        self._items.append(Item(self._start, self._position - self._start, self._item.hexdigest()))
        self._start, self._item = self._position, hashlib.sha256()

    def finish(self) -> FileDigests:
        """Return the digests of all that was told."""
        assert self._start == self._position, "the last item did not end"
        return FileDigests(bytes=self._position, items=tuple(self._items))

    def write(self, path: Path) -> None:
        """Write the digests beside the data file `path`, on the disk when this returns."""
        with open(digests_path(path), "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self.finish()), file, separators=(",", ":"))
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


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
