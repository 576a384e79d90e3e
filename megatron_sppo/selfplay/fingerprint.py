"""What a stage read and wrote, as hashes: exact, and cheap from the first time on.

What a stage's command hashed while it wrote is not hashed again: its manifest is believed as long as sizes and times of
change agree with it. Anything else is hashed once, and kept with its inode, size and both times of change, as git's
index does. So a file that was changed by hand is seen, though it kept its size and was given back its time.
"""

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.file_digests import (
    MANIFEST_NAME,
    is_settled,
    listed_digests,
    mark,
    sha256_of_files,
    sha256_of_items,
)
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, sha256_of_json, write_json

CACHE_NAME = ".file_hashes.json"

NOT_HASHED = (".*", "reference.*", "tensorboard", "trackers", "trackers.json", "*.log", "*.lock", "__pycache__")
"""Names that do not count: temporaries, what training adds to a dataset (it carries its own fingerprint), logs, what
trackers keep."""


class FileHashes:
    """Hashes of files and directories, remembered in `RUN_DIR/.file_hashes.json`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / CACHE_NAME
        try:
            known = read_json(self.path)
        except DataError:  # only a cache: without it files that no manifest lists are read once more
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        self._changed = False

    def of(self, path: Path) -> str:
        """Hash a file, or a directory's files by relative name -> 64 hex digits, or "missing".

        Symbolic links are followed: a hub snapshot is links to blobs.
        """
        path = Path(path)
        if path.is_file():
            return self._of_files([path], listed={})[path]
        if not path.is_dir():
            return "missing"
        files, listed = _files_that_count(path)
        digests = self._of_files(files, listed=listed)
        listing = {str(file.relative_to(path)): digest for file, digest in digests.items()}
        return sha256_of_json(listing) if listing else "missing"

    def save(self) -> None:
        """Write what was learnt."""
        if self._changed:
            write_json(self.path, self._known, seal=True)
            self._changed = False

    def _of_files(self, files: Sequence[Path], *, listed: dict[Path, str]) -> dict[Path, str]:
        """Find each file's sha256: as it was noted, as its writer listed it, or from its bytes -> {file: sha256}."""
        marks = {file: mark(file) for file in files}
        settled = [file for file in files if is_settled(marks[file])]
        digests = {file: digest for file in files if (digest := self._noted(file, marks[file]) or listed.get(file))}
        digests |= {file: digest for file in files if file not in digests and (digest := sha256_of_items(file))}
        unknown = [file for file in files if file not in digests]
        digests |= zip(unknown, sha256_of_files(unknown), strict=True)
        for file in settled:
            entry = [*marks[file], digests[file]]
            if self._known.get(key := self._key(file)) != entry:
                self._known[key] = entry
                self._changed = True
        return digests

    def _noted(self, file: Path, marked: list[int]) -> str | None:
        entry = self._known.get(self._key(file))  # of an earlier version: without inode and the kernel's time
        return str(entry[4]) if isinstance(entry, list) and len(entry) == 5 and entry[:4] == marked else None

    def _key(self, file: Path) -> str:
        """Name a file within the run relative to it: a run that was moved is not hashed again -> str."""
        return str(file.relative_to(self.run_dir)) if file.is_relative_to(self.run_dir) else os.path.abspath(file)


def _files_that_count(directory: Path) -> tuple[list[Path], dict[Path, str]]:
    """List the files that count, and what the manifests among them say -> sorted paths, {path: sha256}."""
    files: list[Path] = []
    listed: dict[Path, str] = {}
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not _is_ignored(name)]
        files += [Path(folder, name) for name in names if not _is_ignored(name)]
        if MANIFEST_NAME in names:
            listed |= listed_digests(Path(folder))
    return sorted(files), listed


def _is_ignored(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_HASHED)
