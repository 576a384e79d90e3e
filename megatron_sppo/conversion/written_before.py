"""What an earlier command left where a conversion is to write: this very model, another one, or more than a model."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp import COMMON_FILE
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import INDEX_FILE, SIDE_FILES, WEIGHT_SUFFIXES, read_config
from megatron_sppo.checkpoints.hf_writer import FileLayout
from megatron_sppo.checkpoints.megatron_checkpoint import BACKEND_FILE, HF_DIRECTORY, verify_checkpoint
from megatron_sppo.checkpoints.side_files import same_side_files, side_files
from megatron_sppo.conversion.binding import Binding
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.megatron_model import OpenedMegatron, compare_tensors, open_megatron
from megatron_sppo.conversion.sources import open_source
from megatron_sppo.errors import ConfigError, ConversionError, DataError, some_of
from megatron_sppo.storage import LOCK_NAME

_NOBODY_S = re.compile(rf"{re.escape(LOCK_NAME)}|\..+\.tmp-\d+|\.gitattributes|\.cache")
"""What commands leave in a directory, ours and the hub's, and nobody would miss."""


def holds_import(
    target: Path,
    source: HFCheckpoint,
    bindings: Sequence[Binding],
    architecture: Architecture,
    cast: torch.dtype | None,
) -> bool:
    """Tell whether `target` holds the model that an import would write there; False: there is nothing.

    Raises:
        ConversionError: it holds another.
    """
    if not target.exists():
        return False
    try:
        opened = open_megatron(target)
        # What is neither read by that nor compared below: everything is verified, and once.
        verify_checkpoint(target, names=[COMMON_FILE, BACKEND_FILE])
        opened.check_objects()
    except (DataError, ConversionError) as error:
        raise ConversionError(f"{target} is there, and damaged ({error}) Add --overwrite to import again.") from None
    dtypes = {
        binding.place.key: binding.mapping.cast(cast) or source.entries[next(iter(binding.hf_shapes))].dtype
        for binding in bindings
    }
    if (
        opened.architecture != architecture
        or any(opened.reader.dtype(key) != kind for key, kind in dtypes.items())
        or not same_side_files(source.directory, target / HF_DIRECTORY, any_types=False)
        or compare_tensors(source, opened, dtype=cast)
    ):
        raise ConversionError(
            f"{target} holds another model or another dtype. Choose another --megatron, or add --overwrite."
        )
    return True


def holds_export(hf: Path, opened: OpenedMegatron, cast: torch.dtype | None, *, layout: FileLayout | None) -> bool:
    """Tell whether `hf` holds the model that an export would write there; False: there is nothing.

    Args:
        layout: that its files must have; None: any will do.

    Raises:
        ConversionError: it holds something else.
    """
    if not hf.exists() or not any(hf.iterdir()):
        return False
    if opened.unchecked:
        verify_checkpoint(opened.directory, names=list(opened.unchecked))
    try:
        source = open_source(hf)
        architecture = architecture_from_hf(read_config(hf))
    except (ConversionError, DataError) as error:
        raise ConversionError(f"{hf} is there, and damaged ({error}) Add --overwrite to export again.") from None
    casts = {name for one in opened.bindings if not one.mapping.keeps_type for name in one.hf_shapes}
    if (
        architecture != opened.architecture
        or any(cast not in (None, source.entries[name].dtype) for name in casts & set(source.entries))
        or compare_tensors(source, opened, dtype=cast)
    ):
        raise ConversionError(f"{hf} holds another model or another dtype. Choose another --hf, or add --overwrite.")
    check_files(hf, source, layout=layout, side_files_of=opened.side_files)
    return True


def check_files(hf: Path, source: HFCheckpoint, *, layout: FileLayout | None, side_files_of: Path | None) -> None:
    """Refuse a model that is the right one, and whose files are not those that would be written now.

    Args:
        source: `hf`, opened.
        layout: as of `holds_export`.
        side_files_of: directory whose config, tokenizer and other side files would be written; None: nobody's.

    Raises:
        ConversionError: a side file differs, or the weights are cut otherwise.
    """
    if side_files_of is not None and not same_side_files(side_files_of, hf, any_types=True):
        other = "config, tokenizer or other side files"
    elif layout is not None and source.headers != {name: header for name, (header, _) in layout.files.items()}:
        other = "files of another size (--max-shard-size)"
    else:
        return
    raise ConversionError(f"{hf} holds this model with other {other}. Choose another --hf, or add --overwrite.")


def model_files_like(side_files_of: Path | None) -> set[str]:
    """Name the files that a model's directory may hold beside its weights -> names.

    Args:
        side_files_of: directory whose side files are among them; None: nobody's.
    """
    return {*SIDE_FILES, *(side_files(side_files_of) if side_files_of is not None else ()), INDEX_FILE}


def refuse_loss(directory: Path, known: Collection[str], *, of: str, flag: str) -> None:
    """Refuse to replace a directory that holds more than what is written, for all of it would be gone.

    Args:
        known: names of files that such a directory has, beside weights.
        of: what it holds: "a model" or "an adapter".
        flag: the command-line flag that named the directory, for the error.

    Raises:
        ConfigError: names what is there beside.
    """
    folders = {Path(name).parts[0] for name in known if "/" in name}
    others = sorted(
        path.name
        for path in (directory.iterdir() if directory.is_dir() else ())
        if not (path.name in {*known, *folders} or path.suffix in WEIGHT_SUFFIXES or _NOBODY_S.fullmatch(path.name))
    )
    if others:
        raise ConfigError(
            f"{directory} holds {some_of(others, most=1)} beside {of}, which --overwrite would remove. Move that "
            f"elsewhere, or choose another {flag}."
        )
