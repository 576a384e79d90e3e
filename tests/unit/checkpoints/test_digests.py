"""Proves: digests name exactly the ranges that make up the file, each byte hashed once; damage is told."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest

from megatron_sppo.checkpoints.digests import (
    BLOCK_BYTES,
    DigestingStream,
    ItemDigests,
    digests_path,
    read_digests,
)
from megatron_sppo.errors import DataError
from tests.file_layer import counted

ITEMS = [random.Random(1).randbytes(size) for size in (5, BLOCK_BYTES, 2 * BLOCK_BYTES + 3, 0, 64)]


def written(path: Path) -> bytes:
    with open(path, "wb", buffering=0) as file, counted() as counts:
        digests = ItemDigests()
        for item in ITEMS:
            with DigestingStream(file, digests) as stream:
                stream.write(item[:2])
                stream.write(memoryview(item)[2:])
    digests.write(path)
    assert counts.hashed == sum(map(len, ITEMS))
    return path.read_bytes()


def test_items_have_the_sha256_of_what_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    content = written(path)
    assert content == b"".join(ITEMS)
    found = read_digests(path)
    assert found.bytes == len(content)
    assert [item.length for item in found.items] == [len(item) for item in ITEMS]
    for offset, length, sha256 in found.items:
        assert sha256 == hashlib.sha256(content[offset : offset + length]).hexdigest()
        if length:
            found.check(path, offset=offset, length=length, found=sha256)
    with counted() as counts:
        found.check_file(path)
    assert counts.hashed == len(content) <= counts.read < len(content) + 500  # and /proc/self/io


def test_a_file_that_is_not_made_of_its_items_is_told(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    content = written(path)
    found = read_digests(path)
    for _ in range(20):
        damaged = bytearray(content)
        damaged[random.Random(2).randrange(len(content))] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is not what was written"):
            found.check_file(path)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="is not what was written"):
        found.check_file(path)
    for other in (content + b"x", content):
        path.write_bytes(other)
        fewer = found.items if other != content else found.items[1:]
        with pytest.raises(DataError, match=r"__0_0\.digests does not list all of __0_0\.distcp"):
            dataclasses.replace(found, items=fewer).check_file(path)


def test_digests_of_before_with_the_whole_file_s_sha256_are_read(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    content = written(path)
    beside = digests_path(path)
    before = {"schema_version": 1, "sha256": hashlib.sha256(content).hexdigest()}
    beside.write_text(json.dumps(json.loads(beside.read_text()) | before))
    read_digests(path).check_file(path)


def test_the_file_beside_has_the_name_of_the_data(tmp_path: Path) -> None:
    assert digests_path(tmp_path / "__3_1.distcp") == tmp_path / "__3_1.digests"


def test_a_wrong_digest_and_a_range_that_is_no_item_are_told(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    written(path)
    found = read_digests(path)
    with pytest.raises(DataError, match=r"__0_0\.distcp is not what was written \(sha256 of the 5 bytes at 0 differs"):
        found.check(path, offset=0, length=5, found=64 * "0")
    with pytest.raises(DataError, match=r"__0_0\.digests lists no item of 4 bytes at 1\. The checkpoint is damaged"):
        found.check(path, offset=1, length=4, found=64 * "0")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 3},
        {"bytes": -1},
        {"items": [[0, 5]]},
        {"items": [[0, 5, 64 * "g"]]},
    ],
)
def test_digests_that_are_damaged_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "__0_0.distcp"
    written(path)
    beside = digests_path(path)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    with pytest.raises(DataError, match=r"__0_0\.digests: .* The checkpoint is damaged: use another one\."):
        read_digests(path)


def test_digests_that_are_missing_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"__0_0\.digests does not exist"):
        read_digests(tmp_path / "__0_0.distcp")
