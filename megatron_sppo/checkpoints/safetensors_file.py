"""One safetensors file: its header checked in full, its tensors read one at a time by plain file I/O.

The format: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the
bytes. Reading with pread instead of mapping keeps resident memory to the tensor at hand, and a file that is cut short
while we read it gives an error, not SIGBUS. Headers alone need no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.errors import ConversionError
from megatron_sppo.storage import damage

if TYPE_CHECKING:
    import torch

WEIGHTS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What a weight may be, and torch's name of it. Integers and float8 are quantized weights, which the Megatron side does
not hold."""
_PACKED = {"U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
"""What quantized weights are packed in, where they can be read (`mxfp4.py`, `fp8.py`)."""
_ITEM_BYTES = {"U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}

LENGTH_BYTES = 8
"""Before the header."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 8

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor's place in a file."""

    file: Path
    kind: str
    """Its type, as safetensors spells it."""
    shape: Shape
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, {**WEIGHTS, **_PACKED}[self.kind])
        return dtype

    @property
    def is_stored(self) -> bool:
        """Whether the file holds it as it is."""
        return True

    @property
    def span(self) -> Span:
        """All of its bytes."""
        return Span(self.file, self.offset, self.nbytes)

    def rows(self, start: int, count: int) -> Span:
        """Find some of its rows -> span."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return Span(self.file, self.offset + start * row, count * row)


def read_header(path: Path, *, quantized: bool = False) -> tuple[bytes, dict[str, Entry]]:
    """Read and check a file's header -> (its bytes as they are, {name: entry} in the header's order).

    Args:
        quantized: let tensors pass that are no weights, or of quantized ones; they cannot be read.

    Raises:
        ConversionError: not a safetensors file, cut short, overlapping tensors, or a dtype that is no weight.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, _MAX_HEADER_BYTES):
                fault = f"{path} ({size} bytes) is cut short or no safetensors file. Fetch it again."
                raise ConversionError(damage(path, fault))
            raw = file.read(length)
    except PermissionError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}). Make it readable: chmod u+r {path}") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from None
    try:
        entries = entries_of_header(path, raw, quantized=quantized)
    except ConversionError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path} has a damaged header ({type(error).__name__}: {error}). Fetch it again."
        ) from None
    end = LENGTH_BYTES + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ConversionError(f"{path} has a damaged header (a gap or an overlap before {name}). Fetch it again.")
        end += entry.nbytes
    if end != size:
        raise ConversionError(
            f"{path} has {size} bytes where its header says {end}: it is cut short or damaged. Fetch it again."
        )
    return raw, entries


def entries_of_header(path: Path, raw: bytes, *, quantized: bool = False) -> dict[str, Entry]:
    """Read a header's entries -> {name: entry}; of what is damaged Python's own exceptions come out."""
    header = json.loads(raw)
    header.pop("__metadata__", None)
    data_start = LENGTH_BYTES + len(raw)
    return {name: _entry(path, name, fields, data_start, quantized=quantized) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Mapping[str, Any], data_start: int, *, quantized: bool) -> Entry:
    kind, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if kind not in WEIGHTS and not quantized:
        raise ConversionError(
            f"{path}: {name} is of type {kind}, which is quantized or no weight; read are {', '.join(WEIGHTS)}. "
            "Use the unquantized model."
        )
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or an offset is no whole number")
    if kind in _ITEM_BYTES and end - start != math.prod(shape) * _ITEM_BYTES[kind]:
        raise ValueError(f"{name} has {end - start} bytes for {kind} of shape {list(shape)}")
    return Entry(file=path, kind=kind, shape=shape, offset=data_start + start, nbytes=end - start)


def some_rows(entry: Entry, start: int, count: int) -> Entry:
    """Take some rows of a tensor for a tensor of their own -> Entry."""
    span = entry.rows(start, count)
    return dataclasses.replace(entry, shape=(count, *entry.shape[1:]), offset=span.offset, nbytes=span.nbytes)


def new_header(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """Lay out a new file, tensors in the order given -> (header bytes, entries).

    Args:
        metadata: texts beside the format, for whoever knows their names.
    """
    kinds = {name: kind for kind, name in WEIGHTS.items()}
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        kind = kinds[str(dtype).removeprefix("torch.")]
        fields[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(fields, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return raw, entries_of_header(path, raw)


def write_header(path: Path, raw: bytes, entries: Mapping[str, Entry]) -> None:
    """Create a file with its header and room for its tensors."""
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)
        file.truncate(max([LENGTH_BYTES + len(raw), *(entry.offset + entry.nbytes for entry in entries.values())]))


@dataclass(frozen=True, kw_only=True)
class Packed(Entry):
    """A tensor that lies in no file as it is, but quantized: shape and type are what is made of it."""

    @property
    def is_stored(self) -> bool:
        return False

    @property
    def span(self) -> Span:
        raise AssertionError("quantized weights are computed, not moved")

    def rows(self, start: int, count: int) -> Span:
        raise AssertionError("quantized weights are computed, not moved")


def read_tensor(entry: Entry) -> torch.Tensor:
    """Read one tensor into fresh memory -> [*entry.shape]."""
    import torch

    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
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
