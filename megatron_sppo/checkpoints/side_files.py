"""The small files that travel with a Hugging Face model's weights: config, tokenizer, chat template, licence."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.checkpoints.hf_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    LAYOUT_FILE,
    SIDE_FILES,
    SINGLE_FILE,
    WEIGHT_SUFFIXES,
    check_link,
    weight_map,
)
from megatron_sppo.checkpoints.tokenizer import TOKENIZER_FILE, file_hash, hash_of, parse_tokenizer
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.storage import damage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_MAX_CARRIED_BYTES = 1 << 20
_SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


def check_side_files(directory: Path) -> str | None:
    """Open each file beside the weights that a later stage needs, once -> the tokenizer's hash, as `tokenizer_hash`.

    Which files no stage takes along, and which contradict each other, is logged.

    Raises:
        ConversionError: one of them is damaged, a Git LFS pointer, empty, or no template; an unmerged adapter is there.
    """
    directory = Path(directory)
    if adapters := sorted(path.name for path in directory.glob("adapter_*")):
        raise ConversionError(
            f"{directory} holds an adapter ({', '.join(adapters)}), which transformers would put on the weights and an "
            "import does not. Merge it first (peft: merge_and_unload), or move it elsewhere if it is not this model's."
        )
    tokenizer: Tokenizer | None = None
    for name in side_files(directory):
        path = directory / name
        try:
            if name == TOKENIZER_FILE:
                tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"))
            else:
                _check_side_file(path)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ConversionError(damage(path, f"{path} is damaged ({reason}). Fetch the file again.")) from None
    _compare_settings(directory, tokenizer)
    for reason, names in _left_behind(directory).items():
        logger.info("left behind, %s: %s", reason, some_of(names))
    return file_hash(directory) if tokenizer is None else hash_of(tokenizer)


def _compare_settings(directory: Path, tokenizer: "Tokenizer | None") -> None:
    """Warn where two of the files state one fact differently, and say which of them transformers takes."""
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
    if tokenizer is None:
        return
    file, ids = directory / TOKENIZER_FILE, tokenizer.get_vocab()
    if size and (largest := max(ids.values(), default=0)) >= size:
        logger.warning(
            "%s has token %d, and the model embeds %d: a text with that token cannot be used", file, largest, size
        )
    for path in (settings, directory / "special_tokens_map.json"):
        named = read_json(path) if path.is_file() else {}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        for key in _SPECIAL_TOKENS:
            if isinstance(text := texts.get(f"{key}_token"), str) and text not in ids:
                logger.warning(
                    "%s says %s_token %r, which %s does not know: transformers gives it a new id, which the model has "
                    "no embedding for",
                    path,
                    key,
                    text,
                    file.name,
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
        for key in (f"{name}_token_id" for name in _SPECIAL_TOKENS[:3]):
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
    if path.name not in SIDE_FILES and path.suffix != ".jinja":
        return  # a licence in whatever encoding, settings of which no stage reads anything
    if damage(path, ""):
        raise ValueError("not the file itself")
    if path.suffix == ".model":
        # What it holds is SentencePiece's or tiktoken's own; tokenizer.json decides where it is there.
        if path.read_bytes()[:1] in (b"", b"<"):
            raise ValueError("no tokenizer model")
        return
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("no text")
    if path.suffix == ".json":
        content = json.loads(text, parse_constant=_no_number)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        template = content.get("chat_template")
        listed = template if isinstance(template, list) else [{"template": template}]
        templates = [entry.get("template") for entry in listed if isinstance(entry, dict)]
    else:
        templates = [text] if path.suffix == ".jinja" else []
    for template in templates:
        if isinstance(template, str):
            _check_template(template)


def _is_json(path: Path) -> bool:
    """Tell whether a file is what its name says, where that is JSON."""
    if path.suffix != ".json":
        return True
    try:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return False
    return True


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _check_template(template: str) -> None:
    """Raise a ValueError if a chat template is not Jinja, in the dialect of transformers 5 (chat_template_utils.py).

    Nothing of it is computed: jinja folds constants when it compiles, and 10**10**8 is one.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import SandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> nodes.Node:
            next(parser.stream)
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    class NothingComputed(SandboxedEnvironment):
        intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)
        intercepted_unops = frozenset(SandboxedEnvironment.default_unop_table)

    def not_here(*_: Any, **__: Any) -> None:
        raise nodes.Impossible

    environment = NothingComputed(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False, optimized=False)
    environment.filters = dict.fromkeys(environment.filters, not_here)
    environment.tests = dict.fromkeys(environment.tests, not_here)
    try:
        # Compiled, for a filter that does not exist is found then.
        environment.compile(template)
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
    names = {path.relative_to(directory).as_posix(): path for path in found}
    others = [name for name in sorted(names) if name not in (*known, INDEX_FILE, LAYOUT_FILE)]
    return [*known, *(name for name in others if _is_carried(names[name]))]


def _is_carried(path: Path) -> bool:
    """Tell whether a file that no stage reads is small, and what its name says: others write there too."""
    return path.stat().st_size <= _MAX_CARRIED_BYTES and _is_json(path)


def _left_behind(directory: Path) -> dict[str, list[str]]:
    """Sort what an import does not take along -> {reason: names}."""
    weights = {SINGLE_FILE, INDEX_FILE}
    if not (directory / SINGLE_FILE).is_file():
        weights |= set(weight_map(directory).values())
    taken = {*weights, *side_files(directory), "additional_chat_templates"}
    left: dict[str, list[str]] = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in taken:
            continue
        if path.is_dir():
            reason = "a folder that no stage reads"
        elif path.suffix == ".py":
            reason = "code, which is never run"
        elif path.stat().st_size <= _MAX_CARRIED_BYTES and not _is_json(path):
            reason = "no JSON, in spite of its name"
        elif path.suffix in WEIGHT_SUFFIXES:
            reason = "weights that the index does not name, or in another format"
        else:
            reason = "not needed by any stage"
        left.setdefault(reason, []).append(path.name)
    return left


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config.json, generation config, tokenizer, chat template and other small texts, those that there are."""
    for name in side_files(source):
        check_link(source, name)
        Path(target, name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(source, name), Path(target, name))  # follows links into the hub's cache


_TYPES = ("dtype", "torch_dtype", "quantization_config")
"""Keys of config.json that follow from the tensors."""


def same_side_files(source: Path, target: Path, *, any_types: bool) -> bool:
    """Tell whether a directory has the side files that another's would be written as.

    Args:
        any_types: of weights in any type, which config.json then names (`write_side_files`); else byte for byte.
    """

    def content(directory: Path, name: str) -> Any:
        path = Path(directory, name)
        if not path.is_file():
            return None
        if name != CONFIG_FILE or not any_types:
            return path.read_bytes()
        return {key: value for key, value in read_json(path).items() if key not in _TYPES}

    return all(content(source, name) == content(target, name) for name in {*SIDE_FILES, *side_files(source)})


def write_side_files(source: Path, target: Path, *, dtype: str | None) -> None:
    """Copy the side files; where the weights' dtype is not the config's, config.json says the new one.

    Nor does it say that weights are quantized: none that are written here is.
    """
    copy_side_files(source, target)
    path = Path(target, CONFIG_FILE)
    config = read_json(path)
    changed = {name: value for name, value in config.items() if name != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if dtype is not None:
        changed[key] = dtype
    if changed != config:
        write_json(path, changed)
