"""Which checkpoints of a root stay: the newest few that are whole, and whatever something still refers to.

A directory that goes is first renamed to `.iter_0000010.removed-<pid>`, so that a kill in the middle of it leaves
nothing that looks like a checkpoint; the next call removes the rest.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sppo.checkpoints.megatron_checkpoint import (
    expected_digests,
    iteration_directory,
    iterations,
    tracked_directory,
)
from megatron_sppo.errors import DataError
from megatron_sppo.storage import fsync_path

logger = logging.getLogger(__name__)


def keep_last(root: Path, count: int, *, newest: int, needed: Sequence[Path] = ()) -> list[Path]:
    """Remove the iterations of a root that are older than its `count` newest whole ones -> the directories that went.

    For the process that holds the root's lock, after it has published `newest`. Whole is what has a manifest and every
    file of it, each of the size that it was written with. Where fewer than `count` are whole nothing goes, and neither
    does what the tracker names.

    Args:
        newest: iterations above it are neither counted nor removed: a run that was taken back will come to them.
        needed: checkpoints, or files in them, that something will still read.
    """
    root, aside = Path(root), f".removed-{os.getpid()}"
    for left in root.glob(".iter_*.removed-*"):
        shutil.rmtree(left, ignore_errors=True)
    directories = [iteration_directory(root, number) for number in reversed(iterations(root)) if number <= newest]
    whole = [directory for directory in directories if _is_whole(directory)][:count]
    if len(whole) < count:
        if len(directories) > count:
            logger.warning(
                "%s: %d of its %d checkpoints are whole, none is removed", root, len(whole), len(directories)
            )
        return []
    kept = {path.resolve() for path in (tracked_directory(root), *needed) if path is not None}
    removed = []
    for directory in directories[directories.index(whole[-1]) + 1 :]:
        place = directory.resolve()
        if any(place == path or place in path.parents for path in kept):
            continue
        hidden = root / f".{directory.name}{aside}"
        os.rename(directory, hidden)
        fsync_path(root)
        shutil.rmtree(hidden, ignore_errors=True)
        removed.append(directory)
    if removed:
        logger.info("removed %s: the newest %d stay", ", ".join(path.name for path in removed), count)
    return removed


def _is_whole(directory: Path) -> bool:
    try:
        expected_digests(directory)
    except DataError:
        return False
    return True
