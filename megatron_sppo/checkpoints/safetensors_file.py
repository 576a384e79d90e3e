"""One safetensors file: header checked in full, tensors read and written one at a time by plain file I/O.

The format: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the
bytes. Reading with pread instead of mapping keeps resident memory to the tensor at hand, and a file that is cut short
while we read it gives an error, not SIGBUS.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sppo.checkpoints.transfer import bytes_of, write_at
from megatron_sppo.errors import ConversionError
from megatron_sppo.storage import damage

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a weight may be. Integers and float8 are quantized weights, which the Megatron side does not hold."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor's place in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


def read_header(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """Read and check a file's header -> (its bytes as they are, {name: entry} in the header's order).

    Raises:
        ConversionError: not a safetensors file, cut short, overlapping tensors, or a dtype that is no weight.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                fault = f"{path} ({size} bytes) is cut short or no safetensors file. Fetch it again."
                raise ConversionError(damage(path, fault))
            raw = file.read(length)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, fields, _LENGTH_BYTES + length) for name, fields in header.items()}
    except ConversionError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path} has a damaged header ({type(error).__name__}: {error}). Fetch it again."
        ) from None
    end = _LENGTH_BYTES + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ConversionError(f"{path} has a damaged header (a gap or an overlap before {name}). Fetch it again.")
        end += entry.nbytes
    if end != size:
        raise ConversionError(
            f"{path} has {size} bytes where its header says {end}: it is cut short or damaged. Fetch it again."
        )
    return raw, entries


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor into fresh memory -> [*entry.shape]."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.nbytes == 0:
        return tensor
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.offset)
        while len(view):
            count = file.readinto(view)  # at most 2 GiB at a time
            if not count:
                raise ConversionError(
                    f"{entry.file} became shorter while it was read. Leave it alone, and run the command again."
                )
            view = view[count:]
    return tensor


def write_header(path: Path, raw: bytes, entries: Mapping[str, Entry]) -> None:
    """Create a file with its header and room for its tensors."""
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
        file.truncate(max([_LENGTH_BYTES + len(raw), *(entry.offset + entry.nbytes for entry in entries.values())]))


def write_tensor(descriptor: int, entry: Entry, tensor: Tensor) -> None:
    """Write one tensor at its place in an open file."""
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, (
        f"{entry} is to hold {tensor.dtype} {tensor.shape}"
    )
    write_at(descriptor, bytes_of(tensor), entry.offset)


def new_header(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, Entry]]:
    """Lay out a new file, tensors in the order given -> (header bytes, entries)."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(fields, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    del fields["__metadata__"]
    return raw, {name: _entry(path, name, field, _LENGTH_BYTES + len(raw)) for name, field in fields.items()}


def entries_of_header(path: Path, raw: bytes) -> dict[str, Entry]:
    """Read the entries of a header that was kept apart from its file."""
    fields = json.loads(raw)
    fields.pop("__metadata__", None)
    return {name: _entry(path, name, field, _LENGTH_BYTES + len(raw)) for name, field in fields.items()}


def _entry(path: Path, name: str, fields: Mapping[str, Any], data_start: int) -> Entry:
    kind, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if kind not in DTYPES:
        raise ConversionError(
            f"{path}: {name} is of type {kind}, which is quantized or no weight; read are {', '.join(DTYPES)}. "
            "Use the unquantized model."
        )
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or an offset is no whole number")
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{name} has {end - start} bytes for {kind} of shape {list(shape)}")
    return Entry(file=path, dtype=DTYPES[kind], shape=shape, offset=data_start + start, nbytes=end - start)


Shape = tuple[int, ...]
