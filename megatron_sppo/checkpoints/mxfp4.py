"""MXFP4 weights (gpt-oss), read as the bfloat16 tensors that transformers makes of them, bit for bit.

OCP Microscaling Formats 1.0: 32 numbers of 4 bits (E2M1), two a byte and the lower half first, share an exponent of 8
bits. `NAME_blocks` [E, rows, columns / 32, 16] and `NAME_scales` [E, rows, columns / 32] stand for NAME
[E, columns, rows] (transformers 5.19, integrations/mxfp4.py, convert_moe_packed_tensors). Nothing writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.safetensors_file import WEIGHTS, Entry, Packed, read_tensor, some_rows
from megatron_sppo.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "mxfp4"
"""`quant_method` of config.json's quantization_config."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK_BYTES = 16
_BIAS = 127
"""Of the exponents."""


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Compute the numbers of MXFP4 weights -> [E, G * 32, R] bfloat16.

    Args:
        blocks: [E, R, G, 16] uint8.
        scales: [E, R, G] uint8.
    """
    import torch

    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16)
    numbers = torch.stack((table[(blocks & 0x0F).int()], table[(blocks >> 4).int()]), dim=-1).flatten(-2)
    numbers = torch.ldexp(numbers, (scales.int() - _BIAS)[..., None]).to(torch.bfloat16)
    return numbers.flatten(-2).transpose(-1, -2).contiguous()


@dataclass(frozen=True, kw_only=True)
class Mxfp4Checkpoint(HFCheckpoint):
    """A directory with quantized weights, its tensors under the names and in the shapes of the unquantized model."""

    packed: Mapping[str, tuple[Entry, Entry]]
    """{name: (blocks, scales)}."""

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().read(name)
        return dequantize(*(read_tensor(entry) for entry in self.packed[name]))

    def read_rows(self, name: str, start: int, count: int) -> Tensor:
        if name not in self.packed:
            return super().read_rows(name, start, count)
        return dequantize(*(read_tensor(some_rows(entry, start, count)) for entry in self.packed[name]))

    @property
    def is_quantized(self) -> bool:
        return True


def open_mxfp4(directory: Path) -> Mxfp4Checkpoint:
    """Open a directory whose weights are quantized.

    Raises:
        ConversionError: blocks without scales, or of another form; any other quantized tensor; as open_hf_checkpoint.
    """
    found = open_hf_checkpoint(directory, quantized=True)
    entries, packed = dict[str, Entry](), dict[str, tuple[Entry, Entry]]()
    for name, entry in found.entries.items():
        base, _, part = name.rpartition("_")
        other = {"blocks": f"{base}_scales", "scales": f"{base}_blocks"}.get(part)
        if entry.kind in WEIGHTS:
            entries[name] = entry
        elif entry.kind != "U8" or other is None:
            raise ConversionError(
                f"{entry.file}: {name} is of type {entry.kind}, which is quantized or no weight, and no part of MXFP4 "
                "(_blocks and _scales). Use the unquantized model."
            )
        elif other not in found.entries:
            raise ConversionError(f"{directory} holds {name} without {other}. Fetch the model again.")
        elif part == "blocks":
            packed[base] = entry, _checked_scales(directory, name, entry, found.entries[other])
            experts, rows, groups, _ = entry.shape
            entries[base] = Packed(
                file=entry.file,
                kind="BF16",
                shape=(experts, groups * 2 * _BLOCK_BYTES, rows),
                offset=0,
                nbytes=experts * rows * groups * 4 * _BLOCK_BYTES,
            )
    plain = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Mxfp4Checkpoint(**plain | {"entries": entries}, packed=packed)


def _checked_scales(directory: Path, name: str, blocks: Entry, scales: Entry) -> Entry:
    """Hold the shapes of both parts against each other -> the scales."""
    if scales.kind != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK_BYTES:
        raise ConversionError(
            f"{directory} holds {name} of shape {list(blocks.shape)}, scaled by {scales.kind}: MXFP4 has "
            f"[experts, rows, blocks, {_BLOCK_BYTES}] and bytes (U8). Fetch the model again."
        )
    if scales.shape != blocks.shape[:3]:
        raise ConversionError(
            f"{directory} holds {name} of shape {list(blocks.shape)} and its scales of shape {list(scales.shape)}, "
            f"which must be {list(blocks.shape[:3])}. Fetch the model again."
        )
    return scales
