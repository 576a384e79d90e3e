"""Megatron's indexed dataset, checked: its own reader asserts, or trusts, where a user needs one line.

A flipped bit loads silently in mcore (no checksum), so that every file is listed with its sha256 in a manifest.
"""

import logging
import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_sppo.data.schema import FileEntry
from megatron_sppo.errors import DataError
from megatron_sppo.storage import sha256_of_file

# mcore 0.16.1 indexed_dataset.py logs six lines at INFO for every file opened.
logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)


class ColumnWriter:
    """One indexed dataset being written: a document per prompt group."""

    def __init__(self, prefix: Path, dtype: type[np.number]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)

    def append(self, sequences: list[np.ndarray]) -> None:
        """Add one document of one or more sequences."""
        document = np.concatenate([np.asarray(sequence, dtype=self._dtype).reshape(-1) for sequence in sequences])
        self._builder.add_document(document, [sequence.size for sequence in sequences])

    def finish(self) -> None:
        """Flush the .bin file and write the .idx file."""
        self._builder.finalize(f"{self._prefix}.idx")

    def abandon(self) -> None:
        """Close the .bin file of a dataset that will not be kept."""
        self._builder.data_file.close()


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
        raise DataError(f"{path} does not match the sha256 in its manifest: it is damaged. {remedy}")


class Column:
    """One indexed dataset opened for reading, memory-mapped, with its sequence lengths as one array.

    Everything is handed out as a copy: mcore's readers unmap their file when they are collected, and a view that
    outlives them is a segmentation fault (mcore 0.16.1 and 0.19.2 indexed_dataset.py, `__del__`).
    """

    def __init__(self, prefix: Path, dtype: type[np.number], *, remedy: str) -> None:
        _check_index(prefix, dtype, remedy=remedy)
        self._dataset = IndexedDataset(str(prefix))
        index = self._dataset.index
        self.lengths: np.ndarray = index.sequence_lengths.copy()
        self.document_indices: np.ndarray = index.document_indices.copy()
        self._pointers: np.ndarray = index.sequence_pointers.copy()
        itemsize = np.dtype(dtype).itemsize
        expected = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64))) * itemsize
        if (self.lengths < 0).any() or not np.array_equal(self._pointers, expected[:-1]):
            raise DataError(f"{prefix}.idx has pointers that do not follow from its lengths. {remedy}")
        size = Path(f"{prefix}.bin").stat().st_size
        if size != expected[-1]:
            raise DataError(f"{prefix}.bin has {size} bytes, its index says {expected[-1]}. {remedy}")
        self._dtype = dtype

    def sequence(self, index: int) -> np.ndarray:
        """Read one sequence -> [lengths[index]], a copy."""
        return self._read(int(self.lengths[index]), int(self._pointers[index])).copy()

    def everything(self) -> np.ndarray:
        """Read all sequences end to end -> [sum of lengths], a copy."""
        return self._whole().copy()

    def value_range(self) -> tuple[float, float]:
        """Find the smallest and the largest value without copying -> NaN for both where any value is NaN."""
        return self._whole().min().item(), self._whole().max().item()

    def _whole(self) -> np.ndarray:
        return self._read(int(self.lengths.sum(dtype=np.int64)), 0)

    def _read(self, count: int, offset: int) -> np.ndarray:
        return self._dataset.bin_reader.read(dtype=self._dtype, count=count, offset=offset)


_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document boundaries; unpadded."""


def _check_index(prefix: Path, dtype: type[np.number], *, remedy: str) -> None:
    """Refuse an index that mcore's reader would fail on: that leaves half-built objects with noisy finalisers.

    Raises:
        DataError: the header, the size or the last document boundary is wrong, or the .bin file is empty.
    """
    path = Path(f"{prefix}.idx")
    contents = np.fromfile(path, dtype=np.uint8)
    if len(contents) < _HEADER.size:
        raise DataError(f"{path} is no Megatron index ({len(contents)} bytes). {remedy}")
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(contents[: _HEADER.size].tobytes())
    if magic != b"MMIDIDX\x00\x00" or version != 1 or code not in {member.value for member in DType}:
        raise DataError(f"{path} is no Megatron index (magic {magic!r}, version {version}, dtype {code}). {remedy}")
    if DType.dtype_from_code(code) is not dtype:
        raise DataError(f"{path} says {DType.dtype_from_code(code).__name__}, expected {dtype.__name__}. {remedy}")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if len(contents) != expected or not num_boundaries:
        raise DataError(f"{path} has {len(contents)} bytes, its header says {expected}. {remedy}")
    if contents[-8:].view(np.int64)[0] != num_sequences:
        raise DataError(f"{path} has documents that do not cover its {num_sequences} sequences. {remedy}")
    if not Path(f"{prefix}.bin").stat().st_size:
        raise DataError(f"{prefix}.bin is empty. {remedy}")
