"""Proves that every kind of file gives the same prompts, and that unusable rows are counted with their reason."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.rollout import table_files
from megatron_sppo.rollout.prompts import Prompt, PromptRows, PromptsHash, read_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt_id": "sky", "prompt": "Why is the sky blue?", "split": "train"},
    {"prompt_id": "sea", "prompt": "Why is the sea salty?", "split": "heldout"},
    {"prompt_id": "moon", "prompt": "None of my friends like the moon. Why?", "split": "train"},
]
IDS = ["sky", "sea", "moon"]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def reasons_of(tmp_path: Path, *rows: Any) -> list[str]:
    """The reasons for which rows beside a good one are set aside."""
    found = read_prompts(write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "A good one?"}]))
    assert len(found.prompts) + len(found.quarantined) == len(rows) + 1
    return [entry["reason"] for entry in found.quarantined]


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def write_json_list(path: Path) -> Path:
    path.write_text("\n " + json.dumps(ROWS))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def write_jsonl_with_bom(path: Path) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS).encode())
    return path


WRITERS = {
    "prompts.jsonl": lambda path: write_rows(path, ROWS),
    "lines.json": lambda path: write_rows(path, ROWS),
    "list.json": write_json_list,
    "list.jsonl": write_json_list,
    "prompts.parquet": write_parquet,
    "bom.jsonl": write_jsonl_with_bom,
    "saved": save_dataset,
    "files": lambda path: write_parquet(path / "data" / "train-00000-of-00001.parquet").parents[1],
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    found = read_prompts(WRITERS[name](tmp_path / name))
    assert ids(found.prompts) == IDS
    assert [prompt.messages for prompt in found.prompts] == [user(row["prompt"]) for row in ROWS]
    assert found.quarantined == ()


def test_chat_columns_of_other_projects_are_read(tmp_path: Path) -> None:
    """TRL: `prompt` as messages with `chosen`; UltraFeedback: `messages` holds the answer too, `prompt` does not."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    rows = [
        {"prompt": chat, "chosen": [{"role": "assistant", "content": "Hi."}], "rejected": []},
        {"prompt": "Hello there?", "messages": [*user("Hello there?"), {"role": "assistant", "content": "Hi."}]},
        {"messages": [*user("One?"), {"role": "assistant", "content": "Two."}, *user("Three?")], "prompt": None},
        {"prompt": "What is SPPO?", "prompt_id": 17, "generate_0": "An algorithm."},
    ]
    prompts = read_prompts(write_rows(tmp_path / "rows.jsonl", rows)).prompts
    assert prompts[0].messages == tuple(chat)
    assert prompts[1].messages == user("Hello there?")
    assert [turn["role"] for turn in prompts[2].messages] == ["user", "assistant", "user"]
    assert prompts[3].prompt_id == "17"


def test_a_missing_id_is_a_hash_of_the_content_alone(tmp_path: Path) -> None:
    first = read_prompts(write_rows(tmp_path / "a.jsonl", [{"prompt": "A?"}, {"prompt": "B?"}])).prompts
    second = read_prompts(write_rows(tmp_path / "b.jsonl", [{"prompt": "B?"}, {"prompt": "A?", "split": "x"}])).prompts
    assert ids(first) == ids(second)[::-1]
    assert len(set(ids(first))) == 2


BAD_ROWS = {
    "no text": ({"prompt": " \n"}, "no text"),
    "no column": ({"text": "Why?"}, "another column that asks (it has: text)"),
    "nul": ({"prompt": "a\0b"}, "NUL"),
    "lone surrogate": ({"prompt": "a \ud800"}, "surrogate"),
    "number": ({"prompt": 5}, "neither a text nor"),
    "not an object": ("Why?", "a str, not an object"),
    "answered": (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        "assistant's",
    ),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text"),
    "tool": ({"messages": [{"role": "user", "content": "Q"}, {"role": "tool", "content": "3"}]}, "is a tool's"),
    "a role of its own": ({"messages": [{"role": "critic", "content": "Q"}]}, "none of the roles system, user,"),
    "system alone": ({"messages": [{"role": "system", "content": "Q"}]}, "the last message is the system's"),
    "no role": ({"messages": [{"content": "Q"}]}, "no role"),
    "empty chat": ({"messages": []}, "non-empty list"),
    "list as id": ({"prompt": "Q?", "prompt_id": [1]}, "prompt_id"),
    "same text": ({"prompt": "A good one?", "prompt_id": "x"}, "the same text as prompt x"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path: Path, name: str) -> None:
    row, reason = BAD_ROWS[name]
    (found,) = reasons_of(tmp_path, row)
    assert reason in found


def test_the_second_of_two_equal_ids_is_set_aside(tmp_path: Path) -> None:
    (reason,) = reasons_of(tmp_path, {"prompt": "A?", "prompt_id": "x"}, {"prompt": "B?", "prompt_id": "x"})
    assert reason == "the same prompt_id as row 1"


def test_unreadable_lines_are_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "A?"}\n{"prompt": "B\n\xff\xfe\n{"prompt": "C?"}\n')
    found = read_prompts(path)
    assert [prompt.messages for prompt in found.prompts] == [user("A?"), user("C?")]
    assert found.quarantined == (
        {"prompt_id": "row-2", "reason": "the line is not valid JSON"},
        {"prompt_id": "row-3", "reason": "the line is not UTF-8 (byte 0)"},
    )


def test_split_offset_and_limit_choose_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert ids(read_prompts(path, split="train").prompts) == ["sky", "moon"]
    assert ids(read_prompts(path, split="heldout").prompts) == ["sea"]
    assert ids(read_prompts(path, split="train", offset=1).prompts) == ["moon"]
    assert ids(read_prompts(path, offset=1, limit=1).prompts) == ["sea"]


def test_a_held_out_prompt_that_is_also_a_training_prompt_is_set_aside(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt_id": "again", "prompt": "Why is the sky blue?", "split": "heldout"}]
    found = read_prompts(write_rows(tmp_path / "rows.jsonl", rows), split="heldout")
    assert ids(found.prompts) == ["sea"]
    assert found.quarantined == ({"prompt_id": "again", "reason": "the same text as prompt sky"},)


def test_a_directory_with_several_splits_wants_one_chosen(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS[:2])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[2:])
    assert ids(read_prompts(tmp_path, split="test").prompts) == ["moon"]
    with pytest.raises(ConfigError, match="several splits. Use --split with one of: test, train"):
        read_prompts(tmp_path)


def test_a_saved_dataset_dict_wants_a_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    assert ids(read_prompts(tmp_path / "saved", split="train").prompts) == ["sky", "sea"]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        read_prompts(tmp_path / "saved", split="dev")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "no rows of split 'test'. Use --split with one of: heldout, train"),
        ({"offset": 3}, "--offset 3 skips all 3 prompts"),
        ({"limit": 0}, "Use --offset 0 or more and --limit 1 or more"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(write_rows(tmp_path / "rows.jsonl", ROWS), **settings)


def test_split_without_a_split_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Leave out --split"):
        read_prompts(write_rows(tmp_path / "rows.jsonl", [{"prompt": "A?"}]), split="train")


def test_a_file_without_a_usable_prompt_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 rows set aside; the first: row-1: the row has neither"):
        read_prompts(write_rows(tmp_path / "rows.jsonl", [{"text": "A?"}]))
    with pytest.raises(DataError, match="no usable prompt"):
        read_prompts(write_rows(tmp_path / "empty.jsonl", []))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("prompts.xlsx", b"PK", "'.xlsx' are not read"),
        ("list.json", b'[{"prompt": "A?"}', "not valid JSON"),
        ("broken.parquet", b"PAR1 and then nothing", "no readable Parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_a_parquet_file_without_prompts_lists_its_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has: text"):
        read_prompts(write_parquet(tmp_path / "rows.parquet", [{"text": "Why?"}]))


def test_a_directory_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no dataset"):
        read_prompts(tmp_path)


def test_the_hash_sees_ids_texts_and_order() -> None:
    first, second = (Prompt(prompt_id=name, messages=user(name)) for name in "ab")
    other_text = Prompt(prompt_id="a", messages=user("c"))
    hashes = {hash_of(p) for p in [(first, second), (second, first), (first,), (other_text, second)]}
    assert len(hashes) == 4


def test_the_hash_taken_one_by_one_is_that_of_the_whole_list() -> None:
    """As it was taken by versions before, whose directories must still be resumed."""
    prompts = [Prompt(prompt_id=f"p\u00fc{i}", messages=user(f"Why {i}? \u2600")) for i in range(3)]
    for some in (prompts, prompts[:1], []):
        assert hash_of(some) == sha256_of_json([[prompt.prompt_id, prompt.messages] for prompt in some])


def hash_of(prompts: Iterable[Prompt]) -> str:
    taken = PromptsHash()
    for prompt in prompts:
        taken.add(prompt)
    return taken.hexdigest()


def test_prompts_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[bytes] = []
    real = table_files._json_line
    monkeypatch.setattr(table_files, "_json_line", lambda line: lines.append(line) or real(line))
    rows = PromptRows(write_rows(tmp_path / "rows.jsonl", [*ROWS, 5]))
    prompts = iter(rows)
    for number, expected in enumerate(IDS, start=1):
        assert next(prompts).prompt_id == expected and len(lines) == number
    assert next(prompts, None) is None
    assert rows.quarantined == [{"prompt_id": "row-4", "reason": "the row is a int, not an object"}]


# Columns as data sets publish them


def answered(*texts: str) -> list[dict[str, str]]:
    """Turns of a user and an assistant, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}, {"from": "human", "value": "Three?"}]
HH = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"

PUBLISHED: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "ShareGPT": ({"conversations": SHAREGPT}, answered("One?", "Two.", "Three?")),
    "ShareGPT with an answer": (
        {"id": "a_0", "conversations": [*SHAREGPT, {"from": "gpt", "value": "Four."}]},
        answered("One?", "Two.", "Three?"),
    ),
    "ShareGPT with a system message": (
        {"conversations": [{"from": "system", "value": "Be brief."}, SHAREGPT[0]]},
        [SYSTEM, *answered("One?")],
    ),
    "ShareGPT with a system column": (
        {"system": "Be brief.", "conversations": SHAREGPT[:1]},
        [SYSTEM, *answered("One?")],
    ),
    "UltraFeedback": (
        {
            "source": "flan",
            "instruction": "One?",
            "models": ["x"],
            "completions": [{"response": "1", "overall_score": 7.0}],
        },
        answered("One?"),
    ),
    "Alpaca": ({"instruction": "Translate.", "input": "", "output": "x"}, answered("Translate.")),
    "Alpaca with an input": (
        {"instruction": "Translate.", "input": "Chat", "output": "x"},
        answered("Translate.\nChat"),
    ),
    "Alpaca with a history": (
        {"instruction": "Three?", "history": [["One?", "Two."]], "system": "Be brief."},
        [SYSTEM, *answered("One?", "Two.", "Three?")],
    ),
    "Orca": ({"system": "Be brief.", "question": "One?", "chosen": "a", "rejected": "b"}, [SYSTEM, *answered("One?")]),
    "Orca without a system message": ({"system": "", "question": "One?"}, answered("One?")),
    "Nectar": ({"prompt": HH, "answers": [{"answer": "a", "rank": 1.0}]}, answered("One?", "Two.", "Three?")),
    "HH": (
        {"chosen": HH + " Four.", "rejected": HH + " Five."},
        answered("One?", "Two.", "Three?"),
    ),
    "HH, answers aside": (
        {"prompt": "Human: One?\n\nAssistant:", "chosen": " a", "rejected": " b"},
        answered("One?"),
    ),
    "TRL, the prompt in the responses": (
        {"chosen": [SYSTEM, *answered("One?", "a")], "rejected": [SYSTEM, *answered("One?", "b")]},
        [SYSTEM, *answered("One?")],
    ),
    "TRL, the prompt's context in the responses": (
        {
            "prompt": "Three?",
            "chosen": [SYSTEM, *answered("One?", "Two.", "Three?", "a")],
            "rejected": [SYSTEM, *answered("One?", "Two.", "Three?", "b")],
        },
        [SYSTEM, *answered("One?", "Two.", "Three?")],
    ),
    "UltraChat: the first question of a conversation": (
        {"prompt": "One?", "messages": [SYSTEM, *answered("One?", "Two.", "Three?", "Four.")]},
        [SYSTEM, *answered("One?")],
    ),
    "a text that speaks of humans": ({"prompt": "Human: the word?"}, answered("Human: the word?")),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_columns_are_read_with_all_that_comes_before_the_question(
    tmp_path: Path, kind: str, name: str
) -> None:
    row, expected = PUBLISHED[name]
    path = (
        write_rows(tmp_path / "rows.jsonl", [row]) if kind == "jsonl" else write_parquet(tmp_path / "r.parquet", [row])
    )
    (prompt,) = read_prompts(path).prompts
    assert list(prompt.messages) == expected


CONTRADICTIONS = {
    "two system messages": ({"system": "Be long.", "messages": [SYSTEM, *answered("One?")]}, "system is not the conv"),
    "two system columns": ({"system": "a", "system_prompt": "b", "prompt": "One?"}, "system_prompt is not the conv"),
    "another question": ({"prompt": "Two?", "messages": answered("One?", "a")}, "contradicts the messages of messages"),
    "other responses": (
        {"prompt": "Two?", "chosen": answered("One?", "a"), "rejected": answered("One?", "b")},
        "contradicts the messages of the responses",
    ),
    "responses to different turns": (
        {"chosen": answered("One?", "a"), "rejected": answered("Two?", "b")},
        "do not answer the same messages",
    ),
    "prompt and instruction": ({"prompt": "One?", "instruction": "Two?"}, "contradicts the column instruction"),
    "prompt and question": ({"system": "S", "prompt": "One?", "question": "Two?"}, "contradicts the column question"),
    "a response of the user's": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "a response is not the assistant's",
    ),
    "a function's call": (
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "function_call", "value": "f()"}]},
        "function_call message is a tool's",
    ),
    "another history": ({"history": [["a", "b"]], "messages": answered("c", "d", "e")}, "history is not how"),
    "no history": ({"history": "a", "instruction": "b"}, "no list of pairs"),
    "tools": ({"prompt": "Weather?", "tools": [{"name": "weather"}]}, "names tools"),
    "a tool call": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, *answered("One?")]},
        "tool calls",
    ),
    "only answers": ({"conversations": [{"from": "gpt", "value": "Hi."}]}, "asks nothing"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_columns_that_contradict_each_other_set_the_row_aside(tmp_path: Path, name: str) -> None:
    row, reason = CONTRADICTIONS[name]
    (found,) = reasons_of(tmp_path, row)
    assert reason in found


def test_a_directory_that_the_hub_converted_gives_one_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "default/train/0000.parquet", [{"prompt": "Train?"}])
    write_parquet(tmp_path / "default/test/0000.parquet", [{"prompt": "Test?"}])
    with pytest.raises(ConfigError, match="several splits. Use --split with one of: test, train"):
        read_prompts(tmp_path)
    assert [prompt.messages for prompt in read_prompts(tmp_path, split="train").prompts] == [user("Train?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "User", "content": "One?"}]}, "One?"),
        ({"conversations": [{"from": "HUMAN", "value": "One?"}]}, "One?"),
        (
            {"prompt": "### Instruction:\nOne?\n### Response:", "instruction": "One?"},
            "### Instruction:\nOne?\n### Response:",
        ),
        ({"system": "", "input": "One?", "chosen": "a", "rejected": "b"}, "One?"),
        ({"system": "", "question": "One?", "input": "Two?", "chosen": "a", "rejected": "b"}, "One?"),
    ],
)
def test_other_spellings_of_a_question(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    assert read_prompts(write_rows(tmp_path / "rows.jsonl", [row])).prompts[0].messages == user(expected)


def test_a_developer_s_message_is_the_system_s(tmp_path: Path) -> None:
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *user("One?")]}
    (prompt,) = read_prompts(write_rows(tmp_path / "rows.jsonl", [row])).prompts
    assert prompt.messages == ({"role": "system", "content": "Be brief."}, *user("One?"))
