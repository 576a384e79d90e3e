"""Proves: an identity is the same whether its digests come from manifests, from memory or from bytes; and which do."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from megatron_sppo.checkpoints import file_digests
from megatron_sppo.checkpoints.digests import ItemDigests
from megatron_sppo.selfplay.fingerprint import CACHE_NAME, FileHashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the names of the files that are read to be hashed -> list that grows."""
    names, hash_file = [], file_digests.sha256_of_file
    monkeypatch.setattr(file_digests, "sha256_of_file", lambda path: names.append(path.name) or hash_file(path))
    return names


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a training root of two checkpoints, whose manifests are their last files -> its directory."""
    for step in ("0000010", "0000020"):
        directory = tmp_path / "run" / "iter_1" / "checkpoint" / f"iter_{step}"
        (directory / "hf").mkdir(parents=True)
        files = {"__0_0.distcp": b"w" * 1000 + step.encode(), "hf/config.json": b"{}", "model.json": b"{}"}
        for name, content in files.items():
            (directory / name).write_bytes(content)
        listed = {name: {"sha256": sha256(content), "bytes": len(content)} for name, content in files.items()}
        now = time.time_ns()
        (directory / "manifest.json").write_text(json.dumps({"schema_version": 1, "files": listed}))
        os.utime(directory / "manifest.json", ns=(now, now))
    (tmp_path / "run" / "iter_1" / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("20\n")
    at_rest()
    return tmp_path / "run"


def at_rest() -> None:
    """Wait until the kernel's own time of change, which nobody can set, is a tick ago."""
    time.sleep(1.5 * file_digests._TICK_SECONDS)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def identity_by_hand(directory: Path) -> str:
    """What state.json of runs that were begun before manifests were asked has: the bytes of every file, hashed."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    listing = {str(path.relative_to(directory)): sha256(path.read_bytes()) for path in files}
    return sha256(json.dumps(listing, sort_keys=True, separators=(",", ":")).encode())


def test_no_byte_that_a_manifest_lists_is_hashed_again_and_the_identity_is_as_ever(
    run_dir: Path, hashed: list[str]
) -> None:
    checkpoint = run_dir / "iter_1" / "checkpoint"
    hashes = FileHashes(run_dir)
    assert hashes.of(checkpoint) == identity_by_hand(checkpoint)
    assert sorted(hashed) == ["latest_checkpointed_iteration.txt", "manifest.json", "manifest.json"]
    hashes.save()
    assert FileHashes(run_dir).of(checkpoint) == identity_by_hand(checkpoint)
    assert len(hashed) == 3


def test_a_checkpoint_that_is_changed_afterwards_is_another(run_dir: Path, hashed: list[str]) -> None:
    checkpoint, hashes = run_dir / "iter_1" / "checkpoint", FileHashes(run_dir)
    before = hashes.of(checkpoint)
    data = checkpoint / "iter_0000010" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert hashes.of(checkpoint) == identity_by_hand(checkpoint) != before
    assert hashed[3:] == ["__0_0.distcp"]


def test_a_checkpoint_that_was_only_touched_is_the_same(run_dir: Path) -> None:
    checkpoint, hashes = run_dir / "iter_1" / "checkpoint", FileHashes(run_dir)
    before = hashes.of(checkpoint)
    os.utime(checkpoint / "iter_0000010" / "__0_0.distcp")
    assert hashes.of(checkpoint) == before


def listed_by_items(run_dir: Path) -> Path:
    """Let the manifest of one checkpoint have the digests of the data file's items in place of its sha256 -> file."""
    directory = run_dir / "iter_1" / "checkpoint" / "iter_0000020"
    data, digests = directory / "__0_0.distcp", ItemDigests()
    digests.update(data.read_bytes())
    digests.end_item()
    digests.write(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    content = (directory / "__0_0.digests").read_bytes()
    manifest["files"] |= {
        "__0_0.distcp": {"sha256": sha256(content), "bytes": data.stat().st_size, "digests": "__0_0.digests"},
        "__0_0.digests": {"sha256": sha256(content), "bytes": len(content)},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return data


def test_what_was_hashed_item_by_item_is_what_its_digests_are(run_dir: Path, hashed: list[str]) -> None:
    """Untouched it is not read; touched it is the same, and changed another."""
    data = listed_by_items(run_dir)
    before = FileHashes(run_dir).of(data.parent)
    assert hashed == ["manifest.json"]
    os.utime(data)
    assert FileHashes(run_dir).of(data.parent) == before
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    assert FileHashes(run_dir).of(data.parent) != before


def test_a_run_that_was_moved_is_not_hashed_again(run_dir: Path, tmp_path: Path, hashed: list[str]) -> None:
    hashes = FileHashes(run_dir)
    before = hashes.of(run_dir / "iter_1" / "checkpoint")
    hashes.save()
    moved = Path(shutil.move(run_dir, tmp_path / "elsewhere"))
    assert FileHashes(moved).of(moved / "iter_1" / "checkpoint") == before
    assert len(hashed) == 3


def test_what_an_earlier_version_noted_by_size_and_time_alone_is_not_believed(run_dir: Path) -> None:
    file = run_dir / "iter_1" / "checkpoint" / "latest_checkpointed_iteration.txt"
    stat = file.stat()
    noted = {str(file.relative_to(run_dir)): [stat.st_size, stat.st_mtime_ns, sha256(b"10\n")]}
    (run_dir / CACHE_NAME).write_text(json.dumps(noted))
    assert FileHashes(run_dir).of(file) == sha256(b"20\n")


@pytest.mark.parametrize("name", ["iter_0000020/__0_0.distcp", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("is_noted", [True, False])
def test_the_same_size_and_time_do_not_hide_a_change(run_dir: Path, name: str, is_noted: bool) -> None:
    """Neither of what a manifest lists nor of what it does not."""
    checkpoint, hashes = run_dir / "iter_1" / "checkpoint", FileHashes(run_dir)
    if is_noted:
        hashes.of(checkpoint)
        hashes.save()
    file = checkpoint / name
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    os.utime(file, ns=times)
    assert FileHashes(run_dir).of(checkpoint) == identity_by_hand(checkpoint)


def test_what_may_change_again_in_this_instant_is_not_noted(run_dir: Path) -> None:
    file, hashes = run_dir / "iter_1" / "checkpoint" / "latest_checkpointed_iteration.txt", FileHashes(run_dir)
    file.write_text("10\n")
    hashes.of(file)
    hashes.save()
    assert not (run_dir / CACHE_NAME).exists()
    at_rest()
    hashes.of(file)
    hashes.save()
    assert list(json.loads((run_dir / CACHE_NAME).read_text())) == [str(file.relative_to(run_dir)), "content_sha256"]


def test_one_more_name_of_a_listed_file_is_no_change(run_dir: Path, hashed: list[str]) -> None:
    """Tensors beside the decoder are carried from checkpoint to checkpoint as one file with several names."""
    checkpoint = run_dir / "iter_1" / "checkpoint"
    os.link(checkpoint / "iter_0000020" / "__0_0.distcp", run_dir / "another_name")
    assert FileHashes(run_dir).of(checkpoint) == identity_by_hand(checkpoint)
    assert "__0_0.distcp" not in hashed
