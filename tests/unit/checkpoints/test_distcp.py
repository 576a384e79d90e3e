"""Proves: our files are read by torch.distributed.checkpoint itself and its files by us, box by box; no pickle runs."""

import enum
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_sppo.checkpoints.digests import read_digests
from megatron_sppo.checkpoints.distcp import DistcpReader, check_metadata, read_metadata
from megatron_sppo.checkpoints.distcp_writer import Piece, write_distcp
from megatron_sppo.errors import ConversionError, DataError

STACKED = torch.arange(3 * 4 * 5, dtype=torch.float32).reshape(3, 4, 5)
ROWS = torch.randn(7, 2).to(torch.bfloat16)


def write(directory: Path) -> Path:
    """Write a stacked tensor layer by layer and a plain one in two pieces."""
    directory.mkdir()
    pieces = [
        Piece(
            key="stacked",
            offsets=(layer, 0, 0),
            sizes=(1, 4, 5),
            global_shape=(3, 4, 5),
            dtype=torch.float32,
            values=lambda layer=layer: STACKED[layer],
        )
        for layer in range(3)
    ]
    for start, stop in ((0, 4), (4, 7)):
        pieces.append(
            Piece(
                key="rows",
                offsets=(start, 0),
                sizes=(stop - start, 2),
                global_shape=(7, 2),
                dtype=torch.bfloat16,
                values=lambda start=start, stop=stop: ROWS[start:stop],
            )
        )
    seen: list[int] = []
    write_distcp(directory, pieces, objects={"module._extra_state/shard_0_3": None}, progress=seen.append)
    assert seen == [80, 80, 80, 16, 12]
    return directory


def test_torchs_own_reader_loads_what_we_write(tmp_path: Path) -> None:
    directory = write(tmp_path / "c")
    state: dict[str, Any] = {"stacked": torch.zeros(3, 4, 5), "rows": torch.zeros(7, 2, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    assert torch.equal(state["stacked"], STACKED)
    assert torch.equal(state["rows"], ROWS)


def test_boxes_of_what_torch_writes_are_exact(tmp_path: Path) -> None:
    dcp.save({"stacked": STACKED, "note": {"x": 1}}, checkpoint_id=tmp_path / "c", no_dist=True)
    reader = DistcpReader.open(tmp_path / "c")
    assert reader.shapes() == {"stacked": (3, 4, 5)}
    assert torch.equal(reader.read("stacked", (1, 1, 0), (1, 2, 5)), STACKED[1:2, 1:3])
    assert torch.equal(reader.read("stacked", (0, 0, 0), (3, 4, 5)), STACKED)


def test_a_box_over_several_pieces_is_put_together(tmp_path: Path) -> None:
    reader = DistcpReader.open(write(tmp_path / "c"))
    assert torch.equal(reader.read("rows", (2, 0), (4, 2)), ROWS[2:6])
    assert torch.equal(reader.read("stacked", (0, 2, 1), (3, 2, 3)), STACKED[:, 2:4, 1:4])
    assert reader.dtype("rows") == torch.bfloat16
    assert reader.files(["rows"]) == ["__0_0.distcp"]


def test_a_box_that_the_pieces_do_not_cover_is_refused(tmp_path: Path) -> None:
    reader = DistcpReader.open(write(tmp_path / "c"))
    del reader.metadata.state_dict_metadata["rows"].chunks[1]
    with pytest.raises(ConversionError, match="8 of 14 values of rows"):
        reader.read("rows", (0, 0), (7, 2))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: [p], lambda p: {"state_dict_metadata": p}])
def test_a_payload_in_the_metadata_is_not_run(tmp_path: Path, wrap: Any) -> None:
    directory = write(tmp_path / "c")
    (directory / ".metadata").write_bytes(pickle.dumps(wrap(Payload(tmp_path / "owned"))))
    with pytest.raises(ConversionError, match=r"mkdir.*Do not use"):
        read_metadata(directory)
    assert not (tmp_path / "owned").exists()


def test_a_payload_in_place_of_a_tensor_is_not_run(tmp_path: Path) -> None:
    directory = write(tmp_path / "c")
    reader = DistcpReader.open(directory)
    torch.save(Payload(tmp_path / "owned"), directory / "__0_0.distcp")
    size = (directory / "__0_0.distcp").stat().st_size
    for info in reader.metadata.storage_data.values():
        info.offset, info.length = 0, size
    with pytest.raises(ConversionError, match="damaged"):
        reader.read("rows", (0, 0), (4, 2))
    assert not (tmp_path / "owned").exists()


def test_a_payload_in_the_common_state_is_not_run(tmp_path: Path) -> None:
    directory = write(tmp_path / "c")
    torch.save({"iteration": 0}, directory / "common.pt")
    check_metadata(directory)
    torch.save({"iteration": Payload(tmp_path / "owned")}, directory / "common.pt")
    with pytest.raises(DataError, match="holds more than data"):
        check_metadata(directory)
    assert not (tmp_path / "owned").exists()


def test_digests_made_while_writing_are_those_of_the_items(tmp_path: Path) -> None:
    large = torch.randn(300, 1000)
    piece = Piece(
        key="large",
        offsets=(0, 0),
        sizes=(300, 1000),
        global_shape=(300, 1000),
        dtype=torch.float32,
        values=lambda: large,
    )
    write_distcp(tmp_path, [piece], objects={"x": None}, progress=lambda nbytes: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metadata", "__0_0.digests", "__0_0.distcp"]
    content, found = (tmp_path / "__0_0.distcp").read_bytes(), read_digests(tmp_path / "__0_0.distcp")
    assert found.bytes == len(content)
    places = read_metadata(tmp_path).storage_data.values()
    assert [item[:2] for item in found.items] == sorted((place.offset, place.length) for place in places)
    for offset, length, digest in found.items:
        assert hashlib.sha256(content[offset : offset + length]).hexdigest() == digest


@pytest.mark.parametrize("module", ["builtins eval", "os system", "torch load", "torch.serialization load"])
def test_no_other_global_is_ever_looked_up(tmp_path: Path, module: str) -> None:
    name, attribute = module.split()
    (tmp_path / ".metadata").write_bytes(f"c{name}\n{attribute}\n.".encode())
    with pytest.raises(ConversionError, match=r"Do not use"):
        read_metadata(tmp_path)


class OlderPickler(pickle.Pickler):
    """Pickles members of an enumeration as Python 3.11.0 to 3.11.3 does (enum.Enum.__reduce_ex__)."""

    def reducer_override(self, found: Any) -> Any:
        return (getattr, (type(found), found.name)) if isinstance(found, enum.Enum) else NotImplemented


def test_members_of_enumerations_are_read_as_older_pythons_pickle_them(tmp_path: Path) -> None:
    """What Debian 12's Python has written, Megatron-Core's own files among it."""
    content = read_metadata(write(tmp_path / "c"))
    with open(tmp_path / "c/.metadata", "wb") as file:
        OlderPickler(file).dump(content)
    assert b"getattr" in (tmp_path / "c/.metadata").read_bytes()
    assert read_metadata(tmp_path / "c") == content


NO_MEMBER = r"asks for an attribute of .*Do not use"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Metadata, "__init__", NO_MEMBER),
        (torch.Size, "numel", NO_MEMBER),
        (torch.float32, "to_complex", NO_MEMBER),
        ("text", "format", NO_MEMBER),
        (WriteItemType, "__class__", "damaged"),
    ],
)
def test_of_nothing_else_an_attribute_is_looked_up(tmp_path: Path, kind: Any, name: str, words: str) -> None:
    class Asking:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (kind, name)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Asking()))
    with pytest.raises(ConversionError, match=words):
        read_metadata(tmp_path)


def test_damaged_metadata_is_one_line(tmp_path: Path) -> None:
    whole = (write(tmp_path / "c") / ".metadata").read_bytes()
    for length in range(0, len(whole) - 1, 37):
        (tmp_path / "c" / ".metadata").write_bytes(whole[:length])
        with pytest.raises(ConversionError) as caught:
            read_metadata(tmp_path / "c")
        assert "\n" not in str(caught.value)


def test_a_named_file_that_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "c")
    check_metadata(directory)
    content = read_metadata(directory)
    for info in content.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (directory / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="outside"):
        check_metadata(directory)
    with pytest.raises(DataError, match="outside"):
        DistcpReader.open(directory).read("rows", (0, 0), (4, 2))
    write(tmp_path / "d")
    (tmp_path / "d" / "__0_0.distcp").unlink()
    with pytest.raises(DataError, match=r"lacks __0_0\.distcp"):
        check_metadata(tmp_path / "d")


def test_a_truncated_file_is_one_line_with_the_tensors_name(tmp_path: Path) -> None:
    directory = write(tmp_path / "c")
    whole = (directory / "__0_0.distcp").read_bytes()
    (directory / "__0_0.distcp").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="rows at") as caught:
        DistcpReader.open(directory).read("rows", (0, 0), (7, 2))
    assert "\n" not in str(caught.value)
