"""Reference log-probabilities beside the dataset: computed once per iteration, bound to what computed them.

G = prompt groups, K = responses per prompt. A value is the summed log pi_t(y|x) of one response, nats; NaN where no row
needed it.
"""

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
from megatron_sppo.storage import atomic_file, fsync_path, remove_stale_temporaries

SCHEMA_VERSION = 1
MANIFEST_NAME = "reference.json"
FILES = ("reference.bin", "reference.idx")

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
        for row in values_GK:
            column.append([row])
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
