"""What a conversion hands to the writers: which bytes go where, and which tensors have to be computed (a cast)."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp_writer import Piece
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_writer import Computed, Moved, Rows
from megatron_sppo.checkpoints.safetensors_file import Entry, read_tensor
from megatron_sppo.conversion.binding import Binding, megatron_shapes
from megatron_sppo.conversion.mapping import ExpertStack, Run, to_megatron
from megatron_sppo.conversion.megatron_model import OpenedMegatron
from megatron_sppo.errors import ConversionError


def import_pieces(
    source: HFCheckpoint, bindings: Sequence[Binding], architecture: Architecture, cast: torch.dtype | None
) -> list[Piece]:
    """Describe an import -> a piece for each part that is read apart of a Megatron tensor; nothing is read yet.

    Raises:
        ConversionError: layers of one Megatron tensor are of several types, and no cast makes them one.
    """
    shapes = megatron_shapes(bindings, architecture)
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    pieces = []
    for binding in bindings:
        mapping, place, names = binding.mapping, binding.place, list(binding.hf_shapes)
        found = [source.entries[name].dtype for name in names]
        to = mapping.cast(cast)
        dtype, first = dtypes.setdefault(place.key, (found[0], names[0]))
        for name, other in zip(names, found, strict=True):
            if to is None and other != dtype:
                raise ConversionError(
                    f"{source.directory} holds {first} in {dtype} and {name} in {other}, "
                    "which Megatron keeps in one tensor. Choose one type: --dtype bfloat16."
                )
        shape = mapping.megatron_shape(architecture)
        moves = all(to in (None, entry.dtype) and entry.is_stored for entry in (source.entries[name] for name in names))
        if isinstance(mapping, ExpertStack):
            pieces += [
                Piece(
                    key=place.key,
                    offsets=(*place.offsets, expert, *(0,) * (len(shape) - 1)),
                    sizes=(*(1,) * len(place.offsets), 1, *shape[1:]),
                    global_shape=shapes[place.key],
                    dtype=to or dtype,
                    values=functools.partial(_of_expert, source, names[0], mapping, expert, to or dtype),
                )
                for expert in range(shape[0])
            ]
            continue
        first_row = 0
        for runs in mapping.read_apart(architecture):
            num_rows = sum(run.rows for run in runs)
            pieces.append(
                Piece(
                    key=place.key,
                    offsets=(*place.offsets, first_row, *(0,) * (len(shape) - 1)),
                    sizes=(*(1,) * len(place.offsets), num_rows, *shape[1:]),
                    global_shape=shapes[place.key],
                    dtype=to or dtype,
                    values=tuple(source.entries[names[part]].rows(start, rows) for part, start, rows in runs)
                    if moves
                    else functools.partial(_megatron_rows, source, names, runs, to or dtype),
                )
            )
            first_row += num_rows
    return pieces


def _megatron_rows(source: HFCheckpoint, names: Sequence[str], runs: Sequence[Run], dtype: torch.dtype) -> Tensor:
    return to_megatron({part: source.read(names[part]) for part in sorted({run.part for run in runs})}, runs).to(dtype)


def _of_expert(source: HFCheckpoint, name: str, mapping: ExpertStack, expert: int, dtype: torch.dtype) -> Tensor:
    return mapping.from_hf(source.read_rows(name, expert, 1)).to(dtype)


def export_tensors(
    opened: OpenedMegatron, cast: torch.dtype | None, *, in_files: Callable[[str], str] = str
) -> Iterator[Moved | Computed]:
    """Describe an export -> one entry per Megatron tensor and layer.

    What lies in the checkpoint otherwise than in rows (cut across columns, say) is computed, as a cast is.

    Args:
        in_files: how the files name a tensor of the family's.
    """
    for binding in opened.bindings:
        names = [in_files(name) for name in binding.hf_shapes]
        to = binding.mapping.cast(cast)
        is_moved = to in (None, opened.dtype(binding)) and not isinstance(binding.mapping, ExpertStack)
        spans = opened.spans(binding) if is_moved else None
        if spans is None:
            yield Computed(names=names, make=functools.partial(_hf_tensors, opened, binding, names, to))
        else:
            runs = binding.mapping.runs(opened.architecture)
            yield Moved(spans=spans, rows=[Rows(names[part], start, rows) for part, start, rows in runs])
    for name, entry in opened.carried.items():
        if entry.shape:
            yield Moved(spans=[entry.span], rows=[Rows(name, 0, entry.shape[0])])
        else:  # a single number has no rows
            yield Computed(names=[name], make=functools.partial(_one_tensor, name, entry))


def _one_tensor(name: str, entry: Entry) -> list[tuple[str, Tensor]]:
    return [(name, read_tensor(entry))]


def _hf_tensors(
    opened: OpenedMegatron, binding: Binding, names: Sequence[str], cast: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in zip(names, opened.read(binding).values(), strict=True):
        yield name, tensor.to(cast or tensor.dtype)
