"""Items of a checkpoint's data files (`distcp`): each read once, in one piece, and checked as it is read.

An item is one tensor's chunk or one object. Its sha256 is in the `.digests` beside its file, whose own sha256 is in the
manifest. A file without `.digests`, of an earlier version, has to be checked whole, before anything of it is used.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_sppo.checkpoints.digests import FileDigests, digests_path
from megatron_sppo.checkpoints.megatron_checkpoint import MANIFEST_FILE, listed_files, listed_items
from megatron_sppo.errors import DataError
from megatron_sppo.storage import contained


class Items:
    """Reads the items of one iteration directory; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Read the manifest, where there is one: else nothing can be checked.

        Raises:
            DataError: it is damaged.
        """
        self._directory = Path(directory)
        has_manifest = (self._directory / MANIFEST_FILE).is_file()
        self._listed = listed_files(self._directory) if has_manifest else None
        self._digests: dict[str, FileDigests | None] = {}

    def without_digests(self, names: Iterable[str]) -> list[str]:
        """Tell which data files have to be checked whole -> their names; none where nothing can be checked."""
        if self._listed is None:
            return []
        return [name for name in names if digests_path(Path(name)).as_posix() not in self._listed]

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
        """Read items of one data file, each by (offset, length) -> their bytes, in the order asked for.

        Raises:
            DataError: an item is not what was written, is cut short, or is none.
        """
        path, digests = contained(self._directory, name), self.digests(name)
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for offset, length in ranges:
                if offset + length > size:
                    raise DataError(
                        f"{path} is damaged (an item of {length} bytes at {offset} lies beyond its end). Use another "
                        "checkpoint."
                    )
                raw = _read(file.fileno(), offset, length)
                if digests is not None:
                    digests.check(path, offset=offset, length=length, found=hashlib.sha256(raw).hexdigest())
                yield raw

    def digests(self, name: str) -> FileDigests | None:
        """Read the digests of a data file's items, once -> digests, or None where the manifest lists none.

        Raises:
            DataError: they are not what was written.
        """
        if name not in self._digests:
            self._digests[name] = listed_items(self._directory, name, self._listed or {})
        return self._digests[name]


def _read(descriptor: int, offset: int, length: int) -> bytearray:
    raw = bytearray(length)
    view, position = memoryview(raw), 0
    while position < length:
        count = os.preadv(descriptor, [view[position:]], offset + position)  # at most 2 GiB at a time
        if not count:
            raise DataError("a file of the checkpoint became shorter while it was read. Leave it alone, and try again.")
        position += count
    return raw
