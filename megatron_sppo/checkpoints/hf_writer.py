"""Write the safetensors files of a Hugging Face directory: laid out first, then filled in by several threads.

What only changes its place goes from file to file; what has to be computed is a tensor for a moment.
"""

import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sppo.checkpoints.crew import ALONE, Crew
from megatron_sppo.checkpoints.digests import FileDigests
from megatron_sppo.checkpoints.hf_files import INDEX_FILE, SINGLE_FILE
from megatron_sppo.checkpoints.megatron_checkpoint import check_digest
from megatron_sppo.checkpoints.safetensors_file import (
    LENGTH_BYTES,
    Entry,
    Shape,
    Span,
    entries_of_header,
    new_header,
    write_header,
)
from megatron_sppo.checkpoints.transfer import MAKING, Made, Move, Transfer, bytes_of, write_at
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.storage import named_inside

Place = tuple[int, Entry]
"""An open file's descriptor, and where a tensor lies in it."""


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """Where each tensor of a directory lies."""

    files: Mapping[str, tuple[bytes, Mapping[str, Entry]]]
    """{file: (header, entries)}; entries that lie in the file one after another, and need not be the header's own."""
    index: str | None
    """Text of the index; None for a single file."""

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """All tensors of all files -> {name: (dtype, shape)}."""
        held = (entries.items() for _, entries in self.files.values())
        return {name: (entry.dtype, entry.shape) for name, entry in itertools.chain.from_iterable(held)}

    def described(self, change: Callable[[Mapping[str, Entry]], Mapping[str, Entry]]) -> "FileLayout":
        """Describe the bytes of each file by other entries than its header's -> layout."""
        files = {name: (raw, change(entries)) for name, (raw, entries) in self.files.items()}
        return dataclasses.replace(self, files=files)


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one tensor to be written."""

    name: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Rows whose values lie in files as they are to be: the spans, one after another, are the rows, likewise."""

    spans: Sequence[Span]
    rows: Sequence[Rows]


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Tensors to be made when their turn comes."""

    names: Sequence[str]
    make: Callable[[], Iterable[tuple[str, Tensor]]]


def read_layout(path: Path) -> FileLayout | None:
    """Read how the tensors lay in the imported files (`HFCheckpoint.layout`) -> layout; None: it is not said.

    Raises:
        ConversionError, DataError: the description is damaged.
    """
    if not path.is_file():
        return None
    layout = read_json(path)
    try:
        headers = {name: base64.b64decode(encoded) for name, encoded in layout["files"].items()}
        files = {name: (raw, entries_of_header(named_inside(Path(), name), raw)) for name, raw in headers.items()}
        return FileLayout(files=files, index=layout["index"])
    except DataError:
        raise  # a name that leads elsewhere
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path} describes no files ({type(error).__name__}). It is damaged: remove it to do without it."
        ) from None


def new_files(tensors: Mapping[str, tuple[torch.dtype, Shape]], *, max_shard_bytes: int) -> FileLayout:
    """Lay the tensors out in new files by Hugging Face's names, in the order given -> layout.

    Args:
        tensors: {name: (dtype, shape)}.
        max_shard_bytes: of tensors in one file; a tensor that is larger has a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return FileLayout(files={SINGLE_FILE: new_header(Path(SINGLE_FILE), tensors)}, index=None)
    files = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files[file] = new_header(Path(file), {name: tensors[name] for name in group})
    total = sum(entry.nbytes for _, entries in files.values() for entry in entries.values())
    weight_map = {name: file for file, (_, entries) in files.items() for name in entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return FileLayout(files=files, index=json.dumps(index, indent=2) + "\n")


def parse_size(text: str) -> int:
    """Read a size such as "5GB" or "500MiB" -> bytes.

    Raises:
        ConversionError: no such size.
    """
    prefixes = ("", "K", "M", "G", "T")
    units = {f"{prefix}B": 1000**power for power, prefix in enumerate(prefixes)}
    units |= {f"{prefix}IB": 1024**power for power, prefix in enumerate(prefixes) if prefix} | {"": 1}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units or float(match[1]) == 0:
        raise ConversionError(f"max_shard_size is {text!r}, which is no size. Use --max-shard-size 5GB.")
    return int(float(match[1]) * units[match[2].upper()])


def write_tensors(
    directory: Path,
    layout: FileLayout,
    tensors: Iterable[Moved | Computed],
    *,
    digests: Mapping[Path, str],
    items: Mapping[Path, FileDigests],
    progress: Callable[[int], object],
    workers: int | None = None,
    crew: Crew = ALONE,
) -> None:
    """Write a directory's files and index, and check the files that the values come from on the way.

    The same bytes by any number of workers and ranks. A file whose sha256 is known is read once, from end to end; of
    one whose items have digests, the items that move: what is moved is what was hashed.

    Args:
        directory: an existing directory; the caller makes it appear atomically.
        tensors: together, every row of the layout's tensors.
        digests: {source file: sha256 that it must have}.
        items: {source file: digests of the items that moves may lie in}.
        progress: called with the bytes of each block written.
        workers: threads; None takes the cores that there are.
        crew: the ranks that call this, each with the same tensors; they divide the source files, and what is computed.

    Raises:
        DataError: a source file is not what was written.
    """
    with (
        _opened_files(directory, layout, crew) as places,
        Transfer(workers=workers, progress=progress) as transfer,
        crew.working(directory),
    ):
        moves: dict[Path, list[Move]] = {path: [] for path in digests}
        computed = []
        for one in tensors:
            if isinstance(one, Computed):
                computed.append(one)
                continue
            for path, move in _matched(one.spans, [_target(places, rows) for rows in one.rows]):
                moves.setdefault(path, []).append(move)
        tasks: list[Callable[[], None]] = [
            functools.partial(_scatter, transfer, path, moves[path], digests.get(path) or items.get(path))
            for path in sorted(moves, key=lambda path: (-path.stat().st_size, path.name))
        ]
        tasks += [functools.partial(_compute, transfer, one, places) for one in computed]
        transfer.run(crew.share(tasks))
        for descriptor in {descriptor for descriptor, _ in places.values()}:
            os.fdatasync(descriptor)


def copy_tensors(
    tensors: Mapping[str, Entry],
    path: Path,
    *,
    made: Mapping[str, Callable[[], Tensor]],
    progress: Callable[[int], object],
) -> None:
    """Copy tensors of other files into a new one, in the order given, and write its items' digests beside it.

    Args:
        made: how those are computed that lie in no file as they are.
    """
    raw, _ = new_header(path, {name: (entry.dtype, entry.shape) for name, entry in tensors.items()})
    header = len(raw).to_bytes(LENGTH_BYTES, "little") + raw
    with Transfer(workers=1, progress=progress) as transfer:
        items = (
            [Made(MAKING * entry.nbytes, made[name]) if name in made else entry.span] for name, entry in tensors.items()
        )
        transfer.gather(path, [[header], *items])


@contextlib.contextmanager
def _opened_files(directory: Path, layout: FileLayout, crew: Crew) -> Iterator[dict[str, Place]]:
    """Let the leader create the files with their headers, and the index -> {tensor: place}, to be filled in."""
    with contextlib.ExitStack() as stack:
        places: dict[str, Place] = {}
        for file, (raw, entries) in layout.files.items():
            if crew.leads:
                write_header(directory / file, raw, entries)
            descriptor = os.open(directory / file, os.O_WRONLY)
            stack.callback(os.close, descriptor)
            places |= {name: (descriptor, entry) for name, entry in entries.items()}
        if layout.index is not None and crew.leads:
            (directory / INDEX_FILE).write_text(layout.index, encoding="utf-8")
        yield places


def _target(places: Mapping[str, Place], rows: Rows) -> tuple[int, Span]:
    descriptor, entry = places[rows.name]
    return descriptor, entry.rows(rows.start, rows.count)


def _matched(sources: Sequence[Span], targets: Sequence[tuple[int, Span]]) -> list[tuple[Path, Move]]:
    """Cut two rows of runs of bytes, as long as each other, at the ends of either -> moves."""
    source_starts = list(itertools.accumulate((span.nbytes for span in sources), initial=0))
    target_starts = list(itertools.accumulate((span.nbytes for _, span in targets), initial=0))
    assert source_starts[-1] == target_starts[-1], "two sizes of one tensor"
    moves = []
    source = target = 0
    for low, high in itertools.pairwise(sorted({*source_starts, *target_starts})):
        while source_starts[source + 1] <= low:
            source += 1
        while target_starts[target + 1] <= low:
            target += 1
        span, (descriptor, place) = sources[source], targets[target]
        from_offset = span.offset + low - source_starts[source]
        moves.append((span.path, Move(from_offset, high - low, descriptor, place.offset + low - target_starts[target])))
    return moves


def _scatter(transfer: Transfer, path: Path, moves: Sequence[Move], known: str | FileDigests | None) -> None:
    if known is None:
        transfer.scatter(path, moves, hashed=None)
    elif isinstance(known, str):
        (found,) = transfer.scatter(path, moves, hashed=[(0, path.stat().st_size)])
        check_digest(path, found, known)
    else:
        places = sorted({known.item_at(path, move.offset, move.nbytes) for move in moves})
        for (offset, length), found in zip(places, transfer.scatter(path, moves, hashed=places), strict=True):
            known.check(path, offset=offset, length=length, found=found)


def _compute(transfer: Transfer, one: Computed, places: Mapping[str, Place]) -> None:
    nbytes = sum(places[name][1].nbytes for name in one.names)
    with transfer.hold(MAKING * nbytes):
        for name, tensor in one.make():
            write_tensor(*places[name], tensor)
    transfer.advance(nbytes)


def write_tensor(descriptor: int, entry: Entry, tensor: Tensor) -> None:
    """Write one tensor at its place in an open file."""
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, (
        f"{entry} is to hold {tensor.dtype} {tensor.shape}"
    )
    write_at(descriptor, bytes_of(tensor), entry.offset)
