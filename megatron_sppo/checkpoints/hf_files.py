"""Where things are in a Hugging Face directory: names of files, config.json, the index of the shards, links."""

from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.tokenizer import ID_FILES, TEXT_FILES
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.json_files import read_json

SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
SIDE_FILES = (CONFIG_FILE, GENERATION_FILE, *ID_FILES, *TEXT_FILES)
"""Files that are kept inside the Megatron checkpoint and come out again, byte for byte."""
LAYOUT_FILE = "layout.json"
"""Beside them: how the tensors lay in the imported files, so that an export writes the same files."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory.

    Raises:
        ConversionError: there is none, or it is no JSON object; the message says what the directory is instead.
    """
    path = Path(directory, CONFIG_FILE)
    if not path.is_file():
        kind = "is not a directory" if not Path(directory).is_dir() else f"has no {CONFIG_FILE}"
        raise ConversionError(f"{directory} {kind}, so it is no Hugging Face model. Check the path.")
    config = _read(path)
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no JSON object. It is damaged: fetch the model again.")
    return config


def weight_map(directory: Path) -> dict[str, str]:
    """Read the index of a directory's shards -> {tensor: file}.

    Raises:
        ConversionError: it is damaged.
    """
    path = directory / INDEX_FILE
    index = _read(path)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ConversionError(f"{path} has no weight_map of names to files. It is damaged: fetch the model again.")
    return listed


def check_link(directory: Path, name: str) -> None:
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


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except DataError as error:
        raise ConversionError(str(error)) from None
