"""Proves that a reader sees the complete old or the complete new artefact, whatever fails in between.

Every write, fsync and rename is made to fail once. A really full disk (a small tmpfs) where the test may mount one.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo import storage
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, write_json


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with storage.atomic_file(path) as file:
        file.write("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert entries(path.parent) == ["a.txt"]


def test_a_failing_block_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), storage.atomic_file(path) as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int) -> None:
    """Let the call-th use of os.<name> fail with the given errno."""
    real, count = getattr(os, name), iter(range(1000))

    def failing(*args, **kwargs):
        if next(count) == call:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("name", "call"), [("fsync", 0), ("replace", 0), ("fsync", 1)])
def test_a_file_is_old_or_new_after_any_failing_step(tmp_path, monkeypatch, name, call, number):
    path = tmp_path / "a.json"
    write_json(path, {"state": "old"})
    fail_once(monkeypatch, name, call, number)
    with pytest.raises((OSError, DataError)):
        write_json(path, {"state": "new"})
    monkeypatch.undo()
    assert json.loads(path.read_text())["state"] in ("old", "new")
    assert entries(tmp_path) == ["a.json"]


def write_pair(directory: Path, text: str) -> None:
    with storage.atomic_directory(directory, replaces="*") as temporary:
        (temporary / "one").write_text(text)
        (temporary / "two").write_text(text)


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed twice"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can let two directories change places, as some cannot."""
    if not request.param:
        monkeypatch.setattr(storage, "exchange", lambda one, other: False)
    return request.param


@pytest.mark.parametrize("call", range(4))
def test_a_directory_is_old_or_new_after_any_failing_fsync(tmp_path, monkeypatch, exchanges, call):
    directory = tmp_path / "artefact"
    write_pair(directory, "old")
    fail_once(monkeypatch, "fsync", call, errno.EIO)
    with pytest.raises(DataError, match=r"artefact could not be written: Input/output error\. Check the disk"):
        write_pair(directory, "new")
    monkeypatch.undo()
    texts = {(directory / part).read_text() for part in ("one", "two")}
    assert texts in ({"old"}, {"new"})
    assert [name for name in entries(tmp_path) if ".tmp-" in name] == []


@pytest.mark.parametrize("call", [0, 1])
def test_a_directory_is_old_after_a_failing_rename(tmp_path, monkeypatch, call):
    directory = tmp_path / "artefact"
    write_pair(directory, "old")
    monkeypatch.setattr(storage, "exchange", lambda one, other: False)
    fail_once(monkeypatch, "rename", call, errno.EIO)
    with pytest.raises((OSError, DataError)):
        write_pair(directory, "new")
    monkeypatch.undo()
    assert {(directory / part).read_text() for part in ("one", "two")} == {"old"}
    assert [name for name in entries(tmp_path) if ".tmp-" in name] == []


def test_two_directories_change_places_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not storage.exchange(tmp_path / "one", tmp_path / "other"):
        assert sys.platform != "linux" or entries(tmp_path / "one") == ["one"]  # then nothing has happened
        return
    assert entries(tmp_path / "one") == ["other"] and entries(tmp_path / "other") == ["one"]
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.exchange(tmp_path / "one", tmp_path / "absent")


def test_a_killed_writer_of_a_file_leaves_what_the_next_one_removes(tmp_path):
    program = (
        "import os, signal, sys; from megatron_sppo import storage\n"
        "with storage.atomic_file(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.json")])
    write_json(tmp_path / "b.json", 1)
    assert len(entries(tmp_path)) == 2, "what the other left is not this one's"
    write_json(tmp_path / "a.json", 1)
    assert entries(tmp_path) == ["a.json", "b.json"]


def test_a_writer_killed_between_its_two_renames_loses_nothing(tmp_path):
    write_pair(tmp_path / "artefact", "old")
    program = (
        "import os, signal; from megatron_sppo import storage\n"
        "real = os.rename\n"
        "def rename(a, b): real(a, b); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = rename\n"
        "storage.exchange = lambda one, other: False\n"
        f"with storage.atomic_directory({str(tmp_path / 'artefact')!r}, replaces='*') as temporary:\n"
        "    (temporary / 'one').touch()\n"
    )
    subprocess.run([sys.executable, "-c", program])
    assert "artefact" not in entries(tmp_path)
    storage.remove_stale_temporaries(tmp_path / "artefact")
    assert entries(tmp_path) == ["artefact"]
    assert (tmp_path / "artefact" / "two").read_text() == "old"


def test_replacing_a_directory_leaves_nothing_of_the_old_one(tmp_path):
    write_pair(tmp_path / "artefact", "old")
    (tmp_path / "artefact" / "stale").touch()
    write_pair(tmp_path / "artefact", "new")
    assert entries(tmp_path) == ["artefact"]
    assert entries(tmp_path / "artefact") == ["one", "two"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["disk is full", "MiB free"]),
        (errno.EDQUOT, ["disk is full"]),
        (errno.EROFS, ["Read-only", "writable"]),
        (errno.EACCES, ["Permission denied"]),
        (errno.EMFILE, ["ulimit -n"]),
    ],
)
def test_a_refusing_disk_is_one_line_with_the_file_and_the_remedy(tmp_path, monkeypatch, number, words):
    fail_once(monkeypatch, "fsync", 0, number)
    with pytest.raises(DataError) as caught:
        write_json(tmp_path / "a.json", 1)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in [str(tmp_path / "a.json"), *words]), str(caught.value)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_really_full_disk_keeps_the_old_file_and_says_so(full_disk):
    path = full_disk / "a.json"
    write_json(path, "old")
    with pytest.raises(DataError, match="disk is full"):
        write_json(path, "x" * 200_000)
    assert read_json(path) == "old"
    assert entries(full_disk) == ["a.json"]


def test_a_killed_writer_leaves_the_old_file_and_its_temporary_is_removed_later(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    program = (
        "import os, signal; from megatron_sppo import storage\n"
        f"with storage.atomic_file({str(path)!r}) as f: f.write('new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program])
    assert path.read_text() == "old"
    assert len(entries(tmp_path)) == 2
    ours = storage.temporary_beside(path)
    ours.touch()
    storage.remove_stale_temporaries(path)
    assert entries(tmp_path) == sorted([ours.name, "a.txt"])


def test_what_is_left_of_many_files_is_found_by_one_listing(tmp_path, monkeypatch):
    names = [f"part-{number}" for number in range(1000)]
    for name in [*names[::10], "part-1000"]:
        (tmp_path / f".{name}.tmp-999999").touch()
    listings = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listings.append(place) or real(place))
    monkeypatch.setattr(os, "scandir", lambda place: pytest.fail(f"{place} is scanned"))
    storage.remove_stale_temporaries(*(tmp_path / name for name in names))
    assert listings == [tmp_path]
    monkeypatch.undo()
    assert entries(tmp_path) == [".part-1000.tmp-999999"]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", ".."])
def test_a_name_that_leads_out_of_its_directory_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="outside"):
        storage.contained(tmp_path, name)


def test_a_name_inside_is_taken(tmp_path):
    assert storage.contained(tmp_path, "a/b") == tmp_path / "a" / "b"


def test_hashes_are_those_of_the_standard(tmp_path):
    """FIPS 180-2, appendix B.1: SHA-256 of "abc"."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256_of_file(tmp_path / "abc") == expected


def test_only_a_directory_of_the_same_kind_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refusal = pytest.raises(ConfigError, match=r"mine holds thesis\.txt, which this command did not write")
    with refusal, storage.atomic_directory(mine, replaces="tokens.idx"):
        raise AssertionError("nothing is begun")
    assert (entries(tmp_path), entries(mine)) == (["mine"], ["thesis.txt"])
    (mine / "tokens.idx").touch()
    with storage.atomic_directory(mine, replaces="tokens.idx") as temporary:
        (temporary / "new").touch()
    assert entries(mine) == ["new"]


@pytest.mark.parametrize("inside", ["", "model"], ids=["the input itself", "a folder that holds it"])
def test_an_output_is_no_input(tmp_path, inside):
    source = tmp_path / "there" / inside
    source.mkdir(parents=True)
    (source / "config.json").touch()
    with pytest.raises(ConfigError, match=r"there (is|holds) the input .*Choose another directory with --hf"):
        storage.refuse_foreign(tmp_path / "there", ours=("*",), inputs=(source,), flag="--hf")


@pytest.mark.parametrize("name", ["", ".", "..", "sub/.."])
def test_a_directory_without_a_name_beside_others_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "sub" / "sub").mkdir()
    storage.refuse_foreign(Path(name), ours=("*",))  # what is written in it is another matter
    refusal = pytest.raises(ConfigError, match=r"is the directory that you are in, or above it.*outside: cd /")
    with refusal, storage.atomic_directory(Path(name), replaces="*"):
        raise AssertionError("nothing is begun")


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with (
        pytest.raises(ConfigError, match="is a mount point, which cannot be replaced as a whole. Choose a directory"),
        storage.atomic_directory(tmp_path, replaces="*"),
    ):
        raise AssertionError("nothing is begun")
    with storage.atomic_directory(tmp_path / "in it", replaces="*"):
        pass


@pytest.mark.parametrize("left", [[], [".lock"], [".state.json.tmp-123", ".lock"]])
def test_what_a_killed_command_left_behind_is_nobody_else_s(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    storage.refuse_foreign(tmp_path, ours=("state.json",))


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "dear diary", "\0\1"])
def test_a_report_is_not_written_over_another_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is there and is no report.*another file with --json"):
        storage.refuse_foreign_file(path, ours="faults", flag="--json")
    with pytest.raises(ConfigError, match="is a directory"):
        storage.refuse_foreign_file(tmp_path, ours="faults", flag="--json")
    for ours in ('{"faults": []}', ""):
        path.write_text(ours)
        storage.refuse_foreign_file(path, ours="faults", flag="--json")
    storage.refuse_foreign_file(tmp_path / "new.json", ours="faults", flag="--json")
