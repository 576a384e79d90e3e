"""The files of torch.distributed.checkpoint (DCP), which Megatron-Core's `torch_dist` format is made of.

A checkpoint is `.metadata` (a pickle of DCP's own metadata classes) and `*.distcp` files, each a row of `torch.save`
streams. Here they are read without Megatron, without a process group and without trusting the pickle: only the
metadata classes may appear in it, and tensors are loaded with weights_only. `distcp_writer` writes them.
"""

import enum
import functools
import itertools
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.serialization import _get_layout

from megatron_sppo.checkpoints.safetensors_file import Span
from megatron_sppo.checkpoints.torch_streams import Section, object_in, refuse_packed
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.storage import contained

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
COMMON_KEY = "common_state/"
"""Beginning of the key under which megatron-core 0.19 keeps among the tensors what 0.16 writes to common.pt."""
MODEL_ROOTS = ("embedding.", "decoder.", "output_layer.", "mtp.", "encoder.", "vision_model.", "adapter.")
"""Beginnings of a model's own keys; those of optimizer state and the like begin otherwise."""

_CLASSES: dict[tuple[str, str], Any] = {
    (found.__module__, found.__qualname__): found
    for found in (
        *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorProperties, dcp._MEM_FORMAT_ENCODING),
        *(dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, filesystem._StorageInfo),
        # Megatron-Core stores its save plans beside the metadata.
        *(planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData),
        planner.BytesIOWriteData,
    )
} | {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): _get_layout}

LOADING_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError),
    *(IndexError, OverflowError, MemoryError, AssertionError),
)
"""What torch.load and pickle raise on what is damaged, or promises sizes that cannot be."""


_PLACE = ("offset", "length", "relative_path")


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickle DCP's metadata classes and nothing else: no other name is ever looked up, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "Path", "PurePosixPath"):
            return Path
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _CLASSES:
            raise ConversionError(
                f"{METADATA_FILE} asks for {module}.{name}, which no checkpoint needs. Do not use this checkpoint."
            )
        return _CLASSES[module, name]


def _member(kind: Any, name: Any) -> Any:
    """Stand for `getattr`, by which Python 3.11.0 to 3.11.3 (Debian 12's) pickles members of an enumeration."""
    if not isinstance(kind, enum.EnumType) or kind not in _CLASSES.values():
        raise ConversionError(f"{METADATA_FILE} asks for an attribute of {kind!r:.60}. Do not use this checkpoint.")
    return kind[name]


def read_metadata(directory: Path) -> Any:
    """Read `.metadata` -> torch.distributed.checkpoint's Metadata.

    Raises:
        ConversionError: missing, damaged, or a pickle that names anything but DCP's metadata classes, or what it places
            lies where nothing can.
    """
    path = Path(directory, METADATA_FILE)
    try:
        with open(path, "rb") as file:
            content = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ConversionError(
            f"{directory} has no {METADATA_FILE}: it is no torch_dist checkpoint, or never finished. Check the path."
        ) from None
    except ConversionError as error:
        raise ConversionError(f"{directory}: {error}") from None
    except LOADING_ERRORS as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}). Use another checkpoint.") from None
    parts = [getattr(content, name, None) for name in ("storage_data", "state_dict_metadata")]
    if not isinstance(content, dcp.Metadata) or not all(isinstance(part, dict) for part in parts):
        raise ConversionError(f"{path} is damaged (no metadata inside). Use another checkpoint.")
    for index, info in content.storage_data.items():
        key, place = getattr(index, "fqn", None), [getattr(info, name, None) for name in _PLACE]
        if not isinstance(key, str) or not _are_counts(tuple(place[:2])) or not isinstance(place[2], str):
            raise ConversionError(f"{path} says no possible place for {key}. Use another checkpoint.")
    return content


class ItemReader(Protocol):
    """Reads items of data files, each once, and checks them: `items.Items`."""

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
        """Read items of one data file, each by (offset, length) -> their bytes."""


@dataclass(frozen=True, kw_only=True)
class DistcpReader:
    """Global tensors of a checkpoint, by key; nothing is read before `read`."""

    directory: Path
    metadata: Any
    items: ItemReader | None
    """What reads the items, and checks them; None reads them unchecked."""

    @classmethod
    def open(cls, directory: Path, *, items: ItemReader | None = None) -> "DistcpReader":
        """Open a checkpoint directory (one iteration).

        Raises:
            ConversionError: as `read_metadata`, or a tensor is described in a way that cannot be.
        """
        reader = cls(directory=Path(directory), metadata=read_metadata(directory), items=items)
        for key, entry in reader.metadata.state_dict_metadata.items():
            is_tensor = isinstance(entry, dcp.TensorStorageMetadata)
            if not isinstance(key, str) or (is_tensor and not _is_possible(entry)):
                raise ConversionError(
                    f"{Path(directory, METADATA_FILE)} describes {key} in a way that cannot be (its pieces lie outside "
                    "of it). It is damaged: use another checkpoint."
                )
        return reader

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List the tensors -> {key: global shape}; objects are not listed."""
        tensors = self.metadata.state_dict_metadata
        return {
            key: tuple(entry.size) for key, entry in tensors.items() if isinstance(entry, dcp.TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Give a tensor's dtype."""
        return self.metadata.state_dict_metadata[key].properties.dtype

    def files(self, keys: Sequence[str]) -> list[str]:
        """Name the files that hold these tensors -> names relative to the directory."""
        wanted = set(keys)
        return sorted({info.relative_path for index, info in self.metadata.storage_data.items() if index.fqn in wanted})

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read a box of a global tensor, whatever layout it was saved in -> [*sizes].

        Raises:
            ConversionError: a chunk is missing or damaged, or the chunks do not cover the box.
        """
        result: Tensor | None = None
        covered = 0
        for chunk, low, high in self._shared(key, offsets, sizes):
            tensor = self._read_chunk(key, chunk)
            part = tensor[tuple(slice(a - b, c - b) for a, b, c in zip(low, chunk.offsets, high, strict=True))]
            covered += part.numel()
            if list(part.shape) == list(sizes):
                result = part
                continue
            if result is None:
                result = torch.empty(tuple(sizes), dtype=tensor.dtype)
            result[tuple(slice(a - b, c - b) for a, b, c in zip(low, offsets, high, strict=True))] = part
        if result is None or covered != math.prod(sizes):
            raise ConversionError(
                f"{self.directory} holds {covered} of {math.prod(sizes)} values of {key}. The checkpoint is incomplete."
            )
        return result

    def read_item(self, place: Any) -> bytearray:
        """Read an item whose place (`_StorageInfo`) `.metadata` says -> its bytes, as `items` reads them."""
        assert self.items is not None, "opened to be read unchecked"
        (raw,) = self.items.read(place.relative_path, [(place.offset, place.length)])
        return raw

    def spans(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[Span] | None:
        """Find a box of a global tensor as runs of bytes in files, in the box's order -> spans, to be joined.

        None where it is no such row of runs (a cut across columns, say), or is not whole: `read` then makes the tensor
        of it, or says what is wrong.
        """
        axis, item, found = row_axis(sizes), self.dtype(key).itemsize, []
        for chunk, low, high in self._shared(key, offsets, sizes):
            first = _first_value(chunk, low, offsets, sizes)
            place = None if first is None else self._payload(key, chunk)
            if first is None or place is None:
                return None
            rows = high[axis] - low[axis]
            nbytes = rows * math.prod(sizes[axis + 1 :]) * item
            found.append((low[axis] - offsets[axis], rows, Span(place.path, place.offset + first * item, nbytes)))
        found.sort(key=lambda entry: entry[0])
        ends = [0, *itertools.accumulate(rows for _, rows, _ in found)]
        is_whole = [start for start, _, _ in found] == ends[:-1] and ends[-1] == sizes[axis]
        return [span for _, _, span in found] if is_whole else None

    def _payload(self, key: str, chunk: Any) -> Span | None:
        """Find a chunk's values in its file -> span, or None where they are not stored plainly, one after another."""
        info = self.metadata.storage_data.get(dcp.MetadataIndex(key, chunk.offsets))
        path = None if info is None else contained(self.directory, info.relative_path)
        if info is None or path is None or not path.is_file() or path.stat().st_size < info.offset + info.length:
            return None
        described = self._read_chunk(key, chunk, values=False)
        start = getattr(described.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not described.is_contiguous():
            return None
        start += described.storage_offset() * described.itemsize
        if start + described.nbytes > info.length:
            return None
        return Span(path, info.offset + start, described.nbytes)

    def _shared(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int]
    ) -> Iterator[tuple[Any, list[int], list[int]]]:
        """Cut a box with the chunks of its tensor -> (chunk, first index on each axis, the one after the last)."""
        if sizes[0] != 1:
            chunks = self.metadata.state_dict_metadata[key].chunks
        else:
            thin, thick = self._by_first_index[key]
            chunks = [*thin.get(offsets[0], ()), *thick]
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(start < end for start, end in zip(low, high, strict=True)):
                yield chunk, low, high

    @functools.cached_property
    def _by_first_index(self) -> dict[str, tuple[dict[int, list[Any]], list[Any]]]:
        """Chunks of each key: those of one index of the first axis (layers) by that index, and the others.

        A mixture of experts has thousands of chunks a key; without this each read would look at all of them.
        """
        sorted_chunks: dict[str, tuple[dict[int, list[Any]], list[Any]]] = {}
        for key in self.shapes():
            thin, thick = sorted_chunks.setdefault(key, ({}, []))
            for chunk in self.metadata.state_dict_metadata[key].chunks:
                (thin.setdefault(chunk.offsets[0], []) if chunk.sizes[:1] == (1,) else thick).append(chunk)
        return sorted_chunks

    def _read_chunk(self, key: str, chunk: Any, *, values: bool = True) -> Tensor:
        """Load a chunk -> [*chunk.sizes]; without `values` only described, on the meta device."""
        place = f"{self.directory}: {key} at {list(chunk.offsets)}"
        info = self.metadata.storage_data.get(dcp.MetadataIndex(key, chunk.offsets))
        if info is None:
            raise ConversionError(f"{place} is in no file. The checkpoint is incomplete.")
        path, device = contained(self.directory, info.relative_path), "cpu" if values else "meta"
        try:
            if values and self.items is not None:
                tensor = object_in(self.read_item(info))
            else:
                with open(path, "rb") as file:
                    if info.offset + info.length > os.fstat(file.fileno()).st_size:
                        raise EOFError("it lies beyond the end")
                    section: Any = Section(file, info.offset, info.length)
                    refuse_packed(section)
                    tensor = torch.load(section, map_location=device, weights_only=True)
        except FileNotFoundError:
            raise ConversionError(
                f"{place} is in {info.relative_path}, which is missing. Use another checkpoint."
            ) from None
        except LOADING_ERRORS as error:
            reason = _first_line(error)
            raise ConversionError(
                f"{place} in {info.relative_path} is damaged ({reason}). Use another checkpoint."
            ) from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(chunk.sizes):
            raise ConversionError(
                f"{place} in {info.relative_path} is not of shape {list(chunk.sizes)}. Use another checkpoint."
            )
        if tensor.dtype != self.dtype(key):
            raise ConversionError(
                f"{place} in {info.relative_path} is {tensor.dtype}, and {METADATA_FILE} says {self.dtype(key)}. "
                "Use another checkpoint."
            )
        return tensor


def row_axis(sizes: Sequence[int]) -> int:
    """Choose the axis along which a box may be cut into pieces that follow each other: the first that is not 1."""
    return next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes) - 1)


def _first_value(chunk: Any, low: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Find where the rows that a box and a chunk share begin in the chunk -> value, or None: they are no single run."""
    axis = row_axis(sizes)
    if list(sizes[axis + 1 :]) != list(chunk.sizes[axis + 1 :]) or list(offsets[axis + 1 :]) != list(
        chunk.offsets[axis + 1 :]
    ):
        return None
    first, stride = 0, math.prod(sizes[axis + 1 :])
    for i in range(axis, -1, -1):
        first += (low[i] - chunk.offsets[i]) * stride
        stride *= chunk.sizes[i]
    return first


def _is_possible(described: Any) -> bool:
    """Whether a tensor's description has chunks of its own rank that lie within it."""
    shape = getattr(described, "size", None)
    dtype = getattr(getattr(described, "properties", None), "dtype", None)
    if not _are_counts(shape) or not isinstance(dtype, torch.dtype):
        return False
    if not isinstance(getattr(described, "chunks", None), list):
        return False
    return all(
        _are_counts(getattr(chunk, "offsets", None))
        and _are_counts(getattr(chunk, "sizes", None))
        and len(chunk.offsets) == len(chunk.sizes) == len(shape)
        and all(a + n <= whole for a, n, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True))
        for chunk in described.chunks
    )


def _are_counts(numbers: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(numbers, tuple) and all(isinstance(number, int) and number >= 0 for number in numbers)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def data_files(metadata: Any, *, weights_only: bool = False) -> list[str]:
    """Name the files that hold what `.metadata` describes, whoever wrote it -> names relative to the directory.

    Args:
        weights_only: leave out those that hold no model's tensor; the state that megatron-core 0.19 reads beside any
            load counts as one.
    """
    wanted = (*MODEL_ROOTS, COMMON_KEY) if weights_only else ("",)
    return sorted({info.relative_path for index, info in metadata.storage_data.items() if index.fqn.startswith(wanted)})


def check_metadata(directory: Path) -> None:
    """Check that the pickles of a checkpoint hold data only and that all files that `.metadata` names exist.

    For those who hand the directory to a reader that trusts it, such as Megatron-Core's.

    Raises:
        DataError: a file that it names is missing or lies outside, or common.pt holds more than data.
        ConversionError: as `read_metadata`.
    """
    for info in read_metadata(directory).storage_data.values():
        if not contained(directory, info.relative_path).is_file():
            raise DataError(
                f"{directory} lacks {info.relative_path}, which its {METADATA_FILE} names. Use another checkpoint."
            )
    check_common(directory)


def check_common(directory: Path) -> None:
    """Check that common.pt, where there is one, holds data only.

    Raises:
        DataError: it holds more, or is damaged.
    """
    if Path(directory, COMMON_FILE).is_file():  # megatron-core 0.19 keeps that state among the tensors
        _load_common(Path(directory, COMMON_FILE))


def _load_common(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            refuse_packed(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        reason = _first_line(error)
        raise DataError(f"{path} is damaged or holds more than data ({reason}). Use another checkpoint.") from None


def read_common(directory: Path, *, items: ItemReader) -> dict[str, Any]:
    """Read the state that belongs to no rank: common.pt, or the object that megatron-core 0.19 has in its place.

    Raises:
        DataError: it is damaged, or holds more than data.
        ConversionError: there is neither, or as `read_metadata`.
    """
    path = Path(directory, COMMON_FILE)
    if path.is_file():
        return dict(_load_common(path))
    for index, info in read_metadata(directory).storage_data.items():
        if index.fqn.startswith(COMMON_KEY):
            (raw,) = items.read(info.relative_path, [(info.offset, info.length)])
            try:
                return dict(object_in(raw)[0])
            except LOADING_ERRORS as error:
                raise DataError(
                    f"{directory}: {index.fqn} in {info.relative_path} is damaged or holds more than data "
                    f"({_first_line(error)}). Use another checkpoint."
                ) from None
    raise ConversionError(f"{directory} has no {COMMON_FILE}: it was never finished. Use another checkpoint.")
