"""Proves the rollout files: round trips, and that nothing damaged, foreign or half-written is ever read."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.rollout import records
from megatron_sppo.rollout.records import (
    Response,
    RolloutGroup,
    RolloutManifest,
    ShardEntry,
    read_manifest,
    read_rollouts,
    read_shard,
    write_manifest,
    write_shard,
)


def group(prompt_id: str, text: str = "Ja.\u2028\r\nSo ist es.") -> RolloutGroup:
    return RolloutGroup(
        prompt_id=prompt_id,
        messages=(
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Warum ist der Himmel blau? \u2600"},
        ),
        prompt_token_ids=(1, 7, 7),
        responses=(
            Response(text=text, token_ids=(5, 2), finish_reason="stop", seed=None),
            Response(text="", token_ids=(), finish_reason="length", seed=2**40),
        ),
        prompt_text="<user>Warum",
    )


def manifest_of(*entries: ShardEntry) -> RolloutManifest:
    return RolloutManifest(
        schema_version=1,
        model="models/a",
        model_hash="a" * 64,
        tokenizer_hash="b" * 64,
        chat_template_hash=None,
        vocab_size=8,
        sampling={"num_responses": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 4, "seed": 3},
        num_prompts=sum(entry.rows for entry in entries),
        shards=entries,
        quarantined=({"prompt_id": "bad", "reason": "empty"},),
    )


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    entries = [write_shard(tmp_path, 0, [group("a"), group("b")]), write_shard(tmp_path, 1, [group("c")])]
    write_manifest(tmp_path, manifest_of(*entries))
    return tmp_path


def test_what_is_written_is_what_is_read(rollouts: Path) -> None:
    assert list(read_rollouts(rollouts)) == [group("a"), group("b"), group("c")]
    manifest = read_manifest(rollouts)
    assert manifest == manifest_of(*manifest.shards)
    assert [entry.file for entry in manifest.shards] == ["shard-00000.jsonl", "shard-00001.jsonl"]


def test_the_entry_has_the_hash_of_the_bytes_on_disk(rollouts: Path) -> None:
    for entry in read_manifest(rollouts).shards:
        assert hashlib.sha256((rollouts / entry.file).read_bytes()).hexdigest() == entry.sha256


def test_a_row_is_spelled_as_it_always_was_and_no_token_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, by hand; `dataclasses.asdict` copies every leaf by `copy.deepcopy`."""
    monkeypatch.setattr(copy, "deepcopy", lambda value: pytest.fail(f"{value!r} is copied"))
    groups = [group('a "quoted" \u00fc\u2028', "\t\u2600\\"), replace(group("b", "\U0001f600"), prompt_text=None)]
    write_shard(tmp_path, 0, groups)
    turns = (
        '"messages": [{"role": "system", "content": "Be kind."}, '
        '{"role": "user", "content": "Warum ist der Himmel blau? \u2600"}], "prompt_token_ids": [1, 7, 7], '
    )
    second = '{"text": "", "token_ids": [], "finish_reason": "length", "seed": 1099511627776}'
    first = '{{"text": "{}", "token_ids": [5, 2], "finish_reason": "stop", "seed": null}}'
    expected = [
        f'{{"schema_version": 1, "prompt_id": "{name}", {turns}"responses": [{first.format(text)}, {second}], '
        f'"prompt_text": {prompt_text}}}'
        for name, text, prompt_text in (
            ('a \\"quoted\\" \u00fc\u2028', "\\t\u2600\\\\", '"<user>Warum"'),
            ("b", "\U0001f600", "null"),
        )
    ]
    assert (tmp_path / "shard-00000.jsonl").read_bytes().decode().split("\n") == [*expected, ""]


@pytest.mark.parametrize("held", [1 << 26, 100])
def test_a_shard_is_read_once_or_where_it_is_large_not_held(
    rollouts: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(records, "_MOST_HELD_BYTES", held)
    whole: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: whole.append(path) or real(path))
    entry = read_manifest(rollouts).shards[0]
    assert list(read_shard(rollouts, entry)) == [group("a"), group("b")]
    assert whole == ([rollouts / entry.file] if held > 100 else [])
    with pytest.raises(DataError, match="is damaged: its sha256"):
        list(read_shard(rollouts, replace(entry, sha256="0" * 64)))


def test_rows_have_the_keys_of_the_contract(rollouts: Path) -> None:
    row = json.loads((rollouts / "shard-00000.jsonl").read_text().split("\n")[0])
    assert {"schema_version", "prompt_id", "messages", "prompt_token_ids", "responses"} <= set(row)
    assert set(row["responses"][0]) == {"text", "token_ids", "finish_reason", "seed"}


def test_optional_keys_may_be_absent_and_unknown_keys_are_ignored(rollouts: Path) -> None:
    manifest = read_json(rollouts / "manifest.json")
    del manifest["vocab_size"]
    manifest["note"] = "by another producer"
    row = json.loads((rollouts / "shard-00001.jsonl").read_text())
    del row["prompt_text"]
    row["source"] = "elsewhere"
    rewrite(rollouts, manifest, 1, json.dumps(row) + "\n")
    assert read_manifest(rollouts).vocab_size is None
    assert list(read_rollouts(rollouts))[2] == replace(group("c"), prompt_text=None)


def rewrite(directory: Path, manifest: dict[str, Any], shard: int, content: str) -> None:
    """Replace a shard's content with a matching checksum: what a faulty producer would write."""
    name = manifest["shards"][shard]["file"]
    (directory / name).write_bytes(content.encode())
    manifest["shards"][shard]["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("position", [0, 40, -2])
def test_one_flipped_bit_in_a_shard_is_found_before_its_first_row(rollouts: Path, position: int) -> None:
    path = rollouts / "shard-00000.jsonl"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="shard-00000.jsonl is damaged"):
        next(read_rollouts(rollouts))


ROW_FAULTS = {
    "no JSON": lambda row: "{",
    "no object": lambda row: "[1]",
    "other schema": lambda row: {**row, "schema_version": 2},
    "no responses key": lambda row: {key: value for key, value in row.items() if key != "responses"},
    "empty id": lambda row: {**row, "prompt_id": ""},
    "number as id": lambda row: {**row, "prompt_id": 7},
    "message without content": lambda row: {**row, "messages": [{"role": "user"}]},
    "no messages": lambda row: {**row, "messages": []},
    "empty prompt": lambda row: {**row, "prompt_token_ids": []},
    "token outside the vocabulary": lambda row: {**row, "prompt_token_ids": [8]},
    "negative token": lambda row: {**row, "prompt_token_ids": [-1]},
    "float token": lambda row: {**row, "prompt_token_ids": [1.0]},
    "true as token": lambda row: {**row, "prompt_token_ids": [True]},
    "one response of two": lambda row: {**row, "responses": row["responses"][:1]},
    "response without ids": lambda row: with_response(row, token_ids=None),
    "response token outside": lambda row: with_response(row, token_ids=[99]),
    "text is no string": lambda row: with_response(row, text=5),
    "finish_reason is null": lambda row: with_response(row, finish_reason=None),
    "seed is a string": lambda row: with_response(row, seed="1"),
    "prompt_text is a number": lambda row: {**row, "prompt_text": 5},
}


def with_response(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**row, "responses": [row["responses"][0], {**row["responses"][1], **fields}]}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_bad_row_is_refused_with_its_file_and_number(rollouts: Path, fault: str) -> None:
    manifest = read_json(rollouts / "manifest.json")
    good, second = (rollouts / "shard-00000.jsonl").read_text().strip("\n").split("\n")
    bad = ROW_FAULTS[fault](json.loads(second))
    rewrite(rollouts, manifest, 0, good + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n")
    reader = read_rollouts(rollouts)
    assert next(reader).prompt_id == "a"
    with pytest.raises(DataError, match=r"shard-00000.jsonl, row 2: .*\. Write the rollouts again\.$"):
        next(reader)


MANIFEST_FAULTS = {
    "schema_version": 2,
    "model": None,
    "model_hash": "short",
    "tokenizer_hash": 5,
    "vocab_size": 0,
    "sampling": {"num_responses": 0},
    "num_prompts": 4,
    "shards": [{"file": "shard-00000.jsonl", "rows": 3}],
    "quarantined": [{"prompt_id": "x"}],
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("key", MANIFEST_FAULTS)
def test_a_bad_manifest_is_refused(rollouts: Path, key: str) -> None:
    manifest = read_json(rollouts / "manifest.json")
    (rollouts / "manifest.json").write_text(json.dumps({**manifest, key: MANIFEST_FAULTS[key]}))
    with pytest.raises(DataError, match="manifest.json: "):
        read_manifest(rollouts)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("key", ["model", "model_hash", "sampling", "shards", "quarantined"])
def test_a_manifest_that_lacks_a_key_names_it(rollouts: Path, key: str) -> None:
    manifest = read_json(rollouts / "manifest.json")
    del manifest[key]
    (rollouts / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"missing required field `{key}`"):
        read_manifest(rollouts)


@pytest.mark.parametrize("version", [2, None, "1"])
def test_another_version_is_named_whatever_its_other_keys(rollouts: Path, version: object) -> None:
    (rollouts / "manifest.json").write_text(json.dumps({"schema_version": version, "files": []}))
    with pytest.raises(DataError, match=f"manifest.json: schema_version is {version!r}, this version reads 1"):
        read_manifest(rollouts)


def test_rollouts_without_a_manifest_are_unfinished(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [group("a")])
    with pytest.raises(DataError, match="unfinished"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="not a directory of rollouts"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../shard-00000.jsonl", "/etc/hostname"])
def test_a_manifest_cannot_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="outside"):
        next(read_shard(tmp_path, ShardEntry(file=name, rows=1, sha256="0" * 64)))


def test_a_shard_that_the_manifest_names_must_be_there(rollouts: Path) -> None:
    (rollouts / "shard-00001.jsonl").unlink()
    reader = read_rollouts(rollouts)
    assert [next(reader).prompt_id, next(reader).prompt_id] == ["a", "b"]
    with pytest.raises(DataError, match="does not exist"):
        next(reader)


def test_a_wrong_number_of_rows_is_found(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, 0, [group("a")])
    with pytest.raises(DataError, match="has 1 rows, the manifest says 2"):
        list(read_shard(tmp_path, replace(entry, rows=2)))


def test_a_prompt_that_occurs_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_manifest(
        tmp_path, manifest_of(write_shard(tmp_path, 0, [group("a")]), write_shard(tmp_path, 1, [group("a")]))
    )
    with pytest.raises(DataError, match="'a' occurs twice"):
        list(read_rollouts(tmp_path))


def test_a_text_that_utf8_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="surrogate"):
        write_shard(tmp_path, 0, [group("a"), group("b", text="\ud800")])
    assert list(tmp_path.iterdir()) == []
