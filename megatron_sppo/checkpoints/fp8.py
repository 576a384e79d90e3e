"""FP8 weights with a scale for each block (DeepSeek-V3, Kimi-K2), read as bfloat16 numbers; nothing writes them.

NAME.weight [rows, columns] in E4M3 and NAME.weight_scale_inv [rows / block, columns / block], rounded up, stand for one
weight: each number times its block's scale, in float32, then rounded. So do DeepSeek's own files (weight_dequant)
and vLLM. transformers (5.19, integrations/finegrained_fp8.py) does the same where blocks divide rows and columns;
elsewhere it refuses the weight or takes blocks of another size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, open_hf_checkpoint
from megatron_sppo.checkpoints.safetensors_file import WEIGHTS, Entry, Packed, read_tensor, some_rows
from megatron_sppo.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "fp8"
"""`quant_method` of config.json's quantization_config."""

_KIND = "F8_E4M3"
_SCALES = ("F32", "BF16", "F8_E8M0")
_SUFFIX = "_scale_inv"
_ROWS_AT_ONCE = 1024
"""So that float32 copies are small beside the weight."""

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def dequantize(weight: Tensor, scales: Tensor, *, block: Block, first_row: int = 0) -> Tensor:
    """Compute the numbers of some rows of a weight -> [rows, columns] bfloat16.

    Args:
        weight: [rows, columns] float8.
        scales: of the whole weight, [blocks of rows, blocks of columns].
        first_row: of the weight, that `weight` begins with.
    """
    import torch

    numbers = torch.empty(weight.shape, dtype=torch.bfloat16)
    columns = torch.arange(weight.shape[1]) // block[1]
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = weight[start : start + _ROWS_AT_ONCE].float()
        rows = torch.arange(first_row + start, first_row + start + len(part)) // block[0]
        numbers[start : start + len(part)] = part * scales.float()[rows][:, columns]
    return numbers


@dataclass(frozen=True, kw_only=True)
class Fp8Checkpoint(HFCheckpoint):
    """A directory with quantized weights, its tensors as those of the unquantized model."""

    packed: Mapping[str, tuple[Entry, Entry]]
    """{name: (weight, scales)}."""
    block: Block

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().read(name)
        return self.read_rows(name, 0, self.entries[name].shape[0])

    def read_rows(self, name: str, start: int, count: int) -> Tensor:
        if name not in self.packed:
            return super().read_rows(name, start, count)
        weight, scales = self.packed[name]
        return dequantize(
            read_tensor(some_rows(weight, start, count)), read_tensor(scales), block=self.block, first_row=start
        )

    @property
    def is_quantized(self) -> bool:
        return True


def open_fp8(directory: Path, described: Mapping[str, Any]) -> Fp8Checkpoint:
    """Open a directory whose weights are quantized.

    Args:
        described: config.json's quantization_config.

    Raises:
        ConversionError: blocks of no size, a weight without scales, scales without a weight or of another form; any
            other quantized tensor; as open_hf_checkpoint.
    """
    block = _block(directory, described)
    found = open_hf_checkpoint(directory, quantized=True)
    entries, packed = dict[str, Entry](), dict[str, tuple[Entry, Entry]]()
    for name, entry in found.entries.items():
        if name.endswith(_SUFFIX):
            weight = found.entries.get(name.removesuffix(_SUFFIX))
            if weight is None or weight.kind != _KIND:
                held = "without its weight" if weight is None else f"and its weight in {weight.kind}, not {_KIND}"
                raise ConversionError(f"{directory} holds {name} {held}. Fetch the model again.")
        elif entry.kind in WEIGHTS:
            entries[name] = entry
        elif entry.kind != _KIND:
            raise ConversionError(
                f"{entry.file}: {name} is of type {entry.kind}, which is no weight and not {_KIND}, which its "
                "quantization_config (fp8) means. Use the unquantized model."
            )
        else:
            packed[name] = entry, _checked_scales(directory, name, entry, found.entries, block)
            entries[name] = Packed(
                file=entry.file, kind="BF16", shape=entry.shape, offset=0, nbytes=2 * math.prod(entry.shape)
            )
    plain = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Fp8Checkpoint(**plain | {"entries": entries}, packed=packed, block=block)


def _block(directory: Path, described: Mapping[str, Any]) -> Block:
    """Read the size of a block, and refuse another format."""
    size, kind = described.get("weight_block_size"), described.get("fmt", "e4m3")
    is_list = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not isinstance(size, list) or not is_list or kind != "e4m3":
        raise ConversionError(
            f"{directory} describes FP8 weights (quantization_config) of fmt {kind!r} and weight_block_size {size!r}; "
            "read are e4m3 and blocks of [rows, columns]. Use the unquantized model."
        )
    rows, columns = size
    return rows, columns


def _checked_scales(directory: Path, name: str, weight: Entry, entries: Mapping[str, Entry], block: Block) -> Entry:
    """Hold the shapes of both parts against each other -> the scales."""
    scales = entries.get(f"{name}{_SUFFIX}")
    if scales is None:
        raise ConversionError(f"{directory} holds {name} in {_KIND} without {name}{_SUFFIX}. Fetch the model again.")
    wanted = tuple(-(-side // width) for side, width in zip(weight.shape, block, strict=False))
    if len(weight.shape) != 2 or scales.shape != wanted or scales.kind not in _SCALES:
        raise ConversionError(
            f"{directory} holds {name} of shape {list(weight.shape)} and its scales of shape {list(scales.shape)} and "
            f"type {scales.kind}; blocks of {block[0]} x {block[1]} need {list(wanted)} of {' or '.join(_SCALES)}. "
            "Fetch the model again."
        )
    return scales
