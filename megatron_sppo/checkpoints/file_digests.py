"""The sha256 of files that were hashed before, without reading them again, and of the others by several threads.

Whoever writes a checkpoint, a dataset or rollouts hashes what it writes and lists it in `manifest.json`, the last file
of its directory: `listed_digests`. What nobody lists, such as a downloaded model, is hashed by the first who asks and
remembered for this user: `sha256_of_files`. No torch here: the loop of self-play lives beside an engine.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.digests import digests_path, read_digests
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.storage import contained, sha256_of_file

MANIFEST_NAME = "manifest.json"
REMEMBERED_BYTES = 16 << 20
"""Smaller files are hashed again: that is as quick as looking them up."""

_MOST_WORKERS = 16
_MOST_REMEMBERED = 4096
_TICK_SECONDS, _COARSE_TICK_SECONDS = 0.1, 2.0
"""A file that was changed less than a tick of its file system's clock ago may change again in it: it is not remembered.
The second is of those that keep whole seconds."""


def default_workers() -> int:
    """Count the cores that this process may use, and one for a thread that waits for the disk -> int, at most 16."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)) + 1)


def listed_digests(directory: Path) -> dict[Path, str]:
    """Look up what a directory's manifest says of its files -> {path: sha256}, empty where there is no manifest.

    A file counts as listed while it has the listed size and was not changed after the manifest, which its writer
    finished last. The kernel's own time of change counts too, which nobody can set; so the files of a copy are read
    once more. Of a file with several names it does not: a name more or less is a change to the kernel, and the stage
    that reads the file checks what it reads.
    Manifests of checkpoints and datasets list `files: {name: {sha256, bytes}}`, those of rollouts
    `shards: [{file, sha256}]`. The sha256 of a data file that was hashed item by item is that of its digests.
    """
    path = Path(directory, MANIFEST_NAME)
    with contextlib.suppress(DataError, OSError):  # damaged: its files are hashed, as if it were not there
        manifest, finished = read_json(path), path.stat()
        found = {}
        for name, digest, size in _entries(manifest):
            file = contained(directory, name)
            if file.is_file():
                stat = file.stat()
                is_older = stat.st_mtime_ns <= finished.st_mtime_ns and (
                    stat.st_ctime_ns <= finished.st_ctime_ns or stat.st_nlink > 1
                )
                if is_older and size in (None, stat.st_size):
                    found[file] = digest
        return found
    return {}


def _entries(manifest: Any) -> list[tuple[str, str, int | None]]:
    """List what a manifest of any kind says -> (name, sha256, bytes or None)."""
    if not isinstance(manifest, dict):
        return []
    files, shards = manifest.get("files"), manifest.get("shards")
    named = [*files.items()] if isinstance(files, dict) else []
    if isinstance(shards, list):
        named += [(entry.get("file"), entry) for entry in shards if isinstance(entry, dict)]
    return [
        (name, entry["sha256"], entry.get("bytes"))
        for name, entry in named
        if isinstance(name, str) and isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
    ]


def sha256_of_items(path: Path) -> str | None:
    """Hash a data file by the digests of its items, as its manifest does -> sha256 of those.

    None where it has none, has its own sha256 beside them, or is not what they say.
    """
    beside = digests_path(path)
    if path != beside and beside.is_file():
        with contextlib.suppress(DataError):
            digests = read_digests(path)
            if digests.schema_version > 1:
                digests.check_file(path)
                return sha256_of_file(beside)
    return None


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """Hash files side by side, but for those that this user hashed before and that were not touched since -> sha256s.

    Remembered in $XDG_CACHE_HOME/megatron_sppo, by place, inode, size and both times of change; links are followed. A
    file of the hub's cache lies there under its hash, and is held against it.

    Raises:
        DataError: a file of the hub's cache is not what the hub has.
    """
    memory = _Memory()
    known = [memory.recall(path) for path in paths]
    unknown = [path for path, digest in zip(paths, known, strict=True) if digest is None]
    if any(one[1] >= REMEMBERED_BYTES and not is_settled(one) for one in map(mark, unknown)):
        time.sleep(_TICK_SECONDS)  # such as a model that was exported this instant: not to read it again next time
    with ThreadPoolExecutor(max_workers=default_workers()) as pool:  # hashing releases the GIL
        marks = [(one, is_settled(one)) for one in map(mark, unknown)]
        found = dict(zip(unknown, pool.map(sha256_of_file, unknown), strict=True))
    for path, digest in found.items():
        _check_blob(path, digest)
    memory.keep({path: (one, found[path]) for path, (one, settled) in zip(unknown, marks, strict=True) if settled})
    return [digest or found[path] for path, digest in zip(paths, known, strict=True)]


def check_blobs(paths: Iterable[Path]) -> None:
    """Hold the files among these that link into the hub's cache against the hashes that they lie there under.

    Raises:
        DataError: one is damaged.
    """
    sha256_of_files([path for path in paths if _blob_name(path) is not None])


def _blob_name(path: Path) -> str | None:
    """Find what the hub's cache calls the file that a path links to (snapshots/REVISION/NAME -> blobs/HASH) -> hash.

    sha256 of a file in LFS, 64 digits; git's sha1 of a small one, 40.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve()
    is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) is not None
    return blob.name if blob.parent.name == "blobs" and is_hash else None


def _check_blob(path: Path, sha256: str) -> None:
    name = _blob_name(path)
    if name is None:
        return
    if len(name) == 40:
        content = path.read_bytes()
        sha256 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if sha256 != name:
        raise DataError(
            f"{path} is not what the hub has: its hash is not {name[:12]}..., under which it lies in the cache. It is "
            f"damaged: rm {path.resolve()} and fetch the model again."
        )


def mark(path: Path) -> list[int]:
    """Tell by what a changed file differs, whatever it was changed by -> [inode, bytes, mtime, ctime], times in ns.

    The last is the kernel's own, which nobody can set back.
    """
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def is_settled(marked: list[int]) -> bool:
    """Tell, right after `mark` and before the file is read, whether any later change would give it another mark.

    One within the same tick of the file system's clock would not: git calls such files racy.
    """
    changed = max(marked[2:])
    tick = _COARSE_TICK_SECONDS if changed % 10**9 == 0 else _TICK_SECONDS
    return changed < (time.time() - tick) * 1e9


class _Memory:
    """{resolved path: [inode, size, mtime, ctime, sha256]} in a file of this user's; without a home, nothing."""

    def __init__(self) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # "~" stays as it is for a user without HOME and without a name, as in many containers.
        self._path = Path(root, "megatron_sppo", "file_digests.json") if os.path.isabs(root) else None
        self._entries = self._read()

    def recall(self, path: Path) -> str | None:
        entry = self._entries.get(str(path.resolve()))
        if isinstance(entry, list) and len(entry) == 5 and entry[:4] == mark(path):
            return str(entry[4])
        return None

    def keep(self, found: dict[Path, tuple[list[int], str]]) -> None:
        """Add what is large and at rest; of the whole, the latest `_MOST_REMEMBERED` stay."""
        added = {
            str(path.resolve()): [*marked, digest]
            for path, (marked, digest) in found.items()
            if marked[1] >= REMEMBERED_BYTES and marked == mark(path)
        }
        if not added or self._path is None:
            return
        entries = {name: entry for name, entry in self._read().items() if name not in added} | added
        with contextlib.suppress(OSError, DataError):  # a home that cannot be written: hashed again the next time
            write_json(self._path, dict(list(entries.items())[-_MOST_REMEMBERED:]), seal=True)

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        with contextlib.suppress(DataError):
            content = read_json(self._path)
            return content if isinstance(content, dict) else {}
        return {}
