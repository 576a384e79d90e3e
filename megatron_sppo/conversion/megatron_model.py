"""A Megatron checkpoint opened as the model that it holds: checked, and read as Hugging Face tensors."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import is_adapter
from megatron_sppo.checkpoints.digests import FileDigests
from megatron_sppo.checkpoints.distcp import METADATA_FILE, MODEL_ROOTS, DistcpReader
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.megatron_checkpoint import (
    CARRIED_FILE,
    HF_DIRECTORY,
    MANIFEST_FILE,
    check_backend,
    check_copy,
    expected_digests,
    model_files,
    resolve_checkpoint,
    verify_checkpoint,
)
from megatron_sppo.checkpoints.safetensors_file import Entry, Span, read_tensor
from megatron_sppo.conversion.binding import Binding, Place, bind
from megatron_sppo.conversion.carried import open_carried
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.mapping import VocabRows
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.model_file import read_architecture

logger = logging.getLogger(__name__)

_CARRIED_NAME = f"{HF_DIRECTORY}/{CARRIED_FILE}"


@dataclass(frozen=True, kw_only=True)
class OpenedMegatron:
    """A Megatron checkpoint that was checked against its architecture, ready to be read as Hugging Face tensors."""

    directory: Path
    architecture: Architecture
    bindings: tuple[Binding, ...]
    reader: DistcpReader
    side_files: Path | None
    """Directory with config.json and tokenizer, or None where the checkpoint carries none."""
    unchecked: Mapping[str, str]
    """{file: sha256 that it must have} of those that whoever reads them has still to check."""
    items: Mapping[str, FileDigests]
    """{file: digests of its items}. `read` checks what it reads by them; who reads a file otherwise does so too."""
    carried: Mapping[str, Entry]
    """Tensors that are no part of the decoder, and go back into the Hugging Face files as they are."""

    def place_of(self, binding: Binding) -> Place:
        """Find the form in which the checkpoint holds a tensor; the usual one where it holds none."""
        stored = self.reader.metadata.state_dict_metadata
        return next((place for place in binding.places if place.key in stored), binding.place)

    def key_of(self, binding: Binding) -> str:
        """Key in the checkpoint."""
        return self.place_of(binding).key

    def dtype(self, binding: Binding) -> torch.dtype:
        return self.reader.dtype(self.key_of(binding))

    def read(self, binding: Binding) -> dict[str, Tensor]:
        """Read one Megatron tensor and make the Hugging Face tensors of it -> {name: tensor}."""
        tensor = self.read_megatron(binding)
        return dict(zip(binding.hf_shapes, binding.mapping.to_hf(tensor, self.architecture), strict=True))

    def read_megatron(self, binding: Binding) -> Tensor:
        """Read one Megatron tensor -> [*megatron_shape]."""
        return self.reader.read(*self._box(binding)).reshape(binding.mapping.megatron_shape(self.architecture))

    def spans(self, binding: Binding) -> list[Span] | None:
        """Find one Megatron tensor's bytes in the files, in its order; None where it has to be read."""
        return self.reader.spans(*self._box(binding))

    def check_objects(self) -> None:
        """Check what lies beside the tensors in files whose items have digests: empty states, of no use here.

        Raises:
            DataError: one is not what was written.
        """
        for index, place in self.reader.metadata.storage_data.items():
            if place.relative_path in self.items and index.offset is None:
                self.reader.read_item(place)

    def _box(self, binding: Binding) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Place a Megatron tensor in the checkpoint -> (key, offsets, sizes)."""
        shape, place = binding.mapping.megatron_shape(self.architecture), self.place_of(binding)
        return place.key, (*place.offsets, *(0,) * len(shape)), (*(1,) * len(place.offsets), *shape)


def open_megatron(
    megatron: Path, *, template: Path | None = None, leave_unchecked: bool = False, any_keys: bool = False
) -> OpenedMegatron:
    """Open a Megatron checkpoint for reading: checksums of what will be read, keys and shapes.

    Weights whose items have digests are checked as they are read, those of earlier versions now.

    Args:
        template: Hugging Face directory that says what model it is.
        leave_unchecked: do not hash weights now; the caller will while reading them (`unchecked`).
        any_keys: let missing, mis-shaped and unknown keys pass, for a caller who names them all (`key_faults`).

    Raises:
        DataError: no checkpoint there, or its checksums do not hold.
        ConversionError: it is not the model that model.json (or the template's config.json) describes.
    """
    directory, template = (
        resolve_checkpoint(Path(megatron), weights_only=True),
        None if template is None else Path(template),
    )
    if is_adapter(directory):
        raise ConversionError(
            f"{directory} holds adapters and no model. Use `megatron-sppo convert export --megatron {megatron}` with "
            "--adapter DIR, or with --hf DIR --merge --base HF_DIR of their base."
        )
    carried = directory / HF_DIRECTORY
    has_manifest = (directory / MANIFEST_FILE).is_file()
    beside = model_files(directory)
    if has_manifest:
        # Gigabytes, which are checked as they are read.
        verify_checkpoint(directory, names=[METADATA_FILE, *(name for name in beside if name != _CARRIED_NAME)])
    else:
        logger.warning("%s has no %s: its checksums are unknown", directory, MANIFEST_FILE)
    if template is not None:
        architecture = architecture_from_hf(read_config(template), place=str(Path(template, CONFIG_FILE)))
        _check_template(template, architecture, directory)
    elif (directory / MODEL_FILE).is_file():
        architecture, _ = read_architecture(directory)
    else:
        raise ConversionError(
            f"{directory} has no {MODEL_FILE} that says what model it holds. "
            "Give its Hugging Face directory: --template HF_DIR."
        )
    family = family_of(architecture.family, place=str(directory / MODEL_FILE))
    check_backend(directory)
    items = Items(directory)
    reader = DistcpReader.open(directory, items=items)
    _check_counts(reader, architecture)
    bindings = bind(family, architecture)
    files = [_CARRIED_NAME] if _CARRIED_NAME in beside else []
    files += reader.files(list(dict.fromkeys(place.key for binding in bindings for place in binding.places)))
    unchecked: dict[str, str] = {}
    if has_manifest:
        unchecked = expected_digests(directory, names=items.without_digests(files))
    if unchecked and not leave_unchecked:
        verify_checkpoint(directory, names=list(unchecked))
        unchecked = {}
    side_files = template if template is not None else carried if (carried / CONFIG_FILE).is_file() else None
    if side_files == carried:
        _check_carried(carried, architecture)
    opened = OpenedMegatron(
        directory=directory,
        architecture=architecture,
        bindings=bindings,
        reader=reader,
        side_files=side_files,
        unchecked=unchecked,
        items={name: digests for name in files if (digests := items.digests(name)) is not None},
        carried=open_carried(carried),
    )
    if not any_keys:
        _check_keys(opened, template)
    check_copy(Path(megatron), directory)
    return opened


def compare_tensors(
    source: HFCheckpoint,
    opened: OpenedMegatron,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Compare, byte for byte and streamed, what the Megatron checkpoint exports with a Hugging Face directory.

    Args:
        dtype: that either side is cast to first; None compares as they are.

    Returns:
        Names of the tensors that differ in bytes, dtype or shape, or that `source` lacks.
    """
    different = []
    for name, tensor, cast in _exported(opened, dtype):
        entry = source.entries.get(name)
        if entry is None or entry.shape != tuple(tensor.shape) or (cast is None and entry.dtype != tensor.dtype):
            different.append(name)
            continue
        other = source.read(name)
        if cast is not None:
            tensor, other = tensor.to(cast), other.to(cast)
        # As bytes: equal means equal for NaN and -0.0 too.
        if not torch.equal(_bytes(tensor), _bytes(other)):
            different.append(name)
        progress(entry.nbytes)
    return different


def _exported(opened: OpenedMegatron, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor, torch.dtype | None]]:
    """Read all that an export writes, one at a time -> (name, tensor, type that it is cast to)."""
    for binding in opened.bindings:
        for name, tensor in opened.read(binding).items():
            yield name, tensor, binding.mapping.cast(dtype)
    for name, entry in opened.carried.items():
        yield name, read_tensor(entry), None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_carried(carried: Path, architecture: Architecture) -> None:
    """Refuse a carried config.json of another model: an export would hand it out with these weights."""
    path = carried / CONFIG_FILE
    if architecture_from_hf(read_config(carried), place=str(path)) != architecture:
        raise ConversionError(
            f"{path} describes another model than {carried.parent / MODEL_FILE}. "
            "Give the right Hugging Face directory: --template HF_DIR."
        )


def _check_counts(reader: DistcpReader, architecture: Architecture) -> None:
    """Refuse more layers than there can be, before each is laid out."""
    values = sum(math.prod(shape) for shape in reader.shapes().values())
    if architecture.num_layers + architecture.num_expert_layers * (architecture.num_moe_experts or 0) > values:
        raise ConversionError(
            f"{reader.directory} holds {values} values, too few for {architecture.num_layers} layers. "
            "It is a checkpoint of another model."
        )


def _check_template(template: Path, architecture: Architecture, directory: Path) -> None:
    """Refuse a template that describes another model than the checkpoint says it holds; names what differs."""
    held = read_architecture(directory)[0] if (directory / MODEL_FILE).is_file() else architecture
    if different := different_fields(architecture, held, names=("the template", MODEL_FILE)):
        raise ConversionError(
            f"--template {template} is of another model than {directory}: {'; '.join(different[:3])}. "
            "Give the Hugging Face directory that this checkpoint was made from, or leave --template out."
        )


def different_fields(one: Architecture, other: Architecture, *, names: tuple[str, str]) -> list[str]:
    """Say in which fields two architectures differ -> "FIELD is A in NAME and B in NAME" lines."""
    return [
        f"{field.name} is {getattr(one, field.name)} in {names[0]} and {getattr(other, field.name)} in {names[1]}"
        for field in fields(Architecture)
        if getattr(one, field.name) != getattr(other, field.name)
    ]


@dataclass(frozen=True, kw_only=True)
class KeyFaults:
    """How a checkpoint's keys differ from those of its architecture."""

    missing: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """{key: (shape that is there, shape that the architecture has)}."""
    unknown: tuple[str, ...]
    """Keys of a model for which the family has no rule."""


def key_faults(opened: OpenedMegatron) -> KeyFaults:
    """Hold the checkpoint's keys against the architecture's."""
    stored = opened.reader.shapes()
    missing, misshapen, known = dict[str, None](), {}, set()
    for binding in opened.bindings:
        place = opened.place_of(binding)
        key, wanted = place.key, (*place.stacked, *binding.mapping.megatron_shape(opened.architecture))
        known.add(key)
        if key not in stored:
            missing[key] = None
            continue
        found = stored[key]
        # Megatron pads the vocabulary.
        rows_may_exceed = isinstance(binding.mapping, VocabRows) and found[0] >= wanted[0]
        if found != wanted and not (rows_may_exceed and found[1:] == wanted[1:]):
            misshapen[key] = found, wanted
    unknown = sorted(key for key in stored if key.startswith(MODEL_ROOTS) and key not in known)
    return KeyFaults(missing=tuple(missing), misshapen=misshapen, unknown=tuple(unknown))


def _check_keys(opened: OpenedMegatron, template: Path | None) -> None:
    """Refuse keys that are missing, mis-shaped or unknown; the first is named."""
    if template is None:
        blame, where = "It is a checkpoint of another model", "its architecture"
    else:
        blame = f"--template {template} describes another model than the checkpoint holds; give the right one"
        where = str(template)
    faults = key_faults(opened)
    if faults.missing:
        raise ConversionError(
            f"{opened.directory} lacks {some_of(faults.missing)}. {blame}, or the checkpoint is of no GPTModel."
        )
    for key, (found, wanted) in faults.misshapen.items():
        raise ConversionError(
            f"{opened.directory} holds {key} of shape {list(found)} where {where} has {list(wanted)}. {blame}."
        )
    if faults.unknown:
        raise ConversionError(
            f"{opened.directory} holds {some_of(faults.unknown)}, for which the family "
            f"{opened.architecture.family!r} has no rule. {blame}."
        )
