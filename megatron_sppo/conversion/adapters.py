"""Import and export of LoRA adapters: PEFT directory <-> Megatron-Core checkpoint of adapters.

Their matrices are the same numbers under other names, so nothing is computed.
"""

import base64
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sppo.checkpoints import adapter_file
from megatron_sppo.checkpoints.adapter_file import AdapterFile, AdapterSettings, BaseName
from megatron_sppo.checkpoints.distcp_writer import write_common, write_distcp
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.hf_writer import write_tensor
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
from megatron_sppo.checkpoints.model_files import model_hash
from megatron_sppo.checkpoints.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_HASH,
    CONTENT_HASH,
    NO_HASH,
    PeftAdapter,
    adapter_config,
    base_hash_of,
    check_fits,
    module_of,
    open_peft_adapter,
    seal_adapter,
    tensor_names,
)
from megatron_sppo.checkpoints.safetensors_file import entries_of_header, new_header, write_header
from megatron_sppo.checkpoints.side_files import check_side_files, copy_side_files
from megatron_sppo.checkpoints.wrapped import (
    adapter_form,
    form_of,
    name_in,
    of_decoder,
    shapes_as_named_by,
)
from megatron_sppo.conversion import convert
from megatron_sppo.conversion.adapter_checkpoint import (
    PEFT_LAYOUT_FILE,
    OpenedAdapter,
    adapter_pieces,
    open_adapter_checkpoint,
)
from megatron_sppo.conversion.binding import bind
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.megatron_model import different_fields
from megatron_sppo.conversion.sources import open_plain
from megatron_sppo.conversion.weights_hash import weights_hash
from megatron_sppo.conversion.written_before import refuse_loss
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.locks import locked, locked_place
from megatron_sppo.model_file import write_architecture
from megatron_sppo.storage import atomic_directory, refuse_foreign, remove_stale_temporaries

logger = logging.getLogger(__name__)

_BASE_NAME = "base_model_name_or_path"
_TRAINED_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def import_adapter(
    adapter: Path, megatron: Path, *, base: Path, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Convert a PEFT adapter into a Megatron-Core checkpoint of adapters -> its iteration directory.

    Args:
        adapter: directory with adapter_config.json and adapter_model.safetensors.
        megatron: root of the checkpoint to write, iteration 0.
        base: Hugging Face directory of the model that it was trained on.
        dtype: "bfloat16" or "float32", the type that training will hold weights in (`params_dtype`), casts the
            matrices; None keeps them, and takes the base's own type for that.
        overwrite: replace other adapters that are there.

    Raises:
        ConversionError: it cannot be read, is no plain LoRA or another base's. Nothing is written then.
    """
    adapter, megatron, base = Path(adapter), Path(megatron), Path(base)
    refuse_foreign(
        megatron,
        ours=(TRACKER_FILE, ITERATION_PATTERN, f".{ITERATION_PATTERN}"),
        inputs=(adapter, base),
        flag="--megatron",
    )
    opened, cast = open_peft_adapter(adapter), convert.torch_dtype(dtype)
    config = read_config(base)
    architecture = architecture_from_hf(config, place=str(base / CONFIG_FILE))
    family = family_of(architecture.family, place=str(base))
    source = open_plain(base)
    base_hash = None if opened.base_hash is None else model_hash(base)
    check_fits(opened, shapes_as_named_by(opened, source, config), base=base, base_hash=base_hash)
    opened = of_decoder(opened, config)
    settings = AdapterSettings(
        rank=opened.rank,
        alpha=float(opened.alpha),
        scaling="rslora" if opened.use_rslora else "lora",
        targets=_targets(opened, [module.name for module in adapter_file.linear_modules(architecture)]),
    )
    pieces = adapter_pieces(opened, architecture, settings.targets, cast)
    tokenizer = check_side_files(base)
    trained = cast or source.entries[next(iter(bind(family, architecture)[0].hf_shapes))].dtype
    if trained not in _TRAINED_TYPES:
        raise ConversionError(f"{base} is in {trained}, which training does not use. Choose one: --dtype bfloat16.")
    target = iteration_directory(megatron, convert.IMPORT_ITERATION)
    with locked(megatron, flag="--megatron"):
        remove_stale_temporaries(target)
        refuse_later(megatron, convert.IMPORT_ITERATION)
        content = AdapterFile(
            settings=settings,
            base=BaseName(
                weights_hash=weights_hash(source, bind(family, architecture), dtype=trained),
                params_dtype=_TRAINED_TYPES[trained],
            ),
        )
        if target.exists() and not overwrite:
            _check_already_imported(target, opened, content, cast)
            logger.info("%s holds this adapter already", target)
            publish(megatron, convert.IMPORT_ITERATION)
            return target
        total = sum(piece.nbytes for piece in pieces)
        convert.check_space(megatron, total)
        with atomic_directory(target, replaces=MANIFEST_FILE) as directory:
            write_distcp(directory, pieces, objects={}, progress=lambda _: None)
            write_common(directory, convert.COMMON_STATE)
            (directory / "metadata.json").write_text(json.dumps(convert.METADATA_JSON))
            write_architecture(architecture, directory, tokenizer=convert.tokenizer_record(base, tokenizer))
            (directory / HF_DIRECTORY).mkdir()
            copy_side_files(base, directory / HF_DIRECTORY)
            adapter_file.write_adapter(directory, content)
            if cast is None:
                write_json(directory / PEFT_LAYOUT_FILE, _layout(opened))
            write_manifest(directory)
        publish(megatron, convert.IMPORT_ITERATION)
    logger.info("imported %s to %s: rank %d, %s", adapter, target, settings.rank, " ".join(settings.targets))
    return target


def export_adapter(
    megatron: Path, adapter: Path, *, base: Path | None, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Convert a Megatron-Core checkpoint of adapters into a PEFT directory -> that directory.

    Args:
        megatron: root (its tracker decides) or one iteration directory, saved in any parallel layout.
        adapter: directory to write; `peft` and vLLM load it as it is.
        base: Hugging Face directory of the model that it was trained on, which is proven and then named in the files;
            None: they name none. Of an import the files are the imported ones, to the byte, and name what those named.
        dtype: casts the matrices; None keeps them.
        overwrite: replace another adapter that is there.

    Raises:
        ConversionError, DataError: the checkpoint is damaged or holds a model, `base` is another model, or `adapter`
            holds something else.
    """
    adapter = Path(adapter)
    inputs = (Path(megatron), *(() if base is None else (Path(base),)))
    refuse_foreign(adapter, ours=(ADAPTER_CONFIG,), inputs=inputs, flag="--adapter", is_replaced=True)
    opened, cast = open_adapter_checkpoint(megatron), convert.torch_dtype(dtype)
    if base is not None:
        check_base(opened, Path(base))
    config, header = _kept_words(opened, cast) or _new_words(opened, cast, base)
    if overwrite:
        refuse_loss(adapter, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), of="an adapter", flag="--adapter")
    with locked_place(adapter, flag="--adapter"):
        remove_stale_temporaries(adapter)
        if adapter.exists() and any(adapter.iterdir()) and not overwrite:
            _check_already_exported(adapter, opened, cast, words=None if base is None else (config, header))
            logger.info("%s holds this adapter already", adapter)
            return adapter
        convert.check_space(adapter, len(header))
        with atomic_directory(adapter, replaces=ADAPTER_CONFIG) as directory:
            path = directory / ADAPTER_WEIGHTS
            entries = entries_of_header(path, header)
            write_header(path, header, entries)
            form = form_of(_hf_config(opened), map(module_of, entries))
            with open(path, "r+b", buffering=0) as file:
                for name in opened.factors:
                    for tensor_name, matrix in zip(tensor_names(name_in(form, name)), opened.read(name), strict=True):
                        write_tensor(file.fileno(), entries[tensor_name], matrix.to(entries[tensor_name].dtype))
            (directory / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
            if NO_HASH[CONTENT_HASH].encode() in header:
                seal_adapter(directory)
    logger.info("exported %s to %s: rank %d", opened.directory, adapter, opened.content.settings.rank)
    return adapter


def _targets(opened: PeftAdapter, known: list[str]) -> tuple[str, ...]:
    """Name the adapted modules -> in the order of a layer's computation.

    Raises:
        ConversionError: one of them is none that Megatron's adapters have, such as a mixture's router.
    """
    found = {module.rpartition(".")[2] for module in opened.factors}
    if others := sorted(found.difference(known)):
        raise ConversionError(
            f"{opened.directory} adapts {others[0]}, which Megatron's adapters cannot: only {', '.join(known)}. "
            "Train it without, or merge it with PEFT (merge_and_unload)."
        )
    return tuple(name for name in known if name in found)


def check_base(opened: OpenedAdapter, base: Path) -> HFCheckpoint:
    """Prove that a model is the one that adapters were trained on, by all of its weights -> the model, opened.

    Raises:
        ConversionError: it is another.
    """
    config = read_config(base)
    architecture = architecture_from_hf(config, place=str(base / CONFIG_FILE))
    if different := different_fields(architecture, opened.architecture, names=("the base", "the checkpoint")):
        raise ConversionError(
            f"--base {base} is of another model than {opened.directory}: {'; '.join(different[:3])}. "
            "Give the Hugging Face directory of the model that the adapters were trained on."
        )
    source, named = open_plain(base), opened.content.base
    bindings = bind(family_of(architecture.family, place=str(base)), architecture)
    if missing := [name for binding in bindings for name in binding.hf_shapes if name not in source.entries]:
        raise ConversionError(f"{base} lacks {some_of(missing)}, which its {CONFIG_FILE} promises. Fetch it again.")
    found = weights_hash(source, bindings, dtype=getattr(torch, named.params_dtype))
    if found != named.weights_hash:
        raise ConversionError(
            f"--base {base} has weights {found}, and the adapters of {opened.directory} were trained on "
            f"{named.weights_hash} (in {named.params_dtype}). Give the model that they were trained on."
        )
    return source


def _layout(opened: PeftAdapter) -> dict[str, str]:
    """Keep the words of the imported files."""
    config = (opened.directory / ADAPTER_CONFIG).read_text(encoding="utf-8")
    return {"config": config, "header": base64.b64encode(opened.header).decode()}


def _kept_words(opened: OpenedAdapter, cast: torch.dtype | None) -> tuple[str, bytes] | None:
    """Find the words of the imported files -> (adapter_config.json, header of the weights), None where there are none.

    Only an import has them, and its types are what it imported.
    """
    path = opened.directory / PEFT_LAYOUT_FILE
    if not path.is_file() or cast is not None:
        return None
    kept = read_json(path)
    return kept["config"], base64.b64decode(kept["header"])


def _new_words(opened: OpenedAdapter, cast: torch.dtype | None, base: Path | None) -> tuple[str, bytes]:
    settings, form = opened.content.settings, adapter_form(_hf_config(opened))
    config = adapter_config(
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.scaling == "rslora",
        # Ends of names would be the vision tower's, too.
        target_modules=_regular_expression(form, settings.targets) if form else sorted(settings.targets),
        base_model=None if base is None else str(base.absolute()),
    )
    named: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in opened.factors:
        pair = zip(tensor_names(name_in(form, name)), opened.dtypes(name), opened.shapes(name), strict=True)
        named |= {tensor: (cast or kind, shape) for tensor, kind, shape in pair}
    metadata = NO_HASH | ({} if base is None else {BASE_HASH: model_hash(base)})
    header, _ = new_header(Path(ADAPTER_WEIGHTS), dict(sorted(named.items())), metadata=metadata)
    return json.dumps(config, indent=2) + "\n", header


def _hf_config(opened: OpenedAdapter) -> dict[str, Any]:
    """Read the config.json that a checkpoint carries -> {}: it carries none."""
    place = opened.directory / HF_DIRECTORY
    return read_config(place) if (place / CONFIG_FILE).is_file() else {}


def _regular_expression(form: Mapping[str, str], targets: Sequence[str]) -> str:
    return rf"{re.escape(form['model.'])}layers\..*\.({'|'.join(map(re.escape, targets))})"


def _check_already_imported(target: Path, opened: PeftAdapter, content: AdapterFile, cast: torch.dtype | None) -> None:
    """Refuse other adapters that are there.

    Raises:
        ConversionError: they are not the ones that would be written.
    """
    there = open_adapter_checkpoint(target)
    if there.content != content or not _are_equal(there, opened, cast):
        raise ConversionError(
            f"{target} holds other adapters or another dtype. Choose another --megatron, or add --overwrite."
        )


def _check_already_exported(
    adapter: Path, opened: OpenedAdapter, cast: torch.dtype | None, *, words: tuple[str, bytes] | None
) -> None:
    """Refuse another adapter that is there.

    Args:
        words: whose base's name and hash it must have; None: any will do.

    Raises:
        ConversionError: it is not the one that would be written.
    """
    there, settings = of_decoder(open_peft_adapter(adapter), _hf_config(opened)), opened.content.settings
    same = (there.rank, float(there.alpha), there.use_rslora) == (
        *(settings.rank, settings.alpha, settings.scaling == "rslora"),
    )
    if not same or not _are_equal(opened, there, cast):
        raise ConversionError(
            f"{adapter} holds another adapter or another dtype. Choose another --adapter, or add --overwrite."
        )
    named = (read_json(adapter / ADAPTER_CONFIG).get(_BASE_NAME), there.base_hash)
    if words is not None and named != (json.loads(words[0]).get(_BASE_NAME), base_hash_of(words[1])):
        raise ConversionError(
            f"{adapter} holds this adapter and names the base {named[0]}. Choose another --adapter, or add --overwrite."
        )


def _are_equal(one: OpenedAdapter, other: PeftAdapter, cast: torch.dtype | None) -> bool:
    """Compare byte for byte, both cast first where a type is given."""
    if set(one.factors) != set(other.factors):
        return False
    for name in one.factors:
        for mine, theirs in zip(one.read(name), other.read(name), strict=True):
            pair = (mine.to(cast or mine.dtype), theirs.to(cast or theirs.dtype))
            if pair[0].dtype != pair[1].dtype or not torch.equal(*pair):
                return False
    return True
