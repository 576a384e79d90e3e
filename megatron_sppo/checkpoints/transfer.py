"""Bytes from file to file in one pass: every block is read once, hashed and written, by several threads side by side.

A weight that only changes its place never becomes a tensor: memory holds one block a thread, whatever the model's
size. What must be computed (a cast, a cut across columns) is a whole tensor, and as many of those are held at a time
as fit into a fixed number of bytes. hashlib, pread and pwrite all release the GIL, so threads use as many cores.
"""

import bisect
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sppo.checkpoints.digests import ItemDigests
from megatron_sppo.checkpoints.file_digests import default_workers
from megatron_sppo.checkpoints.safetensors_file import Span
from megatron_sppo.errors import ConversionError

BLOCK_BYTES = 4 << 20
"""Small enough to stay in a core's cache between reading, hashing and writing."""
BUDGET_BYTES = 256 << 20
"""Of tensors in the making at a time; one that is larger is made alone."""
MAKING = 3
"""Memory that making a tensor takes, in tensors: what it is made of, the result, and a cast of it."""


def part_of(spans: Sequence[Span], start: int, nbytes: int) -> tuple[Span, ...]:
    """Take `nbytes` from `start` on of what the spans hold one after another -> spans."""
    found = []
    for span in spans:
        low, high = max(0, start), min(span.nbytes, start + nbytes)
        if low < high:
            found.append(Span(span.path, span.offset + low, high - low))
        start -= span.nbytes
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that has to be computed."""

    nbytes: int
    """Memory that making it takes."""
    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of a source file and where they go in an open file."""

    offset: int
    nbytes: int
    descriptor: int
    target: int


class Transfer:
    """The threads of one conversion, the files that they read, and how much memory they may take together."""

    def __init__(self, *, workers: int | None, progress: Callable[[int], object]) -> None:
        if workers is not None and workers < 1:
            raise ConversionError(f"workers is {workers}. Use --workers 1 or more.")
        self.workers = workers or default_workers()
        self._progress = progress
        self._lock = threading.Lock()
        self._sources: dict[Path, int] = {}
        self._free = self._budget = BUDGET_BYTES
        self._freed = threading.Condition()
        self._stopped = threading.Event()

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._sources.values():
            os.close(descriptor)

    def run(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run the tasks side by side -> their results, in order. After a failure the others end at their next block."""
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() and not future.exception() for future in futures):
                    self._stopped.set()
                    pool.shutdown(cancel_futures=True)
        failures = [future.exception() for future in futures if not future.cancelled() and future.exception()]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, _Stopped)):
            assert failure is not None
            raise failure
        return [future.result() for future in futures]

    def gather(self, path: Path, items: Sequence[Sequence[bytes | Span | Made]]) -> None:
        """Write a file of items, each from its parts, one after another; and the items' digests beside it."""
        digests, buffer = ItemDigests(), bytearray(BLOCK_BYTES)
        with open(path, "wb", buffering=0) as file:
            for item in items:
                for part in item:
                    for block in self._blocks(part, buffer):
                        write_at(file.fileno(), block, digests.position)
                        digests.update(block)
                        if not isinstance(part, bytes):
                            self.advance(len(block))
                digests.end_item()
            os.fsync(file.fileno())  # here, where the other threads go on meanwhile
        digests.write(path)

    def scatter(self, source: Path, moves: Sequence[Move], *, hashed: Sequence[tuple[int, int]] | None) -> list[str]:
        """Send bytes of one file to their places -> sha256 of each of the `hashed` ranges.

        Args:
            hashed: (offset, length) of ranges that are read from end to end, each once; every move lies within one.
                None: only what moves is read, and nothing is hashed.
        """
        moves = sorted(moves, key=lambda move: move.offset)
        buffer = bytearray(BLOCK_BYTES)
        if hashed is None:
            for move in moves:
                for start, block in self._read(Span(source, move.offset, move.nbytes), buffer):
                    self._send(block, start, move)
        found = [self._scatter_range(Span(source, *place), moves, buffer) for place in hashed or ()]
        for descriptor in {move.descriptor for move in moves}:
            os.fdatasync(descriptor)  # here, where the other threads go on meanwhile
        return found

    def _scatter_range(self, span: Span, moves: Sequence[Move], buffer: bytearray) -> str:
        """Read a range block by block, hash it, and send what moves of it -> sha256."""
        digest = hashlib.sha256()
        first = bisect.bisect_left(moves, span.offset, key=lambda move: move.offset)
        for start, block in self._read(span, buffer):
            digest.update(block)
            while first < len(moves) and moves[first].offset + moves[first].nbytes <= start:
                first += 1
            following = first
            while following < len(moves) and moves[following].offset < start + len(block):
                self._send(block, start, moves[following])
                following += 1
        return digest.hexdigest()

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until so much memory may be taken, and hold it; what needs more than all waits until it is alone."""
        nbytes = min(nbytes, self._budget)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            self._check_stopped()
            yield
        finally:
            with self._freed:
                self._free += nbytes
                self._freed.notify_all()

    def advance(self, nbytes: int) -> None:
        """Report bytes that are done."""
        with self._lock:
            self._progress(nbytes)

    def _blocks(self, part: bytes | Span | Made, buffer: bytearray) -> Iterator[bytes | memoryview]:
        if isinstance(part, bytes):
            yield part
        elif isinstance(part, Span):
            for _, block in self._read(part, buffer):
                yield block
        else:
            with self.hold(part.nbytes):
                yield bytes_of(part.make())

    def _read(self, span: Span, buffer: bytearray) -> Iterator[tuple[int, memoryview]]:
        """Read block by block -> (offset in the file, bytes, valid until the next)."""
        descriptor, view = self._source(span.path), memoryview(buffer)
        position, end = span.offset, span.offset + span.nbytes
        while position < end:
            self._check_stopped()
            count = os.preadv(descriptor, [view[: min(len(view), end - position)]], position)
            if not count:
                raise ConversionError(
                    f"{span.path} became shorter while it was read. Leave it alone, and run the command again."
                )
            yield position, view[:count]
            position += count

    def _send(self, block: memoryview, start: int, move: Move) -> None:
        low, high = max(start, move.offset), min(start + len(block), move.offset + move.nbytes)
        write_at(move.descriptor, block[low - start : high - start], move.target + low - move.offset)
        self.advance(high - low)

    def _source(self, path: Path) -> int:
        with self._lock:
            if path not in self._sources:
                self._sources[path] = os.open(path, os.O_RDONLY)
            return self._sources[path]

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Another thread has failed; this one gives up."""


def bytes_of(tensor: Tensor) -> memoryview:
    """View a tensor's values as they lie in a file; copied only where it is not contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(descriptor: int, view: bytes | memoryview, offset: int) -> None:
    """Write all of `view` at `offset` of an open file."""
    view = memoryview(view)
    while len(view):
        written = os.pwrite(descriptor, view, offset)  # at most 2 GiB at a time
        view, offset = view[written:], offset + written
