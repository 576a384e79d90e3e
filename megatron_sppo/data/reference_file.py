"""Reference log-probabilities beside the dataset: computed once per iteration, bound to what computed them.

G = prompt groups, K = responses per prompt. A value is the summed log pi_t(y|x) of one response, nats; NaN where no row
needed it. Numbers of further policies lie in files that are named by their fingerprint (`name_of`).
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
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.storage import atomic_file, explain_os_error, fsync_path, remove_stale_temporaries

SCHEMA_VERSION = 1
NAME = "reference"
"""Of pi_t's numbers, before the endings."""
MANIFEST_NAME = f"{NAME}.json"
FILES = (f"{NAME}.bin", f"{NAME}.idx")
PIECES_PREFIX = "reference.pieces-"
"""Of the directory with what an unfinished pass has computed."""


def name_of(fingerprint: Mapping[str, Any]) -> str:
    """Name the files of a policy other than pi_t, before their endings -> such as "reference.0123456789ab"."""
    return f"{NAME}.{sha256_of_json(_as_json(fingerprint))[:12]}"


def _remedy(name: str) -> str:
    return f"Delete {name}.bin, {name}.idx and {name}.json there: they are computed again."


def write_reference(
    directory: Path, values_GK: np.ndarray, fingerprint: Mapping[str, Any], *, name: str = NAME
) -> None:
    """Write NAME.{bin,idx} and, last, NAME.json; until then the directory holds no such reference at all.

    Args:
        directory: the dataset's directory, or one under --save where the dataset is read-only.
        values_GK: [G, K] float32; NaN where not computed.
        fingerprint: JSON values that must agree for the numbers to be used: model, precision recipe, packing, dataset.
        name: "reference" for pi_t, otherwise of `name_of`.
    """
    directory = Path(directory)
    assert values_GK.ndim == 2
    directory.mkdir(parents=True, exist_ok=True)
    files, manifest = _files(name), Path(directory, f"{name}.json")
    for file in (*files, manifest.name):
        remove_stale_temporaries(directory / file)
    with tempfile.TemporaryDirectory() as scratch:
        column = ColumnWriter(Path(scratch, name), np.float32)
        column.extend(values_GK.reshape(-1), np.full((len(values_GK), 1), values_GK.shape[1]))
        column.finish()
        # The old manifest goes first: a crash from here on leaves "no reference", never old numbers with a new name.
        if manifest.exists():
            try:
                manifest.unlink()
                fsync_path(directory)
            except OSError as error:
                explain_os_error(error, manifest)
                raise
        for file in files:
            with open(Path(scratch, file), "rb") as source, atomic_file(directory / file, "wb") as target:
                shutil.copyfileobj(source, target)
    fields = {
        "schema_version": SCHEMA_VERSION,
        "num_prompts": values_GK.shape[0],
        "num_responses": values_GK.shape[1],
        "fingerprint": _as_json(fingerprint),
        "files": {file: msgspec.to_builtins(file_entry(directory / file)) for file in files},
    }
    write_signed(manifest, fields)


def _files(name: str) -> tuple[str, str]:
    return f"{name}.bin", f"{name}.idx"


def read_reference(directory: Path, fingerprint: Mapping[str, Any], *, name: str = NAME) -> np.ndarray | None:
    """Read reference log-probabilities made under exactly `fingerprint` -> [G, K] float32, or None if there are none.

    Raises:
        DataError: they were made under another fingerprint (each differing field is named), or are damaged.
    """
    directory, remedy = Path(directory), _remedy(name)
    path = directory / f"{name}.json"
    if not path.is_file():
        return None
    fields = read_signed(path, schema_version=SCHEMA_VERSION, remedy=remedy)
    if set(fields) != {"schema_version", "num_prompts", "num_responses", "fingerprint", "files"}:
        raise DataError(f"{path} is no reference manifest of schema_version {SCHEMA_VERSION}. {remedy}")
    _check_fingerprint(path, stored=fields["fingerprint"], wanted=_as_json(fingerprint))
    for file in _files(name):
        verify_file(directory / file, FileEntry(**fields["files"][file]), checksum=True, remedy=remedy)
    column = Column(directory / name, np.float32, remedy=remedy)
    shape = (fields["num_prompts"], fields["num_responses"])
    if len(column.lengths) != shape[0] or (column.lengths != shape[1]).any():
        raise DataError(f"{directory / name}.idx does not hold {shape[0]} x {shape[1]} values. {remedy}")
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
