"""Reference log-probabilities beside the dataset: computed once per iteration, bound to what computed them.

G = prompt groups, K = responses per prompt. A value is the summed log pi_t(y|x) of one response, nats; NaN where no row
needed it.
"""

import base64
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_sppo.data.indexed import Column, ColumnWriter, file_entry, verify_file
from megatron_sppo.data.schema import FileEntry, read_signed, write_signed
from megatron_sppo.errors import DataError
from megatron_sppo.storage import atomic_file, fsync_path, remove_stale_temporaries, sha256_of_json

SCHEMA_VERSION = 1
MANIFEST_NAME = "reference.json"
FILES = ("reference.bin", "reference.idx")
PIECES_PREFIX = "reference.pieces-"
"""Of the directory with what an unfinished pass has computed."""

_REMEDY = "Delete reference.bin, reference.idx and reference.json there: they are computed again."


def write_reference(directory: Path, values_GK: np.ndarray, fingerprint: Mapping[str, Any]) -> None:
    """Write reference.{bin,idx} and, last, reference.json; until then the directory holds no reference at all.

    Args:
        directory: the dataset's directory, or one under --save where the dataset is read-only.
        values_GK: [G, K] float32; NaN where not computed.
        fingerprint: JSON values that must agree for the numbers to be used: model, precision recipe, packing, dataset.
    """
    directory = Path(directory)
    assert values_GK.ndim == 2
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, MANIFEST_NAME):
        remove_stale_temporaries(directory / name)
    with tempfile.TemporaryDirectory() as scratch:
        column = ColumnWriter(Path(scratch, "reference"), np.float32)
        column.extend(values_GK.reshape(-1), np.full((len(values_GK), 1), values_GK.shape[1]))
        column.finish()
        # The old manifest goes first: a crash from here on leaves "no reference", never old numbers with a new name.
        if Path(directory, MANIFEST_NAME).exists():
            Path(directory, MANIFEST_NAME).unlink()
            fsync_path(directory)
        for name in FILES:
            with open(Path(scratch, name), "rb") as source, atomic_file(directory / name, "wb") as target:
                shutil.copyfileobj(source, target)
    fields = {
        "schema_version": SCHEMA_VERSION,
        "num_prompts": values_GK.shape[0],
        "num_responses": values_GK.shape[1],
        "fingerprint": _as_json(fingerprint),
        "files": {name: msgspec.to_builtins(file_entry(directory / name)) for name in FILES},
    }
    write_signed(directory / MANIFEST_NAME, fields)


def read_reference(directory: Path, fingerprint: Mapping[str, Any]) -> np.ndarray | None:
    """Read reference log-probabilities made under exactly `fingerprint` -> [G, K] float32, or None if there are none.

    Raises:
        DataError: they were made under another fingerprint (each differing field is named), or are damaged.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    fields = read_signed(path, schema_version=SCHEMA_VERSION, remedy=_REMEDY)
    if set(fields) != {"schema_version", "num_prompts", "num_responses", "fingerprint", "files"}:
        raise DataError(f"{path} is no reference manifest of schema_version {SCHEMA_VERSION}. {_REMEDY}")
    _check_fingerprint(path, stored=fields["fingerprint"], wanted=_as_json(fingerprint))
    for name in FILES:
        verify_file(directory / name, FileEntry(**fields["files"][name]), checksum=True, remedy=_REMEDY)
    column = Column(directory / "reference", np.float32, remedy=_REMEDY)
    shape = (fields["num_prompts"], fields["num_responses"])
    if len(column.lengths) != shape[0] or (column.lengths != shape[1]).any():
        raise DataError(f"{directory / 'reference.idx'} does not hold {shape[0]} x {shape[1]} values. {_REMEDY}")
    return column.values.copy().reshape(shape)


class Pieces:
    """What a reference pass that is not done has computed, in files of their own beside its result's place.

    Each is whole or not there, signed, and named by its number; those of another fingerprint lie in another directory.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, Any], *, shape: tuple[int, int]) -> None:
        """Name the pieces of one pass; nothing is read or written yet.

        Args:
            directory: where the finished reference will lie.
            shape: of its values.
        """
        self._fingerprint, self._shape = _as_json(fingerprint), shape
        key = sha256_of_json({"fingerprint": self._fingerprint, "shape": shape})
        self.directory = Path(directory, f"{PIECES_PREFIX}{key[:12]}")
        self._num_pieces = 0

    def read(self) -> np.ndarray | None:
        """Put all pieces together -> [G, K] float32, NaN where there is nothing; None where there is no piece.

        Raises:
            DataError: one is damaged.
        """
        values = np.full(self._shape, np.nan, dtype=np.float32)
        paths = sorted(self.directory.glob("[0-9]*.json"))
        for path in paths:
            remedy = f"Delete {path}: what it held is computed again."
            fields = read_signed(path, schema_version=SCHEMA_VERSION, remedy=remedy)
            if set(fields) != {"schema_version", "fingerprint", "shape", "places", "values"}:
                raise DataError(f"{path} is no piece of schema_version {SCHEMA_VERSION}. {remedy}")
            places = np.frombuffer(base64.b64decode(fields["places"]), "<i8")
            values.reshape(-1)[places] = np.frombuffer(base64.b64decode(fields["values"]), "<f4")
        self._num_pieces = 1 + int(paths[-1].stem) if paths else 0
        return values if paths else None

    def write(self, places: np.ndarray, values: np.ndarray) -> None:
        """Keep values that were computed since the last piece; the cost is theirs alone.

        Args:
            places: into the reference's values, row after row.
            values: as many.
        """
        fields = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self._fingerprint,
            "shape": list(self._shape),
            "places": base64.b64encode(places.astype("<i8").tobytes()).decode(),
            "values": base64.b64encode(values.astype("<f4").tobytes()).decode(),
        }
        write_signed(self.directory / f"{self._num_pieces:06d}.json", fields)
        self._num_pieces += 1

    def remove(self) -> None:
        """Remove all pieces; a pass that is killed in it finds some that its result holds too."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _check_fingerprint(path: Path, *, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    absent = "(absent)"
    differing = [
        f"{key} {stored.get(key, absent)!r} there, {wanted.get(key, absent)!r} here"
        for key in sorted({*stored, *wanted})
        if stored.get(key, absent) != wanted.get(key, absent)
    ]
    if differing:
        raise DataError(
            f"{path} was computed under other conditions: {'; '.join(differing)}. "
            "Delete reference.* there to compute it again, or use a copy of that directory if another run needs it yet."
        )


def _as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Pass through JSON once, so that a tuple here equals the list that was stored."""
    return json.loads(json.dumps(dict(fingerprint)))
