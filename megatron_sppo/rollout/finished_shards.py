"""Which shards are done: `request.json` beside the shards, so that the same command resumes and another is refused.

It holds the request (everything that decides the responses) and the entry of each finished shard. While shards are
being finished, `finished.jsonl` takes a line for each, so that entering one costs the same however many there are; the
last one, and the next opening, fold the lines into request.json. A shard is written first and entered second, so a kill
costs at most the shards at work; one whose bytes are not those entered is redone.
"""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.records import MANIFEST_NAME, Count, SetAside, ShardEntry, shard_name
from megatron_sppo.storage import (
    explain_os_error,
    fsync_path,
    locked,
    read_json_as,
    refuse_foreign,
    remove_stale_temporaries,
    sha256_of_file,
    write_json,
)

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"
LINES_NAME = "finished.jsonl"


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """One shard that is in place, and what became of its prompts."""

    entry: ShardEntry
    outcomes: dict[str, Count]
    """`outcomes.count_outcomes` of its answers."""
    refused: tuple[SetAside, ...] = ()
    """Prompts that no answer could be had to."""


@dataclass(frozen=True, kw_only=True)
class _RequestFile:
    """What request.json holds."""

    request: dict[str, Any]
    shards: dict[int, FinishedShard]


@dataclass(frozen=True, kw_only=True)
class _Line(FinishedShard):
    """What a line of finished.jsonl holds."""

    index: Count


class FinishedShards:
    """The finished shards of one output directory. Open them with `open_finished_shards`."""

    def __init__(
        self, directory: Path, request: dict[str, Any], finished: dict[int, FinishedShard], *, num_shards: int
    ) -> None:
        self._directory, self._request, self._finished = directory, request, finished
        self._num_shards = num_shards
        self._lines: IO[bytes] | None = None

    def __contains__(self, index: int) -> bool:
        """Tell whether shard `index` is finished."""
        return index in self._finished

    def in_order(self) -> list[FinishedShard]:
        """List the finished shards by their numbers."""
        return [shard for _, shard in sorted(self._finished.items())]

    def outcomes(self) -> dict[str, int]:
        """Sum what became of the answers of the finished shards -> counts."""
        total: Counter[str] = Counter()
        for shard in self.in_order():
            total.update(shard.outcomes)
        return dict(total)

    def enter(self, index: int, shard: FinishedShard) -> None:
        """Record a shard whose file is in place: by a line, and with the last shard by request.json."""
        self._finished[index] = shard
        if len(self._finished) == self._num_shards:
            self._fold()
            return
        path = self._directory / LINES_NAME
        try:
            if self._lines is None:
                self._lines = open(path, "ab")
                fsync_path(self._directory)
            self._lines.write(msgspec.json.encode({"index": index, **asdict(shard)}) + b"\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            explain_os_error(error, path)
            raise

    def is_complete(self) -> bool:
        """Tell whether all shards and the manifest are there."""
        return len(self._finished) == self._num_shards and (self._directory / MANIFEST_NAME).is_file()

    def close(self) -> None:
        """Close the lines; they stay where shards are missing."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _fold(self) -> None:
        """Write request.json whole, and end the lines that it now holds."""
        self.close()
        shards = {str(index): asdict(shard) for index, shard in sorted(self._finished.items())}
        write_json(self._directory / REQUEST_NAME, {"request": self._request, "shards": shards})
        (self._directory / LINES_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def open_finished_shards(directory: Path, request: dict[str, Any], *, num_shards: int) -> Iterator[FinishedShards]:
    """Open or create the output directory for one request, alone -> FinishedShards, those whose files hold.

    Lists the directory once, and reads every finished shard once, for its digest.

    Raises:
        ConfigError: the directory belongs to another request (the first differing setting is named), holds something
            else, or another process is writing to it.
        DataError: its request.json is damaged.
    """
    directory = Path(directory)
    refuse_foreign(directory, ours=(REQUEST_NAME,), flag="--output")
    with locked(directory, flag="--output"):
        names = [MANIFEST_NAME, REQUEST_NAME, *(shard_name(index) for index in range(num_shards))]
        remove_stale_temporaries(*(directory / name for name in names))
        entered = _entered(directory, request)
        holding = _holding(directory, entered or {}, num_shards)
        finished = FinishedShards(directory, request, holding, num_shards=num_shards)
        if not finished.is_complete():
            (directory / MANIFEST_NAME).unlink(missing_ok=True)  # it must never name shards that are not there
        if holding != entered or (directory / LINES_NAME).exists():
            finished._fold()
        with contextlib.closing(finished):
            yield finished


def _entered(directory: Path, request: dict[str, Any]) -> dict[int, FinishedShard] | None:
    """Read request.json and the lines beside it -> the shards that they name; None where there is no request.json."""
    path = directory / REQUEST_NAME
    if not path.is_file():
        return None
    damaged = f"{path.name} is damaged. Remove {directory} and run the command again."
    content = read_json_as(path, _RequestFile, remedy=damaged, str_keys=True)
    difference = _first_difference(content.request, request)
    if difference is not None:
        raise ConfigError(
            f"{directory} holds rollouts of another request: {difference}. Use another --output, or remove it."
        )
    return {**content.shards, **_entered_by_lines(directory / LINES_NAME)}


def _entered_by_lines(path: Path) -> dict[int, FinishedShard]:
    """Read finished.jsonl -> the shards that it names. What a kill cut short is left out: that shard is redone."""
    found = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entered = msgspec.json.decode(line, type=_Line)
        except ValueError as error:
            logger.warning("%s, line %d is damaged (%s): its shard will be sampled again", path, number, error)
            continue
        found[entered.index] = FinishedShard(entry=entered.entry, outcomes=entered.outcomes, refused=entered.refused)
    return found


def _holding(directory: Path, entered: dict[int, FinishedShard], num_shards: int) -> dict[int, FinishedShard]:
    """Read every shard that was entered -> those whose bytes are still what was entered."""
    finished = {}
    for index, shard in entered.items():
        file, entry = directory / shard_name(index), shard.entry
        if index < num_shards and entry.file == file.name and file.is_file() and sha256_of_file(file) == entry.sha256:
            finished[index] = shard
        else:
            logger.warning("%s is missing or damaged and will be sampled again", file)
    return finished


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for key in sorted({*old, *new}, key=lambda key: (list(new).index(key) if key in new else len(new), key)):
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
