"""Parts of files and of memory that `torch.load` takes for a whole `torch.save` stream."""

import io
import os
import struct
import zipfile
from typing import Any

import torch
from torch import Tensor

from megatron_sppo.storage import packed_member

_DIRECTORY_BYTES = 4096
"""What a stream of one tensor lists its members in, at its end: read at once, for a file is read in blocks."""


class _Window(io.RawIOBase):
    """A read-only row of bytes; a subclass says how to read them."""

    def __init__(self, length: int) -> None:
        self._length, self._position = length, 0

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
        count = self._fill(view)
        self._position += count
        return count

    def _fill(self, view: memoryview) -> int:
        raise NotImplementedError


class Section(_Window):
    """A part of an open file."""

    def __init__(self, file: io.BufferedIOBase, offset: int, length: int) -> None:
        super().__init__(length)
        self._file, self._offset = file, offset

    def _fill(self, view: memoryview) -> int:
        self._file.seek(self._offset + self._position)
        return self._file.readinto(view)


class _Memory(_Window):
    def __init__(self, raw: bytearray) -> None:
        super().__init__(len(raw))
        self._view = memoryview(raw)

    def _fill(self, view: memoryview) -> int:
        view[:] = self._view[self._position : self._position + len(view)]
        return len(view)


def refuse_packed(stream: Any) -> None:
    """Refuse a `torch.save` stream whose members are compressed, which torch never does: a small one may fill memory.

    Raises:
        ValueError: it is; or it is no such stream.
    """
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _DIRECTORY_BYTES))
    end = io.BytesIO(stream.read(_DIRECTORY_BYTES))
    try:
        try:
            packed = _packed_in(end)
        except zipfile.BadZipFile:  # the list of members is longer
            packed = _packed_in(stream)
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError(f"no archive of torch.save: {error}") from None
    if packed is not None:
        raise ValueError(f"{packed} is compressed, which torch.save does not do")
    stream.seek(0)


def _packed_in(stream: Any) -> str | None:
    with zipfile.ZipFile(stream) as archive:
        return packed_member(archive)


def object_in(raw: bytearray) -> Any:
    """Load what a stream holds: tensors, numbers, texts and containers of them -> object, on the CPU.

    A plain tensor's values are the stream's own bytes, not copied.

    Raises:
        RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError: it is damaged, or names code.
    """
    refuse_packed(_stream(raw))
    described = torch.load(_stream(raw), map_location="meta", weights_only=True)
    start = getattr(described.untyped_storage(), "_checkpoint_offset", None) if isinstance(described, Tensor) else None
    if start is None or not described.is_contiguous() or not described.numel():
        return torch.load(_stream(raw), map_location="cpu", weights_only=True)
    start += described.storage_offset() * described.itemsize
    values = torch.frombuffer(raw, dtype=described.dtype, count=described.numel(), offset=start)
    return values.reshape(described.shape)


def _stream(raw: bytearray) -> Any:
    return _Memory(raw)
