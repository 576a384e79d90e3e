"""Proves: our reader and writer agree with the safetensors library, and a damaged file is one line, never a crash."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints import safetensors_file
from megatron_sppo.checkpoints.hf_writer import write_tensor
from megatron_sppo.checkpoints.safetensors_file import (
    entries_of_header,
    new_header,
    read_header,
    read_tensor,
    write_header,
)
from megatron_sppo.errors import ConversionError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 7).to(torch.bfloat16),
    "half": torch.randn(9).to(torch.float16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}


def test_weights_that_may_not_be_read_need_no_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safetensors_file, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(ConversionError, match=r"cannot be read \(Permission denied\)\. Make it readable: chmod u\+r /"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_of_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    raw, entries = read_header(tmp_path / "x.safetensors")
    assert set(entries) == set(TENSORS)
    for name, expected in TENSORS.items():
        tensor = read_tensor(entries[name])
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert entries_of_header(tmp_path / "x.safetensors", raw) == entries


def test_the_library_reads_our_file_written_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "y.safetensors"
    raw, entries = new_header(path, {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()})
    write_header(path, raw, entries)
    descriptor = os.open(path, os.O_WRONLY)
    for name in reversed(list(TENSORS)):
        write_tensor(descriptor, entries[name], TENSORS[name])
    os.close(descriptor)
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert torch.equal(loaded[name], expected) and loaded[name].dtype == expected.dtype
    assert json.loads(raw)["__metadata__"] == {"format": "pt"}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 20, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ConversionError, match=r"x\.safetensors"):
            read_header(path)


def test_random_damage_to_the_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """A changed byte may rename a tensor (found later, against config.json); only ConversionError may come out."""
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except ConversionError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        ["a"],
        7,
    ],
)
def test_impossible_headers_are_refused(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ConversionError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")
