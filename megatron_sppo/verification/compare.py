"""Two models held against each other, each a Hugging Face directory or a Megatron checkpoint: every difference, named.

`verify` asks whether one model is the other, and ends at what is not a model. Here either side may lack tensors, have
others, or be of a family for which there is no table: what a converter lost silently is what is looked for.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp import METADATA_FILE
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, GENERATION_FILE, read_config
from megatron_sppo.checkpoints.megatron_checkpoint import ITERATION_PATTERN, TRACKER_FILE, resolve_checkpoint
from megatron_sppo.checkpoints.safetensors_file import read_tensor
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.conversion.binding import Binding
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.megatron_model import OpenedMegatron, different_fields, key_faults, open_megatron
from megatron_sppo.conversion.sources import open_source
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.verification.logits import Model, compare_models, logit_faults, logit_summary
from megatron_sppo.verification.probes import compare_texts, prompt_token_ids

SCHEMA_VERSION = 1

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SAYS_NOTHING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that programs write of themselves, or that say what the tensors say."""
_BESIDE_ARCHITECTURE = ("bos_token_id", "eos_token_id", "pad_token_id", "architectures")
"""Keys of it that say more than an `Architecture` holds."""
_CHUNK_VALUES = 1 << 22

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models, opened."""

    path: Path
    opened: OpenedMegatron | None
    """Of a Megatron checkpoint."""
    architecture: Architecture | None
    """None: of a Hugging Face directory for whose family there is no table."""
    files: Path | None
    """Where its config.json and tokenizer lie; None: it carries none."""
    tensors: Mapping[str, tuple[torch.dtype, Shape]]
    """By Hugging Face's names."""
    read: Callable[[str], Tensor]
    faults: tuple[str, ...] = ()
    """What it holds that has no name of Hugging Face's."""

    @property
    def kind(self) -> str:
        return "Hugging Face" if self.opened is None else "Megatron"

    @property
    def config(self) -> dict[str, Any]:
        """config.json's content; {} where there is none."""
        return read_config(self.files) if self.files is not None else {}


def compare(
    one: Path, other: Path, *, prompts: Path | None = None, logits: bool = True, layerwise: bool | None = None
) -> dict[str, Any]:
    """Compare two models -> report, whose `differences` (sentences) are empty where they are one.

    Args:
        one, other: Hugging Face directory, root of a Megatron checkpoint, or one iteration directory. A Megatron
            checkpoint without model.json is read as the model of the other side's config.json.
        prompts: as in `verify`.
        logits: run both on prompts too, where neither lacks a tensor.
        layerwise: as in `verify`.

    Raises:
        ConversionError, DataError: one of the two cannot be read.
    """
    one, other = Path(one), Path(other)
    sides = _open(one, template=other), _open(other, template=one)
    tensors = _compare_tensors(*sides)
    report = {
        "schema_version": SCHEMA_VERSION,
        "one": {"path": str(one), "kind": sides[0].kind},
        "other": {"path": str(other), "kind": sides[1].kind},
        "settings": _compare_settings(*sides),
        "tensors": tensors,
        "tokenizer": _compare_tokenizers(*sides),
        "logits": None,
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        | {"python": platform.python_version()},
    }
    # Of weights that are absent or of another shape transformers makes up new ones, which are no model to compare with.
    if logits and not any(side.faults for side in sides) and not _is_incomplete(tensors):
        report["logits"] = _compare_logits(sides, prompts=prompts, layerwise=layerwise)
    faults = [f"{side.path} {fault}" for side in sides for fault in side.faults]
    return {**report, "differences": faults + _differences(report)}


def summary(report: dict[str, Any]) -> Iterator[str]:
    """Word a report for people -> lines: every difference, then what was compared."""
    yield from report["differences"]
    tensors, tokenizer = report["tensors"], report["tokenizer"]
    yield f"{tensors['equal']} of {tensors['compared']} tensors are equal bit for bit"
    for name, reason in tensors["left_out"].items():
        yield f"left out: {name} ({reason})"
    if tokenizer is None or not tokenizer["probes"]:
        yield "tokenizers: not compared, for one side carries none"
    else:
        same = tokenizer["probes"] - len(tokenizer["different_probes"])
        yield f"tokenizers: {same} of {tokenizer['probes']} probes are the same"
    yield logit_summary(report["logits"]) if report["logits"] else "logits: not compared"


def _open(path: Path, *, template: Path) -> Side:
    if _is_megatron(path):
        return _open_megatron(path, template=template)
    config = read_config(path)
    source = open_source(path)
    try:
        architecture = architecture_from_hf(config, place=str(path / CONFIG_FILE))
    except ConversionError:
        architecture = None  # transformers may know it all the same
    return Side(
        path=path,
        opened=None,
        architecture=architecture,
        files=path,
        tensors={name: (entry.dtype, entry.shape) for name, entry in source.entries.items()},
        read=source.read,
    )


def _is_megatron(path: Path) -> bool:
    return (
        (path / TRACKER_FILE).is_file()
        or (path / METADATA_FILE).is_file()
        or next(path.glob(ITERATION_PATTERN), None) is not None
    )


def _open_megatron(path: Path, *, template: Path) -> Side:
    needs_template = not (resolve_checkpoint(path, weights_only=True) / MODEL_FILE).is_file()
    if needs_template and _is_megatron(template):
        raise ConversionError(
            f"{path} has no {MODEL_FILE} that says what model it holds. Compare it with a Hugging Face directory."
        )
    opened = open_megatron(path, template=template if needs_template else None, any_keys=True)
    faults = key_faults(opened)
    absent = {*faults.missing, *faults.misshapen}
    usable = [one for one in opened.bindings if opened.key_of(one) not in absent]
    places = {name: binding for binding in usable for name in binding.hf_shapes}
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name in opened.carried:
            return read_tensor(opened.carried[name])
        if name not in last:  # a Megatron tensor holds several of Hugging Face's, which are asked for in a row
            last.clear()
            last.update(opened.read(places[name]))
        return last[name]

    return Side(
        path=path,
        opened=opened,
        architecture=opened.architecture,
        files=opened.side_files,
        tensors={name: _described(opened, binding, name) for name, binding in places.items()}
        | {name: (entry.dtype, entry.shape) for name, entry in opened.carried.items()},
        read=read,
        faults=(
            *(f"lacks {key}" for key in faults.missing),
            *(f"holds {key} of shape {list(a)}, not {list(b)}" for key, (a, b) in faults.misshapen.items()),
            *(f"holds {key}, which the family {opened.architecture.family!r} has not" for key in faults.unknown),
        ),
    )


def _described(opened: OpenedMegatron, binding: Binding, name: str) -> tuple[torch.dtype, Shape]:
    return opened.dtype(binding), tuple(binding.hf_shapes[name])


def _compare_tensors(one: Side, other: Side) -> dict[str, Any]:
    """Compare all tensors by name, shape, type and bits, one pair in memory at a time."""
    left_out = {**_copies(one, other), **_copies(other, one)}
    names = [name for name in dict.fromkeys((*one.tensors, *other.tensors)) if name not in left_out]
    different = []
    for name in tqdm(names, desc="tensors", unit="tensor", disable=None):
        if found := _difference(name, one, other):
            different.append({"name": name, **found})
    return {
        "compared": len(names),
        "equal": len(names) - len(different),
        "different": different,
        "left_out": left_out,
    }


def _copies(one: Side, other: Side) -> dict[str, str]:
    """Find what only one side holds and what holds no weights of its own -> {name: why}."""
    ignored: tuple[str, ...] = ()
    if one.architecture is not None:
        ignored = tuple(family_of(one.architecture.family, place=str(one.path)).ignored)
    only = [name for name in one.tensors if name not in other.tensors]
    found = {name: "a buffer that is computed" for name in only if ignored and name.endswith(ignored)}
    if _OUTPUT in only and _EMBEDDING in one.tensors and one.read(_OUTPUT).equal(one.read(_EMBEDDING)):
        tied = other.architecture is not None and other.architecture.share_embeddings_and_output_weights
        if tied or other.config.get("tie_word_embeddings"):
            found[_OUTPUT] = f"a copy of {_EMBEDDING}, which the other side takes for both"
    return found


def _difference(name: str, one: Side, other: Side) -> dict[str, Any] | None:
    """Compare one tensor -> what differs, or None."""
    for side, absent in ((one, other), (other, one)):
        if name not in absent.tensors:
            kind, shape = side.tensors[name]
            return {"kind": "missing", "in": str(absent.path), "dtype": _spelled(kind), "shape": list(shape)}
    (kind, shape), (other_kind, other_shape) = one.tensors[name], other.tensors[name]
    if shape != other_shape:
        return {"kind": "shape", "one": list(shape), "other": list(other_shape)}
    values = _compare_values(one.read(name), other.read(name))
    if kind != other_kind:
        return {"kind": "dtype", "one": _spelled(kind), "other": _spelled(other_kind), **values}
    return {"kind": "values", **values} if values["changed"] else None


def _compare_values(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Measure how far two tensors of one shape lie apart, bit for bit after a cast to the narrower type.

    Returns:
        `changed`: values that differ in a bit; `of`: values; `max_abs`: largest |difference|, in float64, None where
        one of them is not a number; `max_value`: largest |value| of the first.
    """
    narrow = min((one.dtype, other.dtype), key=lambda kind: (kind.itemsize, str(kind)))
    changed, max_abs, max_value = 0, 0.0, 0.0
    pairs = zip(one.reshape(-1).split(_CHUNK_VALUES), other.reshape(-1).split(_CHUNK_VALUES), strict=True)
    for first, second in pairs:
        bits = [part.to(narrow).contiguous().view(_BITS[narrow.itemsize]) for part in (first, second)]
        differs = bits[0] != bits[1]
        changed += int(differs.sum())
        difference = (first.double() - second.double()).abs()[differs]
        if len(difference):
            max_abs = max(max_abs, _largest(difference))
        max_value = max(max_value, _largest(first.double().abs())) if len(first) else max_value
    return {
        "changed": changed,
        "of": one.numel(),
        "max_abs": max_abs if max_abs < float("inf") else None,
        "max_value": max_value if max_value < float("inf") else None,
    }


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _largest(values: Tensor) -> float:
    """Find the largest of some values, infinity where one of them is not a number."""
    return float(values.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _compare_settings(one: Side, other: Side) -> list[str]:
    """Compare what config.json and generation_config.json say -> sentences.

    Where both families have a table the architectures are compared, for one network is spelled in many ways; elsewhere
    key by key.
    """
    names = (str(one.path), str(other.path))
    configs = one.config, other.config
    if one.architecture is not None and other.architecture is not None:
        different = different_fields(one.architecture, other.architecture, names=names)
        if one.files is not None and other.files is not None:
            first, second = ({key: config.get(key) for key in _BESIDE_ARCHITECTURE} for config in configs)
            different += _different_keys(first, second, CONFIG_FILE)
    else:
        different = _different_keys(*configs, CONFIG_FILE)
    if one.files is not None and other.files is not None:
        first, second = (_json_or_nothing(files / GENERATION_FILE) for files in (one.files, other.files))
        different += _different_keys(first, second, GENERATION_FILE)
    return different


def _different_keys(one: Mapping[str, Any], other: Mapping[str, Any], file: str) -> list[str]:
    keys = [key for key in dict.fromkeys((*one, *other)) if key not in _SAYS_NOTHING]
    return [
        f"{file} says {key}: {json.dumps(one.get(key))} and {json.dumps(other.get(key))}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def _json_or_nothing(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object. It is damaged: fetch the file again.")
    return content


def _compare_tokenizers(one: Side, other: Side) -> dict[str, Any] | None:
    if one.files is None or other.files is None:
        return None
    hashes = [tokenizer_hash(one.files), tokenizer_hash(other.files)]
    return {"hashes": hashes, "ids_same": hashes[0] == hashes[1], **compare_texts(one.files, other.files)}


def _compare_logits(sides: tuple[Side, Side], *, prompts: Path | None, layerwise: bool | None) -> dict[str, Any] | None:
    directory = next((side.files for side in sides if side.files is not None), None)
    if directory is None:
        return None
    one, other = (
        Model(directory=side.path if side.opened is None else side.opened.directory, opened=side.opened)
        for side in sides
    )
    architecture = sides[0].architecture
    described = sides[0].config or sides[1].config
    rows = sides[0].tensors[_EMBEDDING][1][0] if _EMBEDDING in sides[0].tensors else described.get("vocab_size", 1)
    places = architecture.max_position_embeddings if architecture else described.get("max_position_embeddings", 512)
    return compare_models(
        (one, other),
        prompt_token_ids(directory, prompts, vocab_size=rows, max_position_embeddings=places),
        architecture=architecture,
        num_parameters=sum(torch.Size(shape).numel() for _, shape in sides[0].tensors.values()),
        dtype=None,
        layerwise=layerwise,
    )


def _is_incomplete(tensors: Mapping[str, Any]) -> bool:
    return any(entry["kind"] in ("missing", "shape") for entry in tensors["different"])


def _differences(report: dict[str, Any]) -> list[str]:
    """Word all that differs, but for what a side itself is at fault for -> sentences."""
    found = list(report["settings"])
    found += [_tensor_sentence(entry, report) for entry in report["tensors"]["different"]]
    tokenizer = report["tokenizer"]
    if tokenizer is not None:
        tried = tokenizer["probes"] and not tokenizer["different_probes"]
        if None in tokenizer["hashes"] and not tokenizer["ids_same"]:
            lacking, having = ("one", "other") if tokenizer["hashes"][0] is None else ("other", "one")
            found.append(f"{report[lacking]['path']} carries no tokenizer, {report[having]['path']} has one")
        elif not tokenizer["ids_same"]:
            found.append("the tokenizers give other ids")
        # Where both tokenizers could be tried, what they do decides, not how their settings are spelled.
        found += [] if tokenizer["templates_same"] else ["the chat templates differ"]
        found += [f"{name} differs" for name, same in tokenizer["texts"].items() if not same and not tried]
        found += [f"the tokenizers treat {text!r} differently" for text in tokenizer["different_probes"]]
    if report["logits"] is not None:
        found += logit_faults(report["logits"])
    return found


def _tensor_sentence(entry: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    name, kind = entry["name"], entry["kind"]
    if kind == "missing":
        return f"{entry['in']} lacks {name} ({entry['dtype']} {entry['shape']})"
    if kind == "shape":
        return f"{name} has shape {entry['one']} and {entry['other']}"
    largest = "not a number" if entry["max_abs"] is None else f"{entry['max_abs']:.3g}"
    of = "" if entry["max_value"] is None else f" of values up to {entry['max_value']:.3g}"
    moved = f"{entry['changed']} of {entry['of']} values differ, by up to {largest}{of}"
    if kind == "values":
        return f"{name}: {moved}"
    after = f"after a cast {moved}" if entry["changed"] else "equal after a cast"
    return f"{name} is {entry['one']} and {entry['other']}; {after}"


def _spelled(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
