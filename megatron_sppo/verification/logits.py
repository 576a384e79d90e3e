"""Logits of both worlds on the same tokens, and how far they lie apart.

Hugging Face's own model class, and the Megatron model that training builds: one whole model in memory after the other,
or a layer of each at a time (`layerwise`).
"""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
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
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.megatron_checkpoint import BACKEND_FILE, MANIFEST_FILE, verify_checkpoint
from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.checkpoints.wrapped import is_wrapped
from megatron_sppo.command_line import one_line
from megatron_sppo.conversion.megatron_model import OpenedMegatron
from megatron_sppo.errors import ConversionError, DataError
from megatron_sppo.training import parallel
from megatron_sppo.training.checkpoint import load_stages
from megatron_sppo.verification import layerwise as by_layer
from megatron_sppo.verification.layerwise import Logits, built_stage, stage_logits

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


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to be run: by Hugging Face's own class, or the one that training builds, where `opened` is given."""

    directory: Path
    opened: OpenedMegatron | None = None

    @property
    def name(self) -> str:
        return "Hugging Face" if self.opened is None else "Megatron"

    def whole(self, dtype: str, attention: str | None) -> AbstractContextManager[Logits]:
        """Have all of it in memory."""
        if self.opened is None:
            return hf_logits(self.directory, dtype, attention)
        return megatron_logits(self.opened, dtype)

    def by_layer(
        self, dtype: str, attention: str | None, on_layer: Callable[[], object]
    ) -> AbstractContextManager[Logits]:
        """Have a layer of it in memory at a time; `on_layer` is called after each."""
        if self.opened is not None:
            return by_layer.megatron_logits(self.opened, dtype, on_layer=on_layer)
        logits = by_layer.hf_logits(self.directory, getattr(torch, dtype), attention=attention, on_layer=on_layer)
        return contextlib.nullcontext(logits)


def compare_models(
    models: tuple[Model, Model],
    token_ids: list[list[int]],
    *,
    architecture: Architecture | None,
    num_parameters: int,
    dtype: str | None,
    layerwise: bool | None,
) -> dict[str, Any]:
    """Run both models on the prompts -> statistics over all positions, and the thresholds for them.

    Args:
        models: the first is the reference, of two Hugging Face models, two of Megatron's, or one of each.
        architecture: None where the family is none of ours, and transformers runs both.
        num_parameters: of one model.
        dtype, layerwise: as in `verify`.
    """
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if layerwise is None:
        layerwise = _is_too_large(num_parameters, dtype) or not all(map(_mcore_may_read, models))
    attention = _attention(architecture)
    parts = list((_compare_by_layer if layerwise else _compare_whole)(models, token_ids, dtype, attention))
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


def logit_faults(logits: dict[str, Any]) -> list[str]:
    """Say in which of its statistics a comparison lies beyond its thresholds -> faults, in words."""
    faults, limits = [], logits["thresholds"]
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


def logit_summary(logits: dict[str, Any]) -> str:
    """Word a comparison of logits -> one line."""
    return (
        f"logits ({logits['dtype']}, {logits['prompts']} prompts, {logits['positions']} positions): "
        f"max |difference| {logits['max_abs']:.2e} of max |logit| {logits['max_logit']:.1f}, mean "
        f"{logits['mean_abs']:.2e}; KL mean {logits['mean_kl']:.2e}, max {logits['max_kl']:.2e}; "
        f"same most likely token at {logits['argmax_agreement']:.2%}"
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


def _is_too_large(num_parameters: int, dtype: str) -> bool:
    """Whether one model would take more than half of the memory that is free, and so must be run by layers."""
    needed = num_parameters * getattr(torch, dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed <= free / 2:
        return False
    logger.info("%.1f GB of weights, %.1f GB free: the logits are computed layer by layer", needed / 1e9, free / 1e9)
    return True


def _mcore_may_read(model: Model) -> bool:
    """Whether mcore may load the checkpoint: it trusts pickles, and Megatron-LM's own hold more than data."""
    try:
        if model.opened is not None:
            check_metadata(model.opened.directory)
    except DataError as error:
        logger.info("%s The weights are read without it, and the logits computed layer by layer.", error)
        return False
    return True


def _attention(architecture: Architecture | None) -> str | None:
    """Name transformers' implementation to compare with; None: its default.

    The default silently leaves soft caps out (transformers 5.19, sdpa_attention.py).
    """
    return "eager" if architecture is None or architecture.attention_softcap is not None else None


@torch.no_grad()
def _compare_by_layer(
    models: tuple[Model, Model], token_ids: list[list[int]], dtype: str, attention: str | None
) -> Iterator[dict[str, float]]:
    """Run both sides with a layer in memory at a time, a batch of prompts after the other -> statistics per prompt."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="layers", disable=None))
        one, other = (stack.enter_context(model.by_layer(dtype, attention, bar.update)) for model in models)
        for batch in by_layer.batches(token_ids):
            tokens_BS = by_layer.padded(batch)
            pairs = zip(batch, one(tokens_BS), other(tokens_BS), strict=True)
            yield from (compare_logits(first[: len(ids)], second[: len(ids)]) for ids, first, second in pairs)


def _compare_whole(
    models: tuple[Model, Model], token_ids: list[list[int]], dtype: str, attention: str | None
) -> Iterator[dict[str, float]]:
    """Run one whole model after the other -> statistics per prompt.

    One prompt at a time: float64 over all positions of a large vocabulary would not fit.
    """
    one, other = (prompt_logits(model.whole(dtype, attention), token_ids, model.name) for model in models)
    return (compare_logits(first, second) for first, second in zip(one, other, strict=True))


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
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if is_wrapped(read_config(hf)) else AutoModelForCausalLM
    try:
        model = load_pretrained(auto, hf, dtype=getattr(torch, dtype), attn_implementation=attention)
    except (ConversionError, DataError):
        raise
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"transformers cannot load {hf} ({one_line(error)}). `convert compare --no-logits` compares all else."
        ) from error
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
