"""Proves: of a shard's file with a flipped bit nothing is taken that was not written; and what decides a file.

That a damaged one is made again is tests/unit/judge/test_shard_scores.py's.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.shard_files import DAMAGE, ShardKey, is_complete, read_blocks, read_scores, scores_path
from megatron_sppo.judge.shard_scores import score_rollouts
from megatron_sppo.judge.workers import pooled_here
from megatron_sppo.rollout.records import read_manifest
from tests.unit.judge.rollout_files import random_rollouts


@pytest.fixture
def scored(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Rollouts of two prompts, and the work directory of their scoring."""
    rollouts = random_rollouts(tmp_path / "r", num_prompts=2, num_responses=3, rows_per_shard=2)
    score_rollouts(rollouts, pooled_here(load_judge("rules:cyclic")), tmp_path / "work", rule="paper")
    logging.disable(logging.WARNING)
    yield rollouts, tmp_path / "work"
    logging.disable(logging.NOTSET)


def key(rollouts: Path, *, spec: str = "rules:cyclic", rule: str = "paper") -> ShardKey:
    return ShardKey.of(read_manifest(rollouts), 0, load_judge(spec), rule=rule)


def content(work: Path, wanted: ShardKey) -> Any:
    """All that a file says, in what can be compared; None where it has no scores."""
    scores = read_scores(scores_path(work, 0), wanted)
    if scores is None:
        return None
    blocks = [
        (
            block.rows,
            block.num_cut.tolist(),
            *(getattr(value, "tolist", lambda v=value: v)() for value in vars(block.groups).values()),
        )
        for block in read_blocks(scores_path(work, 0), wanted)
    ]
    return scores.judge_logits.tolist(), scores.reasons, scores.counts, blocks


def test_no_flipped_bit_is_taken_for_what_was_written(scored) -> None:
    rollouts, work = scored
    wanted, path = key(rollouts), scores_path(work, 0)
    written, truth = path.read_bytes(), content(work, wanted)
    assert truth is not None and truth[3]
    for position in range(0, len(written), 5):
        flipped = bytearray(written)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = content(work, wanted)
        except DAMAGE:
            found = None
        assert found in (None, truth), f"byte {position}"
        assert not is_complete(scores_path(work, 0), wanted, verify=True) or found == truth, f"byte {position}"


def test_another_judge_takes_nothing_and_another_rule_the_scores_alone(scored) -> None:
    rollouts, work = scored
    path = scores_path(work, 0)
    assert is_complete(path, key(rollouts), verify=False)
    other_rule, other_judge = key(rollouts, rule="official"), key(rollouts, spec="rules:concise")
    assert not is_complete(path, other_rule, verify=False) and read_scores(path, other_rule) is not None
    assert not is_complete(path, other_judge, verify=False) and read_scores(path, other_judge) is None


def test_the_time_of_day_is_in_no_file(scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts, work = scored
    long_ago = time.localtime(10**9)
    monkeypatch.setattr("time.localtime", lambda *_: long_ago)
    score_rollouts(rollouts, pooled_here(load_judge("rules:cyclic")), tmp_path / "again", rule="paper")
    assert scores_path(tmp_path / "again", 0).read_bytes() == scores_path(work, 0).read_bytes()
