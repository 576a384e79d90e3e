"""What a stage read and wrote, as hashes: exact, and cheap the second time.

A file's sha256 is kept with its size and modification time, as git's index does, so that a resumed run of a large model
does not read its checkpoints again to learn that nothing has changed.
"""

import fnmatch
import os
from pathlib import Path
from typing import Any

from megatron_sppo.errors import DataError
from megatron_sppo.storage import read_json, sha256_of_file, sha256_of_json, write_json

CACHE_NAME = ".file_hashes.json"

NOT_HASHED = (".*", "reference.*", "tensorboard", "*.log", "*.lock", "__pycache__")
"""Names that do not count: temporaries, what training adds to a dataset (it carries its own fingerprint), logs."""


class FileHashes:
    """Hashes of files and directories, remembered in `RUN_DIR/.file_hashes.json`."""

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir, CACHE_NAME)
        try:
            known = read_json(self.path)
        except DataError:  # only a cache: without it every file is read once more
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        self._changed = False

    def of(self, path: Path) -> str:
        """Hash a file, or a directory's files by relative name -> 64 hex digits, or "missing".

        Symbolic links are followed: a hub snapshot is links to blobs.
        """
        path = Path(path)
        if path.is_file():
            return self._of_file(path)
        if not path.is_dir():
            return "missing"
        listing = {str(file.relative_to(path)): self._of_file(file) for file in _hashed_files(path)}
        return sha256_of_json(listing) if listing else "missing"

    def save(self) -> None:
        """Write what was learnt."""
        if self._changed:
            write_json(self.path, self._known)
            self._changed = False

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        key, mark = os.path.abspath(path), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if isinstance(known, list) and known[:2] == mark:
            return str(known[2])
        digest = sha256_of_file(path)
        self._known[key] = [*mark, digest]
        self._changed = True
        return digest


def _hashed_files(directory: Path) -> list[Path]:
    """List the files that count, sorted -> paths."""
    files: list[Path] = []
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not _is_ignored(name)]
        files += [Path(folder, name) for name in names if not _is_ignored(name)]
    return sorted(files)


def _is_ignored(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_HASHED)
