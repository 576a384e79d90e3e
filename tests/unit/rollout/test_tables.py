"""Proves that every format gives the same rows, and that of several splits or subsets none is read unasked.

Layouts are those of the hub: a sharded `data/` folder, the converted `SUBSET/SPLIT/0000.parquet`, files named by split,
a README.md with `configs`, `save_to_disk`. Files are written by other libraries (csv, gzip, pyarrow, datasets).
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.table_files import UnusableRow
from megatron_sppo.rollout.tables import table_rows

ROWS: list[dict[str, Any]] = [{"prompt": 'Why, "sky"?\nTwo lines'}, {"prompt": "\u00e9t\u00e9?"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_bytes(json.dumps(rows, indent=1).encode() if kind == "json" else lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    if path.suffix == ".zst":
        content = path.read_bytes()
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    return path


def texts(path: Path, split: str | None = None, subset: str | None = None) -> list[str]:
    rows = list(table_rows(path, split, subset=subset))
    return [row["prompt"] for row in rows]


KINDS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")


@pytest.mark.parametrize(
    "name", [*(f"rows.{kind}" for kind in KINDS), "a.jsonl.gz", "a.csv.gz", "a.json.zst", "a.jsonl.zst"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name)) == [row["prompt"] for row in ROWS]


def test_compressed_parts_that_were_joined_are_read_whole(tmp_path: Path) -> None:
    """`cat a.gz b.gz > c.gz` is a valid file of both, for zstd too."""
    for suffix in (".gz", ".zst"):
        part = write(tmp_path / f"part.jsonl{suffix}").read_bytes()
        (tmp_path / f"both.jsonl{suffix}").write_bytes(part + part)
        assert len(texts(tmp_path / f"both.jsonl{suffix}")) == 2 * len(ROWS)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "other.jsonl.gz", "other.jsonl.zst", "cut.parquet"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"prompt": f"{i} {i * i}"} for i in range(2000)])
    path.write_bytes(path.read_bytes()[:-40] if name.startswith("cut") else b"<html>no archive</html>")
    with pytest.raises(DataError, match=rf"{name} (cannot be read|is no readable).*ownload or write it again"):
        list(table_rows(path))


def test_csv_faults_are_of_their_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,messages\nWhy?,\na,b,c\n\xff,\n,"[{""role"": ""user"", ""content"": ""Hi""}]"\n,[x\n'
    )
    found = list(table_rows(path))
    assert found[0] == {"prompt": "Why?", "messages": None}
    assert list(map(str, found[1:3])) == ["the row has 3 cells, the header 2", "the row is not UTF-8"]
    assert found[3] == {"prompt": None, "messages": [{"role": "user", "content": "Hi"}]}
    assert str(found[4]) == "the cell messages is no JSON list"
    assert [isinstance(row, UnusableRow) for row in found] == [False, True, True, False, True]


@pytest.mark.parametrize(
    "content", [b'id,prompt\n1,"Why?\n2,How?\n', b'id\tprompt\n1\t"said\n2\tHow?\n', b'"id,prompt\n1,a\n']
)
def test_a_quotation_mark_that_is_never_closed_takes_no_rows_with_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("rows.tsv" if b"\t" in content else "rows.csv")
    path.write_bytes(content)
    with pytest.raises(DataError, match="no valid CSV .*is a quotation mark closed"):
        list(table_rows(path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_lines_that_a_bad_quotation_mark_takes_into_its_cell_are_rows_all_the_same(tmp_path: Path, suffix: str) -> None:
    """Lines 2 and 6 open a cell that the marks of lines 5 and 7 do not end: each of them is one fault."""
    lines = ["prompt", '"One?', "Two?", "Three?", 'a 4" screen?', '"open', '"Five', 'six?"', "Seven?"]
    (tmp_path / f"rows{suffix}").write_text("\n".join(lines) + "\n")
    *found, last = table_rows(tmp_path / f"rows{suffix}")
    assert last == {"prompt": "Seven?"}
    told = [str(row).partition(" is no")[0] if isinstance(row, UnusableRow) else row["prompt"] for row in found]
    assert told == ["line 2", "Two?", "Three?", 'a 4" screen?', "line 6", "Five\nsix?"]


def test_a_line_that_is_no_csv_leaves_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt\n"a"b\nHow?\n')
    found = list(table_rows(tmp_path / "rows.csv"))
    assert "line 2 is no valid CSV" in str(found[0]) and found[1] == {"prompt": "How?"}


MESSAGE = {"role": "user", "content": "Hi"}
CELLS = {
    "a list": (json.dumps([MESSAGE]), [MESSAGE]),
    "a spaced list": (' [ {"content": "Hi", "role": "user"}]', [MESSAGE]),
    "one message": ('{"from": "gpt", "value": "Hi"}', {"from": "gpt", "value": "Hi"}),
    "a list of something else": ('[{"a": 1}]', '[{"a": 1}]'),
    "a list in Python's spelling": (repr([MESSAGE]), None),
    "a message in Python's spelling": (repr(MESSAGE), None),
    "an array of numpy": ("[{'content': 'Hi', 'role': 'user'}\n {'content': 'Ho', 'role': 'assistant'}]", None),
}


@pytest.mark.parametrize("name", CELLS)
def test_messages_in_a_cell_are_messages_and_never_a_text(tmp_path: Path, name: str) -> None:
    cell, expected = CELLS[name]
    path = write(tmp_path / "rows.csv", [{"prompt": "Why?", "chosen": cell, "probability": "[[0.5, 1], [0, 0.5]]"}])
    (row,) = table_rows(path)
    if expected is None:
        assert isinstance(row, UnusableRow) and "Python's spelling" in str(row)
    else:
        assert row["chosen"] == expected and row["probability"] == [[0.5, 1], [0, 0.5]]


@pytest.mark.parametrize(
    "line", [b'{"prompt": "a", "prompt": "b"}', b'{"messages": [{"role": "user", "role": "system"}]}']
)
def test_a_key_with_two_values_makes_the_row_unreadable(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n" + LINES)
    found = list(table_rows(tmp_path / "rows.jsonl"))
    assert "twice" in str(found[0]) and found[1:] == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(DataError, match="is a Git LFS pointer.*git lfs pull"):
        list(table_rows(tmp_path / name))


def test_a_csv_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="names a column twice"):
        list(table_rows(tmp_path / "rows.csv"))


def one(text: str) -> list[dict[str, Any]]:
    return [{"prompt": text}]


LAYOUTS: dict[str, tuple[dict[str, str], str]] = {
    "converted": ({"default/train/0000.parquet": "train", "default/test/0000.parquet": "test"}, "test, train"),
    "converted in part": ({"x/partial-train/0000.parquet": "train", "x/test/0000.parquet": "test"}, "test, train"),
    "own names": ({"x/gen/0000.parquet": "gen", "x/train_sft/0000.parquet": "train_sft"}, "gen, train_sft"),
    "sharded": (
        {"data/train-00000-of-00001.parquet": "train", "data/test-00000-of-00001-1a2b3c4d5e6f7a8b.parquet": "test"},
        "test, train",
    ),
    "sharded with short hashes": (
        {"train-00000-of-00002-abc.jsonl": "train", "data/test-00000-of-00001-12ef.jsonl": "test"},
        "test, train",
    ),
    "named": ({"train.jsonl": "train", "validation.jsonl": "validation"}, "train, validation"),
    "lists": ({"train.json": "train", "dev.json": "dev"}, "dev, train"),
    "word in a name": ({"my-train.jsonl.gz": "train", "my-heldout.jsonl.gz": "heldout"}, "heldout, train"),
    "folders": ({"train/part-0.jsonl": "train", "test/part-0.jsonl": "test"}, "test, train"),
    "published": ({"train_sft.parquet": "train_sft", "train_prefs.parquet": "train_prefs"}, "train_prefs, train_sft"),
}
"""{place: split}, and the splits to choose from."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_several_splits_one_must_be_chosen(tmp_path: Path, name: str) -> None:
    files, names = LAYOUTS[name]
    for place, split in files.items():
        write(tmp_path / place, one(split))
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"several splits. Use --split with one of: {names}"):
        table_rows(tmp_path)
    with pytest.raises(ConfigError, match=f"no split 'other'. Use --split with one of: {names}"):
        table_rows(tmp_path, "other")
    for split in files.values():
        assert list(table_rows(tmp_path, split)) == [{"prompt": split, "split": split}]


def test_shards_of_one_split_are_read_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"data/train-0000{number}-of-00003.jsonl", one(str(number)))
    assert texts(tmp_path) == ["0", "1", "2"]


def test_files_that_name_no_split_are_one(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"part-0000{number}.jsonl", one(str(number)))
    assert texts(tmp_path) == ["0", "1"]


@pytest.mark.parametrize(
    "places",
    [
        ("en/train/0000.parquet", "de/train/0000.parquet"),
        ("en/train.jsonl.gz", "de/train.jsonl.gz"),
        ("data/en/rows.jsonl", "data/de/rows.jsonl"),
    ],
)
def test_of_several_subsets_one_must_be_chosen(tmp_path: Path, places: tuple[str, str]) -> None:
    for place in places:
        write(tmp_path / place, one(place))
    with pytest.raises(ConfigError, match="several subsets. Use --subset with one of: de, en"):
        table_rows(tmp_path)
    assert texts(tmp_path, subset="en") == [places[0]]
    with pytest.raises(ConfigError, match="no subset 'fr'"):
        table_rows(tmp_path, subset="fr")


def test_the_readme_of_a_dataset_says_which_file_is_what(tmp_path: Path) -> None:
    """As on the hub: https://huggingface.co/docs/hub/datasets-manual-configuration."""
    for name in ("a-1", "a-2", "b-1"):
        write(tmp_path / f"rows/{name}.jsonl", one(name))
    write(tmp_path / "rows/deeper/a-3.jsonl", one("not named"))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: rows/a-*\n"
        "  - split: test\n    path: [rows/b-1.jsonl]\n- config_name: absent\n  data_files: other/*.csv\n---\n# Rows\n"
    )
    assert texts(tmp_path, "train", "main") == ["a-1", "a-2"]
    assert texts(tmp_path, "test") == ["b-1"]
    with pytest.raises(ConfigError, match="Use --split with one of: test, train"):
        table_rows(tmp_path)


@pytest.mark.parametrize(
    ("said", "splits"),
    [
        ("data_files: {train: a.jsonl, test: [b.jsonl]}", {"train": "a", "test": "b"}),
        ("data_dir: deep", {"train": "c"}),
        ("data_files: {split: gen, path: b.jsonl}", {"gen": "b"}),
    ],
)
def test_a_readme_may_spell_its_files_otherwise(tmp_path: Path, said: str, splits: dict[str, str]) -> None:
    for name in ("a", "b", "deep/c"):
        write(tmp_path / f"{name}.jsonl", one(name[-1]))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  {said}\n---\n")
    for split, text in splits.items():
        assert texts(tmp_path, split) == [text]
    with pytest.raises(ConfigError, match=f"no split 'other'. Use --split with one of: {', '.join(sorted(splits))};"):
        table_rows(tmp_path, "other")


def test_one_table_in_two_formats_is_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="several kinds .train.jsonl, train.parquet.. Give one file"):
        table_rows(tmp_path)


def test_one_table_plain_and_compressed_is_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.jsonl.gz")
    with pytest.raises(ConfigError, match="several kinds .train.jsonl, train.jsonl.gz."):
        table_rows(tmp_path)


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "TRAIN.JSONL")
    assert texts(tmp_path) == [row["prompt"] for row in ROWS]


def test_rows_that_call_their_split_otherwise_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "a", "split": "train"}])
    assert texts(tmp_path, "train") == ["a"] and not caplog.records
    write(tmp_path / "train.jsonl", [{"prompt": text, "split": "heldout"} for text in "ab"])
    assert texts(tmp_path, "train") == ["a", "b"]
    (line,) = caplog.messages
    assert "calls its own split heldout" in line


def test_files_beside_those_of_a_split_must_be_decided_on(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", one("train"))
    write(tmp_path / "more.jsonl", one("more"))
    with pytest.raises(ConfigError, match="more.jsonl"):
        table_rows(tmp_path)
    assert texts(tmp_path, "train") == ["train"]


@pytest.mark.parametrize("what", ["split", "subset"])
def test_saved_datasets_side_by_side_want_one_chosen(tmp_path: Path, what: str) -> None:
    datasets = pytest.importorskip("datasets")
    for name in ("train", "test"):
        saved = datasets.Dataset.from_list(one(name))
        saved = datasets.DatasetDict({"train": saved}) if what == "subset" else saved
        saved.save_to_disk(str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"several {what}s. Use --{what} with one of: test, train"):
        table_rows(tmp_path)
    assert texts(tmp_path, **{what: "test"}) == ["test"]


def test_a_file_has_no_subsets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Leave out --subset"):
        table_rows(write(tmp_path / "rows.jsonl"), subset="en")
