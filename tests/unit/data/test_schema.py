"""Proves that a manifest comes back as written and that every malformed one is refused in one line."""

import dataclasses
import json

import pytest

from megatron_sppo.data.schema import (
    DatasetManifest,
    FileEntry,
    file_names,
    parse_selection,
    read_manifest,
    write_manifest,
)
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json

MANIFEST = DatasetManifest(
    schema_version=1,
    num_prompts=3,
    num_responses=5,
    tokenizer_hash=None,
    vocab_size=100,
    judge="rules:concise",
    preset="official",
    selection="top-bottom:2",
    files={name: FileEntry(sha256="0123456789abcdef" * 4, bytes=10) for name in file_names()},
    rollouts_sha256=None,
    quarantined=({"prompt_id": "7", "reason": "the prompt has no tokens"},),
)


def rewrite(directory, change):
    """Change the manifest's JSON and make its own checksum agree again: an editor's mistake, not a flipped bit."""
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["manifest_sha256"]
    change(fields)
    path.write_text(json.dumps({**fields, "manifest_sha256": sha256_of_json(fields)}))


def test_a_manifest_comes_back_as_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST


def test_the_written_keys_are_the_documented_ones(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    documented = (
        "schema_version num_prompts num_responses tokenizer_hash vocab_size judge preset selection files "
        "rollouts_sha256 quarantined manifest_sha256"
    )
    assert list(json.loads((tmp_path / "manifest.json").read_text())) == documented.split()


def test_dataset_hash_depends_on_the_files_alone():
    other = dataclasses.replace(MANIFEST, judge="x", selection="all")
    assert other.dataset_hash == MANIFEST.dataset_hash
    files = {**MANIFEST.files, "tokens.bin": FileEntry(sha256="f" * 64, bytes=10)}
    assert dataclasses.replace(MANIFEST, files=files).dataset_hash != MANIFEST.dataset_hash


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("key", "value"), [
    ("schema_version", 2), ("schema_version", "1"), ("schema_version", True), ("schema_version", None),
    ("num_prompts", 0), ("num_prompts", -1), ("num_prompts", 1.5), ("num_prompts", True), ("num_prompts", "3"),
    ("num_responses", 0), ("num_responses", None), ("num_responses", [5]),
    ("tokenizer_hash", 3), ("vocab_size", 0), ("vocab_size", "100"), ("vocab_size", False),
    ("judge", None), ("judge", 1), ("preset", "papers"), ("preset", None), ("selection", "best"), ("selection", None),
    ("files", None), ("files", []), ("files", {}), ("files", {"../x": {"sha256": "0" * 64, "bytes": 1}}),
    ("rollouts_sha256", 1), ("quarantined", None), ("quarantined", ["p"]), ("quarantined", [{"prompt_id": "p"}]),
    ("quarantined", [{"prompt_id": 1, "reason": "r"}]), ("surplus", 1),
])  # fmt: skip
def test_a_wrong_value_is_refused_by_name(tmp_path, key, value):
    write_manifest(tmp_path, MANIFEST)
    rewrite(tmp_path, lambda fields: fields.__setitem__(key, value))
    with pytest.raises(DataError, match=key) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(DatasetManifest)])
def test_a_missing_key_is_refused_by_name(tmp_path, key):
    write_manifest(tmp_path, MANIFEST)
    rewrite(tmp_path, lambda fields: fields.pop(key))
    with pytest.raises(DataError, match=key):
        read_manifest(tmp_path)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("entry", [
    None, [], {}, {"sha256": "0" * 64}, {"sha256": "0" * 63, "bytes": 1}, {"sha256": "Z" * 64, "bytes": 1},
    {"sha256": "0" * 64, "bytes": -1}, {"sha256": "0" * 64, "bytes": "1"}, {"sha256": "0" * 64, "bytes": 1, "x": 0},
])  # fmt: skip
def test_a_wrong_file_entry_is_refused_by_name(tmp_path, entry):
    write_manifest(tmp_path, MANIFEST)
    rewrite(tmp_path, lambda fields: fields["files"].__setitem__("win_rates.bin", entry))
    with pytest.raises(DataError, match=r"win_rates\.bin"):
        read_manifest(tmp_path)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_missing_directory_or_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match="not a directory"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        read_manifest(tmp_path)


def test_an_edited_manifest_is_detected(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("rules:concise", "rules:cyclic"))
    with pytest.raises(DataError, match="manifest_sha256"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["all", "extremes", "top-bottom:1", "top-bottom:12"])
def test_a_selection_is_written_as_it_is_read(text):
    assert str(parse_selection(text)) == text


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "text", ["", "ALL", "top-bottom", "top-bottom:0", "top-bottom:-1", "top-bottom:x", "extremes:1"]
)
def test_an_unknown_selection_is_refused(text):
    with pytest.raises(ConfigError, match="all, extremes or top-bottom:M"):
        parse_selection(text)
