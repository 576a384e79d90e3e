"""Rollouts to judge logits, shard by shard: what a killed run has finished is not judged again.

Every shard is judged by itself, in windows of fixed size, and leaves one file in the work directory. So the scores do
not depend on how many workers there are, which of them took the shard, or how often the run was killed. A worker sees
a shard's bytes and gives back those of its file: the driver alone reads and writes.

# G = groups of a shard, K = responses per prompt
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from megatron_sppo.cluster.progress import StageProgress, progress_file
from megatron_sppo.data.blocks import GroupEncoder
from megatron_sppo.errors import DataError
from megatron_sppo.judge.protocol import Judge, JudgeIdentity, Unjudged, Verdict, judge_groups
from megatron_sppo.judge.shard_files import (
    GROUPS_PER_WINDOW,
    Row,
    ShardBlock,
    ShardFileWriter,
    ShardKey,
    ShardScores,
    is_complete,
    read_scores,
    scores_path,
)
from megatron_sppo.judge.workers import PooledJudge, Progress
from megatron_sppo.rollout.records import (
    RolloutGroup,
    RolloutManifest,
    SetAside,
    ShardEntry,
    read_manifest,
    read_rows,
    shard_bytes,
)
from megatron_sppo.storage import atomic_file, contained

logger = logging.getLogger(__name__)

_MOST_HELD_BYTES = 1 << 28
"""A larger score file waits on the disk of its worker until it is written."""


def score_rollouts(rollouts: Path, judge: PooledJudge, work_dir: Path, *, rule: str, output: Path | None = None) -> int:
    """Judge the shards that have no scores yet -> ordered pairs judged now.

    Args:
        rule: makes preferences of the logits.
        output: what comes of it: the progress is told, and the workers' logs are kept, beside it. None: `work_dir`.

    Raises:
        DataError: rollouts that cannot be read, or that the judge cannot judge. Others are the pool's.
    """
    manifest, output = read_manifest(rollouts), output or work_dir
    shards = Shards(rollouts, manifest, judge, work_dir, rule=rule)
    total, start, num_pairs = sum(entry.rows for entry in manifest.shards), time.monotonic(), 0
    done = total - sum(manifest.shards[number].rows for number in shards.unfinished())
    stage = f"judging with {judge.name}"
    with StageProgress(
        progress_file(output), stage=stage, unit="prompts", total=total, done=done, amount_unit="pairs"
    ) as progress:
        judged = judge.work_off(shards.tasks(), progress=progress, output=output)
        with contextlib.closing(judged):
            for task, shard in judged:
                shards.write(task, shard)
                num_pairs += shard.num_pairs
    seconds = time.monotonic() - start
    logger.info("%d pairs judged in %.1f s (%.1f pairs/s)", num_pairs, seconds, num_pairs / max(seconds, 1e-9))
    return num_pairs


class Shards:
    """The shards of one directory, to be judged by one judge into one work directory."""

    def __init__(
        self,
        rollouts: Path,
        manifest: RolloutManifest,
        judge: Judge | JudgeIdentity | PooledJudge,
        work_dir: Path,
        *,
        rule: str,
    ) -> None:
        self._rollouts, self._manifest, self._work_dir, self._rule = Path(rollouts), manifest, work_dir, rule
        self._judge = JudgeIdentity(name=judge.name, fingerprint=judge.fingerprint)
        sizes = [self._bytes(entry) for entry in manifest.shards]
        self.largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        """By bytes, so that what ends last is small."""

    def _bytes(self, entry: ShardEntry) -> int:
        path = contained(self._rollouts, entry.file)
        return path.stat().st_size if path.is_file() else 0  # `read_rows` says so with its remedy

    def _key(self, number: int) -> ShardKey:
        return ShardKey.of(self._manifest, number, self._judge, rule=self._rule)

    def unfinished(self) -> list[int]:
        """Choose the shards that nobody has finished, by one look at the directory -> numbers."""
        there = set(os.listdir(self._work_dir)) if self._work_dir.is_dir() else set()
        return [
            number
            for number in range(len(self._manifest.shards))
            if (path := scores_path(self._work_dir, number)).name not in there
            or not is_complete(path, self._key(number), verify=False)
        ]

    def tasks(self) -> Iterator[ShardTask]:
        """Give out what has no sound file yet, each shard looked at when its turn comes -> tasks.

        Scores without blocks, or with blocks of another preset, go along: the judge is not asked again.
        """
        for number in self.largest_first:
            key, path = self._key(number), scores_path(self._work_dir, number)
            if not is_complete(path, key, verify=True):
                yield ShardTask(index=number, rollouts=self._rollouts, key=key, stored=read_scores(path, key))

    def write(self, task: ShardTask, shard: JudgedShard) -> None:
        """Check what a worker made of a shard, and write its file."""
        path = scores_path(self._work_dir, task.index)
        assert is_complete(shard.file, task.key, verify=True), f"a worker made no scores of {task}"
        shard.file.seek(0)
        with atomic_file(path, "wb") as file:
            shutil.copyfileobj(shard.file, file)
        shard.file.close()


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to be judged. On its way to another process it takes the shard's bytes along."""

    index: int
    rollouts: Path
    key: ShardKey
    stored: ShardScores | None
    """What a killed run, or one of another preset, has left."""
    content: bytes | None = None
    """The shard's bytes; None: they are read from the disk."""

    def __str__(self) -> str:
        """Name the shard."""
        return str(self.rollouts / self.key.entry.file)

    def __getstate__(self) -> dict[str, Any]:
        """Read the shard now that it is sent: the driver holds no more than what is on its way."""
        return vars(self) | {"content": self.content or shard_bytes(self.rollouts, self.key.entry)}

    @property
    def num_prompts(self) -> int:
        """Rows of the shard."""
        return self.key.entry.rows

    def judged(self, judge: Judge, on_progress: Progress) -> JudgedShard:
        """Judge the shard and encode it -> the file of its scores.

        Raises:
            DataError: the shard is damaged, or the stored scores are those of other rows.
        """
        file = cast(IO[bytes], tempfile.SpooledTemporaryFile(_MOST_HELD_BYTES))
        with ShardFileWriter(file) as writer:
            scores = self._judge_windows(judge, writer, on_progress)
            if scores is None or (self.stored and self.stored.judge_logits.shape != scores.judge_logits.shape):
                raise DataError(
                    f"beside --output lie scores of {self} that are of other rows. Remove the hidden directory there "
                    "that ends in .scores, and run the same command again."
                )
            writer.finish(scores, self.key)
        return JudgedShard(index=self.index, file=file, num_pairs=0 if self.stored else scores.counts["pairs"])

    def _judge_windows(self, judge: Judge, writer: ShardFileWriter, on_progress: Progress) -> ShardScores | None:
        """Judge a shard, or take its stored verdicts, window by window, and encode it -> its scores.

        None where fewer verdicts are stored than there are groups.
        """
        key, stored = self.key, self.stored
        num_responses, vocab_size = key.num_responses, key.vocab_size
        encoder = GroupEncoder(num_responses=num_responses, vocab_size=vocab_size, rule=key.rule)
        before, verdicts = Counter(judge.counts), list[Verdict]()
        rows = read_rows(
            self.rollouts, key.entry, num_responses=num_responses, vocab_size=vocab_size, content=self.content
        )
        while window := list(islice(rows, GROUPS_PER_WINDOW)):
            groups = [row for row in window if isinstance(row, RolloutGroup)]
            first = len(verdicts)
            if stored is None:
                verdicts += judge_groups(judge, groups)
            else:
                verdicts += stored.verdicts(first, first + len(groups))
                if len(verdicts) < first + len(groups):
                    return None
            writer.add(_encoded(window, verdicts[first:], encoder))
            on_progress(len(window), 0 if stored else len(window) * num_responses * (num_responses - 1))
        logits = np.full((len(verdicts), num_responses, num_responses), np.nan, dtype=np.float32)
        reasons = {}
        for place, verdict in enumerate(verdicts):
            if isinstance(verdict, Unjudged):
                reasons[place] = verdict.reason
            else:
                assert verdict.shape == (num_responses, num_responses) and verdict.dtype == np.float32
                logits[place] = verdict
        counts = stored.counts if stored else judge.counts - before
        return ShardScores(judge_logits=logits, reasons=reasons, counts=counts)


@dataclass(frozen=True, kw_only=True)
class JudgedShard:
    """What came of a shard."""

    index: int
    file: IO[bytes]
    """Its score file, in the worker's process on its disk if it is large; sent, in memory."""
    num_pairs: int
    """Ordered pairs that the judge was asked about now."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the file's bytes."""
        self.file.seek(0)
        return _arrived, (self.index, self.num_pairs, self.file.read())


def _arrived(index: int, num_pairs: int, content: bytes) -> JudgedShard:
    return JudgedShard(index=index, file=io.BytesIO(content), num_pairs=num_pairs)


def _encoded(
    window: Sequence[RolloutGroup | SetAside], verdicts: Sequence[Verdict], encoder: GroupEncoder
) -> ShardBlock:
    """Encode a window's rows, each with its verdict or the reason why it is set aside -> ShardBlock."""
    rows, num_cut, of_groups = [], [], iter(verdicts)
    for row in window:
        if not isinstance(row, RolloutGroup):
            rows.append(Row(row["prompt_id"], row["reason"], is_rollout=False))
            continue
        verdict = next(of_groups)
        if isinstance(verdict, Unjudged):
            reason: str | None = verdict.reason
        else:
            responses = [response.token_ids for response in row.responses]
            reason = encoder.add(row.prompt_token_ids, responses, verdict, prompt_id=row.prompt_id, info=_texts(row))
        rows.append(Row(row.prompt_id, reason, is_rollout=True))
        if reason is None:
            num_cut.append(sum(response.finish_reason == "length" for response in row.responses))
    return ShardBlock(rows=rows, groups=encoder.take(), num_cut=np.array(num_cut, dtype=np.int64))


def _texts(group: RolloutGroup) -> dict[str, Any]:
    """What prompts.jsonl keeps of a group beside its id."""
    return {
        "messages": list(group.messages),
        "responses": [{"text": response.text, "finish_reason": response.finish_reason} for response in group.responses],
    }
