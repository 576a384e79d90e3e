"""Adapters added to their base: a plain model of Hugging Face's, for which nobody needs to know of LoRA."""

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.hf_writer import (
    Computed,
    FileLayout,
    Moved,
    Rows,
    new_files,
    parse_size,
    write_tensors,
)
from megatron_sppo.checkpoints.peft_files import weight_delta
from megatron_sppo.checkpoints.safetensors_file import Entry, entries_of_header
from megatron_sppo.checkpoints.side_files import write_side_files
from megatron_sppo.checkpoints.wrapped import form_of, name_in, own_names
from megatron_sppo.conversion import convert
from megatron_sppo.conversion.adapter_checkpoint import OpenedAdapter, open_adapter_checkpoint
from megatron_sppo.conversion.adapters import check_base
from megatron_sppo.conversion.binding import bind
from megatron_sppo.conversion.expert_stacks import apart, expert_stacks, together
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.sources import open_plain
from megatron_sppo.conversion.written_before import check_files, model_files_like, refuse_loss
from megatron_sppo.errors import ConversionError
from megatron_sppo.locks import locked_place
from megatron_sppo.storage import atomic_directory, refuse_foreign, remove_stale_temporaries

logger = logging.getLogger(__name__)


def export_merged(
    megatron: Path,
    hf: Path,
    *,
    base: Path,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Path:
    """Add a checkpoint's adapters to their base, weight + scaling * B @ A -> Hugging Face directory of a plain model.

    Product and sum are computed in float32 and rounded once, to the weight's type or `dtype`. What has no adapter is
    copied byte for byte.

    Args:
        base: Hugging Face directory of the model that they were trained on, which is proven.
        dtype, max_shard_size, overwrite, workers: as `convert.export_checkpoint`; without them types and files are the
            base's.

    Raises:
        ConversionError, DataError: as `export_adapter`.
    """
    hf, base = Path(hf), Path(base)
    refuse_foreign(hf, ours=(CONFIG_FILE,), inputs=(Path(megatron), base), flag="--hf", is_replaced=True)
    opened, cast = open_adapter_checkpoint(megatron), convert.torch_dtype(dtype)
    source = check_base(opened, base)
    types = _types(opened, source, cast)
    tensors = {name: (types[name], entry.shape) for name, entry in source.entries.items()}
    is_kept = cast is None and max_shard_size is None
    layout = _layout(opened, source, None if is_kept else tensors, max_shard_size or convert.DEFAULT_SHARD_SIZE)
    if overwrite:
        refuse_loss(hf, model_files_like(base), of="a model", flag="--hf")
    with locked_place(hf, flag="--hf"):
        remove_stale_temporaries(hf)
        if hf.exists() and any(hf.iterdir()) and not overwrite:
            there = _check_already_merged(hf, opened, source, types)
            check_files(hf, there, layout=None if max_shard_size is None else layout, side_files_of=base)
            logger.info("%s holds this model already", hf)
            return hf
        begin = time.monotonic()
        total = sum(math.prod(shape) * kind.itemsize for kind, shape in tensors.values())
        convert.check_space(hf, total)
        with (
            atomic_directory(hf, replaces=CONFIG_FILE) as directory,
            convert.progress_bar(total, "merge") as bar,
        ):
            pieces = _merged(opened, source, types)
            write_tensors(directory, layout, pieces, digests={}, items={}, progress=bar.update, workers=workers)
            write_side_files(base, directory, dtype=None if is_kept else convert.main_dtype(tensors))
    logger.info("merged %s into %s: %s, %s", opened.directory, base, hf, convert.speed(total, begin))
    return hf


def _types(opened: OpenedAdapter, source: HFCheckpoint, cast: torch.dtype | None) -> dict[str, torch.dtype]:
    """Tell which type each tensor of the merged model has -> {name: type}.

    No cast touches what is no part of the decoder, or keeps its type there, as in an export of the model.
    """
    bindings = bind(family_of(opened.architecture.family, place=str(source.directory)), opened.architecture)
    casts = {name: binding.mapping.cast(cast) for binding in bindings for name in binding.hf_shapes}
    if opened.architecture.share_embeddings_and_output_weights:
        casts["lm_head.weight"] = cast  # a copy of the embedding, which some files hold
    return {name: casts.get(name) or entry.dtype for name, entry in source.entries.items()}


def _merged(
    opened: OpenedAdapter, source: HFCheckpoint, types: Mapping[str, torch.dtype]
) -> Iterator[Moved | Computed]:
    for name, entry in source.entries.items():
        is_adapted, is_cast = name.removesuffix(".weight") in opened.factors, types[name] != entry.dtype
        if is_adapted or is_cast or not entry.shape:
            yield Computed(names=[name], make=functools.partial(_merged_weight, opened, source, name, types[name]))
        else:
            yield Moved(spans=[entry.rows(0, entry.shape[0])], rows=[Rows(name, 0, entry.shape[0])])


def _merged_weight(
    opened: OpenedAdapter, source: HFCheckpoint, name: str, kind: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    weight, module = source.read(name), name.removesuffix(".weight")
    if module in opened.factors:
        weight = weight.float() + weight_delta(*opened.read(module), opened.content.settings.scale)
    yield name, weight.to(kind)


def _layout(
    opened: OpenedAdapter, source: HFCheckpoint, tensors: Mapping[str, Any] | None, max_shard_size: str
) -> FileLayout:
    """Lay a model out as another's files are; or its `tensors` in new files, which hold experts as those do."""
    headers = {name: (raw, entries_of_header(Path(name), raw)) for name, raw in source.headers.items()}
    layout = FileLayout(files=headers, index=source.layout()["index"])
    config, named = read_config(source.directory), [*layout.tensors]
    form, own = form_of(config, named), own_names(config, named)

    def alone(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {own(name): entry for name, entry in entries.items()}

    layout = layout.described(alone)
    bindings = bind(family_of(opened.architecture.family, place=str(source.directory)), opened.architecture)
    stacks = {name: stack for name, stack in expert_stacks(bindings).items() if name in layout.tensors}
    if tensors is not None:
        held = {name_in(form, name): tensor for name, tensor in together(tensors, stacks).items()}
        layout = new_files(held, max_shard_bytes=parse_size(max_shard_size)).described(alone)
    return layout.described(lambda entries: apart(entries, stacks))


def _check_already_merged(
    hf: Path, opened: OpenedAdapter, source: HFCheckpoint, types: Mapping[str, torch.dtype]
) -> HFCheckpoint:
    """Refuse another model that is there -> the model, opened.

    Raises:
        ConversionError: it is not the one that would be written.
    """
    there = open_plain(hf)
    same = there.shapes == source.shapes
    same = same and read_config(hf).get("model_type") == read_config(source.directory).get("model_type")
    for name in source.entries if same else ():
        ((_, weight),) = _merged_weight(opened, source, name, types[name])
        found = there.read(name)
        same = same and found.dtype == weight.dtype and torch.equal(found, weight)
    if not same:
        raise ConversionError(f"{hf} holds another model or another dtype. Choose another --hf, or add --overwrite.")
    return there
