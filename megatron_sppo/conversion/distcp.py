"""The files of torch.distributed.checkpoint (DCP), which Megatron-Core's `torch_dist` format is made of.

A checkpoint is `.metadata` (a pickle of DCP's own metadata classes) and `*.distcp` files, each a row of `torch.save`
streams. Here they are read without Megatron, without a process group and without trusting the pickle: only the
metadata classes may appear in it, and tensors are loaded with weights_only. They are written the same way, a tensor
at a time, so that memory holds one tensor, not a state dict.
"""

import functools
import hashlib
import io
import itertools
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.serialization import _get_layout

from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.storage import contained

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_DCP_VERSION = "1.0.0"
_MAX_FILE_BYTES = 4 * 2**30  # so that many readers can share the work
_HASH_APART_BYTES = 1 << 16
_CLASSES: dict[tuple[str, str], Any] = {
    (found.__module__, found.__qualname__): found
    for found in (
        *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorProperties, dcp._MEM_FORMAT_ENCODING),
        *(dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, filesystem._StorageInfo),
        # Megatron-Core stores its save plans beside the metadata.
        *(
            planner.SavePlan,
            planner.WriteItem,
            planner.WriteItemType,
            planner.TensorWriteData,
            planner.BytesIOWriteData,
        ),
    )
} | {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): _get_layout}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickle DCP's metadata classes and nothing else: no other name is ever looked up, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "Path", "PurePosixPath"):
            return Path
        if (module, name) not in _CLASSES:
            raise ConversionError(
                f"{METADATA_FILE} asks for {module}.{name}, which no checkpoint needs. Do not use this checkpoint."
            )
        return _CLASSES[module, name]


def read_metadata(directory: Path) -> Any:
    """Read `.metadata` -> torch.distributed.checkpoint's Metadata.

    Raises:
        ConversionError: missing, damaged, or a pickle that names anything but DCP's metadata classes.
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
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        RuntimeError,
    ) as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}). Use another checkpoint.") from None
    if not isinstance(content, dcp.Metadata) or not isinstance(getattr(content, "storage_data", None), dict):
        raise ConversionError(f"{path} is damaged (no metadata inside). Use another checkpoint.")
    return content


@dataclass(frozen=True, kw_only=True)
class DistcpReader:
    """Global tensors of a checkpoint, by key; nothing is read before `read`."""

    directory: Path
    metadata: Any

    @classmethod
    def open(cls, directory: Path) -> "DistcpReader":
        """Open a checkpoint directory (one iteration)."""
        return cls(directory=Path(directory), metadata=read_metadata(directory))

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
        chunks = self.metadata.state_dict_metadata[key].chunks
        if sizes[0] == 1:
            thin, thick = self._by_first_index[key]
            chunks = [*thin.get(offsets[0], ()), *thick]
        result: Tensor | None = None
        covered = 0
        for chunk in chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(end <= start for start, end in zip(low, high, strict=True)):
                continue
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

    @functools.cached_property
    def _by_first_index(self) -> dict[str, tuple[dict[int, list[Any]], list[Any]]]:
        """Chunks of each key: those of one index of the first axis (layers) by that index, and the others.

        A mixture of experts has thousands of chunks a key; without this each read would look at all of them.
        """
        sorted_chunks: dict[str, tuple[dict[int, list[Any]], list[Any]]] = {}
        for key in self.shapes():
            thin: dict[int, list[Any]] = {}
            thick: list[Any] = []
            for chunk in self.metadata.state_dict_metadata[key].chunks:
                is_thin = len(chunk.sizes) > 0 and chunk.sizes[0] == 1
                (thin.setdefault(chunk.offsets[0], []) if is_thin else thick).append(chunk)
            sorted_chunks[key] = thin, thick
        return sorted_chunks

    def _read_chunk(self, key: str, chunk: Any) -> Tensor:
        place = f"{self.directory}: {key} at {list(chunk.offsets)}"
        info = self.metadata.storage_data.get(dcp.MetadataIndex(key, chunk.offsets))
        if info is None:
            raise ConversionError(f"{place} is in no file. The checkpoint is incomplete.")
        path = contained(self.directory, info.relative_path)
        try:
            with open(path, "rb") as file:
                tensor = torch.load(_Section(file, info.offset, info.length), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConversionError(
                f"{place} is in {info.relative_path}, which is missing. Use another checkpoint."
            ) from None
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(
                f"{place} in {info.relative_path} is damaged ({reason}). Use another checkpoint."
            ) from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(chunk.sizes):
            raise ConversionError(
                f"{place} in {info.relative_path} is not of shape {list(chunk.sizes)}. Use another checkpoint."
            )
        return tensor


class _Section(io.RawIOBase):
    """A read-only window on an open file: torch.load takes it for a whole one."""

    def __init__(self, file: io.BufferedIOBase, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One chunk to write: a box of a global tensor, and how to get it when its turn comes."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_distcp(
    directory: Path, pieces: Sequence[Piece], *, objects: Mapping[str, Any], progress: Callable[[int], None]
) -> dict[str, tuple[str, int]]:
    """Write `*.distcp` and `.metadata` -> {file: (sha256, bytes)}.

    Args:
        directory: an existing directory; the caller makes it appear atomically.
        pieces: in the order to write; one is in memory at a time.
        objects: {key: plain object} saved as Megatron-Core saves ShardedObjects, `torch.save` of a list of one.
        progress: called with the bytes of each piece written.
    """
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    files: dict[str, tuple[str, int]] = {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, group in enumerate(_groups(pieces)):
            name = f"__0_{number}.distcp"
            with open(directory / name, "wb") as file:
                stream = _HashingStream(file, pool)
                for key, value in objects.items() if number == 0 else ():
                    tensors[key] = dcp.BytesStorageMetadata()
                    places[dcp.MetadataIndex(key)] = _save([value], stream, name)
                for piece in group:
                    places[dcp.MetadataIndex(piece.key, piece.offsets)] = _save(_own_storage(piece), stream, name)
                    _describe(tensors, piece)
                    progress(math.prod(piece.sizes) * piece.dtype.itemsize)
                files[name] = stream.digest.hexdigest(), stream.position
    content = dcp.Metadata(tensors, None, places, dcp.StorageMeta(), _DCP_VERSION)
    raw = pickle.dumps(content)
    (directory / METADATA_FILE).write_bytes(raw)
    files[METADATA_FILE] = hashlib.sha256(raw).hexdigest(), len(raw)
    return files


class _HashingStream:
    """What torch.save writes into: counts and hashes on the way, and remembers why a write failed."""

    def __init__(self, file: Any, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self.digest, self.position = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        count = memoryview(block).nbytes
        # Both release the GIL. The block is torch's and valid during this call only, so wait for the hash.
        hashed = self._pool.submit(self.digest.update, block) if count >= _HASH_APART_BYTES else None
        try:
            self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        finally:
            if hashed is not None:
                hashed.result()
        if hashed is None:
            self.digest.update(block)
        self.position += count
        return count

    def flush(self) -> None:
        self._file.flush()


def _save(value: Any, stream: _HashingStream, name: str) -> Any:
    offset = stream.position
    try:
        torch.save(value, stream)
    except RuntimeError:
        if stream.error is not None:  # torch reports a full disk as a RuntimeError of its zip writer
            raise stream.error from None
        raise
    return filesystem._StorageInfo(name, offset, stream.position - offset)


def _own_storage(piece: Piece) -> Tensor:
    tensor = piece.load()
    assert tensor.numel() == math.prod(piece.sizes) and tensor.dtype == piece.dtype, piece.key
    tensor = tensor.reshape(piece.sizes)
    # torch.save writes the whole storage behind a view.
    return tensor if tensor.untyped_storage().size() == tensor.nbytes else tensor.clone()


def _describe(tensors: dict[str, Any], piece: Piece) -> None:
    if piece.key not in tensors:
        properties = dcp.TensorProperties(dtype=piece.dtype)
        tensors[piece.key] = dcp.TensorStorageMetadata(properties, torch.Size(piece.global_shape), [])
    chunk = dcp.ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
    tensors[piece.key].chunks.append(chunk)


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut the pieces into runs of a file each."""
    starts = itertools.accumulate((math.prod(piece.sizes) * piece.dtype.itemsize for piece in pieces), initial=0)
    numbered = zip(starts, pieces, strict=False)
    for _, run in itertools.groupby(numbered, key=lambda item: item[0] // _MAX_FILE_BYTES):
        yield [piece for _, piece in run]


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
    common = Path(directory, COMMON_FILE)
    if not common.is_file():  # megatron-core 0.19 keeps that state among the tensors
        return
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{common} is damaged or holds more than data ({reason}). Use another checkpoint.") from None
