"""Megatron-LM's checkpoint layout on disk: a root with a tracker, and one directory per iteration.

    ROOT/latest_checkpointed_iteration.txt    "0"
    ROOT/model.json
    ROOT/iter_0000000/{.metadata, *.distcp, common.pt, metadata.json, model.json, hf/*, manifest.json}

The manifest holds sha256 and size of every other file of its directory and is written last; the sha256 of a data file
with digests, which its entry names, is that of the digests. An iteration directory appears by a rename, and the tracker
after it. Training shares these functions.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.digests import FileDigests, digests_path, read_digests
from megatron_sppo.checkpoints.distcp import METADATA_FILE, data_files, read_metadata
from megatron_sppo.checkpoints.file_digests import default_workers
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.storage import atomic_file, contained, remove_stale_temporaries, sha256_of_file

logger = logging.getLogger(__name__)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
MANIFEST_FILE = "manifest.json"
BACKEND_FILE = "metadata.json"
HF_DIRECTORY = "hf"
"""Inside an iteration directory: config.json, tokenizer and chat template of the model, for the export."""
CARRIED_FILE = "carried.safetensors"
"""In there: tensors of the Hugging Face model that are no part of its decoder (conversion/carried.py), if any."""
MANIFEST_VERSION = 1
RELEASE = "release"
"""In place of an iteration: Megatron-LM's word in the tracker, and name of the directory."""
ITERATION_PATTERN = "iter_" + 7 * "[0-9]" + "*"
"""Glob of the iteration directories; those of a self-play run (`iter_1`) are others."""

_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_directory(root: Path, iteration: int) -> Path:
    """Name an iteration's directory, as Megatron-LM does."""
    return Path(root, f"iter_{iteration:07d}")


def iterations(root: Path) -> list[int]:
    """List the iterations that have a directory under `root`, finished or not -> ascending."""
    found = (_ITERATION.fullmatch(path.name) for path in Path(root).glob("iter_*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def resolve_checkpoint(path: Path, *, weights_only: bool = False) -> Path:
    """Find the iteration directory that `path` means: the directory itself, or the one that a root's tracker names.

    Where the tracker is empty, garbage or ahead of what is on disk, the newest directory whose checksums hold is taken,
    with a warning.

    Args:
        weights_only: what holds no weights is not hashed for that.

    Raises:
        DataError: nothing usable there; the message says what is.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a directory. Check the path of the Megatron checkpoint.")
    if (path / METADATA_FILE).is_file():
        return path
    _refuse_older_format(path)
    if _ITERATION.fullmatch(path.name):
        raise DataError(
            f"{path} has no {METADATA_FILE}: it was never finished. Use its root {path.parent}, or another iteration."
        )
    named, fault = _tracked(path)
    if named is not None:
        match = _ITERATION.fullmatch(named.name)
        if match and (latest := max(iterations(path))) > int(match[1]):
            later = iteration_directory(path, latest).name
            logger.warning("%s names %s, and it is taken: not %s", path / TRACKER_FILE, named.name, later)
        return named
    for iteration in reversed(iterations(path)):
        directory = iteration_directory(path, iteration)
        try:
            small, data = sorted_files(directory, weights_only=True) if weights_only else ([], [])
            verify_checkpoint(directory, names=[*small, *data] or None)
        except (DataError, ConversionError) as error:
            logger.warning("passed over: %s", error)
            continue
        logger.warning(
            "%s %s; taking %s, the newest checkpoint whose checksums hold", path / TRACKER_FILE, fault, directory.name
        )
        return directory
    for directory in (path / RELEASE, *(iteration_directory(path, number) for number in iterations(path))):
        _refuse_older_format(directory)
    if (path / "config.json").is_file():
        raise DataError(
            f"{path} is a Hugging Face model, no Megatron checkpoint. "
            f"megatron-sppo convert import --hf {path} --megatron NEW_DIR (in a clone: tools/convert.py import)"
        )
    raise DataError(
        f"{path} holds no usable Megatron checkpoint ({TRACKER_FILE} {fault}). "
        f"megatron-sppo convert import --hf HF_DIR --megatron {path} (in a clone: tools/convert.py import)"
    )


def _refuse_older_format(directory: Path) -> None:
    """Refuse Megatron-LM's format of one pickle a rank (mp_rank_00/model_optim_rng.pt), by its name."""
    if next(directory.glob("mp_rank_*"), None) is not None:
        raise DataError(
            f"{directory} is in Megatron-LM's older format (--ckpt-format torch), which is not read. "
            "Save it again by Megatron-LM with --ckpt-format torch_dist."
        )


def tracked_directory(root: Path) -> Path | None:
    """Find the iteration directory that a root's tracker names -> directory, or None where it names none that is there.

    Nothing of it is verified.
    """
    return _tracked(Path(root))[0]


def _tracked(root: Path) -> tuple[Path | None, str]:
    """Follow the tracker -> (the directory, "") or (None, what is wrong with the tracker)."""
    tracker = root / TRACKER_FILE
    if not tracker.is_file():
        return None, "is missing"
    text = tracker.read_bytes().decode("utf-8", errors="replace").strip()
    if text == RELEASE:
        directory = root / RELEASE
    elif text.isascii() and text.isdigit():
        directory = iteration_directory(root, int(text))
    else:
        return None, f"says {text[:20]!r}, which is no iteration" if text else "is empty"
    if not (directory / METADATA_FILE).is_file():
        return None, f"says {text}, but {directory.name} is missing or was never finished"
    return directory, ""


def refuse_later(root: Path, iteration: int) -> None:
    """Refuse to make `iteration` the newest of a root that holds other checkpoints.

    Raises:
        ConversionError: it does.
    """
    later = [f"checkpoints up to iteration {number}" for number in iterations(root) if number != iteration]
    later += ["a release of Megatron-LM's"] if (Path(root) / RELEASE).is_dir() else []
    if later:
        raise ConversionError(f"{root} holds {later[-1]}. Import into a new directory: --megatron NEW_DIR.")


def write_manifest(directory: Path) -> None:
    """Write the manifest over all files of an iteration directory; the last file to be written.

    A file that was hashed item by item as it was written is not read again: the manifest names its digests.
    """
    files = {}
    for path in sorted(Path(directory).rglob("*")):
        name, beside = path.relative_to(directory).as_posix(), digests_path(path)
        if path.is_file() and name != MANIFEST_FILE:
            by_items = beside != path and beside.is_file()
            files[name] = {"sha256": sha256_of_file(beside if by_items else path), "bytes": path.stat().st_size}
            files[name] |= {"digests": beside.name} if by_items else {}
    write_json(Path(directory, MANIFEST_FILE), {"schema_version": MANIFEST_VERSION, "files": files})


def verify_checkpoint(directory: Path, *, names: Sequence[str] | None = None) -> None:
    """Check an iteration directory against its manifest: every file, or those named, by size and sha256.

    Raises:
        DataError: no manifest, or a file that is missing, changed or not in it.
    """
    files = listed_files(directory)
    entries = {name: _sized(directory, name, files) for name in (files if names is None else names)}

    def verify(name: str) -> None:
        path, digests = contained(directory, name), listed_items(directory, name, files)
        if digests is None:
            check_digest(path, sha256_of_file(path), entries[name].get("sha256"))
        else:
            digests.check_file(path)

    with ThreadPoolExecutor(max_workers=default_workers()) as pool:  # hashing releases the GIL
        for _ in pool.map(verify, entries):
            pass


def listed_items(directory: Path, name: str, files: Mapping[str, Any]) -> FileDigests | None:
    """Read the digests of a data file's items -> digests, or None where the manifest lists none.

    Args:
        files: of the manifest (`listed_files`).

    Raises:
        DataError: they are not what was written, or the data file is missing or of another size.
    """
    beside = digests_path(Path(name)).as_posix()
    if beside == name or beside not in files:
        return None
    entry, expected = (_sized(directory, one, files) for one in (name, beside))
    path, found = contained(directory, beside), sha256_of_file(contained(directory, beside))
    check_digest(path, found, expected.get("sha256"))
    if "digests" in entry:
        check_digest(contained(directory, name), found, entry.get("sha256"))
    return read_digests(contained(directory, name))


def expected_digests(directory: Path, *, names: Sequence[str] | None = None) -> dict[str, str]:
    """Check files against the manifest by size alone -> {name: the sha256 that it, or its digests, must have}.

    Raises:
        DataError: as `verify_checkpoint`, but for a wrong sha256.
    """
    files = listed_files(directory)
    return {name: str(_sized(directory, name, files).get("sha256")) for name in (files if names is None else names)}


def _sized(directory: Path, name: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """Find what a manifest says of a file, which must be there and have the size that it says -> entry."""
    path, entry = contained(directory, name), files.get(name)
    if not isinstance(entry, dict):
        raise DataError(f"{path} is not in {MANIFEST_FILE}: it was added or renamed later. Use another checkpoint.")
    if not path.is_file():
        raise DataError(f"{path} is missing. The checkpoint is damaged: use another one.")
    if path.stat().st_size != entry.get("bytes"):
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, not {entry.get('bytes')}. "
            "The checkpoint is damaged: use another one."
        )
    return entry


def listed_files(directory: Path) -> dict[str, Any]:
    """Read the manifest -> {name: what it says of the file}.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(directory, MANIFEST_FILE)
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("schema_version") != MANIFEST_VERSION:
        raise DataError(f"{path} lists no files. It is damaged: use another checkpoint.")
    if METADATA_FILE not in files:
        raise DataError(f"{path} does not list {METADATA_FILE}. It is damaged: use another checkpoint.")
    return files


def sorted_files(directory: Path, *, weights_only: bool) -> tuple[list[str], list[str]]:
    """Sort the files of an iteration directory by who verifies them -> (small ones, data files), names in the manifest.

    Data files are those whose contents `.metadata` describes: who reads an item checks it, by `.digests` where there
    are any. All others are small.

    Args:
        weights_only: data files that hold no weights are in neither.

    Raises:
        DataError: the manifest is damaged, or `.metadata` is not what was written.
        ConversionError: `.metadata` is no such thing.
    """
    verify_checkpoint(directory, names=[METADATA_FILE])
    metadata = read_metadata(directory)
    data = set(data_files(metadata))
    beside = {digests_path(Path(name)).as_posix() for name in data}
    small = [name for name in listed_files(directory) if name not in {METADATA_FILE, *data, *beside}]
    return small, data_files(metadata, weights_only=weights_only)


def check_backend(directory: Path) -> None:
    """Refuse what `metadata.json` does not call torch_dist, such as Megatron-LM's older zarr checkpoints.

    Raises:
        DataError: it names another format, or is damaged.
    """
    path = Path(directory, BACKEND_FILE)
    if not path.is_file():
        return
    described = read_json(path)
    backend = described.get("sharded_backend") if isinstance(described, dict) else None
    if backend != "torch_dist":
        raise DataError(
            f"{path} says sharded_backend {backend!r}, which is not read. "
            "Save it again by Megatron-LM with --ckpt-format torch_dist."
        )


def check_digest(path: Path, found: str | None, expected: str | None) -> None:
    """Compare a file's sha256 with its manifest's.

    Raises:
        DataError: they differ.
    """
    if found != expected:
        raise DataError(f"{path} is not what was written (sha256 differs). The checkpoint is damaged: use another one.")


def publish(root: Path, iteration: int) -> None:
    """Make `iteration` the one that a root means: its model.json, then the tracker, each atomically."""
    directory = iteration_directory(root, iteration)
    assert (directory / MANIFEST_FILE).is_file(), f"{directory} is not finished"
    for name in (MODEL_FILE, TRACKER_FILE):  # of one who was killed here
        remove_stale_temporaries(Path(root, name))
    if (directory / MODEL_FILE).is_file():
        with atomic_file(Path(root, MODEL_FILE), "wb") as file:
            file.write((directory / MODEL_FILE).read_bytes())
    with atomic_file(Path(root, TRACKER_FILE)) as file:
        file.write(f"{iteration}\n")


def check_copy(path: Path, directory: Path) -> None:
    """Hold a root's model.json against that of the iteration which it was resolved to: one is a copy of the other.

    Args:
        path: what was resolved; an iteration directory itself asks its root nothing.

    Raises:
        DataError: they differ.
    """
    copies = [Path(place, MODEL_FILE) for place in (path, directory)]
    if all(copy.is_file() for copy in copies) and copies[0].read_bytes() != copies[1].read_bytes():
        raise DataError(
            f"{copies[0]} and {copies[1]} differ, and should be one. Check which describes the model; if it is the "
            f"second: cp {copies[1]} {copies[0]}"
        )


def model_files(directory: Path) -> list[str]:
    """List what an iteration directory has of model.json and hf/ -> names, as in the manifest.

    Those that the manifest lists, so that one that went is missed, and those that were added, so that they are found.

    Raises:
        DataError: the manifest is damaged.
    """
    directory = Path(directory)
    listed = listed_files(directory) if (directory / MANIFEST_FILE).is_file() else {}
    there = (path for path in (directory / MODEL_FILE, *directory.glob(f"{HF_DIRECTORY}/**/*")) if path.is_file())
    names = {*listed, *(path.relative_to(directory).as_posix() for path in there)}
    return sorted(name for name in names if name == MODEL_FILE or name.startswith(f"{HF_DIRECTORY}/"))


def carry_model_files(source: Path, target: Path) -> None:
    """Copy model.json and hf/ of an iteration directory into a new one that is being written."""
    if Path(source, MODEL_FILE).is_file():
        shutil.copyfile(Path(source, MODEL_FILE), Path(target, MODEL_FILE))
    if Path(source, HF_DIRECTORY).is_dir():
        shutil.copytree(
            Path(source, HF_DIRECTORY), Path(target, HF_DIRECTORY), dirs_exist_ok=True, copy_function=_linked_or_copied
        )


def _linked_or_copied(source: str, target: str) -> str:
    """Copy a file; gigabytes that no checkpoint changes are the same file under one more name, where that can be."""
    if Path(source).name == CARRIED_FILE:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return target
    return shutil.copyfile(source, target)
