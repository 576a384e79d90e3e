"""What a judged shard leaves in the work directory: `scores-00000.npz`, there as a whole or not at all.

It holds the judge's logits, and the shard's groups in blocks, encoded as the dataset will hold them: who writes the
dataset joins them. The logits alone, as an older version wrote them, are enough not to ask the judge again.
Every member of the archive has a checksum.

# G = groups of a shard or a block, K = responses per prompt
"""

from __future__ import annotations

import json
import logging
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megatron_sppo.data.blocks import GroupBlock
from megatron_sppo.judge.protocol import JudgeIdentity, Unjudged, Verdict
from megatron_sppo.rollout.records import RolloutManifest, ShardEntry
from megatron_sppo.storage import packed_member

logger = logging.getLogger(__name__)

SCORES_VERSION = 4
BLOCKS_VERSION = 1
GROUPS_PER_WINDOW = 256
"""Groups judged at once, and those of a block: bounds the memory, whatever the size of a shard."""
DAMAGE = (
    *(ValueError, LookupError, EOFError, TypeError, RuntimeError, OverflowError, OSError),
    *(zipfile.BadZipFile, zlib.error, struct.error, MemoryError),
)
"""What reading a damaged file raises."""
_BLOCKS_NAME = "blocks.json"


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """What the judge made of one shard."""

    judge_logits: np.ndarray
    """[G, K, K] float32, of the rows that could be read, in their order; NaN where the judge gave a reason instead."""
    reasons: dict[int, str]
    """Why a group was not judged, by its place among the G."""
    counts: Counter[str]
    """What the judge counted on this shard: pairs, truncations, neutralised markers, ..."""

    def verdicts(self, start: int, stop: int) -> list[Verdict]:
        """Give the verdicts of groups start .. stop - 1 again, as the judge gave them; fewer where it has no more."""
        return [
            Unjudged(reason=self.reasons[place]) if place in self.reasons else self.judge_logits[place]
            for place in range(start, min(stop, len(self.judge_logits)))
        ]


class Row(NamedTuple):
    """One line of a shard."""

    prompt_id: str
    reason: str | None
    """Why it is set aside; None: it is one of the block's groups."""
    is_rollout: bool
    """Whether it could be read as one."""


@dataclass(frozen=True, kw_only=True)
class ShardBlock:
    """Consecutive lines of a shard, judged and encoded."""

    rows: Sequence[Row]
    groups: GroupBlock
    """The rows without a reason, in their order."""
    num_cut: np.ndarray
    """[G] int64, answers of each group that were cut in sampling."""


@dataclass(frozen=True, kw_only=True)
class ShardKey:
    """What decides the content of a shard's file: another one's is not taken."""

    entry: ShardEntry
    judge: JudgeIdentity
    num_responses: int
    vocab_size: int | None
    rule: str

    @classmethod
    def of(cls, manifest: RolloutManifest, number: int, judge: JudgeIdentity, *, rule: str) -> ShardKey:
        """Make the key of shard `number`."""
        return cls(
            entry=manifest.shards[number],
            judge=judge,
            num_responses=manifest.num_responses,
            vocab_size=manifest.vocab_size,
            rule=rule,
        )

    @property
    def of_scores(self) -> list[object]:
        """What decides the logits."""
        entry, judge = self.entry, self.judge
        return [SCORES_VERSION, GROUPS_PER_WINDOW, entry.sha256, entry.rows, judge.name, judge.fingerprint]

    @property
    def of_blocks(self) -> list[object]:
        """What decides the blocks, beside the logits."""
        return [BLOCKS_VERSION, self.rule, self.num_responses, self.vocab_size]


def scores_path(work_dir: Path, number: int) -> Path:
    """Name the file of shard `number` -> Path."""
    return Path(work_dir, f"scores-{number:05d}.npz")


class ShardFileWriter:
    """Write a shard's file: blocks as they come, and the scores at the end; use as a context manager."""

    def __init__(self, file: IO[bytes]) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._num_blocks = 0

    def __enter__(self) -> ShardFileWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def add(self, block: ShardBlock) -> None:
        """Append a block."""
        arrays = {name: getattr(block.groups, name) for name in _ARRAYS} | {"num_cut": block.num_cut}
        parts = [np.ascontiguousarray(values).tobytes() for values in arrays.values()]
        head = {
            "rows": block.rows,
            "arrays": {name: [values.dtype.str, values.shape] for name, values in arrays.items()},
        }
        first = json.dumps(head).encode() + b"\n"
        self._write(_block_name(self._num_blocks), b"".join([first, *parts, block.groups.lines]))
        self._num_blocks += 1

    def finish(self, scores: ShardScores, key: ShardKey) -> None:
        """Append the scores, and what all of it was made from."""
        self._write(_BLOCKS_NAME, json.dumps({"key": key.of_blocks, "num_blocks": self._num_blocks}).encode())
        texts = {
            "reasons": json.dumps(scores.reasons),
            "key": json.dumps(key.of_scores),
            "counts": json.dumps(dict(scores.counts)),
        }
        # As numpy.savez has them.
        for name, value in {"judge_logits": scores.judge_logits, **texts}.items():
            with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)  # type: ignore[no-untyped-call]

    def _write(self, name: str, content: bytes) -> None:
        """Append a member, without the time of day that a bare name would get: the same scores are the same bytes."""
        self._archive.writestr(zipfile.ZipInfo(name), content)


def read_scores(file: Path | IO[bytes], key: ShardKey) -> ShardScores | None:
    """Read a shard's scores -> None where there are none of this shard by this judge, or they are damaged."""
    if isinstance(file, Path) and not file.is_file():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_packed(archive)
        if not isinstance(file, Path):
            file.seek(0)
        with np.load(file, allow_pickle=False) as content:
            if json.loads(str(content["key"])) != key.of_scores:
                return None
            return ShardScores(
                judge_logits=content["judge_logits"],
                reasons={int(place): reason for place, reason in json.loads(str(content["reasons"])).items()},
                counts=Counter(json.loads(str(content["counts"]))),
            )
    except DAMAGE as error:
        logger.warning("%s is damaged (%s): its shard is judged again.", file, error)
        return None


def is_complete(file: Path | IO[bytes], key: ShardKey, *, verify: bool) -> bool:
    """Look whether a shard's file is there, with scores and blocks under this key.

    Args:
        verify: read all of it, so that damage is found too.
    """
    if isinstance(file, Path) and not file.is_file():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            if _num_blocks(archive, key) is None:
                return False
        # Not `testzip`: what counts is that it can be read as the merge reads it.
        return not verify or (read_scores(file, key) is not None and all(read_blocks(file, key)))
    except DAMAGE:
        return False


def read_blocks(file: Path | IO[bytes], key: ShardKey) -> Iterator[ShardBlock]:
    """Read a complete shard's blocks, each checked before it is yielded -> blocks, one in memory.

    Raises:
        one of `DAMAGE`: the file is not what was written.
    """
    with zipfile.ZipFile(file) as archive:
        num_blocks = _num_blocks(archive, key)
        if num_blocks is None:
            raise KeyError("it has no blocks")
        for place in range(num_blocks):
            yield _block(archive.read(_block_name(place)))


_ARRAYS = ("tokens", "lengths", "win_rates", "preferences", "judge_logits", "line_bytes")


def _block(content: bytes) -> ShardBlock:
    end = content.index(b"\n") + 1
    head = json.loads(content[:end])
    arrays: dict[str, Any] = {}
    for name, (kind, shape) in head["arrays"].items():
        arrays[name] = np.frombuffer(content, kind, int(np.prod(shape)), end).reshape(shape)
        end += arrays[name].nbytes
    num_cut = arrays.pop("num_cut")
    return ShardBlock(
        rows=[Row(*row) for row in head["rows"]],
        groups=GroupBlock(**arrays, lines=content[end:]),
        num_cut=num_cut,
    )


def _block_name(place: int) -> str:
    return f"block-{place:05d}"


def _refuse_packed(archive: zipfile.ZipFile) -> None:
    """Refuse compressed members, which none is written as: a small file could fill the memory."""
    if (packed := packed_member(archive)) is not None:
        raise zipfile.BadZipFile(f"{packed} is compressed")


def _num_blocks(archive: zipfile.ZipFile, key: ShardKey) -> int | None:
    """Count a file's blocks -> None where it has none of this key."""
    _refuse_packed(archive)
    names = archive.namelist()
    if _BLOCKS_NAME not in names:
        return None
    with archive.open("key.npy") as member:
        text = str(np.lib.format.read_array(member, allow_pickle=False))  # type: ignore[no-untyped-call]
        if json.loads(text) != key.of_scores:
            return None
    blocks = json.loads(archive.read(_BLOCKS_NAME))
    return int(blocks["num_blocks"]) if blocks["key"] == key.of_blocks else None
