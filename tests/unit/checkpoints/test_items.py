"""Proves: an item of a data file is read once and checked by its own digest; what has none is told.

Loads by several ranks are in tests/distributed/test_verified_load.py.
"""

import hashlib
import io
import random
from pathlib import Path

import pytest
import torch

from megatron_sppo.checkpoints.digests import ItemDigests
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.megatron_checkpoint import MANIFEST_FILE, write_manifest
from megatron_sppo.checkpoints.torch_streams import object_in
from megatron_sppo.errors import DataError
from tests.file_layer import counted

CONTENT = [random.Random(number).randbytes(1000 * number + 1) for number in range(4)]
PLACES = [(sum(map(len, CONTENT[:number])), len(CONTENT[number])) for number in range(4)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files of the same items, the second without digests, and a manifest over all."""
    digests = ItemDigests()
    for content in CONTENT:
        digests.update(content)
        digests.end_item()
    for name in ("a.distcp", "b.distcp"):
        (tmp_path / name).write_bytes(b"".join(CONTENT))
    digests.write(tmp_path / "a.distcp")
    (tmp_path / ".metadata").write_bytes(b"x")
    write_manifest(tmp_path)
    return tmp_path


def test_each_item_is_read_and_hashed_once_and_nothing_else_of_its_file(directory: Path) -> None:
    items = Items(directory)
    assert items.without_digests(["a.distcp", "b.distcp"]) == ["b.distcp"]
    items.digests("a.distcp")
    with counted() as counts:
        assert [bytes(raw) for raw in items.read("a.distcp", [PLACES[3], PLACES[1]])] == [CONTENT[3], CONTENT[1]]
    assert counts.hashed == 3001 + 1001
    assert 3001 + 1001 <= counts.read < 3001 + 1001 + 500  # and /proc/self/io


def test_any_flipped_bit_in_an_item_or_in_the_digests_is_found(directory: Path) -> None:
    generator = random.Random(0)
    for name in ("a.distcp", "a.digests"):
        whole = (directory / name).read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            (directory / name).write_bytes(damaged)
            with pytest.raises(DataError, match=rf"{name[:-1]}.*is not what was written"):
                list(Items(directory).read("a.distcp", PLACES))
        (directory / name).write_bytes(whole)
    list(Items(directory).read("a.distcp", PLACES))


def test_what_is_no_item_or_lies_elsewhere_is_refused(directory: Path) -> None:
    with pytest.raises(DataError, match="lists no item of 7 bytes at 3"):
        list(Items(directory).read("a.distcp", [(3, 7)]))
    with pytest.raises(DataError, match="beyond its end"):
        list(Items(directory).read("b.distcp", [(0, 1 << 40)]))
    with pytest.raises(DataError, match="outside"):
        list(Items(directory).read("../a.distcp", [(0, 1)]))
    (directory / "a.digests").unlink()
    with pytest.raises(DataError, match=r"a\.digests is missing"):
        list(Items(directory).read("a.distcp", PLACES))


def test_without_a_manifest_nothing_can_be_checked(directory: Path) -> None:
    (directory / MANIFEST_FILE).unlink()
    items = Items(directory)
    assert items.without_digests(["a.distcp", "b.distcp"]) == [] and items.digests("a.distcp") is None
    assert [hashlib.sha256(raw).digest() for raw in items.read("a.distcp", PLACES)] == [
        hashlib.sha256(content).digest() for content in CONTENT
    ]


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4)[:, 1:3],
        torch.zeros(0, 3),
        torch.tensor(5.0),
        torch.arange(6).bfloat16(),
        torch.nn.Parameter(torch.ones(3)),
        [torch.ones(2), None, {"a": 1}],
    ],
    ids=["rows", "columns", "empty", "number", "bfloat16", "parameter", "container"],
)
def test_a_stream_holds_what_was_saved(value: object) -> None:
    stream = io.BytesIO()
    torch.save(value, stream)
    found = object_in(bytearray(stream.getvalue()))
    torch.testing.assert_close(found, value, rtol=0, atol=0)


def test_a_plain_tensor_is_not_copied() -> None:
    stream = io.BytesIO()
    torch.save(torch.arange(1000), stream)
    raw = bytearray(stream.getvalue())
    found = object_in(raw)
    found[7] = -1
    assert (-1).to_bytes(8, "little", signed=True) in bytes(raw)
