"""A Hugging Face directory: its tensors, its shards, and the small files that travel with the weights."""

import base64
import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_sppo.checkpoints.safetensors_file import (
    Entry,
    Shape,
    entries_of_header,
    new_header,
    read_header,
    read_tensor,
    write_header,
)
from megatron_sppo.checkpoints.tokenizer import ID_FILES, TEXT_FILES
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.storage import contained, damage, read_json, write_json

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
SIDE_FILES = (CONFIG_FILE, GENERATION_FILE, *ID_FILES, *TEXT_FILES)
"""Files that are kept inside the Megatron checkpoint and come out again, byte for byte."""
LAYOUT_FILE = "layout.json"
"""Beside them: how the tensors lay in the imported files, so that an export writes the same files."""
_MAX_CARRIED_BYTES = 1 << 20
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")
_NAMED = 4  # how many names an error lists before "and N more"


@dataclass(frozen=True, kw_only=True)
class HFCheckpoint:
    """The tensors of a Hugging Face directory, opened but not read."""

    directory: Path
    headers: Mapping[str, bytes]
    """Header of each safetensors file, as it is."""
    entries: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(self.entries[name])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def layout(self) -> dict[str, Any]:
        """Describe how the tensors lie in the files, for `planned_files`."""
        index = self.directory / INDEX_FILE
        return {
            "files": {name: base64.b64encode(raw).decode() for name, raw in self.headers.items()},
            "index": index.read_text(encoding="utf-8") if SINGLE_FILE not in self.headers else None,
        }


@dataclass(frozen=True, kw_only=True)
class PlannedFiles:
    """Where each tensor of an export will lie."""

    files: Mapping[str, tuple[bytes, Mapping[str, Entry]]]
    """{file: (header, entries)}."""
    index: str | None
    """Text of the index; None for a single file."""


def open_hf_checkpoint(directory: Path) -> HFCheckpoint:
    """Open the safetensors files of a directory; links of the hub's cache to its blobs are followed.

    Raises:
        ConversionError: pickled weights only, a shard that is missing, cut short or outside, a tensor twice or absent,
            a link that leads elsewhere.
    """
    directory = Path(directory)
    for name in (*SIDE_FILES, SINGLE_FILE, INDEX_FILE):
        _check_link(directory, name)
    if (directory / SINGLE_FILE).is_file():
        weight_map, files = None, [SINGLE_FILE]
        others = set(_weight_map(directory).values()) - {SINGLE_FILE} if (directory / INDEX_FILE).is_file() else set()
        if others:
            raise ConversionError(
                f"{directory} holds {SINGLE_FILE} and an {INDEX_FILE} that names {_names(sorted(others))}: "
                "transformers loads the first, vLLM the others. Remove what is not this model's."
            )
    elif (directory / INDEX_FILE).is_file():
        weight_map = _weight_map(directory)
        files = sorted(set(weight_map.values()))
    else:
        raise ConversionError(_no_weights(directory))
    headers: dict[str, bytes] = {}
    entries: dict[str, Entry] = {}
    for file in files:
        path = contained(directory, file)
        _check_link(directory, file)
        if not path.is_file():
            raise ConversionError(f"{directory / INDEX_FILE} names {file}, which is missing. Fetch the model again.")
        headers[file], found = read_header(path)
        if double := sorted(set(found) & set(entries)):
            raise ConversionError(
                f"{path} holds {_names(double)} again; another shard has it too. Fetch the model again."
            )
        entries |= found
    if weight_map is not None:
        for name, file in weight_map.items():
            if name not in entries or entries[name].file != contained(directory, file):
                raise ConversionError(
                    f"{directory / INDEX_FILE} says that {name} is in {file}, which lacks it. Fetch the model again."
                )
    return HFCheckpoint(directory=directory, headers=headers, entries=entries)


def check_tensors(checkpoint: HFCheckpoint, expected: Mapping[str, Shape], *, ignored: Sequence[str]) -> list[str]:
    """Compare what a directory holds with what its config.json promises -> names that hold no weights and are left.

    Raises:
        ConversionError: missing, unknown or mis-shaped tensors, named.
    """
    place = checkpoint.directory
    extra = [name for name in checkpoint.entries if name not in expected]
    if missing := [name for name in expected if name not in checkpoint.entries]:
        instead = f", and holds {_names(extra)}, which it does not" if extra else ""
        raise ConversionError(
            f"{place} lacks {_names(missing)}, which its {CONFIG_FILE} promises{instead}. Fetch the model again."
        )
    for name, shape in expected.items():
        if checkpoint.entries[name].shape != shape:
            raise ConversionError(
                f"{place} holds {name} of shape {list(checkpoint.entries[name].shape)} where its {CONFIG_FILE} "
                f"promises {list(shape)}. Weights and config are of two models: fetch both again."
            )
    left = [name for name in extra if name.endswith(tuple(ignored))] if ignored else []
    if "lm_head.weight" in extra and _same(checkpoint, "lm_head.weight", "model.embed_tokens.weight"):
        left.append("lm_head.weight")
    if "lm_head.weight" in extra and "lm_head.weight" not in left:
        raise ConversionError(
            f"{place} holds an lm_head.weight other than model.embed_tokens.weight, and its {CONFIG_FILE} says "
            "tie_word_embeddings: true, which contradict each other. Set it to false if the model was trained so."
        )
    if unknown := [name for name in extra if name not in left]:
        raise ConversionError(
            f"{place} holds {_names(unknown)}, for which there is no rule. "
            "The weights have more than the config says: use a plain checkpoint of this family (adapters merged)."
        )
    if left:
        logger.info("left out, for they hold no weights of their own: %s", _names(left))
    return left


def check_side_files(directory: Path) -> None:
    """Open each file beside the weights that a later stage needs, once, and say which files no stage takes along.

    Raises:
        ConversionError: one of them is damaged, a Git LFS pointer, empty, or no template; an unmerged adapter is there.
    """
    directory = Path(directory)
    if adapters := sorted(path.name for path in directory.glob("adapter_*")):
        raise ConversionError(
            f"{directory} holds an adapter ({', '.join(adapters)}), which transformers would put on the weights and an "
            "import does not. Merge it first (peft: merge_and_unload), or move it elsewhere if it is not this model's."
        )
    for name in side_files(directory):
        path = directory / name
        try:
            _check_side_file(path)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ConversionError(damage(path, f"{path} is damaged ({reason}). Fetch the file again.")) from None
    _hold_against_each_other(directory)
    for reason, names in _left_behind(directory).items():
        logger.info("left behind, %s: %s", reason, _names(names))


def _hold_against_each_other(directory: Path) -> None:
    """Say where two of the files state one fact differently, and which of them transformers takes."""
    settings, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    inline = read_json(settings).get("chat_template") if settings.is_file() else None
    if (
        isinstance(inline, str)
        and template.is_file()
        and inline.strip() != template.read_text(encoding="utf-8").strip()
    ):
        logger.warning("%s and the chat_template of %s differ: the first is taken", template, settings.name)
    config, size = read_json(directory / CONFIG_FILE), 0
    if isinstance(config.get("vocab_size"), int):
        size = config["vocab_size"]
        _check_special_ids(directory, config, size)
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        return
    content = read_json(tokenizer)
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {row[0]: id_ for id_, row in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if size and (largest := max(ids.values(), default=0)) >= size:
        logger.warning(
            "%s has token %d, and the model embeds %d: a text with that token cannot be used", tokenizer, largest, size
        )
    for path in (settings, directory / "special_tokens_map.json"):
        named = read_json(path) if path.is_file() else {}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        for key in SPECIAL_TOKENS:
            if isinstance(text := texts.get(f"{key}_token"), str) and text not in ids:
                logger.warning(
                    "%s says %s_token %r, which %s does not know: transformers gives it a new id, which the model has "
                    "no embedding for",
                    path,
                    key,
                    text,
                    tokenizer.name,
                )


def _check_special_ids(directory: Path, config: Mapping[str, Any], vocab_size: int) -> None:
    """Hold the special tokens' ids of config.json and generation_config.json against the model and each other.

    Raises:
        ConversionError: one of them is no id.
    """
    path = directory / GENERATION_FILE
    read = {directory / CONFIG_FILE: config, **({path: read_json(path)} if path.is_file() else {})}
    found: dict[str, dict[Path, set[int]]] = {}
    for file, content in read.items():
        for key in (f"{name}_token_id" for name in SPECIAL_TOKENS[:3]):
            if (value := content.get(key)) is None:
                continue
            listed = value if isinstance(value, list) else [value]
            if not all(type(id_) is int for id_ in listed):
                raise ConversionError(f"{file} says {key}: {json.dumps(value)}, which is no token id. Correct it.")
            if max(listed, default=0) >= vocab_size:
                logger.warning("%s says %s %s, and the model has tokens 0 to %d", file, key, value, vocab_size - 1)
            found.setdefault(key, {})[file] = set(listed)
    ends = [*found.get("eos_token_id", {}).items()]
    if len(ends) == 2 and not ends[0][1] <= ends[1][1]:
        logger.warning(
            "%s says eos_token_id %s, %s says %s: transformers and vLLM end an answer at the second",
            ends[0][0],
            sorted(ends[0][1]),
            GENERATION_FILE,
            sorted(ends[1][1]),
        )


def _check_side_file(path: Path) -> None:
    """Raise a ValueError if a file is not what its name says."""
    if path.name not in SIDE_FILES and path.suffix not in (".json", ".jinja"):
        return  # a licence in whatever encoding
    if path.suffix == ".model":
        # What it holds is SentencePiece's or tiktoken's own; tokenizer.json decides where it is there.
        if (raw := path.read_bytes()[:64]).startswith((b"version https://git-lfs", b"<")) or not raw:
            raise ValueError("no tokenizer model")
        return
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("no text")
    if text.startswith("version https://git-lfs"):
        raise ValueError("a pointer")
    if path.name == "tokenizer.json":
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 (the library raises Exception itself)
            raise ValueError(f"no tokenizer: {error}") from None
    if path.suffix == ".json":
        content = json.loads(text, parse_constant=_no_number)
        if not isinstance(content, dict) and path.name in SIDE_FILES:
            raise ValueError("no JSON object")
        template = content.get("chat_template") if isinstance(content, dict) else None
        listed = template if isinstance(template, list) else [{"template": template}]
        templates = [entry.get("template") for entry in listed if isinstance(entry, dict)]
    else:
        templates = [text] if path.suffix == ".jinja" else []
    for template in templates:
        if isinstance(template, str):
            _check_template(template)


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _check_template(template: str) -> None:
    """Raise a ValueError if a chat template is not Jinja, in the dialect of transformers 5 (chat_template_utils.py)."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            next(parser.stream)
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    try:
        # Compiled, for a filter that does not exist is found then.
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False).compile(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"a chat template that is no Jinja: {error.message}, line {error.lineno}") from None


def side_files(directory: Path) -> list[str]:
    """List what travels with the weights, byte for byte -> names, those of SIDE_FILES first.

    Beside what the stages read: small texts and settings, such as a licence, which goes with the weights wherever they
    go, or the settings of a processor that only other programs use.
    """
    directory = Path(directory)
    known = [name for name in SIDE_FILES if (directory / name).is_file()]
    patterns = ("*.json", "*.jinja", "*LICENSE*", "*LICENCE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates/*")
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    small = (path for path in found if path.stat().st_size <= _MAX_CARRIED_BYTES)
    others = sorted(path.relative_to(directory).as_posix() for path in small)
    return [*known, *(name for name in others if name not in (*known, INDEX_FILE, LAYOUT_FILE))]


def _left_behind(directory: Path) -> dict[str, list[str]]:
    """Sort what an import does not take along -> {reason: names}."""
    weights = {SINGLE_FILE, INDEX_FILE}
    if not (directory / SINGLE_FILE).is_file():
        weights |= set(_weight_map(directory).values())
    taken = {*weights, *side_files(directory), "additional_chat_templates"}
    left: dict[str, list[str]] = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in taken:
            continue
        if path.is_dir():
            reason = "a folder that no stage reads"
        elif path.suffix == ".py":
            reason = "code, which is never run"
        elif path.suffix in WEIGHT_SUFFIXES:
            reason = "weights that the index does not name, or in another format"
        else:
            reason = "not needed by any stage"
        left.setdefault(reason, []).append(path.name)
    return left


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config.json, generation config, tokenizer, chat template and other small texts, those that there are."""
    for name in side_files(source):
        _check_link(source, name)
        Path(target, name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source, name), Path(target, name))  # follows links into the hub's cache


def kept_files(tensors: Mapping[str, tuple[torch.dtype, Shape]], layout: Mapping[str, Any]) -> PlannedFiles | None:
    """Lay the tensors out as in the imported files -> plan, or None where those held other tensors or other types."""
    files = {}
    for name, encoded in layout["files"].items():
        path = contained(Path(), name)
        try:
            raw = base64.b64decode(encoded)
            files[name] = (raw, entries_of_header(path, raw))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConversionError(
                f"{LAYOUT_FILE} of the checkpoint has a damaged header of {name} ({type(error).__name__}). "
                "Give --max-shard-size 5GB to do without it."
            ) from None
    held = {name: (entry.dtype, entry.shape) for _, entries in files.values() for name, entry in entries.items()}
    return PlannedFiles(files=files, index=layout["index"]) if held == dict(tensors) else None


def new_files(tensors: Mapping[str, tuple[torch.dtype, Shape]], *, max_shard_bytes: int) -> PlannedFiles:
    """Lay the tensors out in new files by Hugging Face's names, in the order given -> plan.

    Args:
        tensors: {name: (dtype, shape)}.
        max_shard_bytes: of tensors in one file; a tensor that is larger has a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return PlannedFiles(files={SINGLE_FILE: new_header(Path(SINGLE_FILE), tensors)}, index=None)
    files = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files[file] = new_header(Path(file), {name: tensors[name] for name in group})
    total = sum(entry.nbytes for _, entries in files.values() for entry in entries.values())
    weight_map = {name: file for file, (_, entries) in files.items() for name in entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return PlannedFiles(files=files, index=json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def opened_files(directory: Path, plan: PlannedFiles) -> Iterator[dict[str, tuple[int, Entry]]]:
    """Create the planned files with their headers, and the index -> {tensor: (descriptor, place)}, to be filled in."""
    descriptors: dict[str, int] = {}
    try:
        for file, (raw, entries) in plan.files.items():
            write_header(directory / file, raw, entries)
            descriptors[file] = os.open(directory / file, os.O_WRONLY)
        if plan.index is not None:
            (directory / INDEX_FILE).write_text(plan.index, encoding="utf-8")
        yield {
            name: (descriptors[file], entry)
            for file, (_, entries) in plan.files.items()
            for name, entry in entries.items()
        }
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def write_side_files(source: Path, target: Path, *, dtype: str | None) -> None:
    """Copy the side files; where the weights' dtype is not the config's, config.json says the new one."""
    copy_side_files(source, target)
    path = Path(target, CONFIG_FILE)
    config = read_json(path)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if dtype is not None and config.get(key) != dtype:
        write_json(path, {**config, key: dtype})


def parse_size(text: str) -> int:
    """Read a size such as "5GB" or "500MiB" -> bytes.

    Raises:
        ConversionError: no such size.
    """
    units = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units or float(match[1]) == 0:
        raise ConversionError(f"max_shard_size is {text!r}, which is no size. Use --max-shard-size 5GB.")
    return int(float(match[1]) * units[match[2].upper()])


def _check_link(directory: Path, name: str) -> None:
    """Refuse a symbolic link that leads out of a model: what it points to would be copied into a checkpoint.

    The hub's cache is the exception: models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.
    """
    path = Path(directory, name)
    if not path.is_symlink():
        return
    home = Path(directory).resolve()
    allowed = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ConversionError(
            f"{path} is a link to {target}, outside of the model. Put the file itself there: cp --remove-destination "
            f"{target} {path}"
        )


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    try:
        index = read_json(path)
    except DataError as error:
        raise ConversionError(str(error)) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ConversionError(f"{path} has no weight_map of names to files. It is damaged: fetch the model again.")
    return weight_map


def _no_weights(directory: Path) -> str:
    pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.pt")])
    if pickled:
        return (
            f"{directory} holds its weights as pickle only ({pickled[0].name}), which can run code and is not read. "
            "If you trust it, write safetensors: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    if gguf := sorted(directory.glob("*.gguf")):
        return f"{directory} holds GGUF weights ({gguf[0].name}). Use the model's safetensors checkpoint."
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. Fetch the model's weights."


def _same(checkpoint: HFCheckpoint, name: str, other: str) -> bool:
    return torch.equal(checkpoint.read(name), checkpoint.read(other))


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory.

    Raises:
        ConversionError: there is none, or it is no JSON object; the message says what the directory is instead.
    """
    path = Path(directory, CONFIG_FILE)
    if not path.is_file():
        kind = "is no directory" if not Path(directory).is_dir() else f"has no {CONFIG_FILE}"
        raise ConversionError(f"{directory} {kind}, so it is no Hugging Face model. Check the path.")
    try:
        config = read_json(path)
    except DataError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no JSON object. It is damaged: fetch the model again.")
    return config
