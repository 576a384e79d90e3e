"""Which model sampled: hashes of a Hugging Face directory's files, and the few config values that sampling needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.file_digests import sha256_of_files
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, read_config, weight_map
from megatron_sppo.checkpoints.safetensors_file import read_header
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.checkpoints.wrapped import decoder_config
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.json_files import read_json, sha256_of_json
from megatron_sppo.storage import contained


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Identity and limits of a Hugging Face model directory."""

    directory: Path
    config: Mapping[str, Any]
    """The decoder's part of config.json."""
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
        ConversionError: no safetensors file, one that the index names is missing, or one is cut short.
    """
    directory = Path(directory)
    if (directory / INDEX_FILE).is_file():
        files = [contained(directory, name) for name in sorted(set(weight_map(directory).values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConversionError(
            f"{directory} has no *.safetensors weights. Convert or download the model in safetensors format."
        )
    for file in files:  # before an engine loads it
        if not file.is_file():
            raise ConversionError(
                f"{file} does not exist, but {directory / INDEX_FILE} names it. Fetch the model again."
            )
        read_header(file, quantized=True)
    return sha256_of_json(dict(zip((file.name for file in files), sha256_of_files(files), strict=True)))


def read_model_files(directory: Path) -> ModelFiles:
    """Read and check a Hugging Face model directory -> ModelFiles. Weights that this user has not hashed yet are.

    Raises:
        ConfigError: no such directory.
        ConversionError, DataError: config, weights or tokenizer are missing or cannot be used.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"--model {directory} is not a directory. Download the model first "
            f"(`hf download {directory} --local-dir DIR`) and use --model DIR."
        )
    config = read_config(directory)
    described = decoder_config(config, place=str(directory / CONFIG_FILE))
    tokenizer = tokenizer_hash(directory)
    if tokenizer is None:
        raise DataError(
            f"{directory} has no tokenizer file (tokenizer.json or tokenizer.model). Copy the model's there."
        )
    return ModelFiles(
        directory=directory,
        config=described,
        model_hash=model_hash(directory),
        tokenizer_hash=tokenizer,
        vocab_size=_positive(described, "vocab_size", directory),
        context_length=_positive(described, "max_position_embeddings", directory),
        eos_token_ids=_eos_token_ids(directory, config),
    )


def _eos_token_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    path = directory / GENERATION_FILE
    generation = read_json(path) if path.is_file() else {}
    nested = config.get("text_config")
    found: set[int] = set()
    for file, values in ((CONFIG_FILE, config), (CONFIG_FILE, nested), (path.name, generation)):
        named = values.get("eos_token_id") if isinstance(values, dict) else None
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise DataError(f"{directory / file}: eos_token_id is {named!r}, not token ids. Correct the file.")
        found.update(ids)
    return tuple(sorted(found))


def _positive(config: Mapping[str, Any], name: str, directory: Path) -> int:
    value = config.get(name)
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{directory / CONFIG_FILE}: {name} is {value!r}, not a positive integer. Correct the config.")
    return value
