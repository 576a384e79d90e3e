"""Proves what is said of examples/data/instructions.jsonl, and that its generator writes it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.make_instruction_prompts import KINDS, TOPICS, make_rows
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.prompts import read_prompts

FILE = Path(__file__).resolve().parents[3] / "examples/data/instructions.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text().splitlines()]


def of(split: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["split"] == split]


def test_the_file_is_what_the_generator_writes() -> None:
    assert make_rows("train", len(of("train")), seed=0) + make_rows("heldout", len(of("heldout")), seed=0) == ROWS


def test_all_rows_are_usable_and_carry_their_columns() -> None:
    found = read_prompts(FILE)
    assert found.quarantined == () and len(found.prompts) == len(ROWS)
    assert all(set(prompt.columns or ()) == {"instruction_id_list", "kwargs"} for prompt in found.prompts)


def test_no_kind_and_no_topic_of_the_held_out_rows_is_trained_on() -> None:
    for key in ("topic", "instruction_id_list"):
        trained, heldout = (
            {str(part) for row in of(split) for part in _parts(row[key])} for split in ("train", "heldout")
        )
        assert trained and heldout and not trained & heldout
    subjects = {split: {name for names in TOPICS[split].values() for name in names} for split in TOPICS}
    assert not subjects["train"] & subjects["heldout"]


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_kind_is_asked_for_about_equally_often(split: str) -> None:
    counts = Counter(name for row in of(split) for name in row["instruction_id_list"])
    assert set(counts) == set(KINDS[split])
    assert max(counts.values()) - min(counts.values()) <= 2
    assert all(len(set(row["instruction_id_list"])) == len(row["instruction_id_list"]) for row in of(split))


def test_more_prompts_than_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num-heldout is 1000, but there are 216 requests"):
        make_rows("heldout", 1000, seed=0)


def test_every_row_can_be_checked_without_data_of_nltk() -> None:
    from megatron_sppo.judge.instructions import check_instructions

    for row in ROWS:
        columns = {name: row[name] for name in ("instruction_id_list", "kwargs")}
        passed = check_instructions("Well, this is an answer.", [{"role": "user", "content": row["prompt"]}], columns)
        assert len(passed) == len(row["instruction_id_list"])


def test_checks_are_the_library_s_own_on_whole_samples() -> None:
    """`evaluate_output_for_sample`, which takes a benchmark's sample whole, on every row of IFEval's kinds."""
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    from megatron_sppo.judge.instructions import IFEVAL, check_instructions

    answers = (
        '"a small note. The end."',
        "* one\n* two",
        "<<Title>>\nTHE SEA IS DEEP, AND *BLUE*.\nP.S. snow snow snow",
    )
    seen: set[tuple[str, float]] = set()
    for number, row in enumerate(row for row in ROWS if set(row["instruction_id_list"]) <= set(IFEVAL)):
        answer = answers[number % len(answers)]
        columns = {name: row[name] for name in ("instruction_id_list", "kwargs")}
        results, scores = evaluate_output_for_sample(
            "ifeval", IFEvalSample(key=0, prompt=row["prompt"], **columns), answer
        )
        passed = check_instructions(answer, [{"role": "user", "content": row["prompt"]}], columns)
        assert passed == [float(result.strict_pass) for result in results]
        assert (sum(passed) / len(passed), float(all(passed))) == (scores.partial_strict, scores.binary_strict)
        seen |= set(zip(row["instruction_id_list"], passed, strict=True))
    assert len(seen) >= 24  # of 14 kinds, nearly all both passed and failed
