"""Proof that a Hugging Face directory and a Megatron checkpoint are one model: tensors, tokenizer, and logits.

The tensors are compared byte for byte. The logits come from Hugging Face's own model class and from the Megatron model
that training builds, on the same tokens, one model in memory after the other or layer by layer. Equal
weights under a wrong rotary base or norm epsilon give other logits, and equal logits on eight prompts do not prove
every row of a vocabulary.
"""

import dataclasses
import gc
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp import COMMON_FILE, check_metadata
from megatron_sppo.checkpoints.hf_checkpoint import open_hf_checkpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.megatron_checkpoint import MANIFEST_FILE, resolve_checkpoint, verify_checkpoint
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.checkpoints.side_files import check_side_files
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.conversion.megatron_model import OpenedMegatron, compare_tensors, different_fields, open_megatron
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import build_stage, forward
from megatron_sppo.storage import write_json
from megatron_sppo.training import parallel
from megatron_sppo.training.checkpoint import load_stages
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import mcore_config
from megatron_sppo.verification import layerwise as by_layer
from megatron_sppo.verification.probes import compare_tokenizers, prompt_token_ids

# S = tokens of a prompt, V = vocabulary, P = positions of all prompts

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
HOST_FILES = (COMMON_FILE, "metadata.json")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What two implementations of one model may differ by, in one precision."""

    relative_max: float
    """Largest difference of a logit, as a part of the largest logit."""
    mean_kl: float
    """KL(Hugging Face || Megatron) in nats, mean over positions."""
    argmax_agreement: float
    """Least part of positions with the same most likely token."""


THRESHOLDS = {
    # Float32 sums in another order (SmolLM2-135M on one CPU: none at all); near ties may flip.
    "float32": Thresholds(relative_max=1e-4, mean_kl=1e-6, argmax_agreement=0.99),
    # One rounding of bfloat16 is 2^-9 of a value, and residuals add up over layers.
    "bfloat16": Thresholds(relative_max=0.05, mean_kl=1e-2, argmax_agreement=0.9),
}


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
    hf, directory = Path(hf), resolve_checkpoint(Path(megatron))
    check_side_files(hf)
    opened = open_megatron(directory, template=None if (directory / "model.json").is_file() else hf)
    described = architecture_from_hf(read_config(hf), place=str(hf / "config.json"))
    different = different_fields(described, opened.architecture, names=("config.json", "model.json"))
    tensors = _compare_tensors(hf, opened)
    tokenizer = compare_tokenizers(hf, directory)
    logits = None
    # Of weights that are absent or of another shape transformers makes up new ones, which are no model to compare with.
    if not different and not tensors["unusable"]:
        compute_dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        logits = _compare_logits(hf, opened, prompts=prompts, dtype=compute_dtype, layerwise=layerwise)
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


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON; `faults` lists what differs, and is empty where all is well."""
    write_json(path, report)


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
        yield (
            f"logits ({logits['dtype']}, {logits['prompts']} prompts, {logits['positions']} positions): "
            f"max |difference| {logits['max_abs']:.2e} of max |logit| {logits['max_logit']:.1f}, mean "
            f"{logits['mean_abs']:.2e}; KL mean {logits['mean_kl']:.2e}, max {logits['max_kl']:.2e}; "
            f"same most likely token at {logits['argmax_agreement']:.2%}"
        )


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
    """Say what mends the first kind of fault that a report has."""
    tensors = report["tensors"]
    if tensors.get("unusable") or tensors.get("unknown"):
        return f"The weights in {report['hf']} are damaged or of another model: fetch or export them again."
    if report["architecture"]["different"]:
        return "config.json was changed after the import, or is of another model: restore it, or import again."
    if tensors["different"] or report["logits"] is None:
        return f"Convert again: tools/convert.py import --hf {report['hf']} --megatron NEW_DIR."
    if not report["tokenizer"]["ids_same"] or report["tokenizer"]["different_probes"]:
        return "The weights are the same: put the tokenizer's files right, or import again into a new directory."
    return (
        "All tensors are equal, so converting again changes nothing: the two programs compute this architecture "
        "differently. Do not train on it, and report it with its config.json."
    )


def compare_logits(reference_PV: Tensor, logits_PV: Tensor) -> dict[str, float]:
    """Measure how far two sets of logits lie apart, position by position -> statistics.

    KL(p || q) = sum p (log p - log q), p by the reference; in float64, where a sum over 10^5 tokens keeps 1e-12.
    """
    log_p = torch.log_softmax(reference_PV.double(), dim=-1)
    log_q = torch.log_softmax(logits_PV.double(), dim=-1)
    kl_P = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    difference = (reference_PV.double() - logits_PV.double()).abs()
    return {
        "positions": len(reference_PV),
        "max_abs": difference.max().item(),
        "mean_abs": difference.mean().item(),
        "max_logit": reference_PV.abs().max().item(),
        "mean_kl": kl_P.mean().item(),
        "max_kl": kl_P.max().item(),
        "argmax_agreement": (reference_PV.argmax(-1) == logits_PV.argmax(-1)).double().mean().item(),
    }


def _compare_tensors(hf: Path, opened: OpenedMegatron) -> dict[str, Any]:
    source = open_hf_checkpoint(hf)
    dtypes = {opened.dtype(binding) for binding in opened.bindings}
    stored = {entry.dtype for entry in source.entries.values()}
    # An import with --dtype is the same model in another type: the Hugging Face side is then cast as the import did.
    cast = next(iter(dtypes)) if len(dtypes) == 1 and stored != dtypes else None
    with tqdm(total=source.nbytes, desc="tensors", unit="B", unit_scale=True, disable=None) as bar:
        different = compare_tensors(source, opened, dtype=cast, progress=bar.update)
    shapes = {name: shape for binding in opened.bindings for name, shape in binding.hf_shapes.items()}
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


def _compare_logits(
    hf: Path, opened: OpenedMegatron, *, prompts: Path | None, dtype: str, layerwise: bool | None
) -> dict[str, Any]:
    token_ids = prompt_token_ids(hf, opened.architecture, prompts)
    if layerwise is None:
        layerwise = _is_too_large(opened.architecture, dtype) or not _host_may_read(opened)
    if layerwise:
        parts = list(_compare_by_layer(hf, opened, token_ids, dtype))
    else:
        reference = _hf_logits(hf, token_ids, getattr(torch, dtype), attention=_attention(opened.architecture))
        ours = _megatron_logits(opened, token_ids, dtype)
        # One prompt at a time: float64 over all positions of a large vocabulary would not fit.
        parts = [compare_logits(one, other) for one, other in zip(reference, ours, strict=True)]
    positions = sum(part["positions"] for part in parts)

    def mean(name: str) -> float:
        return sum(part[name] * part["positions"] for part in parts) / positions

    return {
        "dtype": dtype,
        "layerwise": layerwise,
        "prompts": len(parts),
        "positions": positions,
        **{name: max(part[name] for part in parts) for name in ("max_abs", "max_logit", "max_kl")},
        **{name: mean(name) for name in ("mean_abs", "mean_kl", "argmax_agreement")},
        "thresholds": dataclasses.asdict(THRESHOLDS[dtype]),
    }


def _attention(architecture: Architecture) -> str | None:
    """Name transformers' implementation to compare with; None: its default.

    The default leaves soft caps out without a word (transformers 5.19, sdpa_attention.py).
    """
    return "eager" if architecture.attention_softcap is not None else None


def _is_too_large(architecture: Architecture, dtype: str) -> bool:
    """Whether one model would take more than half of the memory that is free, and so must be run by layers."""
    needed = architecture.num_parameters() * getattr(torch, dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _available_bytes()
    if needed <= free / 2:
        return False
    logger.info("%.1f GB of weights, %.1f GB free: the logits are computed layer by layer", needed / 1e9, free / 1e9)
    return True


def _host_may_read(opened: OpenedMegatron) -> bool:
    """Whether the host may load the checkpoint: it trusts pickles, and Megatron-LM's own hold more than data."""
    try:
        check_metadata(opened.directory)
    except DataError as error:
        logger.info("%s The weights are read without it, and the logits computed layer by layer.", error)
        return False
    return True


def _available_bytes() -> int:
    """Read how much memory a process may take without swapping -> bytes (Linux)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo without MemAvailable")


@torch.no_grad()
def _compare_by_layer(
    hf: Path, opened: OpenedMegatron, token_ids: list[list[int]], dtype: str
) -> Iterator[dict[str, float]]:
    """Run both sides with a layer in memory at a time, a batch of prompts after the other -> statistics per prompt."""
    batches = list(by_layer.batches(token_ids))
    bar = tqdm(total=2 * len(batches) * opened.architecture.num_layers, desc="layers", disable=None)
    with bar, by_layer.megatron_logits(opened, dtype, on_layer=bar.update) as ours:
        attention = _attention(opened.architecture)
        reference = by_layer.hf_logits(hf, getattr(torch, dtype), attention=attention, on_layer=bar.update)
        for batch in batches:
            tokens_BS = by_layer.padded(batch)
            pairs = zip(batch, reference(tokens_BS), ours(tokens_BS), strict=True)
            yield from (compare_logits(one[: len(ids)], other[: len(ids)]) for ids, one, other in pairs)


@torch.no_grad()
def _hf_logits(
    hf: Path, token_ids: list[list[int]], dtype: torch.dtype, *, attention: str | None = None
) -> list[Tensor]:
    """Run Hugging Face's model -> [S, V] float32 on the CPU per prompt."""
    from transformers import AutoModelForCausalLM

    device = parallel.device()
    model = load_pretrained(AutoModelForCausalLM, hf, dtype=dtype, attn_implementation=attention)
    model = model.to(device).eval()
    bar = tqdm(token_ids, desc="Hugging Face", disable=None)
    logits = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in bar]
    del model
    gc.collect()
    return logits


@torch.no_grad()
def _megatron_logits(opened: OpenedMegatron, token_ids: list[list[int]], dtype: str) -> list[Tensor]:
    """Build the model as training does, in one process, load it by the host and run it -> [S, V] float32 per prompt."""
    if (opened.directory / MANIFEST_FILE).is_file():
        # What the host reads beyond the tensors, which open_megatron has checked.
        verify_checkpoint(opened.directory, names=[name for name in HOST_FILES if (opened.directory / name).is_file()])
    check_metadata(opened.directory)
    layout, config = ParallelConfig(), ModelConfig(params_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    parallel.initialize(layout, seed=0)
    try:
        transformer_config = mcore_config(opened.architecture, config, layout)
        stage = build_stage(opened.architecture, transformer_config, config, pre_process=True, post_process=True)
        device = parallel.device()
        stage = stage.to(device).eval()
        load_stages((stage,), opened.directory)
        results = []
        for ids in tqdm(token_ids, desc="Megatron", disable=None):
            tokens = torch.tensor([ids], device=device)
            positions = torch.arange(len(ids), device=device)[None]
            logits = forward(stage, tokens, positions)[0, :, : opened.architecture.vocab_size]
            results.append(logits.float().cpu())
        return results
    finally:
        parallel.shut_down()


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
    if logits is None:
        return faults
    limits = logits["thresholds"]
    largest = limits["relative_max"] * logits["max_logit"]
    # Written so that NaN, which compares false with everything, is a fault.
    if not logits["max_abs"] <= largest:
        faults.append(f"logits differ by up to {logits['max_abs']:.3g} ({logits['dtype']} allows {largest:.3g})")
    if not logits["mean_kl"] <= limits["mean_kl"]:
        faults.append(f"mean KL is {logits['mean_kl']:.3g} nats ({logits['dtype']} allows {limits['mean_kl']:.3g})")
    if not logits["argmax_agreement"] >= limits["argmax_agreement"]:
        faults.append(
            f"the most likely token agrees at {logits['argmax_agreement']:.2%} of positions "
            f"({logits['dtype']} needs {limits['argmax_agreement']:.0%})"
        )
    return faults


def _same(same: bool) -> str:
    return "the same" if same else "different"
