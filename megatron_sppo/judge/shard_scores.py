"""Rollouts to judge logits, shard by shard: what a killed run has finished is not judged again.

Every shard is scored by itself, in windows of fixed size, and leaves one file in the work directory. So the scores do
not depend on how many ranks there are, which of them took the shard, or how often the run was killed.

# G = groups of a shard, K = responses per prompt
"""

from __future__ import annotations

import json
import logging
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_sppo.judge.protocol import Judge, Unjudged, Verdict, judge_groups
from megatron_sppo.judge.work_list import WorkList
from megatron_sppo.rollout.records import (
    RolloutGroup,
    RolloutManifest,
    ShardEntry,
    read_manifest,
    read_rows,
)
from megatron_sppo.storage import atomic_file, contained, remove_stale_temporaries

logger = logging.getLogger(__name__)

SCORES_VERSION = 4
GROUPS_PER_WINDOW = 256
"""Groups judged at once: bounds the memory, whatever the size of a shard."""
PATIENCE_SECONDS = 1800.0
"""After so long without a window or a shard from any rank, at least, the first one takes over."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """What the judge made of one shard."""

    judge_logits: np.ndarray
    """[G, K, K] float32, of the rows that could be read, in their order; NaN where the judge gave a reason instead."""
    reasons: dict[int, str]
    """Why a group was not judged, by its place among the G."""
    counts: Counter[str]
    """What the judge counted on this shard: pairs, truncations, neutralised markers, ..."""


def score_rollouts(
    rollouts: Path, judge: Judge, work_dir: Path, *, work: WorkList | None = None, patience: float = PATIENCE_SECONDS
) -> int:
    """Judge shards that have no scores yet, for as long as the work list holds any -> pairs judged here and now.

    The first rank then waits until every shard has scores. Should nothing move for `patience` seconds, it judges what
    is left itself: a rank that hangs, or whose machine is gone, costs time and nothing else.

    Args:
        work: what the ranks of this run share; None: this process is alone.

    Raises:
        DataError: rollouts that cannot be read, or that the judge cannot judge.
    """
    work, manifest = work or WorkList(), read_manifest(rollouts)
    shards = _Shards(rollouts, manifest, judge, work_dir)
    pending = shards.unfinished(range(len(manifest.shards)))
    num_responses = manifest.num_responses
    rows = sum(manifest.shards[number].rows for number in pending)
    total = work.num_pairs + rows * num_responses * (num_responses - 1)
    start, num_pairs = time.monotonic(), 0
    last_report, slowest = start, 0.0
    # One bar for all ranks, on the first; quiet where stderr is no terminal.
    disabled = True if work.rank else None
    with tqdm(total=total, desc=f"judging with {judge.name}", unit="pair", disable=disabled) as bar:

        def report(num_judged: int) -> None:
            nonlocal last_report, slowest
            now = time.monotonic()
            last_report, slowest = now, max(slowest, now - last_report)
            work.report(num_judged)
            if not bar.disable:
                bar.update(work.num_pairs - bar.n)

        while (number := work.take(shards.largest_first)) is not None:
            num_pairs += shards.judge(number, report)
        if work.rank == 0:
            # On a slow machine a window may take hours: others are given a multiple of what this rank's took.
            num_pairs += _outlast(shards, pending, work, report, max(patience, 4 * slowest))
    seconds = time.monotonic() - start
    logger.info("%d pairs judged in %.1f s (%.1f pairs/s)", num_pairs, seconds, num_pairs / max(seconds, 1e-9))
    return num_pairs


class _Shards:
    """The shards of one directory, to be judged by one judge into one work directory."""

    def __init__(self, rollouts: Path, manifest: RolloutManifest, judge: Judge, work_dir: Path) -> None:
        self._rollouts, self._manifest, self._judge, self._work_dir = Path(rollouts), manifest, judge, work_dir
        sizes = [self._bytes(entry) for entry in manifest.shards]
        self.largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        """By bytes, so that what ends last is small."""

    def _bytes(self, entry: ShardEntry) -> int:
        path = contained(self._rollouts, entry.file)
        return path.stat().st_size if path.is_file() else 0  # `read_rows` says so with its remedy

    def unfinished(self, numbers: Iterable[int]) -> list[int]:
        """Choose the shards without scores -> their numbers."""
        return [
            number
            for number in numbers
            if read_scores(self._work_dir, number, self._manifest.shards[number], self._judge) is None
        ]

    def judge(self, number: int, report: Callable[[int], None]) -> int:
        """Judge one shard and write its scores, unless it has some -> ordered pairs judged."""
        if not self.unfinished([number]):
            return 0
        entry = self._manifest.shards[number]
        scores = _score_shard(self._rollouts, entry, self._manifest, self._judge, report)
        _write_scores(self._work_dir, number, entry, self._judge, scores)
        return scores.counts["pairs"]


def _outlast(
    shards: _Shards, pending: list[int], work: WorkList, report: Callable[[int], None], patience: float
) -> int:
    """Wait until all shards have scores, and judge those that nobody moves on -> ordered pairs judged here."""
    last, deadline = None, 0.0
    while pending := shards.unfinished(pending):
        report(0)
        state = (len(pending), work.num_pairs)
        if state != last:
            last, deadline = state, time.monotonic() + patience
        elif time.monotonic() > deadline:
            logger.warning("%d shards of other ranks have not moved for %.0f s: judged here.", len(pending), patience)
            return sum(shards.judge(number, report) for number in pending)
        time.sleep(_POLL_SECONDS)
    return 0


def scores_path(work_dir: Path, number: int) -> Path:
    """Name the score file of shard `number` -> Path."""
    return Path(work_dir, f"scores-{number:05d}.npz")


def read_scores(work_dir: Path, number: int, entry: ShardEntry, judge: Judge) -> ShardScores | None:
    """Read a shard's scores -> None where there are none of this shard by this judge, or they are damaged."""
    path = scores_path(work_dir, number)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            if json.loads(str(content["key"])) != _key(entry, judge):
                return None
            return ShardScores(
                judge_logits=content["judge_logits"],
                reasons={int(place): reason for place, reason in json.loads(str(content["reasons"])).items()},
                counts=Counter(json.loads(str(content["counts"]))),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s): its shard is judged again.", path, error)
        return None


def _write_scores(work_dir: Path, number: int, entry: ShardEntry, judge: Judge, scores: ShardScores) -> None:
    path = scores_path(work_dir, number)
    remove_stale_temporaries(path)
    with atomic_file(path, "wb") as file:
        np.savez(
            file,
            judge_logits=scores.judge_logits,
            reasons=json.dumps(scores.reasons),
            key=json.dumps(_key(entry, judge)),
            counts=json.dumps(dict(scores.counts)),
        )


def _key(entry: ShardEntry, judge: Judge) -> list[object]:
    return [SCORES_VERSION, GROUPS_PER_WINDOW, entry.sha256, entry.rows, judge.name, judge.fingerprint]


def _score_shard(
    rollouts: Path, entry: ShardEntry, manifest: RolloutManifest, judge: Judge, report: Callable[[int], None]
) -> ShardScores:
    num_responses = manifest.num_responses
    before = Counter(judge.counts)
    verdicts: list[Verdict] = []
    rows = read_rows(rollouts, entry, num_responses=num_responses, vocab_size=manifest.vocab_size)
    while window := list(islice(rows, GROUPS_PER_WINDOW)):
        verdicts += judge_groups(judge, [row for row in window if isinstance(row, RolloutGroup)])
        report(len(window) * num_responses * (num_responses - 1))
    logits = np.full((len(verdicts), num_responses, num_responses), np.nan, dtype=np.float32)
    reasons = {}
    for place, verdict in enumerate(verdicts):
        if isinstance(verdict, Unjudged):
            reasons[place] = verdict.reason
        else:
            assert verdict.shape == (num_responses, num_responses) and verdict.dtype == np.float32
            logits[place] = verdict
    return ShardScores(judge_logits=logits, reasons=reasons, counts=judge.counts - before)
