"""Which model sampled: hashes of a Hugging Face directory's files, and the few config values that sampling needs."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.storage import contained, read_json, sha256_of_file, sha256_of_json

_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Identity and limits of a Hugging Face model directory."""

    directory: Path
    model_hash: str
    tokenizer_hash: str
    vocab_size: int
    context_length: int
    """Tokens of prompt and response together that the model was built for."""
    eos_token_ids: tuple[int, ...]
    """Ids that config.json and generation_config.json call EOS, ascending."""


def model_hash(directory: Path) -> str:
    """Hash the weights of a Hugging Face directory: every safetensors file that its index names -> 64 hex digits.

    Raises:
        DataError: no safetensors file, or one that the index names is missing.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        value = read_json(index)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DataError(f"{index} has no weight_map of file names. Download the model again.")
        files = [contained(directory, name) for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"{directory} has no *.safetensors weights. Convert or download the model in safetensors format."
        )
    for file in files:
        _check_whole(file)
    return sha256_of_json({file.name: sha256_of_file(file) for file in files})


def read_model_files(directory: Path) -> ModelFiles:
    """Read and check a Hugging Face model directory -> ModelFiles. Hashes all weights: a few seconds per 10 GB.

    Raises:
        ConfigError: no such directory.
        DataError: config, weights or tokenizer are missing or cannot be used.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"--model {directory} is no directory. Download the model first "
            f"(`hf download {directory} --local-dir DIR`) and use --model DIR."
        )
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise DataError(f"{directory / 'config.json'} is no JSON object. Download the model again.")
    tokenizer = tokenizer_hash(directory)
    if tokenizer is None:
        raise DataError(
            f"{directory} has no tokenizer file (tokenizer.json or tokenizer.model). Copy the model's there."
        )
    return ModelFiles(
        directory=directory,
        model_hash=model_hash(directory),
        tokenizer_hash=tokenizer,
        vocab_size=_positive(config, "vocab_size", directory),
        context_length=_positive(config, "max_position_embeddings", directory),
        eos_token_ids=_eos_token_ids(directory, config),
    )


def _eos_token_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    nested = config.get("text_config")
    found: set[int] = set()
    for file, values in (("config.json", config), ("config.json", nested), (path.name, generation)):
        named = values.get("eos_token_id") if isinstance(values, dict) else None
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise DataError(f"{directory / file}: eos_token_id is {named!r}, not token ids. Mend the file.")
        found.update(ids)
    return tuple(sorted(found))


def _positive(config: dict[str, Any], name: str, directory: Path) -> int:
    value = config.get(name)
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{directory / 'config.json'}: {name} is {value!r}, not a positive integer. Mend the config.")
    return value


def _check_whole(file: Path) -> None:
    """Refuse a safetensors file that is missing or not as long as its header says, before an engine loads it."""
    if not file.is_file():
        raise DataError(f"{file} does not exist, but the model's index names it. Download the model again.")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
        header = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        entries = json.loads(header)
        needed = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise DataError(f"{file} is no safetensors file ({size} bytes). Download the model again.") from None
    if size != needed:
        raise DataError(f"{file} has {size} bytes, its header says {needed}. Download the model again.")
