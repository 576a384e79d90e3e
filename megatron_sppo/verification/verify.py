"""Proof that a Hugging Face directory and a Megatron checkpoint are one model: tensors, tokenizer, and logits.

The tensors are compared byte for byte. The logits come from Hugging Face's own model class and from the Megatron model
that training builds, on the same tokens, one model in memory after the other or layer by layer. Equal
weights under a wrong rotary base or norm epsilon give other logits, and equal logits on eight prompts do not prove
every row of a vocabulary.
"""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE, read_config
from megatron_sppo.checkpoints.megatron_checkpoint import resolve_checkpoint
from megatron_sppo.checkpoints.side_files import check_side_files
from megatron_sppo.conversion.binding import hf_shapes
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.megatron_model import OpenedMegatron, compare_tensors, different_fields, open_megatron
from megatron_sppo.conversion.sources import open_source
from megatron_sppo.errors import ConversionError
from megatron_sppo.model_file import FILE_NAME as MODEL_FILE
from megatron_sppo.verification.logits import Model, compare_models, logit_faults, logit_summary
from megatron_sppo.verification.probes import compare_tokenizers, prompt_token_ids
from megatron_sppo.weight_counts import num_parameters

SCHEMA_VERSION = 1


def verify(
    hf: Path,
    megatron: Path,
    *,
    prompts: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    layerwise: bool | None = None,
) -> dict[str, Any]:
    """Compare a Hugging Face directory with a Megatron checkpoint -> report, whose `faults` are empty if all is well.

    Args:
        prompts: prompt file as the rollouts take it, of which the first 64 are used; None takes the built-in ones.
        dtype: of the computation; None computes in float32 on the CPU and in bfloat16 on a GPU.
        layerwise: hold one layer in memory instead of a model; None does so where a model would take more than half of
            the free memory.

    Raises:
        ConversionError, DataError: one of the two cannot be read.
    """
    hf, directory = Path(hf), resolve_checkpoint(Path(megatron), weights_only=True)
    tokenizer_hash = check_side_files(hf)
    opened = open_megatron(directory, template=None if (directory / MODEL_FILE).is_file() else hf)
    described = architecture_from_hf(read_config(hf), place=str(hf / CONFIG_FILE))
    different = different_fields(described, opened.architecture, names=(CONFIG_FILE, MODEL_FILE))
    tensors = _compare_tensors(hf, opened)
    tokenizer = compare_tokenizers(hf, directory, tokenizer_hash)
    logits = None
    # Of weights that are absent or of another shape transformers makes up new ones, which are no model to compare with.
    if not different and not tensors["unusable"]:
        logits = compare_models(
            (Model(directory=hf), Model(directory=directory, opened=opened)),
            prompt_token_ids(
                hf,
                prompts,
                vocab_size=opened.architecture.vocab_size,
                max_position_embeddings=opened.architecture.max_position_embeddings,
            ),
            architecture=opened.architecture,
            num_parameters=num_parameters(opened.architecture),
            dtype=dtype,
            layerwise=layerwise,
        )
    report = {
        "schema_version": SCHEMA_VERSION,
        "hf": str(hf),
        "megatron": str(directory),
        "architecture": {"same": not different, "different": different},
        "tensors": tensors,
        "tokenizer": tokenizer,
        "logits": logits,
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")}
        | {"python": platform.python_version()},
    }
    return {**report, "faults": _faults(report)}


def summary(report: dict[str, Any]) -> Iterator[str]:
    """Word a report for people -> lines."""
    tensors, logits, tokenizer = report["tensors"], report["logits"], report["tokenizer"]
    cast = f" (after a cast to {tensors['cast']})" if tensors["cast"] else ""
    equal = tensors["compared"] - len(tensors["different"])
    yield f"tensors: {equal} of {tensors['compared']} are equal bit for bit{cast}"
    yield (
        f"tokenizer: {_same(tokenizer['ids_same'])}; texts and chat template: {_same(tokenizer['texts_same'])}; "
        f"{tokenizer['probes'] - len(tokenizer['different_probes'])} of {tokenizer['probes']} probes are the same"
    )
    if logits is not None:
        yield logit_summary(logits)


def enforce(report: dict[str, Any]) -> None:
    """Pass a report without faults.

    Raises:
        ConversionError: names the first difference, and how many more there are.
    """
    if faults := report["faults"]:
        more = f" (and {len(faults) - 1} more: --json FILE lists them)" if len(faults) > 1 else ""
        raise ConversionError(
            f"{report['megatron']} is not the model of {report['hf']}: {faults[0]}{more}. {_remedy(report)}"
        )


def _remedy(report: dict[str, Any]) -> str:
    """Say what fixes the first kind of fault that a report has."""
    tensors = report["tensors"]
    if tensors.get("unusable") or tensors.get("unknown"):
        return f"The weights in {report['hf']} are damaged or of another model: fetch or export them again."
    if report["architecture"]["different"]:
        return "config.json was changed after the import, or is of another model: restore it, or import again."
    if tensors["different"] or report["logits"] is None:
        return f"Convert again: megatron-sppo convert import --hf {report['hf']} --megatron NEW_DIR."
    if not report["tokenizer"]["ids_same"] or report["tokenizer"]["different_probes"]:
        return "The weights are the same: put the tokenizer's files right, or import again into a new directory."
    return (
        "All tensors are equal, so converting again changes nothing: the two programs compute this architecture "
        "differently. Do not train on it, and report it with its config.json."
    )


def _compare_tensors(hf: Path, opened: OpenedMegatron) -> dict[str, Any]:
    source = open_source(hf)
    weights = [binding for binding in opened.bindings if not binding.mapping.keeps_type]
    dtypes = {opened.dtype(binding) for binding in weights}
    names = {name for binding in weights for name in binding.hf_shapes}
    stored = {entry.dtype for name, entry in source.entries.items() if name in names}
    # An import with --dtype is the same model in another type: the Hugging Face side is then cast as the import did.
    cast = next(iter(dtypes)) if len(dtypes) == 1 and stored != dtypes else None
    with tqdm(total=source.nbytes, desc="tensors", unit="B", unit_scale=True, disable=None) as bar:
        different = compare_tensors(source, opened, dtype=cast, progress=bar.update)
    shapes = hf_shapes(opened.bindings) | {name: entry.shape for name, entry in opened.carried.items()}
    unusable = [
        f"{name} is missing" if entry is None else f"{name} has shape {list(entry.shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if (entry := source.entries.get(name)) is None or entry.shape != shape
    ]
    family = family_of(opened.architecture.family, place=str(opened.directory))
    known = (*shapes, *(("lm_head.weight",) if opened.architecture.share_embeddings_and_output_weights else ()))
    empty = tuple(family.ignored) or ("\0",)
    unknown = [name for name in source.entries if name not in known and not name.endswith(empty)]
    return {
        "compared": len(shapes),
        "different": different,
        "unusable": unusable,
        "unknown": unknown,
        "cast": str(cast).removeprefix("torch.") if cast else None,
    }


def _faults(report: dict[str, Any]) -> list[str]:
    """List what differs, in words."""
    faults = list(report["architecture"]["different"])
    tensors, tokenizer, logits = report["tensors"], report["tokenizer"], report["logits"]
    if different := tensors["different"]:
        faults.append(f"{len(different)} of {tensors['compared']} tensors differ, the first is {different[0]}")
    faults += tensors.get("unusable", [])
    if unknown := tensors.get("unknown"):
        faults.append(f"{len(unknown)} tensors of the Hugging Face directory are not in it, the first is {unknown[0]}")
    if not tokenizer["ids_same"]:
        faults.append("the tokenizers differ")
    # Where both tokenizers could be tried, what they do decides, not how their settings are spelled.
    if not tokenizer.get("probes") or tokenizer["different_probes"]:
        faults += [f"{name} differs" for name, same in tokenizer["texts"].items() if not same]
    if probes := tokenizer["different_probes"]:
        faults.append(f"the tokenizers treat {len(probes)} texts differently, the first is {probes[0]!r}")
    return faults if logits is None else faults + logit_faults(logits)


def _same(same: bool) -> str:
    return "the same" if same else "different"
