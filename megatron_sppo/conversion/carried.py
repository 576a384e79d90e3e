"""Tensors of a Hugging Face model that are no part of its decoder, kept beside the Megatron checkpoint as they are.

GLM's and DeepSeek's files hold layers behind the last one that predict further tokens (for speculative decoding).
Nothing here computes them: an import copies their bytes to hf/carried.safetensors of the iteration, every checkpoint of
a run that starts there has them, and an export puts them back. No cast touches them; quantized ones are
carried as the bfloat16 numbers that they stand for.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_writer import copy_tensors
from megatron_sppo.checkpoints.megatron_checkpoint import CARRIED_FILE
from megatron_sppo.checkpoints.safetensors_file import Entry, read_header
from megatron_sppo.checkpoints.wrapped import CARRIED, is_wrapped
from megatron_sppo.conversion.config_values import whole
from megatron_sppo.conversion.family import Family


def carried_tensors(
    source: HFCheckpoint, family: Family, architecture: Architecture, config: Mapping[str, Any], *, place: str
) -> dict[str, Entry]:
    """Find the tensors that are carried along -> {name: entry}; often none.

    Those whose names begin so in the family, and of layers behind the decoder's as many as config.json promises.
    """
    prefixes = family.carried + (CARRIED if is_wrapped(config) else ())
    if family.further_layers is not None:
        first, count = architecture.num_layers, whole(config, family.further_layers, place, least=0, default=0)
        prefixes += tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    return {name: entry for name, entry in source.entries.items() if prefixes and name.startswith(prefixes)}


def write_carried(
    source: HFCheckpoint, tensors: Mapping[str, Entry], directory: Path, *, progress: Callable[[int], object]
) -> None:
    """Copy them into one file of a directory, with its digests beside; nothing where there are none."""
    if tensors:
        made = {name: partial(source.read, name) for name, entry in tensors.items() if not entry.is_stored}
        copy_tensors(tensors, Path(directory, CARRIED_FILE), made=made, progress=progress)


def open_carried(directory: Path) -> dict[str, Entry]:
    """Find what a checkpoint carries along in its hf/ directory -> {name: entry}.

    Raises:
        ConversionError: the file is damaged.
    """
    path = Path(directory, CARRIED_FILE)
    return read_header(path)[1] if path.is_file() else {}
