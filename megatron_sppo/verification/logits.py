"""Logits of both worlds on the same tokens, and how far they lie apart.

Hugging Face's own model class, and the Megatron model that training builds: one whole model in memory after the other,
or a layer of each at a time (`layerwise`).
"""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp import COMMON_FILE, check_metadata
from megatron_sppo.checkpoints.megatron_checkpoint import BACKEND_FILE, MANIFEST_FILE, verify_checkpoint
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.conversion.megatron_model import OpenedMegatron
from megatron_sppo.errors import DataError
from megatron_sppo.training import parallel
from megatron_sppo.training.checkpoint import load_stages
from megatron_sppo.verification import layerwise as by_layer
from megatron_sppo.verification.layerwise import Logits, built_stage, stage_logits
from megatron_sppo.verification.probes import prompt_token_ids

# S = tokens of a prompt, V = vocabulary, P = positions of all prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What two implementations of one model may differ by, in one precision."""

    relative_max: float
    """Largest difference of a logit, as a part of the largest logit."""
    mean_kl: float
    """KL(Hugging Face || Megatron) in nats, averaged over positions."""
    argmax_agreement: float
    """Least part of positions with the same most likely token."""


THRESHOLDS = {
    # Float32 sums in another order (SmolLM2-135M on one CPU: none at all); near ties may flip.
    "float32": Thresholds(relative_max=1e-4, mean_kl=1e-6, argmax_agreement=0.99),
    # One rounding of bfloat16 is 2^-9 of a value, and residuals add up over layers.
    "bfloat16": Thresholds(relative_max=0.05, mean_kl=1e-2, argmax_agreement=0.9),
}


def compare_models(
    hf: Path, opened: OpenedMegatron, *, prompts: Path | None, dtype: str | None, layerwise: bool | None
) -> dict[str, Any]:
    """Run both models on the prompts -> statistics over all positions, and the thresholds for them.

    Args:
        prompts, dtype, layerwise: as in `verify`.
    """
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    token_ids = prompt_token_ids(hf, opened.architecture, prompts)
    if layerwise is None:
        layerwise = _is_too_large(opened.architecture, dtype) or not _mcore_may_read(opened)
    parts = list((_compare_by_layer if layerwise else _compare_whole)(hf, opened, token_ids, dtype))
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


def _is_too_large(architecture: Architecture, dtype: str) -> bool:
    """Whether one model would take more than half of the memory that is free, and so must be run by layers."""
    needed = architecture.num_parameters() * getattr(torch, dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed <= free / 2:
        return False
    logger.info("%.1f GB of weights, %.1f GB free: the logits are computed layer by layer", needed / 1e9, free / 1e9)
    return True


def _mcore_may_read(opened: OpenedMegatron) -> bool:
    """Whether mcore may load the checkpoint: it trusts pickles, and Megatron-LM's own hold more than data."""
    try:
        check_metadata(opened.directory)
    except DataError as error:
        logger.info("%s The weights are read without it, and the logits computed layer by layer.", error)
        return False
    return True


def _attention(architecture: Architecture) -> str | None:
    """Name transformers' implementation to compare with; None: its default.

    The default silently leaves soft caps out (transformers 5.19, sdpa_attention.py).
    """
    return "eager" if architecture.attention_softcap is not None else None


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


def _compare_whole(
    hf: Path, opened: OpenedMegatron, token_ids: list[list[int]], dtype: str
) -> Iterator[dict[str, float]]:
    """Run one whole model after the other -> statistics per prompt.

    One prompt at a time: float64 over all positions of a large vocabulary would not fit.
    """
    reference = prompt_logits(hf_logits(hf, dtype, _attention(opened.architecture)), token_ids, "Hugging Face")
    ours = prompt_logits(megatron_logits(opened, dtype), token_ids, "Megatron")
    return (compare_logits(one, other) for one, other in zip(reference, ours, strict=True))


@torch.no_grad()
def prompt_logits(model: AbstractContextManager[Logits], token_ids: list[list[int]], name: str) -> list[Tensor]:
    """Run a model on each prompt -> [S, V] float32 on the CPU per prompt; the model is gone after."""
    with model as logits:
        results = [logits(torch.tensor([ids]))[0] for ids in tqdm(token_ids, desc=name, disable=None)]
    del logits
    gc.collect()
    return results


@contextlib.contextmanager
def hf_logits(hf: Path, dtype: str, attention: str | None) -> Iterator[Logits]:
    """Load Hugging Face's model, with transformers' `attention` implementation (None: its default)."""
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, hf, dtype=getattr(torch, dtype), attn_implementation=attention)
    model = model.to(parallel.device()).eval()
    yield lambda tokens_BS: model(input_ids=tokens_BS.to(parallel.device())).logits.float().cpu()


@contextlib.contextmanager
def megatron_logits(opened: OpenedMegatron, dtype: str) -> Iterator[Logits]:
    """Build the model as training does, in one process, and load it by mcore."""
    if (opened.directory / MANIFEST_FILE).is_file():
        # What mcore reads beyond the tensors, which open_megatron has checked.
        names = [name for name in (COMMON_FILE, BACKEND_FILE) if (opened.directory / name).is_file()]
        verify_checkpoint(opened.directory, names=names)
    check_metadata(opened.directory)
    with built_stage(opened, dtype, on_meta=False) as stage:
        stage.to(parallel.device())
        load_stages((stage,), opened.directory, is_verified=True)
        yield stage_logits(stage, opened.architecture)
