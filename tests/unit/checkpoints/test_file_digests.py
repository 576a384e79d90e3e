"""Proves: a file that its writer listed, or that was hashed before, is not read again; a changed one always is."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from megatron_sppo.checkpoints import file_digests
from megatron_sppo.checkpoints.file_digests import listed_digests, sha256_of_files


@pytest.fixture(autouse=True)
def read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Give the test a memory of its own in which a file of 4 bytes is large -> the files that are read, in order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "REMEMBERED_BYTES", 4)
    read, hash_file = [], file_digests.sha256_of_file
    monkeypatch.setattr(file_digests, "sha256_of_file", lambda path: read.append(path) or hash_file(path))
    return read


def written(path: Path, content: bytes, *, seconds_ago: float = 60.5) -> Path:
    """Write a file that is at rest -> its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    changed = time.time_ns() - round(seconds_ago * 1e9)
    os.utime(path, ns=(changed, changed))
    return path


def at_rest() -> None:
    """Wait until the kernel's own time of change, which nobody can set, is a tick ago."""
    time.sleep(2 * file_digests._TICK_SECONDS)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_and_then_remembered(tmp_path: Path, read_again: list[Path]) -> None:
    files = [written(tmp_path / "model" / name, name.encode() * 4) for name in ("a", "b")]
    at_rest()
    for _ in range(3):
        assert sha256_of_files(files) == [sha256(b"aaaa"), sha256(b"bbbb")]
    assert sorted(read_again) == files


def test_a_link_of_the_hub_s_cache_is_its_blob(tmp_path: Path, read_again: list[Path]) -> None:
    blob = written(tmp_path / "blobs" / "0", b"weights")
    links = [tmp_path / "one", tmp_path / "two"]
    for link in links:
        link.symlink_to(blob)
    at_rest()
    assert [*sha256_of_files(links[:1]), *sha256_of_files(links[1:])] == 2 * [sha256(b"weights")]
    assert len(read_again) == 1


def test_the_same_size_and_time_do_not_hide_a_change(tmp_path: Path, read_again: list[Path]) -> None:
    file = written(tmp_path / "weights", b"before")
    before = file.stat().st_mtime_ns
    at_rest()
    sha256_of_files([file])
    file.write_bytes(b"behind")
    os.utime(file, ns=(before, before))  # the kernel's own time of change tells it
    assert sha256_of_files([file]) == [sha256(b"behind")]


def test_a_file_that_was_changed_this_instant_is_read_again(tmp_path: Path, read_again: list[Path]) -> None:
    file = tmp_path / "weights"
    for content in (b"one.", b"two."):
        file.write_bytes(content)
        assert sha256_of_files([file]) == [sha256(content)]
    assert len(read_again) == 2


def test_a_large_file_that_was_written_this_instant_is_read_once_all_the_same(
    tmp_path: Path, read_again: list[Path]
) -> None:
    file = tmp_path / "exported"
    file.write_bytes(b"weights")
    assert sha256_of_files([file]) == sha256_of_files([file]) == [sha256(b"weights")]
    assert len(read_again) == 1


def test_the_times_of_a_listed_file_that_are_given_back_do_not_hide_a_change(tmp_path: Path) -> None:
    data = written(tmp_path / "data", b"data")
    written(tmp_path / "manifest.json", json.dumps(LISTINGS["rollouts'"]).encode())
    assert listed_digests(tmp_path) == {data: "5e"}
    at_rest()
    before = data.stat().st_mtime_ns
    data.write_bytes(b"beta")
    os.utime(data, ns=(before, before))
    assert listed_digests(tmp_path) == {}


def test_a_home_that_cannot_be_written_only_costs_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_again: list[Path]
) -> None:
    file = written(tmp_path / "weights", b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file, where a directory should be
    at_rest()
    assert sha256_of_files([file]) == sha256_of_files([file]) == [sha256(b"weights")]
    assert len(read_again) == 2


def test_nothing_is_written_for_a_user_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_again: list[Path]
) -> None:
    file = written(tmp_path / "model" / "weights", b"weights")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is where HOME and the user's name are unknown
    monkeypatch.chdir(tmp_path)
    at_rest()
    assert sha256_of_files([file]) == sha256_of_files([file]) == [sha256(b"weights")]
    assert len(read_again) == 2 and list(tmp_path.iterdir()) == [file.parent]


@pytest.mark.parametrize("content", ["[1, 2", "7", '{"PATH": 3}', '{"PATH": [1, 2, 3, 4]}'])
def test_a_damaged_memory_is_begun_anew(tmp_path: Path, read_again: list[Path], content: str) -> None:
    file = written(tmp_path / "weights", b"weights")
    memory = tmp_path / "cache" / "megatron_sppo" / "file_digests.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(content.replace("PATH", str(file)))
    at_rest()
    assert sha256_of_files([file]) == sha256_of_files([file]) == [sha256(b"weights")]
    assert len(read_again) == 1


LISTINGS = {
    "a checkpoint's or a dataset's": {"files": {"data": {"sha256": "5e", "bytes": 4}}},
    "rollouts'": {"shards": [{"file": "data", "rows": 1, "sha256": "5e"}]},
}


@pytest.mark.parametrize("manifest", LISTINGS.values(), ids=LISTINGS)
def test_what_a_manifest_lists_is_believed_until_it_is_modified(tmp_path: Path, manifest: dict) -> None:
    data = written(tmp_path / "data", b"data")
    written(tmp_path / "unlisted", b"more")
    written(tmp_path / "manifest.json", json.dumps(manifest).encode(), seconds_ago=60)
    assert listed_digests(tmp_path) == {data: "5e"}
    written(data, b"beta", seconds_ago=59)  # after the manifest, with the listed size
    assert listed_digests(tmp_path) == {}


def test_another_size_than_the_listed_one_is_not_believed(tmp_path: Path) -> None:
    written(tmp_path / "data", b"longer", seconds_ago=60)
    written(tmp_path / "manifest.json", json.dumps(LISTINGS["a checkpoint's or a dataset's"]).encode(), seconds_ago=50)
    assert listed_digests(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"files": []}', '{"files": {"data": 1}}', '{"shards": [3, {"file": 3}]}']
)
def test_a_manifest_that_is_none_lists_nothing(tmp_path: Path, content: str) -> None:
    written(tmp_path / "data", b"data")
    written(tmp_path / "manifest.json", content.encode(), seconds_ago=50)
    assert listed_digests(tmp_path) == {}


def test_a_name_that_leads_out_of_the_directory_is_not_looked_up(tmp_path: Path) -> None:
    written(tmp_path / "outside", b"data")
    manifest = {"files": {"../outside": {"sha256": "5e", "bytes": 4}}}
    written(tmp_path / "inside" / "manifest.json", json.dumps(manifest).encode())
    assert listed_digests(tmp_path / "inside") == {}
