"""Megatron's indexed dataset, written and read: .bin has the values end to end, .idx says where each sequence lies.

The format is Megatron-Core's (0.16.1 to 0.19.2, megatron/core/datasets/indexed_dataset.py), to the byte, in both
directions. It has no checksum, so that every file is listed with its sha256 in a manifest.
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sppo.data.schema import FileEntry
from megatron_sppo.errors import DataError
from megatron_sppo.storage import sha256_of_file

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, numbers of sequences and of document bounds; 34 bytes. Then the sequences' lengths
(int32) and byte offsets (int64), and the bounds: 0, and after each document how many sequences there are (int64)."""
_BLOCK_BYTES = 1 << 22
_DTYPES = dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1))
"""Megatron's code of each numpy dtype."""


class HashedFile:
    """A file being written that is hashed on the way, so that nobody reads it again to know its manifest entry."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._bytes = open(path, "wb"), hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> None:
        """Flush; once more does nothing."""
        self._file.close()

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what was written so far."""
        return FileEntry(sha256=self._digest.hexdigest(), bytes=self._bytes)


class ColumnWriter:
    """One indexed dataset being written: a document per prompt group."""

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._file = HashedFile(Path(f"{prefix}.bin"))
        self._lengths, self._boundaries = array("i"), array("q", [0])

    def append(self, sequences: Sequence[npt.ArrayLike]) -> None:
        """Add one document of one or more sequences."""
        for sequence in sequences:
            values = np.asarray(sequence, dtype=self._dtype)
            self._file.write(values.tobytes())
            self._lengths.append(values.size)
        self._boundaries.append(len(self._lengths))

    def extend(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents of equally many sequences, all sequences end to end.

        Args:
            values: as many as `lengths` adds up to, of the column's dtype.
            lengths: [documents, sequences of each].
        """
        assert values.dtype == self._dtype and values.size == lengths.sum(), "lengths of other values"
        self._file.write(values.tobytes())
        first, (documents, sequences) = len(self._lengths), lengths.shape
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._boundaries.frombytes((first + sequences * np.arange(1, documents + 1, dtype=np.int64)).tobytes())

    def finish(self) -> dict[str, FileEntry]:
        """Flush the .bin file and write the .idx file -> manifest entries by suffix, "bin" and "idx"."""
        self._file.close()
        code = next(code for code, name in _DTYPES.items() if name == self._dtype.name)
        lengths = np.array(self._lengths, dtype=np.int32)
        index = HashedFile(Path(f"{self._prefix}.idx"))
        index.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(self._boundaries)))
        index.write(lengths.tobytes())
        index.write(_offsets(lengths, self._dtype)[:-1].tobytes())
        index.write(self._boundaries.tobytes())
        index.close()
        return {"bin": self._file.entry, "idx": index.entry}

    def abandon(self) -> None:
        """Close the .bin file of a dataset that will not be kept."""
        self._file.close()


def _offsets(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Byte at which each sequence begins, and after them where the last one ends -> [sequences + 1] int64."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))) * dtype.itemsize


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as it lies on disk -> FileEntry."""
    return FileEntry(sha256=sha256_of_file(path), bytes=path.stat().st_size)


def verify_file(path: Path, entry: FileEntry, *, checksum: bool, remedy: str) -> None:
    """Compare a file with its manifest entry.

    Raises:
        DataError: missing, of another size, or of another hash.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing. {remedy}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(f"{path} has {size} bytes, its manifest says {entry.bytes}. {remedy}")
    if checksum and sha256_of_file(path) != entry.sha256:
        raise _damaged(path, remedy)


def verify_values(path: Path, entry: FileEntry, dtype: npt.DTypeLike, *, remedy: str) -> tuple[float, float]:
    """Verify a .bin file as `verify_file` does and find its smallest and largest value, all in one pass -> both.

    NaN for both where any value is NaN.

    Raises:
        DataError: as `verify_file`.
    """
    verify_file(path, entry, checksum=False, remedy=remedy)
    digest, wanted = hashlib.sha256(), np.dtype(dtype)
    low, high = np.inf, -np.inf
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            values = np.frombuffer(block, wanted, count=len(block) // wanted.itemsize)
            if len(values):
                low, high = np.minimum(low, values.min()), np.maximum(high, values.max())
    if digest.hexdigest() != entry.sha256:
        raise _damaged(path, remedy)
    return float(low), float(high)


def _damaged(path: Path, remedy: str) -> DataError:
    return DataError(f"{path} does not match the sha256 in its manifest: it is damaged. {remedy}")


class Column:
    """One indexed dataset opened for reading, memory-mapped."""

    def __init__(self, prefix: Path, dtype: npt.DTypeLike, *, remedy: str) -> None:
        """Open `prefix`.bin and `prefix`.idx.

        Raises:
            DataError: no index of this dtype, or one that contradicts itself or the .bin file; ends in `remedy`.
        """
        wanted = np.dtype(dtype)
        self.lengths, pointers, self.document_indices = _read_index(Path(f"{prefix}.idx"), wanted, remedy=remedy)
        offsets = _offsets(self.lengths, wanted)
        if (self.lengths < 0).any() or not np.array_equal(pointers, offsets[:-1]):
            raise DataError(f"{prefix}.idx has pointers that do not follow from its lengths. {remedy}")
        path = Path(f"{prefix}.bin")
        size = path.stat().st_size
        if size != offsets[-1]:
            raise DataError(f"{path} has {size} bytes, its index says {offsets[-1]}. {remedy}")
        if not size:
            raise DataError(f"{path} is empty. {remedy}")
        self.values: np.ndarray = np.memmap(path, dtype=wanted, mode="r").view(np.ndarray)
        """All sequences end to end, read-only, from the disk as they are asked for -> [sum of lengths]."""
        self._starts, self._path = offsets // wanted.itemsize, path

    def sequence(self, index: int) -> np.ndarray:
        """Read one sequence -> [lengths[index]], a copy."""
        return self.values[self._starts[index] : self._starts[index + 1]].copy()

    def gather(self, index_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
        """Read the last `length_S` values of each of several sequences, end to end -> [sum of length_S], a copy."""
        begin_S = self._starts[index_S + 1] - length_S
        before_S = np.cumsum(length_S) - length_S
        return self.values[np.repeat(begin_S - before_S, length_S) + np.arange(length_S.sum())]

    def span(self, start: int, stop: int) -> np.ndarray:
        """Read sequences start .. stop - 1, end to end -> an array of their own; the file is not mapped for it."""
        first, last = int(self._starts[start]), int(self._starts[stop])
        return np.fromfile(self._path, self.values.dtype, count=last - first, offset=first * self.values.itemsize)


def _read_index(path: Path, dtype: np.dtype, *, remedy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read an .idx file -> lengths [sequences] int32, pointers [sequences] int64, boundaries [documents + 1] int64."""
    contents = path.read_bytes()
    if len(contents) < _HEADER.size:
        raise DataError(f"{path} is no Megatron index ({len(contents)} bytes). {remedy}")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(contents)
    if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
        raise DataError(f"{path} is no Megatron index (magic {magic!r}, version {version}, dtype {code}). {remedy}")
    if _DTYPES[code] != dtype.name:
        raise DataError(f"{path} says {_DTYPES[code]}, expected {dtype.name}. {remedy}")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if len(contents) != expected or not num_boundaries:
        raise DataError(f"{path} has {len(contents)} bytes, its header says {expected}. {remedy}")
    arrays, offset = [], _HEADER.size
    for kind, count in ((np.int32, num_sequences), (np.int64, num_sequences), (np.int64, num_boundaries)):
        arrays.append(np.frombuffer(contents, kind, count, offset).copy())
        offset += arrays[-1].nbytes
    if arrays[2][-1] != num_sequences:
        raise DataError(f"{path} has documents that do not cover its {num_sequences} sequences. {remedy}")
    return arrays[0], arrays[1], arrays[2]
