"""Rollouts to judge logits, shard by shard: what a killed run has finished is not judged again.

Every shard is scored by itself, in windows of fixed size, and leaves one file in the work directory. So the scores do
not depend on how many ranks there are, which of them took the shard, or how often the run was killed.

# G = groups of a shard, K = responses per prompt
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_sppo.data.blocks import GroupEncoder
from megatron_sppo.errors import DataError
from megatron_sppo.judge.protocol import Judge, Unjudged, Verdict, judge_groups
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
from megatron_sppo.judge.work_list import WorkList
from megatron_sppo.rollout.records import RolloutGroup, RolloutManifest, SetAside, ShardEntry, read_manifest, read_rows
from megatron_sppo.storage import atomic_file, contained

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1800.0
"""After so long without a window or a shard from any rank, at least, the first one takes over."""
_POLL_SECONDS = 0.2


def score_rollouts(
    rollouts: Path,
    judge: Judge,
    work_dir: Path,
    *,
    rule: str,
    work: WorkList | None = None,
    patience: float = PATIENCE_SECONDS,
) -> int:
    """Judge shards that have no scores yet, for as long as the work list holds any -> pairs judged here and now.

    The first rank then waits until every shard has scores. Should nothing move for `patience` seconds, it judges what
    is left itself: a rank that hangs, or whose machine is gone, costs time and nothing else.

    Args:
        rule: makes preferences of the logits.
        work: what the ranks of this run share; None: this process is alone.

    Raises:
        DataError: rollouts that cannot be read, or that the judge cannot judge.
    """
    work, manifest = work or WorkList(), read_manifest(rollouts)
    shards = _Shards(rollouts, manifest, judge, work_dir, rule=rule)
    num_responses = manifest.num_responses
    # One look for all ranks, by the first: the others find out about a shard when they take it.
    rows = sum(manifest.shards[number].rows for number in shards.unfinished()) if work.rank == 0 else 0
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
            work.finish()
        if work.rank == 0:
            # On a slow machine a window may take hours: others are given a multiple of what this rank's took.
            num_pairs += _outlast(shards, work, report, max(patience, 4 * slowest))
    seconds = time.monotonic() - start
    logger.info("%d pairs judged in %.1f s (%.1f pairs/s)", num_pairs, seconds, num_pairs / max(seconds, 1e-9))
    return num_pairs


class _Shards:
    """The shards of one directory, to be judged by one judge into one work directory."""

    def __init__(self, rollouts: Path, manifest: RolloutManifest, judge: Judge, work_dir: Path, *, rule: str) -> None:
        self._rollouts, self._manifest, self._judge, self._work_dir = Path(rollouts), manifest, judge, work_dir
        self._rule = rule
        sizes = [self._bytes(entry) for entry in manifest.shards]
        self.largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        """By bytes, so that what ends last is small."""

    def _bytes(self, entry: ShardEntry) -> int:
        path = contained(self._rollouts, entry.file)
        return path.stat().st_size if path.is_file() else 0  # `read_rows` says so with its remedy

    def _key(self, number: int) -> ShardKey:
        entry = self._manifest.shards[number]
        return ShardKey(entry=entry, judge=self._judge, manifest=self._manifest, rule=self._rule)

    def unfinished(self) -> list[int]:
        """Choose the shards that nobody has finished, by one look at the directory -> numbers."""
        there = set(os.listdir(self._work_dir)) if self._work_dir.is_dir() else set()
        return [
            number
            for number in range(len(self._manifest.shards))
            if scores_path(self._work_dir, number).name not in there
            or not is_complete(self._work_dir, number, self._key(number), verify=False)
        ]

    def judge(self, number: int, report: Callable[[int], None]) -> int:
        """Judge one shard and write its file, unless there is a sound one -> ordered pairs judged.

        Who takes a shard reads what a killed run has left of it, and nobody else. Scores without blocks, or with blocks
        of another preset, are kept: the judge is not asked again.
        """
        key, path = self._key(number), scores_path(self._work_dir, number)
        if is_complete(self._work_dir, number, key, verify=True):
            return 0
        stored = read_scores(self._work_dir, number, key)
        with atomic_file(path, "wb") as file, ShardFileWriter(file) as writer:
            scores = self._judge_shard(key, stored, writer, report)
            if scores is None or (stored and stored.judge_logits.shape != scores.judge_logits.shape):
                raise DataError(f"{path} holds the scores of other rows. Remove it, and run the same command again.")
            writer.finish(scores, key)
        return 0 if stored else scores.counts["pairs"]

    def _judge_shard(
        self, key: ShardKey, stored: ShardScores | None, writer: ShardFileWriter, report: Callable[[int], None]
    ) -> ShardScores | None:
        """Judge a shard, or take its stored verdicts, window by window, and encode it -> its scores.

        None where fewer verdicts are stored than there are groups.
        """
        num_responses, vocab_size = self._manifest.num_responses, self._manifest.vocab_size
        encoder = GroupEncoder(num_responses=num_responses, vocab_size=vocab_size, rule=self._rule)
        before, verdicts = Counter(self._judge.counts), list[Verdict]()
        rows = read_rows(self._rollouts, key.entry, num_responses=num_responses, vocab_size=vocab_size)
        while window := list(islice(rows, GROUPS_PER_WINDOW)):
            groups = [row for row in window if isinstance(row, RolloutGroup)]
            first = len(verdicts)
            if stored is None:
                verdicts += judge_groups(self._judge, groups)
            else:
                verdicts += stored.verdicts(first, first + len(groups))
                if len(verdicts) < first + len(groups):
                    return None
            writer.add(_encoded(window, verdicts[first:], encoder))
            report(len(window) * num_responses * (num_responses - 1))
        logits = np.full((len(verdicts), num_responses, num_responses), np.nan, dtype=np.float32)
        reasons = {}
        for place, verdict in enumerate(verdicts):
            if isinstance(verdict, Unjudged):
                reasons[place] = verdict.reason
            else:
                assert verdict.shape == (num_responses, num_responses) and verdict.dtype == np.float32
                logits[place] = verdict
        counts = stored.counts if stored else self._judge.counts - before
        return ShardScores(judge_logits=logits, reasons=reasons, counts=counts)


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


def _outlast(shards: _Shards, work: WorkList, report: Callable[[int], None], patience: float) -> int:
    """Wait until all shards are finished, and judge those that nobody moves on -> ordered pairs judged here."""
    last, deadline = None, 0.0
    while work.num_finished < len(shards.largest_first):
        report(0)
        state = (work.num_finished, work.num_pairs)
        if state != last:
            last, deadline = state, time.monotonic() + patience
        elif time.monotonic() > deadline:
            left = shards.unfinished()
            logger.warning("%d shards of other ranks have not moved for %.0f s: judged here.", len(left), patience)
            return sum(shards.judge(number, report) for number in left)
        time.sleep(_POLL_SECONDS)
    return 0
