"""Which shards are done: `request.json` beside the shards, so that the same command resumes and another is refused.

It holds the request (everything that decides the responses), what the prompts were found to be, and the entry of each
finished shard. While shards are being finished, `finished.jsonl` takes a line for each, so that entering one costs the
same however many there are; the last one, and the next opening, fold the lines into request.json. A shard is written
first and entered second, so a kill costs at most the shards at work; one whose bytes are not those entered is redone.
"""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import read_json_as, sealed, unsealed, write_json
from megatron_sppo.locks import locked
from megatron_sppo.rollout.prepared import PromptsRecord
from megatron_sppo.rollout.records import MANIFEST_NAME, Count, EngineSteps, SetAside, ShardEntry, shard_name
from megatron_sppo.storage import explain_os_error, fsync_path, refuse_foreign, remove_stale_temporaries, sha256_of_file

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
    engine_steps: EngineSteps | None = None
    """Those until this shard was answered, since the one that was answered before it; None: not counted."""


@dataclass(frozen=True, kw_only=True)
class _RequestFile:
    """What request.json holds."""

    request: dict[str, Any]
    shards: dict[int, FinishedShard]
    prompts: PromptsRecord | None = None
    """None: written by a version that did not record them."""


@dataclass(frozen=True, kw_only=True)
class EarlierJob:
    """What an output directory says of the job that it was begun by."""

    shard_size: int | None
    prompts: PromptsRecord | None


@dataclass(frozen=True, kw_only=True)
class _Line(FinishedShard):
    """What a line of finished.jsonl holds."""

    index: Count


class FinishedShards:
    """The finished shards of one output directory. Open them with `open_finished_shards`."""

    def __init__(
        self,
        directory: Path,
        request: dict[str, Any],
        prompts: PromptsRecord,
        finished: dict[int, FinishedShard],
        *,
        num_shards: int,
    ) -> None:
        self._directory, self._request, self._prompts, self._finished = directory, request, prompts, finished
        self._num_shards = num_shards
        self._lines: IO[bytes] | None = None

    def missing(self) -> list[int]:
        """List the shards that are not finished -> their numbers."""
        return [index for index in range(self._num_shards) if index not in self._finished]

    def in_order(self) -> list[FinishedShard]:
        """List the finished shards by their numbers."""
        return [shard for _, shard in sorted(self._finished.items())]

    def outcomes(self) -> dict[str, int]:
        """Sum what became of the answers of the finished shards -> counts."""
        total: Counter[str] = Counter()
        for shard in self.in_order():
            total.update(shard.outcomes)
        return dict(total)

    def engine_steps(self) -> EngineSteps | None:
        """Sum the engine's steps over the finished shards -> None where none were counted."""
        counted = [shard.engine_steps for shard in self._finished.values() if shard.engine_steps is not None]
        if not counted:
            return None
        return EngineSteps(
            total=sum(steps.total for steps in counted), under_half=sum(steps.under_half for steps in counted)
        )

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
            self._lines.write(json.dumps(sealed({"index": index, **asdict(shard)})).encode() + b"\n")
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
            with contextlib.suppress(OSError):  # of a line that could not be written `enter` has said so
                self._lines.close()
            self._lines = None

    def _fold(self) -> None:
        """Write request.json whole, and end the lines that it now holds."""
        self.close()
        shards = {str(index): asdict(shard) for index, shard in sorted(self._finished.items())}
        content = {"request": self._request, "prompts": asdict(self._prompts), "shards": shards}
        write_json(self._directory / REQUEST_NAME, content, seal=True)
        (self._directory / LINES_NAME).unlink(missing_ok=True)


def read_earlier_job(directory: Path) -> EarlierJob:
    """Read what a directory of rollouts was begun with -> EarlierJob, of Nones where there is none.

    Raises:
        DataError: its request.json is damaged.
    """
    content = _read_request_file(directory)
    size = content.request.get("shard_size") if content is not None else None
    return EarlierJob(
        shard_size=size if isinstance(size, int) and size > 0 else None,
        prompts=content.prompts if content is not None else None,
    )


@contextlib.contextmanager
def open_finished_shards(
    directory: Path, request: dict[str, Any], prompts: PromptsRecord, *, num_shards: int
) -> Iterator[FinishedShards]:
    """Open or create the output directory for one request, alone -> FinishedShards, those whose files hold.

    Lists the directory once, and reads every finished shard once, for its digest.

    Args:
        prompts: kept beside the request; two records of the same request may differ.

    Raises:
        ConfigError: the directory belongs to another request (the first differing setting is named), holds something
            else, or another process is writing to it.
        DataError: its request.json is damaged.
    """
    directory = Path(directory)
    if not (directory / REQUEST_NAME).exists():
        refuse_foreign(directory, ours=(), flag="--output")
    with locked(directory, flag="--output"):
        names = [MANIFEST_NAME, REQUEST_NAME, *(shard_name(index) for index in range(num_shards))]
        remove_stale_temporaries(*(directory / name for name in names))
        before = _read_request_file(directory)
        entered = {} if before is None else _entered(directory, before, request)
        holding = _holding(directory, entered, num_shards)
        finished = FinishedShards(directory, request, prompts, holding, num_shards=num_shards)
        if not finished.is_complete():
            (directory / MANIFEST_NAME).unlink(missing_ok=True)  # it must never name shards that are not there
        # What is complete stays as it is to the byte, without a record too: others know it by its digest.
        has_news = before is None or (before.prompts != prompts and not finished.is_complete())
        if has_news or holding != entered or (directory / LINES_NAME).exists():
            finished._fold()
        with contextlib.closing(finished):
            yield finished


def _read_request_file(directory: Path) -> _RequestFile | None:
    path = directory / REQUEST_NAME
    if not path.is_file():
        return None
    damaged = f"{path.name} is damaged. Remove {directory} and run the command again."
    return read_json_as(path, _RequestFile, remedy=damaged, str_keys=True)


def _entered(directory: Path, before: _RequestFile, request: dict[str, Any]) -> dict[int, FinishedShard]:
    """Gather the shards of request.json and of the lines beside it, if they are this request's."""
    difference = _first_difference(before.request, request)
    if difference is not None:
        raise ConfigError(
            f"{directory} holds rollouts of another request: {difference}. Use another --output, or remove it."
        )
    return {**before.shards, **_entered_by_lines(directory / LINES_NAME)}


def _entered_by_lines(path: Path) -> dict[int, FinishedShard]:
    """Read finished.jsonl -> the shards that it names. What a kill cut short is left out: that shard is redone."""
    found = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entered = msgspec.convert(unsealed(json.loads(line), place="it"), _Line)
        except (ValueError, RecursionError) as error:
            logger.warning("%s, line %d is damaged (%s): its shard will be sampled again", path, number, error)
            continue
        found[entered.index] = FinishedShard(
            entry=entered.entry, outcomes=entered.outcomes, refused=entered.refused, engine_steps=entered.engine_steps
        )
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
