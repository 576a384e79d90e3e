"""What a conversion will do, before it does it: which bytes go where, and which tensors have to be computed."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp_writer import Piece
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint, PlannedFiles, opened_files
from megatron_sppo.checkpoints.megatron_checkpoint import check_digest
from megatron_sppo.checkpoints.safetensors_file import Entry, write_tensor
from megatron_sppo.checkpoints.transfer import MAKING, Move, Span, Transfer
from megatron_sppo.conversion.mapping import (
    Binding,
    Copy,
    FusedQKV,
    GateUp,
    PackedQKV,
    Rule,
    VocabRows,
    dimension,
    megatron_shapes,
)
from megatron_sppo.conversion.megatron_model import OpenedMegatron
from megatron_sppo.errors import ConversionError


def import_pieces(
    source: HFCheckpoint, bindings: Sequence[Binding], architecture: Architecture, cast: torch.dtype | None
) -> list[Piece]:
    """Plan an import -> one piece per Megatron tensor and layer; nothing is read yet.

    Raises:
        ConversionError: layers of one Megatron tensor are of several types, and no cast makes them one.
    """
    shapes = megatron_shapes(bindings, architecture)
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    pieces = []
    for binding in bindings:
        for name in binding.hf_shapes:
            found, first = dtypes.setdefault(binding.rule.key, (source.entries[name].dtype, name))
            if cast is None and found != source.entries[name].dtype:
                raise ConversionError(
                    f"{source.directory} holds {first} in {found} and {name} in {source.entries[name].dtype}, "
                    "which Megatron keeps in one tensor. Choose one type: --dtype bfloat16."
                )
        shape = binding.rule.megatron_shape(architecture)
        index = binding.index
        pieces.append(
            Piece(
                key=binding.rule.key,
                offsets=(*index, *(0,) * len(shape)),
                sizes=(*(1,) * len(index), *shape),
                global_shape=shapes[binding.rule.key],
                dtype=cast or dtypes[binding.rule.key][0],
                values=_spans(source, binding, architecture, cast) or _loader(source, binding, architecture, cast),
            )
        )
    return pieces


def _spans(
    source: HFCheckpoint, binding: Binding, architecture: Architecture, cast: torch.dtype | None
) -> tuple[Span, ...] | None:
    """Find a Megatron tensor's bytes in the Hugging Face files, in its own order; None where it must be computed."""
    entries = [source.entries[name] for name in binding.hf_shapes]
    runs = segments(binding.rule, architecture)
    if runs is None or any(cast not in (None, entry.dtype) for entry in entries):
        return None
    row = [_row_bytes(entry) for entry in entries]
    return tuple(
        Span(entries[part].file, entries[part].offset + start * row[part], rows * row[part])
        for part, start, rows in runs
    )


def _loader(
    source: HFCheckpoint, binding: Binding, architecture: Architecture, cast: torch.dtype | None
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        tensor = binding.rule.to_megatron([source.read(name) for name in binding.hf_shapes], architecture)
        return tensor if cast is None else tensor.to(cast)

    return load


def export_tensors(
    directory: Path,
    plan: PlannedFiles,
    opened: OpenedMegatron,
    *,
    cast: torch.dtype | None,
    workers: int | None,
    progress: Callable[[int], object],
) -> None:
    """Write all tensors of a checkpoint to their planned places, and check the checkpoint's files on the way.

    The same bytes by any number of workers. A file whose sha256 is known is read once, from end to end: what is moved
    is what was hashed.

    Raises:
        DataError: a file of the checkpoint is not what was written.
        ConversionError: a tensor of it cannot be read.
    """
    with (
        opened_files(directory, plan) as places,
        Transfer(workers=workers, progress=progress) as transfer,
    ):
        moves, computed = _moves(opened, places, cast)
        for name in opened.unchecked:
            moves.setdefault(opened.directory / name, [])
        tasks: list[Callable[[], None]] = [
            functools.partial(_scatter, transfer, opened, path, moves[path])
            for path in sorted(moves, key=lambda path: (-path.stat().st_size, path.name))
        ]
        tasks += [functools.partial(_compute, transfer, opened, binding, places, cast) for binding in computed]
        transfer.run(tasks)


def _moves(
    opened: OpenedMegatron, places: Mapping[str, tuple[int, Entry]], cast: torch.dtype | None
) -> tuple[dict[Path, list[Move]], list[Binding]]:
    """Sort the tensors into bytes to move, by source file, and what has to be computed."""
    moves: dict[Path, list[Move]] = {}
    computed = []
    for binding in opened.bindings:
        runs = segments(binding.rule, opened.architecture)
        spans = None if runs is None or cast not in (None, opened.dtype(binding)) else opened.spans(binding)
        if runs is None or spans is None:
            computed.append(binding)
            continue
        targets = [places[name] for name in binding.hf_shapes]
        row = [_row_bytes(entry) for _, entry in targets]
        ends = [
            (targets[part][0], targets[part][1].offset + start * row[part], rows * row[part])
            for part, start, rows in runs
        ]
        for path, move in _matched(spans, ends):
            moves.setdefault(path, []).append(move)
    return moves, computed


def _matched(spans: Sequence[Span], ends: Sequence[tuple[int, int, int]]) -> list[tuple[Path, Move]]:
    """Cut two rows of runs of bytes, as long as each other, at the ends of either -> moves."""
    starts = [list(itertools.accumulate(lengths, initial=0)) for lengths in _lengths(spans, ends)]
    assert starts[0][-1] == starts[1][-1], "two sizes of one tensor"
    moves = []
    source = target = 0
    for low, high in itertools.pairwise(sorted({*starts[0], *starts[1]})):
        while starts[0][source + 1] <= low:
            source += 1
        while starts[1][target + 1] <= low:
            target += 1
        span, (descriptor, offset, _) = spans[source], ends[target]
        from_offset, to_offset = span.offset + low - starts[0][source], offset + low - starts[1][target]
        moves.append((span.path, Move(from_offset, high - low, descriptor, to_offset)))
    return moves


def _lengths(spans: Sequence[Span], ends: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    return [span.nbytes for span in spans], [nbytes for _, _, nbytes in ends]


def _scatter(transfer: Transfer, opened: OpenedMegatron, path: Path, moves: Sequence[Move]) -> None:
    expected = opened.unchecked.get(os.fspath(path.relative_to(opened.directory)))
    found = transfer.scatter(path, moves, whole=expected is not None)
    if expected is not None:
        check_digest(path, found, expected)


def _compute(
    transfer: Transfer,
    opened: OpenedMegatron,
    binding: Binding,
    places: Mapping[str, tuple[int, Entry]],
    cast: torch.dtype | None,
) -> None:
    nbytes = sum(places[name][1].nbytes for name in binding.hf_shapes)
    with transfer.hold(MAKING * nbytes):
        for name, tensor in opened.read(binding).items():
            descriptor, entry = places[name]
            write_tensor(descriptor, entry, tensor if cast is None else tensor.to(cast))
    transfer.advance(nbytes)


def _row_bytes(entry: Entry) -> int:
    return entry.nbytes // entry.shape[0] if entry.shape[0] else 0


class Segment(NamedTuple):
    """Consecutive rows of one Hugging Face tensor."""

    part: int
    """Which of the rule's parts."""
    start: int
    rows: int


def segments(rule: Rule, architecture: Architecture) -> list[Segment] | None:
    """List the runs of rows that the Megatron tensor is made of, in its order -> segments, or None: it is computed."""
    runs = _RUNS.get(type(rule))
    return None if runs is None else runs([shape[0] for shape in rule.part_shapes(architecture)], architecture)


def _in_turn(rows: list[int], architecture: Architecture) -> list[Segment]:
    return [Segment(part, 0, count) for part, count in enumerate(rows)]


def _by_group(rows: list[int], architecture: Architecture) -> list[Segment]:
    groups = architecture.num_query_groups
    return [
        Segment(part, group * (count // groups), count // groups)
        for group in range(groups)
        for part, count in enumerate(rows)
    ]


def _packed_by_group(rows: list[int], architecture: Architecture) -> list[Segment]:
    counts = [dimension(architecture, name) for name in ("query", "key", "key")]
    starts = [0, counts[0], counts[0] + counts[1]]
    return [Segment(0, starts[run.part] + run.start, run.rows) for run in _by_group(counts, architecture)]


_RUNS: dict[type[Rule], Callable[[list[int], Architecture], list[Segment]]] = {
    Copy: _in_turn,
    VocabRows: _in_turn,
    GateUp: _in_turn,
    FusedQKV: _by_group,
    PackedQKV: _packed_by_group,
}
