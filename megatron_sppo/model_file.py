"""`model.json`, which lies beside a Megatron checkpoint: its architecture, and where its tokenizer came from."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConversionError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.layer_parts import DeltaNet, LatentAttention, RopeScaling

SCHEMA_VERSION = 1
FILE_NAME = "model.json"
_DELTA_LAYERS = "linear_attention_freq"
_TUPLES = ("full_attention_layers", "moe_layer_freq")


def write_architecture(architecture: Architecture, directory: Path, *, tokenizer: dict[str, Any]) -> None:
    """Write `model.json`: the architecture and where its tokenizer came from (`hash`, `files`), for later checks."""
    values = _changed(architecture)
    content = {"schema_version": SCHEMA_VERSION, "architecture": values, "tokenizer": tokenizer}
    write_json(Path(directory, FILE_NAME), content)


def _changed(described: Any) -> dict[str, Any]:
    """List the fields without those at their default: a model's file stays as it is when other families bring more."""
    values = {field.name: getattr(described, field.name) for field in fields(described)}
    defaults = {field.name: field.default for field in fields(described) if field.default is not MISSING}
    return {
        name: _changed(value) if is_dataclass(value) else value
        for name, value in values.items()
        if name not in defaults or value != defaults[name]
    }


def read_architecture(directory: Path) -> tuple[Architecture, dict[str, Any]]:
    """Read `model.json` -> (architecture, tokenizer description).

    Raises:
        DataError: no such file, or no JSON.
        ConversionError: another schema version, or a missing, unknown or impossible field.
    """
    path = Path(directory, FILE_NAME)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise ConversionError(f"{path} is not of schema version {SCHEMA_VERSION}. Import the model again.")
    values, tokenizer = content.get("architecture"), content.get("tokenizer")
    if not isinstance(values, dict) or not isinstance(tokenizer, dict):
        raise ConversionError(f"{path} lacks `architecture` or `tokenizer`. Import the model again.")
    known = {field.name for field in fields(Architecture)}
    if unknown := sorted(set(values) - known):
        raise ConversionError(f"{path} has unknown fields {unknown}. It was written by a newer version: upgrade.")
    try:
        if values.get("rope_scaling") is not None:
            scaling: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in values["rope_scaling"].items()
            }
            values = {**values, "rope_scaling": RopeScaling(**scaling)}
        if values.get("delta_net") is not None:
            net = values["delta_net"]
            values = {**values, "delta_net": DeltaNet(**net | {"linear_attention_freq": tuple(net[_DELTA_LAYERS])})}
        if values.get("latent_attention") is not None:
            values = {**values, "latent_attention": LatentAttention(**values["latent_attention"])}
        values = {name: tuple(value) if name in _TUPLES else value for name, value in values.items()}
        return Architecture(**values), tokenizer
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ConversionError(f"{path} does not describe a model ({error}). Import the model again.") from None
