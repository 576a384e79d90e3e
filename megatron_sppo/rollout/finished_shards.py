"""Which shards are done: `request.json` beside the shards, so that the same command resumes and another is refused.

It holds the request (everything that decides the responses) and the entry of each finished shard. A shard is written
first and entered second, so a kill costs at most the shard at work; one whose bytes are not those entered is redone.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.records import MANIFEST_NAME, Count, SetAside, ShardEntry, shard_name
from megatron_sppo.storage import (
    locked,
    read_json_as,
    refuse_foreign,
    remove_stale_temporaries,
    sha256_of_file,
    write_json,
)

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"


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


class FinishedShards:
    """The finished shards of one output directory. Open them with `open_finished_shards`."""

    def __init__(self, directory: Path, request: dict[str, Any], finished: dict[int, FinishedShard]) -> None:
        self._directory, self._request, self._finished = directory, request, finished

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
        """Record a shard whose file is in place."""
        self._finished[index] = shard
        self._save()

    def is_complete(self, num_shards: int) -> bool:
        """Tell whether all shards and the manifest are there."""
        return len(self._finished) == num_shards and (self._directory / MANIFEST_NAME).is_file()

    def _save(self) -> None:
        shards = {str(index): asdict(shard) for index, shard in sorted(self._finished.items())}
        write_json(self._directory / REQUEST_NAME, {"request": self._request, "shards": shards})


@contextlib.contextmanager
def open_finished_shards(directory: Path, request: dict[str, Any], *, num_shards: int) -> Iterator[FinishedShards]:
    """Open or create the output directory for one request, alone -> FinishedShards, those whose files hold.

    Raises:
        ConfigError: the directory belongs to another request (the first differing setting is named), holds something
            else, or another process is writing to it.
        DataError: its request.json is damaged.
    """
    directory = Path(directory)
    refuse_foreign(directory, ours=(REQUEST_NAME,), flag="--output")
    with locked(directory, flag="--output"):
        names = [MANIFEST_NAME, REQUEST_NAME, *(shard_name(index) for index in range(num_shards))]
        for name in names:
            remove_stale_temporaries(directory / name)
        finished = FinishedShards(directory, request, _finished_shards(directory, request, num_shards))
        if not finished.is_complete(num_shards):
            (directory / MANIFEST_NAME).unlink(missing_ok=True)  # it must never name shards that are not there
        finished._save()
        yield finished


def _finished_shards(directory: Path, request: dict[str, Any], num_shards: int) -> dict[int, FinishedShard]:
    """Read request.json and check every shard that it names -> those that hold."""
    path = directory / REQUEST_NAME
    if not path.is_file():
        return {}
    damaged = f"{path.name} is damaged. Remove {directory} and run the command again."
    content = read_json_as(path, _RequestFile, remedy=damaged, str_keys=True)
    difference = _first_difference(content.request, request)
    if difference is not None:
        raise ConfigError(
            f"{directory} holds rollouts of another request: {difference}. Use another --output, or remove it."
        )
    finished = {}
    for index, shard in content.shards.items():
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
