"""One file -> rows: JSON Lines, a JSON list, CSV, TSV and Parquet, plain or compressed (.gz, .zst)."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from megatron_sppo.errors import DataError
from megatron_sppo.storage import damage

Rows = Iterator[Any]
"""Rows as they stand, an UnusableRow in place of one that cannot be read."""

_JSON, _CSV, _PARQUET = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".parquet",)
KINDS = (*_JSON, *_CSV, *_PARQUET)
COMPRESSED = (".gz", ".zst")
KNOWN = f"{', '.join(KINDS)}, plain or with {' or '.join(COMPRESSED)}"
"""What can be read, in words."""
_LISTS = (
    *("messages", "conversations", "conversation", "history", "answers", "completions"),
    *("probability", "rm_scores", "instruction_id_list", "kwargs"),
)
"""Columns that hold a list; a CSV cell spells it as JSON."""
MESSAGES_AS_JSON = re.compile(r'\s*(\[\s*)?\{\s*"(role|content|from|value)"')
_MESSAGES_AS_PYTHON = re.compile(r"\s*(\[\s*)?\{\s*'(role|content|from|value)'")
"""Messages in a CSV cell; the second is what pandas makes of them."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `errors="surrogateescape"` makes of bytes that are no UTF-8."""
MOST_ROW_BYTES = 1 << 26
"""Of one row as it stands in a file of lines: a small compressed file may unpack to a line of any length."""
MOST_UNPACKED_BYTES = 1 << 30
"""Of a compressed file that is held as a whole: a JSON list, Parquet."""
_ROWS_PER_BATCH = 1024
"""Of a Parquet file, held as Python objects at once."""


class UnusableRow(Exception):
    """Why one row is set aside, as a clause."""


def file_rows(path: Path, columns: frozenset[str] | None, context: frozenset[str]) -> Rows:
    """Read one file -> its rows in order.

    Args:
        columns: a Parquet file must have one of them, and others than these are not read; None: every column.
        context: columns that are read too, where a Parquet file has them.

    Raises:
        DataError: an unknown kind, or a file that cannot be read; raised while it is read.
    """
    kind = kind_of(path)
    if kind not in KINDS:
        raise DataError(f"{path}: files that end in {path.suffix!r} are not read. Give one of: {KNOWN}.")
    if path.suffix not in COMPRESSED and (fact := damage(path, "")):
        raise DataError(fact)
    try:
        if kind in _PARQUET:
            yield from _parquet_rows(path, columns, context)
        else:
            yield from _csv_rows(path) if kind in _CSV else _json_rows(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        remedy = "Download or write it again" if path.suffix in COMPRESSED else "Give a readable file"
        raise DataError(f"{path} cannot be read ({reason}). {remedy}.") from None


def kind_of(path: Path) -> str:
    """Tell what a file holds by its name, compression aside -> suffix, such as ".jsonl"."""
    return (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix).lower()


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed; damage shows when it is read."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow  # comes with datasets, and reads zstd without a further package

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _lines(path: Path, file: IO[Any]) -> Iterator[Any]:
    """Read line by line, bytes or text; one that is longer than any row is refused before it fills the memory."""
    number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES:
            raise DataError(
                f"{path}, line {number}: it is longer than {MOST_ROW_BYTES >> 20} MiB. Shorten it or give another file."
            )
        yield line


def _whole(path: Path, file: IO[bytes]) -> bytes:
    """Read a file to its end; a compressed one that unpacks to more than the memory may hold is refused."""
    if path.suffix not in COMPRESSED:
        return file.read()
    blocks, left = [], MOST_UNPACKED_BYTES
    while block := file.read(1 << 20):
        left -= len(block)
        if left < 0:
            unpack = f"gunzip -k {path}" if path.suffix == ".gz" else f"unzstd {path}"
            raise DataError(
                f"{path} unpacks from {path.stat().st_size} bytes to more than {MOST_UNPACKED_BYTES >> 20} MiB. If "
                f"that is right, unpack it first: {unpack}"
            )
        blocks.append(block)
    return b"".join(blocks)


def _json_rows(path: Path) -> Rows:
    """Read a JSON list or JSON Lines, told apart by the first character, whatever the suffix says."""
    with _open(path) as file:
        start = file.peek(4096)  # type: ignore[attr-defined]
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _json_list(path, _whole(path, file))
            return
        for line in _lines(path, file):
            if line.strip():
                yield _json_line(line)


def _json_list(path: Path, content: bytes) -> Rows:
    try:
        return iter(json.loads(content.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). Fix it, or write one row a line (.jsonl).") from None


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnusableRow as fault:
        return fault
    except UnicodeDecodeError as error:
        return UnusableRow(f"the line is not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError):
        return UnusableRow("the line is not valid JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; json itself silently takes the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UnusableRow(f"the line names {next(name for name in names if names.count(name) > 1)} twice")
    return found


def _csv_rows(path: Path) -> Rows:
    """Read a table with a header line; an empty cell is None.

    A quotation mark that is never closed takes further lines into its cell, up to one that no cell may hold. Its own
    line is set aside then, and the others are read again.
    """
    csv.field_size_limit(MOST_ROW_BYTES)
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _RecordLines(path, file)
        # strict: else such a cell would end with the file
        cells_of = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            lines.begin()
            try:
                cells = next(cells_of)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None or "end of data" in str(error):
                    raise DataError(
                        f"{path}, line {lines.start}: no valid CSV ({error}: is a quotation mark closed?). "
                        "Write it again."
                    ) from None
                yield UnusableRow(f"line {lines.start} is no valid CSV ({error})")
                lines.give_again()
                cells_of = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path} names a column twice ({', '.join(header)}). Rename one.")
            elif cells:
                yield _csv_row(header, cells)


class _RecordLines:
    """The lines of a table; those of the record that is being read are kept, and can be read again."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._lines = path, _lines(path, file)
        self._record: list[str] = []
        self._again: list[str] = []
        """The next one last."""
        self._num_bytes = 0
        self.start = 1
        """The line that the record begins with."""

    def begin(self) -> None:
        """Begin the next record."""
        self.start += len(self._record)
        self._record, self._num_bytes = [], 0

    def give_again(self) -> None:
        """Take back the record's lines but the first."""
        self._again += self._record[:0:-1]
        del self._record[1:]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self._record.append(line)
        self._num_bytes += len(line)
        if self._num_bytes > MOST_ROW_BYTES:
            raise DataError(
                f"{self._path}, line {self.start}: its row is longer than {MOST_ROW_BYTES >> 20} MiB (is a quotation "
                "mark closed?). Write it again."
            )
        return line


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | UnusableRow:
    if len(cells) != len(header):
        return UnusableRow(f"the row has {len(cells)} cells, the header {len(header)}")
    if any(map(_NOT_UTF8.search, cells)):
        return UnusableRow("the row is not UTF-8")
    row: dict[str, Any] = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    for name, cell in row.items():
        # Conversations are spelled as JSON; a text that merely begins with a bracket stays a text.
        if cell is not None and _MESSAGES_AS_PYTHON.match(cell):
            return UnusableRow(f"the cell {name} holds messages in Python's spelling, not in JSON's (use json.dumps)")
        if cell is not None and (name in _LISTS or MESSAGES_AS_JSON.match(cell)):
            try:
                row[name] = json.loads(cell)
            except (ValueError, RecursionError):
                if name in _LISTS:
                    return UnusableRow(f"the cell {name} is no JSON list")
    return row


def _parquet_rows(path: Path, columns: frozenset[str] | None, context: frozenset[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(path) as stream:
            content = pyarrow.BufferReader(_whole(path, stream)) if path.suffix in COMPRESSED else path
        file = pyarrow.parquet.ParquetFile(content)
        names = file.schema_arrow.names
        if columns is not None and not columns.intersection(names):
            raise DataError(f"{path} has no column prompt or messages (it has: {', '.join(names)}). Rename the column.")
        chosen = names if columns is None else [name for name in names if name in columns | context]
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=chosen):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is no readable Parquet file ({reason}). Download or write it again.") from None
