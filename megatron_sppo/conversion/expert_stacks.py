"""Files with all experts of a layer in one tensor, [experts, rows, columns], as Qwen3.5-MoE is published.

The rows of such a tensor are those of the experts' own tensors, one after another: it is described as if they were
files' tensors themselves, and what converts never sees it. Families whose experts lie in one tensor of other rows have
a mapping for it (`mapping.ExpertStack`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.checkpoints.safetensors_file import Entry, Shape
from megatron_sppo.conversion.binding import Binding
from megatron_sppo.errors import ConversionError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stack:
    """One tensor of all experts of a layer."""

    shape: Shape
    parts: Mapping[str, Shape]
    """The experts' own tensors, in the order of its rows."""


def expert_stacks(bindings: Iterable[Binding], *, in_files: Callable[[str], str] = str) -> dict[str, Stack]:
    """Find the tensors in which files may hold the experts of a model -> {name: stack}.

    Args:
        in_files: how the files name a tensor of the family's.
    """
    parts: dict[str, dict[str, Shape]] = {}
    experts: dict[str, int] = {}
    for binding in bindings:
        if binding.mapping.stack is not None:
            name = in_files(binding.mapping.stack.replace("{layer}", str(binding.index[0])))
            parts.setdefault(name, {}).update({in_files(part): shape for part, shape in binding.hf_shapes.items()})
            experts[name] = experts.get(name, 0) + 1
    stacks = {}
    for name, shapes in parts.items():
        rows, columns = sum(shape[0] for shape in shapes.values()), next(iter(shapes.values()))[1:]
        stacks[name] = Stack((experts[name], rows // experts[name], *columns), shapes)
    return stacks


def apart(entries: Mapping[str, Entry], stacks: Mapping[str, Stack]) -> dict[str, Entry]:
    """Take the experts' own tensors for those that hold them all; one of another shape stays -> entries.

    Raises:
        ConversionError: an expert is there in both forms.
    """
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stack = stacks.get(name)
        pieces = {name: entry} if stack is None or stack.shape != entry.shape else _parts(entry, stack)
        if double := sorted(pieces.keys() & (entries.keys() - {name})):
            raise ConversionError(
                f"{entry.file} holds {name}, in which {double[0]} is, and that is there by itself too. "
                "Fetch the model again."
            )
        found |= pieces
    return found


def together(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], stacks: Mapping[str, Stack]
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Undo `apart` for names, types and shapes; a stack comes where its first expert was."""
    first = {next(iter(stack.parts)): name for name, stack in stacks.items()}
    inner = {part for stack in stacks.values() for part in stack.parts}
    found: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, (dtype, shape) in tensors.items():
        if name in first:
            found[first[name]] = dtype, stacks[first[name]].shape
        elif name not in inner:
            found[name] = dtype, shape
    return found


def check_stacks(source: HFCheckpoint, stacks: Mapping[str, Stack]) -> None:
    """Refuse tensors of all experts that `apart` left, for they have another shape.

    Raises:
        ConversionError: names the first.
    """
    for name in source.entries.keys() & stacks.keys():
        found, wanted = source.entries[name].shape, stacks[name].shape
        raise ConversionError(
            f"{source.directory} holds {name} of shape {list(found)} where its {CONFIG_FILE} promises {list(wanted)} "
            "(experts, rows, columns). Weights and config are of two models: fetch both again."
        )


def _parts(entry: Entry, stack: Stack) -> dict[str, Entry]:
    offset, item = entry.offset, entry.nbytes // math.prod(entry.shape)
    parts = {}
    for name, shape in stack.parts.items():
        nbytes = shape[0] * shape[1] * item
        parts[name] = dataclasses.replace(entry, shape=shape, offset=offset, nbytes=nbytes)
        offset += nbytes
    return parts
