"""Proves the way to disk and back: round trip, Megatron's own reader and builder, equal bytes, damage found.

Nothing half-written is seen. Does not prove behaviour on a full disk: that is storage's.
"""

import gc
import io
import json
import math
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_sppo import storage
from megatron_sppo.data import indexed
from megatron_sppo.data.blocks import GroupEncoder
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import Column, ColumnWriter
from megatron_sppo.data.schema import file_names
from megatron_sppo.data.writer import DatasetWriter, rebuild_dataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.storage import sha256_of_file
from tests.unit.data.make import VOCAB_SIZE, groups, settings, write


def naive_paper(logits):
    size = len(logits)
    return np.array(
        [[1 / (1 + math.exp(-(logits[i][j] - logits[j][i]) / 2)) for j in range(size)] for i in range(size)], np.float32
    )


def test_everything_comes_back_as_written(tmp_path):
    rows = groups(num_groups=20)
    dataset = PreferenceDataset(write(tmp_path / "d", rows))
    assert (dataset.num_groups, dataset.num_responses) == (20, 4)
    for g, (prompt, responses, logits) in enumerate(rows):
        assert dataset.prompt(g).tolist() == prompt and dataset.prompt(g).dtype == np.int32
        assert [dataset.response(g, k).tolist() for k in range(4)] == responses
        assert np.array_equal(dataset.judge_logits(g), logits)
        np.testing.assert_allclose(dataset.preferences(g), naive_paper(logits.tolist()), atol=1e-6)
        np.testing.assert_allclose(dataset.win_rates(g), naive_paper(logits.tolist()).mean(axis=1), atol=1e-6)
        assert dataset.prompt_lengths[g] == len(prompt)
        assert dataset.response_lengths[g].tolist() == [len(response) for response in responses]
    assert np.array_equal(dataset.all_win_rates(), np.stack([dataset.win_rates(g) for g in range(20)]))
    assert np.array_equal(dataset.all_preferences(), np.stack([dataset.preferences(g) for g in range(20)]))
    assert np.array_equal(dataset.all_judge_logits(), np.stack([dataset.judge_logits(g) for g in range(20)]))
    assert [line["prompt_id"] for line in dataset.lines_of(range(20)).values()] == [f"p{g}" for g in range(20)]


def test_megatrons_own_reader_opens_every_file(tmp_path):
    rows = groups()
    directory = write(tmp_path / "d", rows)
    tokens = IndexedDataset(str(directory / "tokens"))
    assert len(tokens) == 6 * 5 and tokens.document_indices.tolist() == list(range(0, 31, 5))
    assert tokens[5].dtype == np.int32 and tokens[5].tolist() == rows[1][0] and tokens[7].tolist() == rows[1][1][1]
    for name, size in (("win_rates", 4), ("preferences", 16), ("judge_logits", 16)):
        column = IndexedDataset(str(directory / name))
        assert len(column) == 6 and column[0].dtype == np.float32
        assert column.sequence_lengths.tolist() == [size] * 6
        if name == "judge_logits":
            assert column[2].tolist() == rows[2][2].reshape(-1).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_megatrons_own_builder_makes_the_same_bytes(tmp_path, dtype):
    rng = np.random.default_rng(0)
    documents = [
        [rng.integers(0, 99, size).astype(dtype) for size in sizes] for sizes in ((3, 1, 2), (1,), (5, 70_000))
    ]
    builder, column = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype), ColumnWriter(tmp_path / "ours", dtype)
    for document in documents:
        builder.add_document(np.concatenate(document), [part.size for part in document])
        column.append(document)
    builder.finalize(f"{tmp_path}/theirs.idx")
    column.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = Column(tmp_path / "theirs", dtype, remedy="")
    sequences = [part for document in documents for part in document]
    assert all(np.array_equal(theirs.sequence(number), part) for number, part in enumerate(sequences))
    assert theirs.document_indices.tolist() == [0, 3, 4, 6]


def test_what_was_read_is_a_copy_and_outlives_the_dataset(tmp_path):
    dataset = PreferenceDataset(write(tmp_path / "d", groups()))
    prompt, rates, lengths = dataset.prompt(0), dataset.all_win_rates(), dataset.response_lengths
    del dataset
    gc.collect()
    assert prompt.tolist() == groups()[0][0]
    assert rates.sum() == pytest.approx(6 * 2.0) and lengths.sum() > 0
    prompt[:] = 0
    assert PreferenceDataset(tmp_path / "d").prompt(0).tolist() == groups()[0][0]


def test_equal_groups_give_equal_bytes(tmp_path):
    first, second = write(tmp_path / "a", groups()), write(tmp_path / "b", groups())
    for name in (*file_names(), "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert sorted(path.name for path in first.iterdir()) == sorted((*file_names(), "manifest.json"))


def test_dataset_hash_follows_the_contents(tmp_path):
    datasets = [PreferenceDataset(write(tmp_path / str(seed), groups(seed=seed))) for seed in (0, 1)]
    again = PreferenceDataset(write(tmp_path / "again", groups(seed=0), judge="another"))
    assert datasets[0].dataset_hash != datasets[1].dataset_hash
    assert datasets[0].dataset_hash == again.dataset_hash


@pytest.mark.parametrize("name", [*file_names(), "manifest.json"])
def test_any_flipped_bit_is_detected(tmp_path, name):
    directory = write(tmp_path / "d", groups())
    clean = (directory / name).read_bytes()
    rng = random.Random(name)
    for _ in range(20):
        place, bit = rng.randrange(len(clean)), rng.randrange(8)
        damaged = bytearray(clean)
        damaged[place] ^= 1 << bit
        (directory / name).write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            PreferenceDataset(directory)
        assert name in str(caught.value) and "\n" not in str(caught.value), (place, bit)
    (directory / name).write_bytes(clean)
    PreferenceDataset(directory)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", file_names())
def test_missing_cut_and_grown_files_are_named_even_without_checksums(tmp_path, name):
    directory = write(tmp_path / "d", groups())
    clean = (directory / name).read_bytes()
    for contents in (None, b"", clean[:-1], clean + b"\0"):
        (directory / name).unlink()
        if contents is not None:
            (directory / name).write_bytes(contents)
        with pytest.raises(DataError, match=name):
            PreferenceDataset(directory, verify_contents=False)
        (directory / name).write_bytes(clean)


def test_a_rank_that_leaves_the_contents_to_another_reads_no_value_of_them(tmp_path):
    """Files of the same sizes full of ones are no hash's, no vocabulary's and no probability's: nobody looked."""
    directory = write(tmp_path / "d", groups())
    for path in directory.glob("*.bin"):
        path.write_bytes(b"\x01" * path.stat().st_size)
    with pytest.raises(DataError, match="sha256"):
        PreferenceDataset(directory)
    dataset = PreferenceDataset(directory, verify_contents=False)
    assert dataset.prompt_lengths.tolist() == [len(prompt) for prompt, _, _ in groups()]


def test_verifying_reads_every_file_once(tmp_path, monkeypatch):
    directory, read = write(tmp_path / "d", groups(num_groups=20)), Counter()

    class Counting(io.FileIO):
        def read(self, size=-1):
            block = super().read(size)
            read[Path(str(self.name)).name] += len(block)
            return block

    for module in (indexed, storage):
        monkeypatch.setattr(module, "open", lambda path, _mode="r", **_: Counting(path), raising=False)
    dataset = PreferenceDataset(directory)
    assert read == {name: entry.bytes for name, entry in dataset.manifest.files.items()}


def forge(directory, change, **manifest_changes):
    """Change files and sign them again: what a foreign writer with a fault of its own would leave."""
    change(directory)
    path = directory / "manifest.json"
    fields = {**json.loads(path.read_text()), **manifest_changes}
    del fields["manifest_sha256"]
    fields["files"] = {
        name: {"sha256": sha256_of_file(directory / name), "bytes": (directory / name).stat().st_size}
        for name in fields["files"]
    }
    path.write_text(json.dumps({**fields, "manifest_sha256": sha256_of_json(fields)}))


def put_float(name, value):
    def change(directory):
        values = np.fromfile(directory / name, dtype=np.float32)
        values[3] = value
        values.tofile(directory / name)

    return change


def put_token(value):
    def change(directory):
        tokens = np.fromfile(directory / "tokens.bin", dtype=np.int32)
        tokens[0] = value
        tokens.tofile(directory / "tokens.bin")

    return change


def swap(column, other):
    def change(directory):
        for suffix in ("bin", "idx"):
            shutil.copy(directory / f"{other}.{suffix}", directory / f"{column}.{suffix}")

    return change


def overwrite(name, contents):
    return lambda directory: (directory / name).write_bytes(contents)


def patch_index(offset, contents):
    def change(directory):
        index = bytearray((directory / "tokens.idx").read_bytes())
        index[offset : offset + len(contents)] = contents
        (directory / "tokens.idx").write_bytes(index)

    return change


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("change", "manifest", "message"), [
    (lambda _: None, {"num_prompts": 5}, r"tokens\.idx does not hold 5 documents of 5"),
    (lambda _: None, {"num_responses": 5}, r"tokens\.idx does not hold 6 documents of 6"),
    (lambda _: None, {"num_responses": 10**9}, r"tokens\.idx does not hold"),
    (swap("win_rates", "preferences"), {}, r"win_rates\.idx has a sequence that is not 4 long"),
    (swap("preferences", "tokens"), {}, r"preferences\.idx says int32, expected float32"),
    (put_float("win_rates.bin", np.nan), {}, r"win_rates\.bin holds a value outside"),
    (put_float("win_rates.bin", 1.5), {}, r"win_rates\.bin holds a value outside"),
    (put_float("win_rates.bin", 1.0), {}, r"win_rates\.bin differs by 0\..* from the mean preferences"),
    (put_float("preferences.bin", -0.1), {}, r"preferences\.bin holds a value outside"),
    (put_token(-1), {}, r"tokens\.bin holds token ids -1"),
    (put_token(VOCAB_SIZE), {}, r"tokens\.bin holds token ids 0\.\.97"),
    (overwrite("tokens.idx", b"MMIDIDX\x00\x00"), {}, r"tokens\.idx is no Megatron index"),
    (overwrite("tokens.idx", b"x" * 500), {}, r"tokens\.idx is no Megatron index"),
    (overwrite("tokens.idx", b""), {}, r"tokens\.idx is no Megatron index"),
    (overwrite("tokens.bin", b""), {}, r"tokens"),
    (patch_index(17, b"\x63"), {}, r"tokens\.idx is no Megatron index"),
    (patch_index(18, b"\xff" * 8), {}, r"tokens\.idx has 450 bytes, its header says"),
    (patch_index(34, b"\xff\xff\xff\xff"), {}, r"tokens\.idx has pointers"),
    (overwrite("prompts.jsonl", b"{}\n" * 6), {}, r"prompts\.jsonl does not hold 6 lines"),
    (overwrite("prompts.jsonl", b'{"prompt_id": "a"}\n'), {}, r"prompts\.jsonl does not hold 6 lines"),
    (overwrite("prompts.jsonl", b"{\n" * 6), {}, r"prompts\.jsonl is not JSON lines"),
    (overwrite("prompts.jsonl", b"\xff\n" * 6), {}, r"prompts\.jsonl is not JSON lines"),
])  # fmt: skip
def test_a_consistent_looking_but_wrong_dataset_is_refused_in_one_line(tmp_path, change, manifest, message):
    directory = write(tmp_path / "d", groups())
    forge(directory, change, **manifest)
    with pytest.raises(DataError, match=message) as caught:
        # The prompts' texts are read last and only by who wants them: training does not.
        assert PreferenceDataset(directory).lines_of(range(6)) is None
    assert "\n" not in str(caught.value)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("group", "reason"), [
    (([], [[1]] * 4, np.zeros((4, 4))), "the prompt has no tokens"),
    (([1], [[1], [], [2], []], np.zeros((4, 4))), "responses [1, 3] have no tokens"),
    (([1], [[1]] * 3, np.zeros((3, 3))), "3 responses, expected 4"),
    (([1], [[1]] * 4, np.zeros((4, 3))), "judge logits have shape [4, 3], expected [4, 4]"),
    (([1], [[1]] * 4, np.full((4, 4), np.nan)), "judge logits are not finite"),
    (([1], [[1]] * 4, np.where(np.arange(16).reshape(4, 4) == 1, np.inf, 0.0)), "judge logits are not finite"),
    (([VOCAB_SIZE], [[1]] * 4, np.zeros((4, 4))), "token id 97 lies outside the vocabulary of 97"),
    (([1], [[1], [1], [-1], [1]], np.zeros((4, 4))), "token id -1 lies outside the vocabulary of 97"),
])  # fmt: skip
def test_a_bad_group_is_quarantined_with_its_reason_and_the_rest_kept(tmp_path, group, reason):
    rows = groups(num_groups=2)
    with DatasetWriter(tmp_path / "d", **settings()) as writer:
        assert writer.append(*rows[0])
        assert not writer.append(*group, prompt_id="bad")
        assert writer.append(*rows[1])
    dataset = PreferenceDataset(tmp_path / "d")
    assert dataset.manifest.quarantined == ({"prompt_id": "bad", "reason": reason},)
    assert [dataset.prompt(g).tolist() for g in range(2)] == [rows[0][0], rows[1][0]]


def test_nothing_is_written_when_the_writing_fails_or_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "d", **settings()) as writer:
        writer.append(*groups()[0])
        raise KeyboardInterrupt
    with (
        pytest.raises(DataError, match=r"no prompt group.*1 were quarantined \(first reason: judge is down\)"),
        DatasetWriter(tmp_path / "d", **settings()) as writer,
    ):
        writer.quarantine("p", "judge is down")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_known_without_reading_a_file_again(tmp_path, monkeypatch):
    """Hashes are taken while bytes are written: what the files hold on the disk is what they say."""

    def refuse(path):
        raise AssertionError(f"{path} is read again")

    with monkeypatch.context() as patch:
        for module in (indexed, storage):
            patch.setattr(module, "sha256_of_file", refuse)
        directory = write(tmp_path / "d", groups())
    entries = PreferenceDataset(directory).manifest.files
    assert {name: entry.bytes for name, entry in entries.items()} == {
        name: (directory / name).stat().st_size for name in file_names()
    }


def test_blocks_of_any_size_give_the_bytes_of_single_groups(tmp_path):
    rows = groups(num_groups=11)
    write(tmp_path / "single", rows)
    encoder = GroupEncoder(num_responses=4, vocab_size=VOCAB_SIZE, rule="paper")
    with DatasetWriter(tmp_path / "blocks", **settings()) as writer:
        for first, last in ((0, 1), (1, 1), (1, 8), (8, 11)):
            for number in range(first, last):
                assert encoder.add(*rows[number], prompt_id=f"p{number}", info={}) is None
            writer.extend(encoder.take())
    for name in (*file_names(), "manifest.json"):
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "single" / name).read_bytes(), name


def test_a_failed_writer_leaves_the_older_dataset_alone(tmp_path):
    directory = write(tmp_path / "d", groups(seed=0))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(RuntimeError), DatasetWriter(directory, **settings()) as writer:
        writer.append(*groups(seed=1)[0])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    write(directory, groups(seed=1))
    assert PreferenceDataset(directory).prompt(0).tolist() == groups(seed=1)[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    """A process that is no more (its id was a child's, reaped here) left its temporary directory behind."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    stale = tmp_path / f".d.tmp-{child.pid}"
    stale.mkdir()
    (stale / "tokens.bin").write_bytes(b"half")
    write(tmp_path / "d", groups())
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("change", [{"preset": "papers"}, {"selection": "best"}, {"selection": "top-bottom:3"}])
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, change):
    with pytest.raises(ConfigError):
        DatasetWriter(tmp_path / "d", **settings(**change))
    assert list(tmp_path.iterdir()) == []


def test_a_rebuilt_dataset_equals_one_scored_under_the_other_rule(tmp_path):
    source = PreferenceDataset(write(tmp_path / "paper", groups()))
    direct = write(tmp_path / "direct", groups(), preset="official", selection="extremes")
    rebuild_dataset(source, tmp_path / "rebuilt", preset="official", selection="extremes")
    for name in (*file_names(), "manifest.json"):
        assert (tmp_path / "rebuilt" / name).read_bytes() == (direct / name).read_bytes(), name
    assert not np.allclose(PreferenceDataset(direct).all_preferences(), source.all_preferences())
