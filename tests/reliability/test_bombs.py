"""Small files that promise or unpack to more than the memory are refused by name before they fill it.

Prompts, preferences and matrices may be compressed; archives of ours are never. What Python holds is counted by
tracemalloc; of a bomb that is unpacked, many times its limit would be held if nothing were refused. Not shown: Parquet,
whose pages pyarrow unpacks.
"""

import gzip
import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sppo.checkpoints.torch_streams import object_in
from megatron_sppo.errors import DataError
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.shard_scores import score_rollouts
from megatron_sppo.judge.workers import pooled_here
from megatron_sppo.rollout import table_files
from megatron_sppo.rollout.prompts import read_prompts
from tests.unit.judge.rollout_files import random_rollouts

ROW_LIMIT, WHOLE_LIMIT = 1 << 16, 1 << 18
UNPACKED = 1 << 25
BEGINNINGS = {
    "a line without end.jsonl": (b'{"prompt": "', b"a" * 4096, "longer than 0 MiB"),
    "white space without end.jsonl": (b'{"prompt": "a"}\n', b" " * 4096, "longer than 0 MiB"),
    "a list without end.json": (b'[{"prompt": "a"}', b',{"prompt": "a"}' * 256, "unpacks from .* to more than 0 MiB"),
    "zeros.json": (b"[", b"\0" * 4096, "unpacks from .* to more than 0 MiB"),
    "a cell without end.csv": (b'prompt\nWhy?\n"', b"a" * 4096, "longer than 0 MiB"),
    "a cell of many lines.csv": (b'prompt\nWhy?\n"', b"a\n" * 2048, "longer than 0 MiB"),
    "a row of many cells.tsv": (b"prompt\tx\nWhy?\ty\n", b'"a\n"\t' * 512, "longer than 0 MiB"),
    "a header without end.csv": (b"", b"prompt," * 512, "longer than 0 MiB"),
    "no Parquet.parquet": (b"PAR1", b"\0" * 4096, "unpacks from .* to more than 0 MiB"),
}


def packed(path: Path, begin: bytes, block: bytes) -> Path:
    """Write a compressed file that unpacks to `begin` and then UNPACKED bytes of repeated blocks."""
    content = begin + block * (UNPACKED // len(block))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content, compresslevel=1))
    else:
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    assert path.stat().st_size < UNPACKED // 100
    return path


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("compression", table_files.COMPRESSED)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_packed_file_of_prompts_is_refused_before_it_is_unpacked(
    name: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "MOST_ROW_BYTES", ROW_LIMIT)
    monkeypatch.setattr(table_files, "MOST_UNPACKED_BYTES", WHOLE_LIMIT)
    begin, block, words = BEGINNINGS[name]
    path = packed(tmp_path / f"{name}{compression}", begin, block)
    with pytest.raises(DataError, match=words) as refused:
        read_prompts(path)  # what it imports is not counted
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_prompts(path)
        assert tracemalloc.get_traced_memory()[1] < UNPACKED // 8
    finally:
        tracemalloc.stop()


def test_a_long_row_and_a_long_list_are_read(tmp_path: Path) -> None:
    """What people have is far within the limits, here 2 MB."""
    row = {"prompt": "word " * 400_000}
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode(), compresslevel=1))
    assert len(read_prompts(tmp_path / "p.jsonl.gz").prompts) == 1
    (tmp_path / "p.json.gz").write_bytes(
        gzip.compress(json.dumps([row, *({"prompt": f"{i}"} for i in range(4))]).encode(), 1)
    )
    assert len(read_prompts(tmp_path / "p.json.gz").prompts) == 5


@pytest.mark.counts("bad inputs")
def test_archives_of_arrays_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prompt.npy", bytes(1 << 24))
    with pytest.raises(DataError, match=r"prompts.npz: files that end in '.npz' are not read"):
        read_prompts(path)


def repacked(content: bytes) -> bytes:
    """Compress the members of a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return buffer.getvalue()


@pytest.mark.counts("bad inputs")
def test_a_compressed_stream_of_torch_is_refused_before_it_is_unpacked() -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(1 << 20), buffer)
    small = repacked(buffer.getvalue())
    assert len(small) < 1 << 14
    with pytest.raises(ValueError, match="is compressed"):
        object_in(bytearray(small))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts, and in `work` what a judge left of them."""
    root = tmp_path_factory.mktemp("scored")
    random_rollouts(root / "rollouts", num_prompts=2, num_responses=2, rows_per_shard=2)
    (root / "work").mkdir()
    score(root)
    return root


def score(root: Path) -> None:
    score_rollouts(root / "rollouts", pooled_here(load_judge("rules:cyclic")), root / "work", rule="paper")


def promising(content: bytes) -> bytes:
    """Let an archive's logits promise more numbers than any memory holds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            member = source.read(info)
            if info.filename == "judge_logits.npy":
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(
                    header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)}
                )
                member = header.getvalue()
            target.writestr(info.filename, member)
    return buffer.getvalue()


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("bomb", [repacked, promising])
def test_scores_that_would_fill_the_memory_are_judged_again(bomb, scored: Path, tmp_path: Path) -> None:
    shutil.copytree(scored, tmp_path / "scored")
    path = tmp_path / "scored/work/scores-00000.npz"
    whole = path.read_bytes()
    path.write_bytes(bomb(whole))
    score(tmp_path / "scored")
    assert path.read_bytes() == whole
