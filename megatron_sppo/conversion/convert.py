"""Import and export of whole checkpoints: Hugging Face directory <-> Megatron-Core `torch_dist` checkpoint.

Both work on global tensors, which the distributed checkpoint keeps free of any parallel layout: no process group, one
CPU process, a tensor at a time. What is written appears under its name only when it is complete.
"""

import functools
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sppo.checkpoints.crew import ALONE, Crew
from megatron_sppo.checkpoints.distcp_writer import write_common, write_distcp
from megatron_sppo.checkpoints.file_digests import check_blobs
from megatron_sppo.checkpoints.hf_checkpoint import check_tensors
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, LAYOUT_FILE, read_config
from megatron_sppo.checkpoints.hf_writer import FileLayout, new_files, parse_size, read_layout, write_tensors
from megatron_sppo.checkpoints.megatron_checkpoint import (
    HF_DIRECTORY,
    ITERATION_PATTERN,
    MANIFEST_FILE,
    TRACKER_FILE,
    iteration_directory,
    publish,
    refuse_later,
    write_manifest,
)
from megatron_sppo.checkpoints.side_files import check_side_files, copy_side_files, side_files, write_side_files
from megatron_sppo.checkpoints.tokenizer import ID_FILES, TEXT_FILES
from megatron_sppo.checkpoints.wrapped import names_in_files
from megatron_sppo.conversion.binding import bind, hf_shapes
from megatron_sppo.conversion.carried import carried_tensors, write_carried
from megatron_sppo.conversion.expert_stacks import apart, check_stacks, expert_stacks, together
from megatron_sppo.conversion.extra_states import extra_states
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf, hf_from_architecture
from megatron_sppo.conversion.megatron_model import OpenedMegatron, open_megatron
from megatron_sppo.conversion.moves import export_tensors, import_pieces
from megatron_sppo.conversion.sources import open_source
from megatron_sppo.conversion.written_before import holds_export, holds_import, model_files_like, refuse_loss
from megatron_sppo.errors import ConversionError
from megatron_sppo.json_files import write_json
from megatron_sppo.locks import locked, locked_place
from megatron_sppo.model_file import write_architecture
from megatron_sppo.storage import atomic_directory, refuse_foreign, remove_stale_temporaries
from megatron_sppo.weight_counts import num_parameters

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SHARD_SIZE = "5GB"
IMPORT_ITERATION = 0

# mcore 0.16.1 and 0.19.2, dist_checkpointing/core.py: what a torch_dist directory says of itself.
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON_STATE = {"iteration": IMPORT_ITERATION, "checkpoint_version": 3.0}


def import_checkpoint(
    hf: Path,
    megatron: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    crew: Crew = ALONE,
) -> Path:
    """Convert a Hugging Face directory into a Megatron-Core checkpoint -> its iteration directory.

    Args:
        hf: directory with config.json and safetensors.
        megatron: root of the checkpoint to write, iteration 0.
        dtype: "bfloat16", "float16" or "float32" casts the weights; None keeps each as it is.
        overwrite: replace another model that is there.
        workers: threads; None takes the cores that there are, at most 16. The files are the same by any number.
        crew: the ranks that convert together, each with these arguments.

    Raises:
        ConversionError: the model cannot be read or mapped, or `megatron` holds another one. Nothing is written then.
    """
    hf, megatron = Path(hf), Path(megatron)
    if crew.leads:
        refuse_foreign(
            megatron, ours=(TRACKER_FILE, ITERATION_PATTERN, f".{ITERATION_PATTERN}"), inputs=(hf,), flag="--megatron"
        )
    config = read_config(hf)
    architecture = architecture_from_hf(config, place=str(hf / CONFIG_FILE))
    family = family_of(architecture.family, place=str(hf))
    source = open_source(hf)
    tokenizer = check_side_files(hf)
    check_blobs({*(entry.file for entry in source.entries.values()), *(hf / name for name in side_files(hf))})
    alone = any(mapping.per_expert for mapping in family.mappings)
    experts = architecture.num_expert_layers * (architecture.num_moe_experts or 0) if alone else 0
    if architecture.num_layers + experts > len(source.entries):
        raise ConversionError(
            f"{hf} holds {len(source.entries)} tensors, too few for the {architecture.num_layers} layers that its "
            f"{CONFIG_FILE} promises. Fetch the model again."
        )
    bindings = bind(family, architecture)
    carried = carried_tensors(source, family, architecture, config, place=str(hf / CONFIG_FILE))
    check_stacks(source, expert_stacks(bindings))
    shapes = hf_shapes(bindings) | {name: entry.shape for name, entry in carried.items()}
    left_out = check_tensors(source, shapes, ignored=family.ignored)
    pieces = import_pieces(source, bindings, architecture, torch_dtype(dtype))
    total = sum(piece.nbytes for piece in pieces) + sum(entry.nbytes for entry in carried.values())
    target = iteration_directory(megatron, IMPORT_ITERATION)
    write = functools.partial(
        write_distcp, pieces=pieces, objects=extra_states(architecture), workers=workers, crew=crew
    )
    if not crew.leads:
        crew.follow(functools.partial(write, progress=_unseen))
        return target
    if overwrite or not target.exists():
        check_space(megatron, total)
    with crew.leading(), locked(megatron, flag="--megatron"):
        remove_stale_temporaries(target)
        refuse_later(megatron, IMPORT_ITERATION)
        if not overwrite and holds_import(target, source, bindings, architecture, torch_dtype(dtype)):
            logger.info("%s holds this model already", target)
            publish(megatron, IMPORT_ITERATION)
            return target
        begin = time.monotonic()
        with atomic_directory(target, replaces=MANIFEST_FILE) as directory, progress_bar(total, "import") as bar:
            write(directory, progress=bar.update)
            write_common(directory, COMMON_STATE)
            (directory / "metadata.json").write_text(json.dumps(METADATA_JSON))
            write_architecture(architecture, directory, tokenizer=tokenizer_record(hf, tokenizer))
            (directory / HF_DIRECTORY).mkdir()
            copy_side_files(hf, directory / HF_DIRECTORY)
            write_carried(source, carried, directory / HF_DIRECTORY, progress=bar.update)
            if not left_out and not source.is_quantized:
                write_json(directory / HF_DIRECTORY / LAYOUT_FILE, source.layout())
            write_manifest(directory)
        publish(megatron, IMPORT_ITERATION)
    logger.info(
        "imported %s to %s: %s parameters, %s", hf, target, f"{num_parameters(architecture):,}", speed(total, begin)
    )
    return target


def export_checkpoint(
    megatron: Path,
    hf: Path,
    *,
    template: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    crew: Crew = ALONE,
) -> Path:
    """Convert a Megatron-Core checkpoint into a Hugging Face directory -> that directory.

    Args:
        megatron: root (its tracker decides) or one iteration directory, saved in any parallel layout.
        hf: directory to write; transformers and vLLM load it as it is.
        template: Hugging Face directory whose config, tokenizer and chat template to take, in place of those that the
            checkpoint carries.
        dtype: casts the weights; None keeps them.
        max_shard_size: of a safetensors file, such as "5GB"; None keeps the files as they were imported.
        overwrite: replace what is in `hf`.
        workers, crew: as for the import.

    Raises:
        ConversionError, DataError: the checkpoint is damaged or of another model, or `hf` holds something else.
    """
    hf = Path(hf)
    inputs = (Path(megatron), *(() if template is None else (Path(template),)))
    if crew.leads:
        refuse_foreign(hf, ours=(CONFIG_FILE,), inputs=inputs, flag="--hf", is_replaced=True)
    opened = open_megatron(megatron, template=template, leave_unchecked=True)
    cast = torch_dtype(dtype)
    in_files = names_in_files(read_config(opened.side_files) if opened.side_files is not None else {}, opened.carried)
    tensors = {
        in_files(name): (binding.mapping.cast(cast) or opened.dtype(binding), shape)
        for binding in opened.bindings
        for name, shape in binding.hf_shapes.items()
    }
    tensors |= {name: (entry.dtype, entry.shape) for name, entry in opened.carried.items()}
    layout, is_kept = _layout(opened, tensors, in_files, max_shard_size)
    write = functools.partial(
        write_tensors,
        layout=layout,
        tensors=export_tensors(opened, cast, in_files=in_files),
        digests={opened.directory / name: digest for name, digest in opened.unchecked.items()},
        items={opened.directory / name: digests for name, digests in opened.items.items()},
        workers=workers,
        crew=crew,
    )
    if not crew.leads:
        crew.follow(functools.partial(write, progress=_unseen))
        return hf
    if overwrite:
        refuse_loss(hf, model_files_like(opened.side_files), of="a model", flag="--hf")
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in tensors.values())
    with crew.leading(), locked_place(hf, flag="--hf"):
        remove_stale_temporaries(hf)
        if not overwrite and holds_export(hf, opened, cast, layout=None if max_shard_size is None else layout):
            logger.info("%s holds this model already", hf)
            return hf
        begin = time.monotonic()
        check_space(hf, total)
        with atomic_directory(hf, replaces=CONFIG_FILE) as directory, progress_bar(total, "export") as bar:
            write(directory, progress=bar.update)
            _write_side_files(opened, directory, dtype=main_dtype(tensors), types_changed=not is_kept)
    logger.info("exported %s to %s: %d files, %s", opened.directory, hf, len(layout.files), speed(total, begin))
    return hf


def _layout(
    opened: OpenedMegatron,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    in_files: Callable[[str], str],
    max_shard_size: str | None,
) -> tuple[FileLayout, bool]:
    """Lay out the files of an export -> (layout, whether they are cut as the imported ones).

    New files hold the experts of a layer in one tensor where the imported ones did.
    """
    imported = read_layout(opened.directory / HF_DIRECTORY / LAYOUT_FILE)
    stacks = expert_stacks(opened.bindings, in_files=in_files) if imported is not None else {}
    if imported is not None:
        is_stacked = bool(stacks.keys() & imported.tensors.keys())
        imported = imported.described(lambda entries: apart(entries, stacks))
        if max_shard_size is None and imported.tensors == tensors:
            return imported, True
        stacks = stacks if is_stacked else {}
    size = parse_size(max_shard_size or DEFAULT_SHARD_SIZE)
    layout = new_files(together(tensors, stacks), max_shard_bytes=size)
    return layout.described(lambda entries: apart(entries, stacks)), False


def _write_side_files(opened: OpenedMegatron, directory: Path, *, dtype: str, types_changed: bool) -> None:
    if opened.side_files is not None:
        write_side_files(opened.side_files, directory, dtype=dtype if types_changed else None)
        return
    write_json(directory / CONFIG_FILE, hf_from_architecture(opened.architecture, dtype=dtype))
    logger.warning(
        "%s carries no tokenizer: the export has none. Give the original model with --template HF_DIR.",
        opened.directory,
    )


def tokenizer_record(hf: Path, digest: str | None) -> dict[str, Any]:
    """Describe a model's tokenizer for model.json."""
    files = [name for name in (*ID_FILES, *TEXT_FILES) if (hf / name).is_file()]
    if digest is None:
        logger.warning("%s has no tokenizer (none of %s): exports will have none", hf, ", ".join(ID_FILES))
    return {"hash": digest, "files": files}


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Find the type of a name -> type; of None, None.

    Raises:
        ConversionError: there is none.
    """
    if name is not None and name not in DTYPES:
        raise ConversionError(f"dtype is {name!r}. Use --dtype with one of: {', '.join(DTYPES)}.")
    return None if name is None else getattr(torch, name)


def main_dtype(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """Name the dtype that most values have."""
    counts: Counter[torch.dtype] = Counter()
    for kind, shape in tensors.values():
        counts[kind] += math.prod(shape)
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def check_space(path: Path, needed: int) -> None:
    """Refuse to write where there is no room.

    Raises:
        ConversionError: names what is needed and what is free.
    """
    place = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConversionError(
            f"{path} needs {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free. "
            "Free some space, or choose another disk."
        )


def progress_bar(total: int, description: str) -> "tqdm[Any]":
    """Show how many bytes are written, on a terminal."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=None)


def _unseen(nbytes: int) -> None:
    """Show nothing: the leader's bar is the one on the terminal."""


def speed(nbytes: int, begin: float) -> str:
    """Spell how fast bytes were written since `begin` (time.monotonic)."""
    seconds = time.monotonic() - begin
    return f"{nbytes / 1e9:.2f} GB in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s)"
