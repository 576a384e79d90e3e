"""Proves: a root or an iteration directory resolves as in Megatron-LM's convention; damage is found before use."""

import logging
import random
from pathlib import Path

import pytest

from megatron_sppo.checkpoints.megatron_checkpoint import (
    TRACKER_FILE,
    iteration_directory,
    iterations,
    publish,
    resolve_checkpoint,
    verify_checkpoint,
    write_manifest,
)
from megatron_sppo.errors import DataError


def finished(root: Path, iteration: int, *, tracked: bool = True) -> Path:
    directory = iteration_directory(root, iteration)
    (directory / "hf").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "model.json", "hf/config.json"):
        (directory / name).write_text(f"{name} of {iteration}")
    write_manifest(directory)
    if tracked:
        publish(root, iteration)
    return directory


def test_names_are_megatron_lms(tmp_path: Path) -> None:
    finished(tmp_path, 10)
    finished(tmp_path, 0, tracked=False)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000000", "iter_0000010"]
    assert (tmp_path / TRACKER_FILE).read_text().strip() == "10"
    assert (tmp_path / "model.json").read_text() == "model.json of 10"
    assert iterations(tmp_path) == [0, 10]


def test_what_a_writer_left_that_was_killed_while_publishing_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.tmp-99999999" for name in ("model.json", TRACKER_FILE)]
    for path in left:
        path.write_text("half")
    finished(tmp_path, 3)
    assert not any(path.exists() for path in left)


def test_the_tracker_decides_even_where_a_later_iteration_lies(tmp_path: Path) -> None:
    tracked = finished(tmp_path, 5)
    finished(tmp_path, 9, tracked=False)
    assert resolve_checkpoint(tmp_path) == tracked
    assert resolve_checkpoint(tmp_path / "iter_0000009") == tmp_path / "iter_0000009"


@pytest.mark.counts("trackers")
@pytest.mark.parametrize("text", ["", "garbage", "99", "-3", "5.0", "\x00\xff", "５"])
def test_a_bad_tracker_yields_the_newest_sound_iteration_and_says_so(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = finished(tmp_path, 5)
    damaged = finished(tmp_path, 9)
    (damaged / "__0_0.distcp").write_text("something else, of another length")
    (iteration_directory(tmp_path, 12)).mkdir()
    (tmp_path / TRACKER_FILE).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint(tmp_path) == sound
    assert "newest checkpoint whose checksums hold" in caplog.text
    assert TRACKER_FILE in caplog.text


def test_release_checkpoints_of_megatron_lm_resolve(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / ".metadata").write_text("x")
    (tmp_path / TRACKER_FILE).write_text("release")
    assert resolve_checkpoint(tmp_path) == tmp_path / "release"


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(DataError, match="is missing"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"Hugging Face model.*convert\.py import"):
        resolve_checkpoint(tmp_path)
    iteration_directory(tmp_path, 3).mkdir()
    with pytest.raises(DataError, match="never finished"):
        resolve_checkpoint(tmp_path / "iter_0000003")


@pytest.mark.parametrize("name", ["iter_0000003", "release"])
def test_megatron_lm_s_older_format_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER_FILE).write_text("3" if name != "release" else name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{name} is in Megatron-LM's older format .*--ckpt-format torch_dist"):
            resolve_checkpoint(path)


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    directory = finished(tmp_path, 5)
    verify_checkpoint(directory)
    generator = random.Random(0)
    files = [path for path in directory.rglob("*") if path.is_file()]
    for _ in range(100):
        path = generator.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        # White space in the manifest may change without harm; everything else is found.
        if path.name == "manifest.json" and bytes(damaged).split() == whole.split():
            continue
        with pytest.raises(DataError):
            verify_checkpoint(directory)
        path.write_bytes(whole)
    verify_checkpoint(directory)


def test_a_missing_an_added_and_an_outside_file_are_named(tmp_path: Path) -> None:
    directory = finished(tmp_path, 5)
    with pytest.raises(DataError, match=r"new\.distcp is not in manifest"):
        verify_checkpoint(directory, names=[".metadata", "new.distcp"])
    (directory / "__0_0.distcp").unlink()
    with pytest.raises(DataError, match=r"__0_0\.distcp is missing"):
        verify_checkpoint(directory)
    (directory / "manifest.json").write_text(
        '{"schema_version": 1, "files": {".metadata": {}, "../../x": {"sha256": "", "bytes": 0}}}'
    )
    with pytest.raises(DataError):
        verify_checkpoint(directory)
