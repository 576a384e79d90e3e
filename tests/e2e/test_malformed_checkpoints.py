"""Proves: 60 and more malformed Hugging Face models and 40 and more malformed Megatron checkpoints cost one line each.

Every case is a sound checkpoint with one fault. The line on stderr names the file, the tensor where one is meant, and
ends in a remedy; the exit code is 2; nothing is written; no payload runs. The tool's main runs in this process.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints.distcp import read_metadata
from megatron_sppo.checkpoints.megatron_checkpoint import write_manifest
from megatron_sppo.conversion.convert import import_checkpoint
from tests.commands import run_here
from tests.models import tiny_llama

Damage = Callable[[Path], Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
REMEDY = re.compile(
    r"(Fetch|Use|Give|Check|Choose|Import|Save|Put|Leave|Do not use|tools/convert\.py|If you trust it|it must be"
    r"|Weights and config|The weights have more|The (model's )?config is|It is (a checkpoint|damaged)"
    r"|The checkpoint is|upgrade)"
)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: a model in one file and in two; `megatron`: it imported. Cases break copies."""
    root = tmp_path_factory.mktemp("sound")
    tiny_llama(root / "one", dtype="bfloat16")
    shutil.copytree(root / "one", root / "two")
    tensors = load_file(root / "one" / WEIGHTS)
    (root / "two" / WEIGHTS).unlink()
    weight_map = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        names = sorted(tensors)[number - 1 :: 2]
        save_file({name: tensors[name] for name in names}, root / "two" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (root / "two" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    import_checkpoint(root / "one", root / "megatron")
    return root


def refused(arguments: list[str]) -> str:
    """Run the tool -> its last line on stderr, after checking that it is the one line of a refusal."""
    done = run_here("tools/convert.py", *arguments, directory=Path.cwd())
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("convert.py: error: "), done.stderr
    assert REMEDY.search(line), f"no remedy: {line}"
    return line


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the one safetensors file as a dict; its bytes stay."""

    def damage(hf: Path) -> None:
        raw = (hf / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        fields = json.loads(raw[8 : 8 + length])
        changed = change(fields)
        text = changed if isinstance(changed, bytes) else json.dumps(fields).encode()
        (hf / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


def entry(**values: Any) -> Damage:
    """Change fields of one tensor's entry in the header."""
    return header(lambda fields: fields[NORM].update(values) and None)


def without(field: str) -> Damage:
    return header(lambda fields: fields[NORM].pop(field) and None)


def content(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(hf: Path) -> None:
        held = load_file(hf / WEIGHTS)
        change(held)
        save_file(held, hf / WEIGHTS)

    return damage


def config(**values: Any) -> Damage:
    return content("config.json", lambda raw: json.dumps({**json.loads(raw), **values}).encode())


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def edit(raw: bytes) -> bytes:
        value = json.loads(raw)
        changed = change(value["weight_map"])
        return changed if isinstance(changed, bytes) else json.dumps(value).encode()

    return content(INDEX, edit)


def link(name: str) -> Damage:
    """Replace a file by a link to one outside of the model."""

    def damage(hf: Path) -> None:
        os.rename(hf / name, hf.parent / "secret")
        (hf / name).symlink_to("../secret")

    return damage


def pickled(hf: Path) -> None:
    torch.save(Payload(str(hf / "owned")), hf / "pytorch_model.bin")
    (hf / WEIGHTS).unlink()


def overlap(fields: dict[str, Any]) -> None:
    first, second = sorted((f["data_offsets"], n) for n, f in fields.items() if n.endswith("down_proj.weight"))
    fields[second[1]]["data_offsets"] = first[0]


def twice_in_the_header(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields)
    return (text[:-1] + f', "{NORM}": {json.dumps({**fields[NORM], "data_offsets": [0, 128]})}}}').encode()


def repeat_tensor(hf: Path) -> None:
    first, second = load_file(hf / "model-00001-of-00002.safetensors"), hf / "model-00002-of-00002.safetensors"
    name = sorted(first)[0]
    save_file({**load_file(second), name: first[name]}, second)


BIG = 1 << 62
ONE: dict[str, tuple[Damage, str]] = {
    "empty file": (content(WEIGHTS, lambda raw: b""), r"model\.safetensors \(0 bytes\)"),
    "seven bytes": (content(WEIGHTS, lambda raw: raw[:7]), r"model\.safetensors \(7 bytes\)"),
    "header longer than the file": (content(WEIGHTS, lambda raw: BIG.to_bytes(8, "little") + raw[8:]), WEIGHTS),
    "header of 2^64 - 1 bytes": (content(WEIGHTS, lambda raw: b"\xff" * 8 + raw[8:]), WEIGHTS),
    "header of no bytes": (content(WEIGHTS, lambda raw: bytes(8) + raw[8:]), r"damaged header"),
    "header cut short": (content(WEIGHTS, lambda raw: (100).to_bytes(8, "little") + raw[8:]), r"damaged header"),
    "header is no JSON": (header(lambda f: b"{" * 40), r"damaged header"),
    "header is no UTF-8": (header(lambda f: b"\xff\xfe{}"), r"damaged header"),
    "header is a list": (header(lambda f: b"[1]"), r"damaged header"),
    "header is null": (header(lambda f: b"null"), r"damaged header"),
    "header nests without end": (header(lambda f: b'{"a":' * 100_000), r"damaged header"),
    "entry is a string": (header(lambda f: f.update({NORM: "F32"})), r"damaged header"),
    "no dtype": (without("dtype"), r"damaged header.*dtype"),
    "no shape": (without("shape"), r"damaged header.*shape"),
    "no offsets": (without("data_offsets"), r"damaged header.*data_offsets"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), r"damaged header"),
    "offsets reversed": (entry(data_offsets=[128, 0]), r"damaged header"),
    "negative offsets": (entry(data_offsets=[-128, 0]), r"damaged header"),
    "offsets with a fraction": (entry(data_offsets=[0.5, 128.5]), r"damaged header"),
    "offsets that are NaN": (entry(data_offsets=[float("nan"), 128]), r"damaged header"),
    "offsets beyond the file": (entry(data_offsets=[BIG, BIG + 128]), NORM),
    "tensors that overlap": (header(overlap), r"overlap before model\.layers\.\d\.mlp\.down_proj\.weight"),
    "a tensor twice in the header": (header(twice_in_the_header), r"damaged header"),
    "a negative shape": (entry(shape=[-64]), r"damaged header"),
    "a shape of text": (entry(shape="64"), r"damaged header"),
    "a shape that overflows": (entry(shape=[BIG, 4]), r"damaged header"),
    "another shape than the bytes": (entry(shape=[65]), r"damaged header.*65"),
    "another type than the bytes": (entry(dtype="F32"), r"damaged header.*F32"),
    "an unknown type": (entry(dtype="Q4_K"), r"Q4_K"),
    "float8": (entry(dtype="F8_E4M3"), r"F8_E4M3.*unquantized"),
    "whole numbers": (tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int16)})), r"I16"),
    "bytes missing at the end": (content(WEIGHTS, lambda raw: raw[:-10]), r"cut short"),
    "bytes left over at the end": (content(WEIGHTS, lambda raw: raw + b"more"), r"where its header says"),
    "a git-lfs pointer": (content(WEIGHTS, lambda raw: b"version https://git-lfs.github.com/spec/v1"), WEIGHTS),
    "a directory for weights": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), r"neither model\.safe"),
    "weights linked from outside": (link(WEIGHTS), r"model\.safetensors is a link to"),
    "tokenizer linked from outside": (link("tokenizer.json"), r"tokenizer\.json is a link to"),
    "tensor missing": (tensors(lambda t: t.pop(DOWN)), rf"lacks {DOWN}"),
    "tensor unknown": (tensors(lambda t: t.update(ghost=torch.ones(2))), r"holds ghost, for which"),
    "tensor mis-shaped": (tensors(lambda t: t.update({NORM: t[NORM][:63].clone()})), rf"{NORM} of shape \[63\]"),
    "tensor transposed": (tensors(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), rf"{DOWN} of shape \[96, 64\]"),
    "two types in one stack": (tensors(lambda t: t.update({DOWN: t[DOWN].half()})), r"down_proj.*--dtype bfloat16"),
    "adapters beside the weights": (
        tensors(lambda t: t.update({"model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(4, 96)})),
        r"lora_A\.weight.*adapters merged",
    ),
    "an adapter alone": (lambda d: os.rename(d / WEIGHTS, d / "adapter_model.safetensors"), r"neither model\.safe"),
    "pickle alone": (pickled, r"pickle only \(pytorch_model\.bin\)"),
    "GGUF alone": (lambda d: os.rename(d / WEIGHTS, d / "model.gguf"), r"GGUF"),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    "config is no JSON": (content("config.json", lambda raw: raw[:-9]), r"config\.json is not valid JSON"),
    "config is a list": (content("config.json", lambda raw: b"[]"), r"config\.json holds no JSON object"),
    "no family": (config(model_type=None), r"config\.json says model_type None"),
    "another family": (config(model_type="gpt_neox"), r"gpt_neox"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), r"quantization_config"),
    "an epsilon of NaN": (config(rms_norm_eps=float("nan")), r"rms_norm_eps is nan"),
    "an infinite rotary base": (config(rope_parameters={"rope_theta": float("inf")}), r"rope_theta"),
    "layers that are text": (config(num_hidden_layers="2"), r"num_hidden_layers"),
    "no layers": (config(num_hidden_layers=0), r"num_hidden_layers"),
    "a billion layers": (config(num_hidden_layers=10**9), r"1000000000 layers"),
    "more layers than there are": (config(num_hidden_layers=3), r"lacks model\.layers\.2"),
    "fewer layers than there are": (config(num_hidden_layers=1), r"holds model\.layers\.1"),
    "another vocabulary": (config(vocab_size=300), r"embed_tokens\.weight of shape"),
    "heads that do not divide": (config(num_key_value_heads=3), r"num_query_groups"),
    "an odd head": (config(head_dim=7), r"head_dim \(7\) is odd"),
    "biases that are not there": (config(attention_bias=True), r"lacks .*self_attn\.q_proj\.bias"),
    "biases in words": (config(mlp_bias="yes"), r"mlp_bias is 'yes'"),
    "another activation": (config(hidden_act="gelu"), r"hidden_act"),
    "an unknown rotary scaling": (config(rope_parameters={"rope_type": "ntk", "factor": 2.0}), r"'ntk'"),
    "a rotary scaling below 0": (config(rope_parameters={"rope_type": "yarn", "factor": -2.0}), r"factor is -2"),
    "rotary factors of another model": (
        config(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        r"short_factor has 1 numbers for 4 frequencies",
    ),
    "tied in words": (config(tie_word_embeddings="yes"), r"tie_word_embeddings"),
}
TWO: dict[str, tuple[Damage, str]] = {
    "index is no JSON": (content(INDEX, lambda raw: raw[:-9]), r"index\.json is not valid JSON"),
    "index is a list": (content(INDEX, lambda raw: b"[]"), r"no weight_map"),
    "index without a map": (content(INDEX, lambda raw: b"{}"), r"no weight_map"),
    "index with an empty map": (index(lambda m: m.clear()), r"no weight_map"),
    "index maps to a number": (index(lambda m: m.update({NORM: 7})), r"no weight_map"),
    "index leads up": (index(lambda m: m.update({NORM: "../../x.safetensors"})), r"lies outside"),
    "index leads to the root": (index(lambda m: m.update({NORM: "/etc/passwd"})), r"lies outside"),
    "index names the directory": (index(lambda m: m.update({NORM: ""})), r"missing"),
    "index names a NUL": (index(lambda m: m.update({NORM: "a\0b"})), r"missing"),
    "index names the config": (index(lambda m: m.update({NORM: "config.json"})), r"config\.json"),
    "index names the other shard": (
        index(lambda m: m.update(dict.fromkeys(m, "model-00001-of-00002.safetensors"))),
        r"which lacks it",
    ),
    "index names a tensor that is nowhere": (
        index(lambda m: m.update(ghost="model-00001-of-00002.safetensors")),
        r"ghost is in",
    ),
    "shard missing": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), r"00002-of-00002.*missing"),
    "shard linked from outside": (link("model-00002-of-00002.safetensors"), r"is a link to"),
    "tensor in both shards": (repeat_tensor, r"another shard has it too"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("case", [("one", name) for name in ONE] + [("two", name) for name in TWO], ids=lambda c: c[1])
def test_a_malformed_model_is_refused(
    case: tuple[str, str],
    sound: Path,
    tmp_path: Path,
) -> None:
    base, name = case
    damage, named = (ONE if base == "one" else TWO)[name]
    shutil.copytree(sound / base, tmp_path / "hf")
    damage(tmp_path / "hf")
    before = listing(tmp_path)
    line = refused(["import", "--hf", f"{tmp_path}/hf", "--megatron", f"{tmp_path}/new"])
    assert re.search(named, line), line
    assert listing(tmp_path) == before


def iteration(damage: Damage, *, sign: bool = True) -> Damage:
    """Damage the iteration directory; with `sign`, by someone who writes a fitting manifest afterwards."""

    def whole(root: Path) -> None:
        directory = root / "iter_0000000"
        damage(directory)
        if sign:
            (directory / "manifest.json").unlink()
            write_manifest(directory)

    return whole


def metadata(change: Callable[[Any], object]) -> Damage:
    """Change `.metadata` as an object, or replace its bytes."""

    def damage(directory: Path) -> None:
        value = read_metadata(directory)
        changed = change(value)
        (directory / ".metadata").write_bytes(changed if isinstance(changed, bytes) else pickle.dumps(value))

    return iteration(damage)


def described(change: Callable[[Any], object]) -> Damage:
    """Change what `.metadata` says of the stacked down projections."""
    return metadata(lambda m: change(m.state_dict_metadata[FC2]) and None)


def places(change: Callable[[Any], object]) -> Damage:
    """Change where `.metadata` says that the chunks lie."""
    return metadata(lambda m: [change(info) for info in m.storage_data.values()] and None)


def chunk(make: Callable[[torch.Tensor], Any]) -> Damage:
    """Put something else in place of one chunk of the down projections, at the end of the file."""

    def damage(directory: Path) -> None:
        value = read_metadata(directory)
        info = next(s for i, s in value.storage_data.items() if i.fqn == FC2 and i.offset[0] == 1)
        path = directory / info.relative_path
        raw = path.read_bytes()
        (directory / "x").write_bytes(raw[info.offset : info.offset + info.length])
        held = torch.load(directory / "x", weights_only=True)
        torch.save(make(held), directory / "x")
        added = (directory / "x").read_bytes()
        (directory / "x").unlink()
        path.write_bytes(raw + added)
        info.offset, info.length = len(raw), len(added)
        (directory / ".metadata").write_bytes(pickle.dumps(value))

    return iteration(damage)


def architecture(**values: Any) -> Damage:
    def edit(raw: bytes) -> bytes:
        model = json.loads(raw)
        model["architecture"] |= values
        return json.dumps(model).encode()

    return iteration(content("model.json", edit))


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def edit(raw: bytes) -> bytes:
        value = json.loads(raw)
        changed = change(value)
        return changed if isinstance(changed, bytes) else json.dumps(value).encode()

    return iteration(content("manifest.json", edit), sign=False)


def flip(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


def tracker(text: str) -> Damage:
    """Let the tracker say `text` where no iteration is left to fall back on."""

    def damage(root: Path) -> None:
        (root / "latest_checkpointed_iteration.txt").write_text(text)
        shutil.rmtree(root / "iter_0000000")

    return damage


FC2, DATA = "decoder.layers.mlp.linear_fc2.weight", "__0_0.distcp"
UNSIGNED: dict[str, tuple[Damage, str]] = {
    f"bit flipped in {name}": (
        iteration(content(name, flip), sign=False),
        rf"{re.escape(name)} is not what was written",
    )
    for name in (DATA, ".metadata", "model.json", "hf/config.json", "hf/tokenizer.json")
}
MEGATRON: dict[str, tuple[Damage, str]] = {
    **UNSIGNED,
    "an empty root": (lambda d: (shutil.rmtree(d), d.mkdir()), r"no usable Megatron checkpoint"),
    "a file for a root": (lambda d: (shutil.rmtree(d), d.write_text("x")), r"is not a directory"),
    "tracker empty, nothing there": (tracker(""), r"is empty"),
    "tracker garbage, nothing there": (tracker("\x00??"), r"which is no iteration"),
    "tracker leads out": (tracker("../../etc"), r"which is no iteration"),
    "tracker ahead, nothing there": (tracker("7"), r"says 7"),
    "release missing": (tracker("release"), r"says release"),
    "never finished": (
        lambda d: ((d / "iter_0000000/.metadata").unlink(), (d / "iter_0000000/manifest.json").unlink()),
        r"no usable Megatron checkpoint",
    ),
    "weights missing": (iteration(lambda d: (d / DATA).unlink(), sign=False), rf"{DATA} is missing"),
    "weights cut short": (iteration(content(DATA, lambda raw: raw[:999]), sign=False), r"has 999 bytes"),
    "weights prolonged": (iteration(content(DATA, lambda raw: raw + b"x"), sign=False), r"bytes, not"),
    "manifest no JSON": (manifest(lambda m: b"{"), r"manifest\.json is not valid JSON"),
    "manifest a list": (manifest(lambda m: b"[]"), r"manifest\.json lists no files"),
    "manifest of another version": (manifest(lambda m: m.update(schema_version=9)), r"lists no files"),
    "manifest without .metadata": (manifest(lambda m: m["files"].pop(".metadata")), r"does not list \.metadata"),
    "manifest without the weights": (manifest(lambda m: m["files"].pop(DATA)), rf"{DATA} is not in manifest"),
    "manifest lies about a size": (manifest(lambda m: m["files"][DATA].update(bytes=5)), r"bytes, not 5"),
    "manifest with a text for an entry": (manifest(lambda m: m["files"].update({DATA: "x"})), rf"{DATA} is not in"),
    "manifest with a number for a hash": (manifest(lambda m: m["files"][DATA].update(sha256=5)), r"sha256 differs"),
    ".metadata names a file that is not there": (
        places(lambda s: setattr(s, "relative_path", "x.distcp")),
        r"x\.distcp is not in manifest",
    ),
    "without a manifest, the weights are missing": (
        iteration(lambda d: ((d / DATA).unlink(), (d / "manifest.json").unlink()), sign=False),
        rf"{DATA}, which is missing",
    ),
    ".metadata empty": (metadata(lambda m: b""), r"\.metadata is damaged"),
    ".metadata cut short": (metadata(lambda m: pickle.dumps(m)[:-50]), r"\.metadata is damaged"),
    ".metadata is no metadata": (metadata(lambda m: pickle.dumps({"a": 1})), r"no metadata inside"),
    ".metadata runs code": (metadata(lambda m: pickle.dumps(Payload("owned"))), r"posix\.mkdir.*Do not use"),
    ".metadata runs code inside": (
        metadata(lambda m: m.state_dict_metadata.update(x=Payload("owned"))),
        r"posix\.mkdir.*Do not use",
    ),
    ".metadata leads out": (places(lambda s: setattr(s, "relative_path", "../x.distcp")), r"lies outside"),
    ".metadata leads to the root": (places(lambda s: setattr(s, "relative_path", "/etc/passwd")), r"lies outside"),
    ".metadata names no place": (metadata(lambda m: m.storage_data.clear()), r"is in no file"),
    "places beyond the file": (places(lambda s: setattr(s, "offset", BIG)), r"is damaged"),
    "places that are text": (places(lambda s: setattr(s, "offset", "0")), r"no possible place for"),
    "files that are numbers": (places(lambda s: setattr(s, "relative_path", 0)), r"no possible place for"),
    "places of no length": (places(lambda s: setattr(s, "length", 0)), r"is damaged"),
    "a key missing": (metadata(lambda m: m.state_dict_metadata.pop(FC2) and None), rf"lacks {FC2}"),
    "a key unknown": (
        metadata(lambda m: m.state_dict_metadata.update({"decoder.ghost": m.state_dict_metadata[FC2]})),
        r"decoder\.ghost",
    ),
    "a shard of a key missing": (described(lambda t: t.chunks.pop()), rf"values of {FC2}"),
    "another global shape": (described(lambda t: setattr(t, "size", torch.Size([3, 64, 96]))), rf"{FC2} of shape"),
    "a smaller global shape": (described(lambda t: setattr(t, "size", torch.Size([1, 64, 96]))), rf"{FC2} in a way"),
    "a negative global shape": (described(lambda t: setattr(t, "size", (-2, 64, 96))), rf"{FC2} in a way"),
    "another number of axes": (described(lambda t: setattr(t, "size", torch.Size([2, 6144]))), rf"{FC2} in a way"),
    "another type in .metadata": (
        described(lambda t: setattr(t.properties, "dtype", torch.float16)),
        rf"{FC2} at .* is torch\.bfloat16",
    ),
    "no type in .metadata": (described(lambda t: setattr(t.properties, "dtype", "float16")), rf"{FC2} in a way"),
    "a chunk of another shape": (chunk(lambda t: t[:, :10].clone()), rf"{FC2} at .* is not of shape"),
    "a chunk of another type": (chunk(lambda t: t.float()), rf"{FC2} at .* is torch\.float32"),
    "a chunk that is no tensor": (chunk(lambda t: {"a": 1}), rf"{FC2} at .* is not of shape"),
    "a chunk that runs code": (chunk(lambda t: Payload("owned")), rf"{FC2} at .* is damaged"),
    "zarr": (iteration(content("metadata.json", lambda raw: b'{"sharded_backend": "zarr"}')), r"zarr.*torch_dist"),
    "metadata.json no JSON": (iteration(content("metadata.json", lambda raw: b"{")), r"metadata\.json is not valid"),
    "metadata.json a list": (iteration(content("metadata.json", lambda raw: b"[]")), r"sharded_backend None"),
    "model.json missing": (iteration(lambda d: (d / "model.json").unlink()), r"model\.json.*--template"),
    "model.json no JSON": (iteration(content("model.json", lambda raw: raw[:-5])), r"model\.json is not valid JSON"),
    "model.json of another version": (iteration(content("model.json", lambda raw: b"{}")), r"schema version"),
    "model.json with a new field": (architecture(colour="red"), r"colour.*upgrade"),
    "model.json of another family": (architecture(family="gpt"), r"'gpt'"),
    "model.json with more layers": (architecture(num_layers=3), r"another model"),
    "model.json with a billion layers": (architecture(num_layers=10**9), r"too few for 1000000000 layers"),
    "model.json with text for a number": (architecture(hidden_size="64"), r"model\.json does not describe a model"),
    "carried config of another model": (
        iteration(content("hf/config.json", lambda raw: raw.replace(b"1e-05", b"0.1"))),
        r"hf/config\.json describes another model",
    ),
    "carried layout damaged": (iteration(content("hf/layout.json", lambda raw: b"{}")), r"layout\.json"),
    "carried layout leads out": (
        iteration(content("hf/layout.json", lambda raw: raw.replace(b"model.safetensors", b"../x.safetensors"))),
        r"lies outside",
    ),
    "carried layout no header": (
        iteration(content("hf/layout.json", lambda raw: b'{"files": {"model.safetensors": "!!"}, "index": null}')),
        r"layout\.json",
    ),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("name", MEGATRON)
def test_a_malformed_megatron_checkpoint_is_refused(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, named = MEGATRON[name]
    shutil.copytree(sound / "megatron", tmp_path / "megatron")
    damage(tmp_path / "megatron")
    monkeypatch.chdir(tmp_path)  # where a payload would make its directory
    before = listing(tmp_path)
    line = refused(["export", "--megatron", f"{tmp_path}/megatron", "--hf", f"{tmp_path}/new"])
    assert re.search(named, line), line
    assert listing(tmp_path) == before


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(ONE) + len(TWO) >= 60
    assert len(MEGATRON) >= 40
