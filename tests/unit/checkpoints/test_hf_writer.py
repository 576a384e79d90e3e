"""Proves: a damaged description of the imported files is one line with a way out.

That kept and new files hold every byte is shown by the round trips of tests/unit/conversion/test_convert.py.
"""

import base64
import json
from pathlib import Path

import pytest
import torch

from megatron_sppo.checkpoints.hf_writer import read_layout
from megatron_sppo.checkpoints.safetensors_file import new_header
from megatron_sppo.errors import ConversionError, DataError

TENSORS = {"a": (torch.float32, (2, 3))}
RAW, ENTRIES = new_header(Path("model.safetensors"), TENSORS)
HEADER = base64.b64encode(RAW).decode()
WHOLE = {"files": {"model.safetensors": HEADER}, "index": None}


def described(directory: Path, content: object) -> Path:
    path = directory / "layout.json"
    path.write_text(json.dumps(content))
    return path


def test_the_imported_files_come_out_as_they_were(tmp_path: Path) -> None:
    layout = read_layout(described(tmp_path, WHOLE))
    assert layout is not None and layout.index is None
    assert layout.files == {"model.safetensors": (RAW, ENTRIES)}
    assert layout.tensors == TENSORS


def test_where_nothing_is_described_there_is_no_layout(tmp_path: Path) -> None:
    assert read_layout(tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    "content",
    [[], {"files": []}, {"files": WHOLE["files"]}, {**WHOLE, "files": {"m": "!"}}, {**WHOLE, "files": {"m": 7}}],
)
def test_a_damaged_description_says_how_to_do_without(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConversionError, match=r"layout\.json .*damaged.*remove it"):
        read_layout(described(tmp_path, content))


def test_a_file_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside"):
        read_layout(described(tmp_path, {**WHOLE, "files": {"../x": HEADER}}))
