"""Proves: groups come back from the disk as they were written, whatever their bytes, and faults are found at the start.

How much memory they take is not measured: their texts are in no attribute.
"""

import random
from pathlib import Path

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.rollout.records import Response, RolloutGroup
from tests.unit.judge.groups import group_of, random_group
from tests.unit.judge.rollout_files import write_rollouts

TEXTS = ("plain", "\u00e9\u00df\U0001f600 \u2028 wide", 'quotes " \\ and\nlines\r\n')


def group(number: int) -> RolloutGroup:
    answers = tuple(
        Response(text=text, token_ids=tuple(range(3, 4 + number + k)), finish_reason="length" if k else "stop", seed=k)
        for k, text in enumerate(TEXTS)
    )
    return RolloutGroup(
        prompt_id=f"id-{number}",
        messages=({"role": "user", "content": TEXTS[number % 3]},),
        prompt_token_ids=(1, 2),
        responses=answers,
        prompt_text=None,
    )


def test_groups_are_read_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    groups = [group(number) for number in range(7)]
    stored = StoredGroups(write_rollouts(tmp_path / "r", groups, rows_per_shard=3))
    assert list(stored) == [f"id-{number}" for number in range(7)] and len(stored) == 7
    for one in random.Random(1).sample(groups, 7):
        assert stored[one.prompt_id] == one
    assert "id-6" in stored and "id-7" not in stored


def test_lengths_and_cuts_are_counted_on_the_way(tmp_path: Path) -> None:
    """Answer k of group n has n + k + 1 tokens; groups 0 and 1: 1 2 3 2 3 4, mean 15 / 6; two of three are cut."""
    stored = StoredGroups(write_rollouts(tmp_path / "r", [group(0), group(1)], rows_per_shard=1))
    assert stored.mean_answer_tokens == 2.5
    assert (stored.num_answers, stored.num_cut_answers) == (6, 4)


def test_a_prompt_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    groups = [random_group(rng, number, 2) for number in (0, 1, 0)]
    with pytest.raises(DataError, match=r"shard-00001.jsonl: the prompt_id 'prompt-0000' occurs twice"):
        StoredGroups(write_rollouts(tmp_path / "r", groups, rows_per_shard=2))


@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_a_damaged_shard_is_named_before_anything_is_judged(tmp_path: Path, fault: str) -> None:
    directory = write_rollouts(tmp_path / "r", [group_of("why?", ["a", "b"])], rows_per_shard=1)
    shard = directory / "shard-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"why?", b"who?"))
    if fault == "missing":
        shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000.jsonl (is damaged|does not exist)"):
        StoredGroups(directory)
