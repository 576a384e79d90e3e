"""A Megatron checkpoint of adapters opened as the PEFT adapter that it holds: checked, and read as PEFT's tensors."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints import adapter_file
from megatron_sppo.checkpoints.adapter_file import AdaptedModule, AdapterFile
from megatron_sppo.checkpoints.distcp import METADATA_FILE, DistcpReader
from megatron_sppo.checkpoints.distcp_writer import Piece
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.checkpoints.items import Items
from megatron_sppo.checkpoints.megatron_checkpoint import (
    HF_DIRECTORY,
    check_backend,
    check_copy,
    listed_files,
    resolve_checkpoint,
    verify_checkpoint,
)
from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.conversion.binding import bind
from megatron_sppo.conversion.families import family_of
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.model_file import read_architecture

# L = layers, E = experts, r = rank

PEFT_LAYOUT_FILE = "peft_layout.json"
"""Beside adapter.json of an import: the imported files' own words, so that an export writes the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The matrices of one adapted module of Hugging Face's model, and their place in the checkpoint."""

    module: AdaptedModule
    index: tuple[int, ...]
    """(layer,) or (layer, expert)."""


@dataclass(frozen=True, kw_only=True)
class OpenedAdapter:
    """A checkpoint of adapters that was checked against its architecture."""

    directory: Path
    architecture: Architecture
    content: AdapterFile
    factors: Mapping[str, Factors]
    """{module of Hugging Face's model: its matrices}, layer by layer."""
    reader: DistcpReader

    def shapes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tell the shapes of a module's (A, B)."""
        module, rank = self.factors[name].module, self.content.settings.rank
        return (rank, module.in_features), (module.out_features, rank)

    def dtypes(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """Tell the types of a module's (A, B)."""
        first, *second = self.factors[name].module.matrices(self.content.settings.rank)
        module = self.factors[name].module
        return self.reader.dtype(module.key(first)), self.reader.dtype(module.key(second[0]))

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Read a module's matrices -> (A [r, in], B [out, r])."""
        factors = self.factors[name]
        tensors = []
        for matrix, shape in factors.module.matrices(self.content.settings.rank).items():
            index = factors.index
            box = (*index, *(0,) * len(shape)), (*(1,) * len(index), *shape)
            tensors.append(self.reader.read(factors.module.key(matrix), *box).reshape(shape))
        return tensors[0], tensors[1] if len(tensors) == 2 else torch.cat(tensors[1:])


def open_adapter_checkpoint(megatron: Path) -> OpenedAdapter:
    """Open a checkpoint of adapters: checksums, keys and shapes.

    Raises:
        DataError: no checkpoint there, or its checksums do not hold.
        ConversionError: it holds a model and no adapters, or not those that adapter.json describes.
    """
    directory = resolve_checkpoint(Path(megatron), weights_only=True)
    if not adapter_file.is_adapter(directory):
        raise ConversionError(
            f"{directory} holds a whole model and no adapters. Leave --adapter and --merge out: "
            f"megatron-sppo convert export --megatron {megatron} --hf HF_DIR"
        )
    listed, words = listed_files(directory), (PEFT_LAYOUT_FILE, f"{HF_DIRECTORY}/{CONFIG_FILE}")  # of an export
    words_there = [name for name in words if name in listed or (directory / name).is_file()]
    verify_checkpoint(directory, names=[METADATA_FILE, adapter_file.FILE_NAME, MODEL_FILE, *words_there])
    content = adapter_file.read_adapter(directory)
    architecture, _ = read_architecture(directory)
    check_backend(directory)
    items = Items(directory)
    reader = DistcpReader.open(directory, items=items)
    factors = find_factors(architecture, content.settings.targets)
    expected = stacked_shapes(architecture, content.settings.targets, content.settings.rank)
    found = {key: shape for key, shape in reader.shapes().items() if key.startswith(adapter_file.KEY_ROOT)}
    if found != expected:
        wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise ConversionError(
            f"{directory} does not hold the adapters that its {adapter_file.FILE_NAME} describes ({some_of(wrong)}). "
            "Use another checkpoint."
        )
    verify_checkpoint(directory, names=items.without_digests(reader.files([*expected])))
    check_copy(Path(megatron), directory)
    return OpenedAdapter(
        directory=directory, architecture=architecture, content=content, factors=factors, reader=reader
    )


def find_factors(architecture: Architecture, targets: Sequence[str]) -> dict[str, Factors]:
    """Find the modules of Hugging Face's model that targets name -> {module: where its matrices are}."""
    modules = {module.name: module for module in adapter_file.adapted_modules(architecture, targets)}
    found = {}
    for binding in bind(family_of(architecture.family, place="the model"), architecture):
        for hf_name in binding.hf_shapes:
            module = hf_name.removesuffix(".weight")
            known = modules.get(module.rpartition(".")[2])
            if module != hf_name and known is not None and f".{known.linear}.weight" in binding.megatron_name:
                found[module] = Factors(module=known, index=binding.index)
    return found


def stacked_shapes(architecture: Architecture, targets: Sequence[str], rank: int) -> dict[str, tuple[int, ...]]:
    """List the keys of a checkpoint of adapters -> {key: global shape}, [L, ...] or [L, E, ...]."""
    return {
        module.key(matrix): (
            architecture.num_layers,
            *((architecture.num_moe_experts or 0,) if module.is_expert else ()),
            *shape,
        )
        for module in adapter_file.adapted_modules(architecture, targets)
        for matrix, shape in module.matrices(rank).items()
    }


def adapter_pieces(
    adapter: PeftAdapter, architecture: Architecture, targets: Sequence[str], cast: torch.dtype | None
) -> list[Piece]:
    """Describe the import of an adapter -> a piece for each matrix of each layer; nothing is read yet.

    Raises:
        ConversionError: it adapts a module in some layers and not in others, in several types, or none of a layer's.
    """
    shapes = stacked_shapes(architecture, targets, adapter.rank)
    wanted = find_factors(architecture, targets)
    if missing := [name for name in wanted if name not in adapter.factors]:
        raise ConversionError(
            f"{adapter.directory} adapts {wanted[missing[0]].module.name} in some layers and not in others "
            f"({some_of(missing, most=2)}), which Megatron's adapters cannot. Train it on every layer, or merge it "
            "with PEFT (merge_and_unload)."
        )
    if others := [name for name in adapter.factors if name not in wanted]:
        raise ConversionError(
            f"{adapter.directory} adapts {others[0]}, which is no linear module of the text decoder's layers. Train it "
            "without, or merge it with PEFT (merge_and_unload)."
        )
    pieces = []
    dtypes: dict[str, torch.dtype] = {}
    for name, factors in wanted.items():
        entry_a, entry_b = adapter.factors[name]
        row = 0
        for matrix, shape in factors.module.matrices(adapter.rank).items():
            entry, first = (entry_a, 0) if matrix == "lora_A" else (entry_b, row)
            row += 0 if matrix == "lora_A" else shape[0]
            key = factors.module.key(matrix)
            dtype = cast or entry.dtype
            if dtypes.setdefault(key, dtype) != dtype:
                raise ConversionError(
                    f"{adapter.directory} holds {factors.module.name} in {dtypes[key]} and {dtype}, which Megatron "
                    "keeps in one tensor. Choose one type: --dtype bfloat16."
                )
            pieces.append(
                Piece(
                    key=key,
                    offsets=(*factors.index, 0, 0),
                    sizes=(*(1,) * len(factors.index), *shape),
                    global_shape=shapes[key],
                    dtype=dtype,
                    values=(entry.rows(first, shape[0]),)
                    if entry.dtype == dtype
                    else functools.partial(_cast_rows, adapter, name, matrix, first, shape[0], dtype),
                )
            )
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(math.prod(piece.sizes) for piece in pieces)
    return pieces


def _cast_rows(adapter: PeftAdapter, name: str, matrix: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
    factor_a, factor_b = adapter.read(name)
    return (factor_a if matrix == "lora_A" else factor_b)[first : first + count].to(dtype)
