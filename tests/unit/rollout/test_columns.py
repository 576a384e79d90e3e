"""Columns that answers are checked against travel from the prompts to the rollouts' rows, and nothing else does.

Those that a question is about are in the prompt, or the row is set aside; messages may be spelled as JSON.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.prompts import Prompt, PromptsHash, read_prompts
from megatron_sppo.rollout.records import Response, RolloutGroup, read_shard, write_shard

IFEVAL = {
    "key": 1000,
    "prompt": "Write a note. Use no commas and less than 5 words.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None, "relation": None}, {"num_words": 5, "relation": "less than"}],
}
"""A row as google/IFEval has it: every argument in every mapping, null where it is another instruction's."""
COLUMNS = {name: IFEVAL[name] for name in ("instruction_id_list", "kwargs")}


def file_of(path: Path, row: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="") as file:
            cells = [value if isinstance(value, (str, int)) else json.dumps(value) for value in row.values()]
            csv.writer(file).writerows([list(row), cells])
    else:
        path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.csv"])
def test_ifeval_s_columns_are_kept_and_others_are_not(tmp_path: Path, name: str) -> None:
    (prompt,) = read_prompts(file_of(tmp_path / name, IFEVAL)).prompts
    assert prompt.columns == COLUMNS


@pytest.mark.parametrize(
    ("row", "message", "columns"),
    [
        ({"question": "2 + 2?", "answer": "#### 4"}, "2 + 2?", {"answer": "#### 4"}),
        ({"problem": "2 + 2?", "solution": "So $\\boxed{4}$"}, "2 + 2?", {"solution": "So $\\boxed{4}$"}),
        ({"prompt": "2 + 2?", "level": 5, "answer": None}, "2 + 2?", None),
        ({"prompt": "Two and two?", "question": "2 + 2?", "answer": "4"}, "Two and two?", {"answer": "4"}),
    ],
    ids=["GSM8K", "MATH", "neither", "both"],
)
def test_mathematical_sets_are_read_with_their_answers(tmp_path: Path, row: Any, message: str, columns: Any) -> None:
    (prompt,) = read_prompts(file_of(tmp_path / "p.jsonl", row)).prompts
    assert (prompt.messages[0]["content"], prompt.columns) == (message, columns)


def test_further_columns_are_kept_on_request(tmp_path: Path) -> None:
    path = file_of(tmp_path / "p.parquet", {"prompt": "Sort.", "tests": ["a", "b"], "other": 1})
    (prompt,) = read_prompts(path, keep_columns=("tests",)).prompts
    assert prompt.columns == {"tests": ["a", "b"]}
    with pytest.raises(ConfigError, match="keep_columns names system"):
        read_prompts(path, keep_columns=("tests", "system"))


QUESTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "Dolly": ({"instruction": "When did it start?", "context": "It began in 2000."}, "context"),
    "SQL": ({"question": "How many?", "context": "CREATE TABLE t (n INT)", "answer": "SELECT COUNT(*)"}, "context"),
    "BoolQ": ({"question": "do they speak one language", "passage": "Persian ...", "answer": True}, "passage"),
    "MMLU": ({"question": "Find the degree", "choices": ["0", "4", "2"], "answer": 1}, "choices"),
    "ARC": ({"prompt": "Which?", "choices": {"text": ["sand", "salt"], "label": ["A", "B"]}}, "choices"),
    "RACE": ({"prompt": "Why?", "article": "Once.", "options": ["this"]}, "article"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_not_asked_without_what_it_is_about(tmp_path: Path, name: str, suffix: str) -> None:
    row, column = QUESTIONS[name]
    with pytest.raises(DataError, match=f"the prompt would lose the column {column}: write its text into the prompt"):
        read_prompts(file_of(tmp_path / f"p{suffix}", row))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "When?\n\n It began\nin 2000.", "context": "It began in 2000. "},
        {"prompt": "Which?\nA. sand\nB. salt", "choices": {"text": ["sand", "salt"], "label": ["A", "B"]}},
        {"prompt": "When?", "context": "", "choices": [], "passage": None},
        {"messages": [{"role": "system", "content": "It began."}, {"role": "user", "content": "?"}], "context": "It"},
    ],
    ids=["white space", "choices", "empty", "system"],
)
def test_a_prompt_that_holds_what_it_is_about_is_read(tmp_path: Path, row: dict[str, Any]) -> None:
    assert len(read_prompts(file_of(tmp_path / "p.jsonl", row)).prompts) == 1


def test_what_a_question_is_about_may_be_kept_for_the_judge_alone(tmp_path: Path) -> None:
    path = file_of(tmp_path / "p.jsonl", {"prompt": "When?", "context": "A note of the authors."})
    (prompt,) = read_prompts(path, keep_columns=("context",)).prompts
    assert prompt.columns == {"context": "A note of the authors."}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("messages", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]),
        ("conversations", [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]),
        ("conversation", [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]),
        ("prompt", [{"role": "user", "content": "Why?"}]),
    ],
)
def test_messages_that_a_text_spells_as_json_are_messages(
    tmp_path: Path, column: str, turns: list[dict[str, str]], suffix: str
) -> None:
    spelled, plain = ({column: value} for value in (json.dumps(turns), turns))
    (prompt,) = read_prompts(file_of(tmp_path / f"p{suffix}", spelled)).prompts
    assert read_prompts(file_of(tmp_path / "plain.jsonl", plain)).prompts == (prompt,)
    assert prompt.messages[-1] == {"role": "user", "content": "Why?"}


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': 'Why?'}]", "Why?", '"Why?"', "[]"])
def test_a_text_that_spells_no_messages_is_set_aside(tmp_path: Path, column: str, text: str) -> None:
    with pytest.raises(DataError, match=f"{column} is (a text that spells no|neither a text nor a non-empty)"):
        read_prompts(file_of(tmp_path / "p.jsonl", {column: text}))


def test_hh_s_spelling_and_a_text_in_brackets_stay_what_they_are(tmp_path: Path) -> None:
    rows = [{"conversation": "\n\nHuman: Why?\n\nAssistant:"}, {"prompt": '[{"role": "user"}] is what?'}]
    for row, text in zip(rows, ("Why?", rows[1]["prompt"]), strict=True):
        (prompt,) = read_prompts(file_of(tmp_path / "p.jsonl", row)).prompts
        assert prompt.messages == ({"role": "user", "content": text},)


def test_a_value_that_json_cannot_hold_sets_the_row_aside(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = [{"prompt": "When?", "due": datetime.datetime(2020, 1, 1)}, {"prompt": "What?", "due": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_prompts(path, keep_columns=("due",))
    assert len(found.prompts) == 1
    assert found.quarantined[0]["reason"].startswith("the column due cannot be kept (Object of type datetime")


def test_other_columns_make_another_request_and_none_the_one_of_before() -> None:
    def hashed(columns: dict[str, Any] | None) -> str:
        found = PromptsHash()
        found.add(Prompt(prompt_id="p", messages=({"role": "user", "content": "Why?"},), columns=columns))
        return found.hexdigest()

    assert len({hashed(None), hashed({"answer": "4"}), hashed({"answer": "5"})}) == 3


def test_a_row_of_a_shard_keeps_them_and_one_without_is_spelled_as_before(tmp_path: Path) -> None:
    response = Response(text="a", token_ids=(1,), finish_reason="stop", seed=None)
    groups = [
        RolloutGroup(
            prompt_id=name,
            messages=({"role": "user", "content": "Why?"},),
            prompt_token_ids=(1,),
            responses=(response,),
            columns=columns,
        )
        for name, columns in (("with", COLUMNS), ("without", None))
    ]
    entry = write_shard(tmp_path, 0, groups)
    assert list(read_shard(tmp_path, entry)) == groups
    first, second = map(json.loads, (tmp_path / entry.file).read_text().splitlines())
    assert first["columns"] == COLUMNS
    assert "columns" not in second
