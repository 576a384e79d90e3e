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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_sppo.judge.intake import Row, read_rows
from megatron_sppo.judge.protocol import Judge
from megatron_sppo.rollout.records import RolloutGroup, RolloutManifest, ShardEntry, read_manifest
from megatron_sppo.storage import atomic_file, remove_stale_temporaries

logger = logging.getLogger(__name__)

SCORES_VERSION = 1
GROUPS_PER_WINDOW = 64
"""Groups judged at once: bounds the memory, whatever the size of a shard."""


@dataclass(frozen=True, kw_only=True)
class ShardScores:
    """What the judge made of one shard."""

    judge_logits: np.ndarray
    """[G, K, K] float32, of the rows that could be judged, in their order."""
    counts: Counter[str]
    """What the judge counted on this shard: pairs, truncations, neutralised markers, ..."""


def score_rollouts(rollouts: Path, judge: Judge, work_dir: Path, *, rank: int = 0, world_size: int = 1) -> int:
    """Score the shards rank, rank + world_size, ... that have no scores yet -> number of ordered pairs judged now.

    Raises:
        DataError: rollouts that cannot be read, or that the judge cannot judge.
    """
    manifest = read_manifest(rollouts)
    missing = [
        (number, entry)
        for number, entry in list(enumerate(manifest.shards))[rank::world_size]
        if read_scores(work_dir, number, entry, judge) is None
    ]
    num_pairs, start = 0, time.monotonic()
    # On rank 0 alone, and quiet where stderr is no terminal.
    hidden = True if rank else None
    num_responses = manifest.sampling["num_responses"]
    total = sum(entry.rows for _, entry in missing) * num_responses * (num_responses - 1)
    with tqdm(total=total, desc=f"judging with {judge.name}", unit="pair", disable=hidden) as bar:
        for number, entry in missing:
            scores = _score_shard(rollouts, entry, manifest, judge, bar)
            _write_scores(work_dir, number, entry, judge, scores)
            num_pairs += scores.counts["pairs"]
    seconds = time.monotonic() - start
    logger.info(
        "%d of %d shards judged now: %d pairs in %.1f s (%.1f pairs/s)",
        len(missing), len(manifest.shards), num_pairs, seconds, num_pairs / max(seconds, 1e-9),
    )  # fmt: skip
    return num_pairs


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
            return ShardScores(judge_logits=content["judge_logits"], counts=Counter(json.loads(str(content["counts"]))))
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
            key=json.dumps(_key(entry, judge)),
            counts=json.dumps(dict(scores.counts)),
        )


def _key(entry: ShardEntry, judge: Judge) -> list[object]:
    return [SCORES_VERSION, GROUPS_PER_WINDOW, entry.sha256, entry.rows, judge.name, judge.fingerprint]


def _score_shard(rollouts: Path, entry: ShardEntry, manifest: RolloutManifest, judge: Judge, bar: tqdm) -> ShardScores:
    num_responses = manifest.sampling["num_responses"]
    before = Counter(judge.counts)
    matrices: list[np.ndarray] = []
    rows = read_rows(rollouts, entry, num_responses=num_responses, vocab_size=manifest.vocab_size)
    for window in _windows(rows):
        groups = [row.group for row in window if row.group is not None]
        matrices += _judge_window(judge, groups, num_responses)
        bar.update(len(window) * num_responses * (num_responses - 1))
    shape = (len(matrices), num_responses, num_responses)
    logits = np.stack(matrices) if matrices else np.zeros(shape, dtype=np.float32)
    return ShardScores(judge_logits=logits, counts=judge.counts - before)


def _windows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while window := list(islice(rows, GROUPS_PER_WINDOW)):
        yield window


def _judge_window(judge: Judge, groups: Sequence[RolloutGroup], num_responses: int) -> list[np.ndarray]:
    matrices = judge.judge_logits(groups) if groups else []
    assert len(matrices) == len(groups), f"{judge.name} answered {len(matrices)} of {len(groups)} groups"
    for matrix in matrices:
        assert matrix.shape == (num_responses, num_responses) and matrix.dtype == np.float32
    return matrices
