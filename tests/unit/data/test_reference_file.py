"""Proves that reference log-probs come back to the bit under the same fingerprint and under no other."""

import random

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sppo.data import reference_file as reference
from megatron_sppo.data.reference_file import FILES, MANIFEST_NAME, Pieces, read_reference, write_reference
from megatron_sppo.errors import DataError

FINGERPRINT = {"model_hash": "abc", "precision": "bf16", "packing": True, "layers": (1, 2)}
VALUES = np.array([[-100.25, np.nan, -3.5e-3], [-1e4, 0.0, -7.0]], dtype=np.float32)


def test_values_come_back_to_the_bit_with_nan_where_none_were_computed(tmp_path):
    write_reference(tmp_path, VALUES, FINGERPRINT)
    read = read_reference(tmp_path, FINGERPRINT)
    assert read.dtype == np.float32 and read.tobytes() == VALUES.tobytes()
    column = IndexedDataset(str(tmp_path / "reference"))
    assert len(column) == 2 and column[1].tolist() == VALUES[1].tolist()


def test_absent_is_none(tmp_path):
    assert read_reference(tmp_path, FINGERPRINT) is None


def test_the_directory_is_made(tmp_path):
    write_reference(tmp_path / "save" / "reference", VALUES, FINGERPRINT)
    assert sorted(path.name for path in (tmp_path / "save" / "reference").iterdir()) == sorted((*FILES, MANIFEST_NAME))


def test_another_fingerprint_is_refused_with_every_differing_field(tmp_path):
    write_reference(tmp_path, VALUES, FINGERPRINT)
    other = {"model_hash": "abd", "packing": True, "layers": (1, 2), "fp8": None}
    with pytest.raises(DataError) as caught:
        read_reference(tmp_path, other)
    message = str(caught.value)
    assert "model_hash 'abc' there, 'abd' here" in message
    assert "precision 'bf16' there, '(absent)' here" in message and "fp8 '(absent)' there, None here" in message
    assert "packing" not in message and "layers" not in message
    assert "Delete" in message and "a copy of that directory" in message and "\n" not in message


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_any_flipped_bit_is_detected(tmp_path, name):
    write_reference(tmp_path, VALUES, FINGERPRINT)
    clean = (tmp_path / name).read_bytes()
    rng = random.Random(name)
    for _ in range(20):
        damaged = bytearray(clean)
        damaged[rng.randrange(len(clean))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            read_reference(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    write_reference(tmp_path, VALUES, FINGERPRINT)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        read_reference(tmp_path, FINGERPRINT)


def test_a_rewrite_replaces_all(tmp_path):
    write_reference(tmp_path, VALUES, FINGERPRINT)
    write_reference(tmp_path, VALUES[:1] * 2, {"model_hash": "new"})
    assert read_reference(tmp_path, {"model_hash": "new"}).tobytes() == (VALUES[:1] * 2).tobytes()


@pytest.mark.parametrize("failing", ["reference.bin", "reference.idx", "reference.json"])
def test_a_crash_on_the_way_leaves_no_reference_rather_than_a_mix(tmp_path, monkeypatch, failing):
    """The write of each file in turn fails: the next reader finds none and computes anew."""
    write_reference(tmp_path, VALUES, FINGERPRINT)
    real_file, real_json = reference.atomic_file, reference.write_signed

    def broken_file(path, mode):
        if path.name == failing:
            raise KeyboardInterrupt
        return real_file(path, mode)

    def broken_json(path, value):
        if path.name == failing:
            raise KeyboardInterrupt
        real_json(path, value)

    monkeypatch.setattr(reference, "atomic_file", broken_file)
    monkeypatch.setattr(reference, "write_signed", broken_json)
    with pytest.raises(KeyboardInterrupt):
        write_reference(tmp_path, VALUES * 2, FINGERPRINT)
    assert read_reference(tmp_path, FINGERPRINT) is None


def test_pieces_come_back_together_under_their_own_fingerprint_alone(tmp_path):
    pieces = Pieces(tmp_path, FINGERPRINT, shape=(4, 3))
    assert pieces.read() is None
    pieces.write(np.array([0, 7]), np.array([-1.5, -2.25], dtype=np.float32))
    again = Pieces(tmp_path, FINGERPRINT, shape=(4, 3))
    assert np.flatnonzero(~np.isnan(again.read())).tolist() == [0, 7]
    again.write(np.array([11]), np.array([-3.5e-3], dtype=np.float32))
    values = Pieces(tmp_path, FINGERPRINT, shape=(4, 3)).read()
    assert values.dtype == np.float32 and values.reshape(-1)[[0, 7, 11]].tolist() == [-1.5, -2.25, np.float32(-3.5e-3)]
    assert int(np.isnan(values).sum()) == 9
    assert Pieces(tmp_path, {**FINGERPRINT, "packing": False}, shape=(4, 3)).read() is None
    assert Pieces(tmp_path, FINGERPRINT, shape=(8, 3)).read() is None
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_any_flipped_bit_in_a_piece_is_detected(tmp_path):
    pieces = Pieces(tmp_path, FINGERPRINT, shape=(4, 3))
    pieces.write(np.array([0, 7]), np.array([-1.5, -2.25], dtype=np.float32))
    (path,) = pieces.directory.iterdir()
    clean, rng = path.read_bytes(), random.Random(3)
    for _ in range(40):
        damaged = bytearray(clean)
        damaged[rng.randrange(len(clean))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            values = pieces.read()
        except DataError as error:
            assert path.name in str(error)
        else:  # white space between JSON's tokens
            assert values.reshape(-1)[[0, 7]].tolist() == [-1.5, -2.25]


def test_a_piece_costs_what_it_holds_however_many_there_are(tmp_path):
    pieces, sizes = Pieces(tmp_path, FINGERPRINT, shape=(1000, 5)), []
    for number in range(20):
        pieces.write(np.arange(250) + 250 * number, np.full(250, -1.0, dtype=np.float32))
        sizes.append(sum(path.stat().st_size for path in pieces.directory.iterdir()))
    costs = np.diff(sizes, prepend=0)
    assert set(costs.tolist()) == {costs[0]}
    assert costs[0] <= 250 * 12 * 4 / 3 + 1024
