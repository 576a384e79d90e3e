"""Which shards are done: `request.json` beside the shards, so that the same command resumes and another is refused.

It holds the request (everything that decides the responses) and the entry of each finished shard. A shard is written
first and entered second, so a kill costs at most the shard at work; one whose bytes are not those entered is redone.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.records import MANIFEST_NAME, ShardEntry, shard_name
from megatron_sppo.storage import (
    locked,
    read_json,
    refuse_foreign,
    remove_stale_temporaries,
    sha256_of_file,
    write_json,
)

logger = logging.getLogger(__name__)

REQUEST_NAME = "request.json"


class ShardLedger:
    """The finished shards of one output directory. Open it with `open_ledger`."""

    def __init__(
        self,
        directory: Path,
        request: dict[str, Any],
        entries: dict[int, ShardEntry],
        outcomes: dict[int, dict[str, int]],
    ) -> None:
        self._directory = directory
        self._request = request
        self._entries = entries
        self._outcomes = outcomes

    def __contains__(self, index: int) -> bool:
        """Tell whether shard `index` is finished."""
        return index in self._entries

    def entries(self) -> tuple[ShardEntry, ...]:
        """List the finished shards in order -> entries."""
        return tuple(self._entries[index] for index in sorted(self._entries))

    def outcomes(self) -> dict[str, int]:
        """Sum what became of the answers of the finished shards -> counts."""
        total: Counter[str] = Counter()
        for index in sorted(self._entries):
            total.update(self._outcomes[index])
        return dict(total)

    def enter(self, index: int, entry: ShardEntry, outcomes: Mapping[str, int]) -> None:
        """Record a shard whose file is in place, and what became of its answers."""
        self._entries[index] = entry
        self._outcomes[index] = dict(outcomes)
        self._save()

    def is_complete(self, num_shards: int) -> bool:
        """Tell whether all shards and the manifest are there."""
        return len(self._entries) == num_shards and (self._directory / MANIFEST_NAME).is_file()

    def withdraw_manifest(self) -> None:
        """Remove a manifest before its shards are redone: it must never name shards that are not there."""
        (self._directory / MANIFEST_NAME).unlink(missing_ok=True)

    def _save(self) -> None:
        shards = {str(index): asdict(entry) for index, entry in sorted(self._entries.items())}
        outcomes = {str(index): self._outcomes[index] for index in sorted(self._entries)}
        write_json(self._directory / REQUEST_NAME, {"request": self._request, "shards": shards, "outcomes": outcomes})


@contextlib.contextmanager
def open_ledger(directory: Path, request: dict[str, Any], *, num_shards: int) -> Iterator[ShardLedger]:
    """Open or create the output directory for one request, alone -> ShardLedger of the shards that hold.

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
        ledger = ShardLedger(directory, request, *_finished_shards(directory, request, num_shards))
        if not ledger.is_complete(num_shards):
            ledger.withdraw_manifest()
        ledger._save()
        yield ledger


def _finished_shards(
    directory: Path, request: dict[str, Any], num_shards: int
) -> tuple[dict[int, ShardEntry], dict[int, dict[str, int]]]:
    """Read request.json and check every shard that it names -> (entries of those that hold, their outcomes)."""
    path = directory / REQUEST_NAME
    if not path.is_file():
        return {}, {}
    value = read_json(path)
    try:
        written, shards = dict(value["request"]), dict(value["shards"])
        entered = {int(index): ShardEntry(**entry) for index, entry in shards.items()}
        outcomes = {index: dict(value.get("outcomes", {}).get(str(index), {})) for index in entered}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{path} is damaged. Remove {directory} and run the command again.") from None
    difference = _first_difference(written, request)
    if difference is not None:
        raise ConfigError(
            f"{directory} holds rollouts of another request: {difference}. Use another --output, or remove it."
        )
    finished = {}
    for index, entry in entered.items():
        file = directory / shard_name(index)
        if index < num_shards and entry.file == file.name and file.is_file() and sha256_of_file(file) == entry.sha256:
            finished[index] = entry
        else:
            logger.warning("%s is missing or damaged and will be sampled again", file)
    return finished, {index: outcomes[index] for index in finished}


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for key in sorted({*old, *new}, key=lambda key: (list(new).index(key) if key in new else len(new), key)):
        if old.get(key) != new.get(key):
            return f"{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
