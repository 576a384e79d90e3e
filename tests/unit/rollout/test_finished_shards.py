"""Proves what entering and opening shards costs, by counts, and that neither kills nor older ledgers lose a shard."""

import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.rollout.finished_shards import FinishedShard, open_finished_shards
from megatron_sppo.rollout.prepared import PromptsRecord
from megatron_sppo.rollout.records import Response, RolloutGroup, ShardEntry, shard_name, write_shard

REQUEST = {"model_hash": "m", "seed": 0}
PROMPTS = PromptsRecord(inputs="0" * 64, prompts_hash="1" * 64, num_prompts=5, quarantined=())
NUM_SHARDS = 5


def shard_in(directory: Path, index: int) -> FinishedShard:
    response = Response(text="a", token_ids=(5, 2), finish_reason="stop", seed=None)
    group = RolloutGroup(
        prompt_id=f"p{index}",
        messages=({"role": "user", "content": "?"},),
        prompt_token_ids=(1, 4),
        responses=(response,),
    )
    outcomes = {"groups": 1, "responses": 1, "cut": 0, "empty": 0, "turn_markers": 0, "uniform": 0}
    refused = ({"prompt_id": f"r{index}", "reason": "HTTP 400"},) if index == 1 else ()
    return FinishedShard(entry=write_shard(directory, index, [group]), outcomes=outcomes, refused=refused)


def enter(directory: Path, *indexes: int, num_shards: int = NUM_SHARDS) -> list[FinishedShard]:
    """Open, enter some shards, leave -> what was finished then."""
    with open_finished_shards(directory, REQUEST, PROMPTS, num_shards=num_shards) as finished:
        for index in indexes:
            finished.enter(index, shard_in(directory, index))
        return finished.in_order()


def found(directory: Path) -> list[int]:
    with open_finished_shards(directory, REQUEST, PROMPTS, num_shards=NUM_SHARDS) as finished:
        return [index for index in range(NUM_SHARDS) if index not in finished.missing()]


def test_entered_shards_are_found_again_with_what_was_entered(tmp_path: Path) -> None:
    entered = enter(tmp_path, 3, 1)
    assert [shard.entry.file for shard in entered] == ["shard-00001.jsonl", "shard-00003.jsonl"]
    assert enter(tmp_path) == entered
    assert enter(tmp_path, 0)[1:] == entered  # folded in between


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_one_line_and_the_shard_is_redone(tmp_path: Path) -> None:
    enter(tmp_path, 3)
    with (
        pytest.raises(DataError, match=r"finished\.jsonl could not be written: the disk is full"),
        open_finished_shards(tmp_path, REQUEST, PROMPTS, num_shards=NUM_SHARDS) as finished,
    ):
        (tmp_path / "finished.jsonl").symlink_to("/dev/full")
        finished.enter(0, shard_in(tmp_path, 0))
    (tmp_path / "finished.jsonl").unlink()
    assert found(tmp_path) == [3]


def test_a_shard_is_entered_by_as_many_bytes_however_many_there_are(tmp_path: Path) -> None:
    """300 shards of one size, entered one by one: every entry but the last adds a line of its own and no more."""
    sizes = [0]
    with open_finished_shards(tmp_path, REQUEST, PROMPTS, num_shards=300) as finished:
        request = (tmp_path / "request.json").stat()
        for index in range(299):
            finished.enter(index, shard_in(tmp_path, index))
            sizes.append((tmp_path / "finished.jsonl").stat().st_size)
            assert (tmp_path / "request.json").stat().st_mtime_ns == request.st_mtime_ns
        steps = [after - before for before, after in itertools.pairwise(sizes)]
        assert max(steps) - min(steps) < 50  # the number's digits, and the one refusal
        finished.enter(299, shard_in(tmp_path, 299))
    assert not (tmp_path / "finished.jsonl").exists()
    assert len(json.loads((tmp_path / "request.json").read_text())["shards"]) == 300


def test_each_line_is_on_the_disk_before_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or real(file))
    with open_finished_shards(tmp_path, REQUEST, PROMPTS, num_shards=NUM_SHARDS) as finished:
        for index in range(3):
            finished.enter(index, shard_in(tmp_path, index))
            assert synced[-1] == (tmp_path / "finished.jsonl").stat().st_ino


def test_opening_many_shards_lists_the_directory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 shards of which every fourth is there; each of those is read once, for its digest."""
    present = range(0, 2000, 4)
    shard = shard_in(tmp_path, 0)
    content = (tmp_path / shard.entry.file).read_bytes()
    shards = {}
    for index in present:
        (tmp_path / shard_name(index)).write_bytes(content)
        entry = ShardEntry(file=shard_name(index), rows=1, sha256=shard.entry.sha256)
        shards[str(index)] = asdict(FinishedShard(entry=entry, outcomes={}))
    (tmp_path / "request.json").write_text(json.dumps({"request": REQUEST, "shards": shards}))
    listings: list[Any] = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda place=".", real=real: listings.append(place) or real(place))
    with open_finished_shards(tmp_path, REQUEST, PROMPTS, num_shards=2000) as finished:
        assert finished.missing() == [index for index in range(2000) if index % 4]
    assert listings == [tmp_path]


@pytest.mark.parametrize("torn", [b'{"index":2,"entry":{"fi', b"\x00\x00\x00", b'{"index":2}\n', b"\xff\n"])
def test_a_torn_last_line_costs_its_shard_alone(tmp_path: Path, torn: bytes) -> None:
    enter(tmp_path, 0, 1)
    with open(tmp_path / "finished.jsonl", "ab") as file:
        file.write(torn)
    assert found(tmp_path) == [0, 1]
    assert [shard.entry.file for shard in enter(tmp_path, 2)][-1] == "shard-00002.jsonl"
    assert found(tmp_path) == [0, 1, 2]


def test_a_kill_between_folding_and_ending_the_lines_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = enter(tmp_path, 0, 1, 2)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        enter(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "finished.jsonl").exists()
    (tmp_path / ".lock").unlink(missing_ok=True)
    assert enter(tmp_path) == entered


def test_a_ledger_of_one_file_as_it_was_written_before_is_read(tmp_path: Path) -> None:
    shards = {str(index): asdict(shard_in(tmp_path, index)) for index in (0, 1)}
    (tmp_path / "request.json").write_text(json.dumps({"request": REQUEST, "shards": shards}))
    assert found(tmp_path) == [0, 1]


def test_what_is_complete_is_opened_without_a_write(tmp_path: Path) -> None:
    enter(tmp_path, *range(NUM_SHARDS))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert found(tmp_path) == list(range(NUM_SHARDS))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_finished_shards(tmp_path, REQUEST, PROMPTS, num_shards=NUM_SHARDS) as finished:
        shard = shard_in(tmp_path, 0)

        def refuse(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(DataError, match="finished.jsonl could not be written: the disk is full"):
            finished.enter(0, shard)
        monkeypatch.undo()
    assert found(tmp_path) in ([0], [])


@pytest.mark.parametrize("record", [None, asdict(PromptsRecord(**{**vars(PROMPTS), "inputs": "2" * 64}))])
def test_a_complete_directory_of_an_earlier_version_stays_the_same_to_the_byte(tmp_path: Path, record: Any) -> None:
    """Self-play knows a stage's output by its digest: a look by hand at a done stage must not make it begin anew."""
    enter(tmp_path, *range(NUM_SHARDS))
    (tmp_path / "manifest.json").write_text("{}")
    content = read_json(tmp_path / "request.json")
    content.pop("prompts")
    (tmp_path / "request.json").write_text(json.dumps(content | ({} if record is None else {"prompts": record})))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(enter(tmp_path)) == NUM_SHARDS
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
