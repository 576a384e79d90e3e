"""Write a torch_dist checkpoint's tensors (see `distcp`): laid out first, then filled in by several threads.

Each chunk is a `torch.save` stream of one tensor. What torch writes around the values depends on their number and type
alone, so it is made once for each, from memory that is never touched; the values come straight from the source files.
"""

import dataclasses
import functools
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from megatron_sppo.checkpoints.crew import ALONE, Crew
from megatron_sppo.checkpoints.distcp import COMMON_FILE, METADATA_FILE, row_axis
from megatron_sppo.checkpoints.safetensors_file import Span
from megatron_sppo.checkpoints.transfer import MAKING, Made, Transfer, part_of

_DCP_VERSION = "1.0.0"
_MAX_FILE_BYTES = 256 << 20
"""A file of its own for each thread needs several; a chunk that begins before this ends it."""
_MAX_CHUNK_BYTES = 128 << 20
"""Of what only moves: an embedding of gigabytes would keep one thread busy when the others have done."""

_Part = bytes | Span | Made


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One chunk to write: a box of a global tensor, and how to get it when its turn comes."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[Span, ...] | Callable[[], Tensor]
    """Where its bytes lie in files as they are to be, or what makes them."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def write_distcp(
    directory: Path,
    pieces: Sequence[Piece],
    *,
    objects: Mapping[str, Any],
    progress: Callable[[int], object],
    workers: int | None = None,
    crew: Crew = ALONE,
) -> None:
    """Write `*.distcp`, their digests and `.metadata`; the same bytes by any number of workers and ranks.

    Args:
        directory: an existing directory; the caller makes it appear atomically.
        pieces: in the order to write.
        objects: {key: plain object} saved as Megatron-Core saves ShardedObjects, `torch.save` of a list of one.
        progress: called with the bytes of each block written.
        workers: threads; None takes the cores that there are.
        crew: the ranks that call this, each with the same pieces; they divide the files.
    """
    layout = _Layout()
    chunks = [chunk for piece in pieces for chunk in _cut(piece)]
    for number, group in enumerate(_groups(chunks)):
        layout.begin_file(f"__0_{number}.distcp")
        for key, value in objects.items() if number == 0 else ():
            layout.add_object(key, value)
        for piece in group:
            layout.add(piece)
    with Transfer(workers=workers, progress=progress) as transfer, crew.working(directory):
        tasks = [
            lambda name=name, items=items: transfer.gather(directory / name, items)
            for name, items in layout.files.items()
        ]
        transfer.run(crew.share(tasks))
    if not crew.leads:
        return
    content = dcp.Metadata(layout.tensors, None, layout.places, dcp.StorageMeta(), _DCP_VERSION)
    (directory / METADATA_FILE).write_bytes(pickle.dumps(content))


def write_common(directory: Path, state: Mapping[str, Any]) -> None:
    """Write what no tensor holds, `common.pt`.

    Raises:
        OSError: the disk refuses; of Torch's own file that is a RuntimeError ("unexpected pos").
    """
    content = io.BytesIO()
    torch.save(state, content)
    (directory / COMMON_FILE).write_bytes(content.getbuffer())


class _Layout:
    """What will lie where: the items of each file in parts, and what `.metadata` says of them."""

    def __init__(self) -> None:
        self.files: dict[str, list[list[_Part]]] = {}
        self.tensors: dict[str, Any] = {}
        self.places: dict[Any, Any] = {}
        self._name, self._position = "", 0
        self._frames: dict[tuple[torch.dtype, tuple[int, ...]], tuple[bytes, bytes]] = {}

    def begin_file(self, name: str) -> None:
        self._name, self._position = name, 0
        self.files[name] = []

    def add_object(self, key: str, value: Any) -> None:
        stream = io.BytesIO()
        torch.save([value], stream)
        self.tensors[key] = dcp.BytesStorageMetadata()
        self._place(dcp.MetadataIndex(key), [stream.getvalue()], len(stream.getvalue()))

    def add(self, piece: Piece) -> None:
        described = self.tensors.get(piece.key)
        if described is None:
            properties = dcp.TensorProperties(dtype=piece.dtype)
            described = dcp.TensorStorageMetadata(properties, torch.Size(piece.global_shape), [])
            self.tensors[piece.key] = described
        sizes = torch.Size(piece.sizes)
        described.chunks.append(dcp.ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=sizes))
        kind = piece.dtype, piece.sizes
        if kind not in self._frames:
            self._frames[kind] = _frame(*kind)
        before, after = self._frames[kind]
        values: Sequence[_Part]
        if callable(piece.values):
            values = [Made(MAKING * piece.nbytes, functools.partial(_made, piece, piece.values))]
        else:
            values = piece.values
            assert sum(span.nbytes for span in values) == piece.nbytes, piece.key
        length = len(before) + piece.nbytes + len(after)
        self._place(dcp.MetadataIndex(piece.key, piece.offsets), [before, *values, after], length)

    def _place(self, index: Any, parts: Sequence[_Part], length: int) -> None:
        self.places[index] = filesystem._StorageInfo(self._name, self._position, length)
        self.files[self._name].append(list(parts))
        self._position += length


def _frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Find what torch.save writes around a tensor's values -> (bytes before, bytes after)."""
    tensor = torch.empty(sizes, dtype=dtype)
    stream: Any = _Recorder(tensor.data_ptr())
    checksums = torch.serialization.get_crc32_options()
    # The zip format's own checksums would cost a pass over the values. torch.load does not look at them; the manifest
    # has sha256.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, stream)
    finally:
        torch.serialization.set_crc32_options(checksums)
    before, after = stream.around
    return before.getvalue(), after.getvalue()


class _Recorder:
    """What torch.save writes into: keeps everything but the values, which it knows by their address."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.around = [io.BytesIO()]

    def write(self, block: Any) -> int:
        if np.frombuffer(block, dtype=np.uint8).ctypes.data == self._address:
            self.around.append(io.BytesIO())
        else:
            self.around[-1].write(block)
        return memoryview(block).nbytes

    def flush(self) -> None:
        """Do nothing: all is in memory."""


def _made(piece: Piece, make: Callable[[], Tensor]) -> Tensor:
    tensor = make()
    assert tensor.numel() == math.prod(piece.sizes) and tensor.dtype == piece.dtype, piece.key
    return tensor


def _cut(piece: Piece) -> Iterator[Piece]:
    """Cut a piece whose bytes only move into chunks of whole rows."""
    axis = row_axis(piece.sizes)
    rows = piece.sizes[axis] if piece.sizes else 1
    most = max(1, rows * _MAX_CHUNK_BYTES // max(1, piece.nbytes))
    if callable(piece.values) or rows <= most:
        yield piece
        return
    row = piece.nbytes // rows
    for first in range(0, rows, most):
        count = min(most, rows - first)
        offsets, sizes = list(piece.offsets), list(piece.sizes)
        offsets[axis] += first
        sizes[axis] = count
        values = part_of(piece.values, first * row, count * row)
        yield dataclasses.replace(piece, offsets=tuple(offsets), sizes=tuple(sizes), values=values)


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut the pieces into runs of a file each."""
    starts = itertools.accumulate((piece.nbytes for piece in pieces), initial=0)
    numbered = zip(starts, pieces, strict=False)
    for _, run in itertools.groupby(numbered, key=lambda item: item[0] // _MAX_FILE_BYTES):
        yield [piece for _, piece in run]
