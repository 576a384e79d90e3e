"""log pi_t of every response that will be trained on: computed once, by the model, layout and precision of training.

The numbers lie beside the data with a fingerprint of all that they depend on. A mismatch is refused, never recomputed
silently: a reference of another model or precision shows as nats in the loss.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.forward_step import log_probs
from megatron_sppo.training.metrics import drift_per_token
from megatron_sppo.training.policy import Policy, weights_hash

logger = logging.getLogger(__name__)

MEASURED_EPOCHS = 4
"""Epochs behind the first whose drift is measured."""


def fingerprint(policy: Policy, dataset: PreferenceDataset, batches: Batches, config: TrainingConfig) -> dict[str, Any]:
    """Name all that reference log-probabilities depend on -> JSON dict. Collective.

    The layout is not part of it: other layouts give the same numbers up to rounding, which the first step reports as
    `sppo/ref_drift_step0`.
    """
    model, batch = config.model, config.batch
    names: dict[str, Any] = {
        "weights_hash": weights_hash(policy.stages),
        "dataset_hash": dataset.dataset_hash,
        "selection": batches.selection,
        "seq_length": batch.seq_length,
        "max_prompt_length": batch.max_prompt_length,
        "params_dtype": model.params_dtype,
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe if model.fp8 != "none" else None,
        "packing": batch.packing,
        "packed_sequence_size": batch.packed_sequence_size,
        "share_prompts": batch.share_prompts,
    }
    if _num_passes(batches, config) > 1:
        names["epochs"] = {
            "num_epochs": _num_passes(batches, config),
            "seed": batch.seed,
            "global_batch_size": batch.global_batch_size,
            "micro_batch_size": batch.micro_batch_size,
        }
    return names


def _num_passes(batches: Batches, config: TrainingConfig) -> int:
    return batches.num_epochs if config.batch.reference_per_epoch else 1


def say_what_it_carries(batches: Batches, config: TrainingConfig) -> None:
    """Warn of what makes log pi of the same weights differ between the reference pass and a step."""
    model = config.model
    if model.fp8 == "none":
        return
    if model.fp8_recipe == "delayed":
        logger.warning(
            "fp8_recipe delayed scales by the largest values of earlier calls: log pi of the same weights changes from "
            "call to call, log-ratios do not begin at 0 (2.9 nats a response were seen, emulated), and training "
            "regresses that noise. Use --fp8-recipe tensorwise"
        )
    elif model.fp8_recipe == "tensorwise" and batches.num_epochs > _num_passes(batches, config):
        logger.warning(
            "fp8_recipe tensorwise scales by the largest value of a micro-batch, and the reference is computed in the "
            "first epoch's: later epochs carry the difference as noise, which sppo/ref_drift reports (0.05 nats a "
            "token were seen, emulated). Use --reference-per-epoch (%d reference passes), or --num-epochs 1",
            batches.num_epochs,
        )


def load_or_compute(
    policy: Policy, dataset: PreferenceDataset, batches: Batches, expected: dict[str, Any], *, config: TrainingConfig
) -> np.ndarray:
    """Read the reference log-probabilities, or run the reference pass and write them -> [G, K] float32, nats.

    With `reference_per_epoch` one for each epoch, one after another: [epochs * G, K]. Responses that no step visits are
    NaN. Collective.

    Args:
        expected: `fingerprint` of this run.
    """
    directory = _directory(dataset, config)
    stored = reference_file.read_reference(directory, expected)
    torch.distributed.barrier()  # every rank has looked before one writes
    if stored is not None:
        logger.info("reference log-probabilities read from %s", directory)
        return stored
    values = np.concatenate(
        [compute(policy, dataset, batches, epoch=epoch) for epoch in range(_num_passes(batches, config))]
    )
    if parallel.is_rank_zero():
        reference_file.write_reference(directory, values, expected)
    torch.distributed.barrier()
    return values


def read_for_resume(
    dataset: PreferenceDataset, batches: Batches, expected: dict[str, Any], *, config: TrainingConfig
) -> np.ndarray:
    """Read the reference that an interrupted run trained against -> as `load_or_compute`.

    Raises:
        ConfigError: it was not computed for the epochs that are asked for.
        DataError: it is gone or is not the one that the checkpoint names. Computing it again is impossible: the policy
            has moved on.
    """
    stored_epochs = expected.get("epochs", {}).get("num_epochs", 1)
    if _num_passes(batches, config) > stored_epochs or (stored_epochs > 1 and not config.batch.reference_per_epoch):
        flag = "--reference-per-epoch" if stored_epochs > 1 else "--no-reference-per-epoch"
        raise ConfigError(
            f"{config.save} was trained against log pi_t of the micro-batches of {stored_epochs} epoch(s), and pi_t is "
            f"not here to compute others. Use {flag} and --num-epochs {stored_epochs}, or another --save."
            if stored_epochs > 1
            else f"{config.save} was trained against one reference pass, and pi_t is not here to compute others. "
            f"Use {flag}, or another --save."
        )
    directory = _directory(dataset, config)
    stored = reference_file.read_reference(directory, expected)
    if stored is None:
        raise DataError(
            f"{directory} has no reference log-probabilities, but the checkpoint to resume from was trained against "
            "some. Restore reference.*, or start anew with another --save."
        )
    return stored


def compute(policy: Policy, dataset: PreferenceDataset, batches: Batches, *, epoch: int = 0) -> np.ndarray:
    """Run the reference pass over an epoch's steps -> [G, K] float32 with NaN where no step looks. Collective."""
    values = np.full((dataset.num_groups, dataset.num_responses), np.nan, dtype=np.float32)
    first, last = batches.first_step(epoch), batches.first_step(epoch + 1) - 1
    quiet = None if parallel.is_rank_zero() else True
    steps = batches.steps(first=first, last=last)
    for plan in tqdm(steps, total=last - first + 1, desc="reference", unit="step", disable=quiet):
        values[plan.group, plan.response] = log_probs(policy, plan).float().numpy()
    return values


def drift_by_step(
    policy: Policy, dataset: PreferenceDataset, batches: Batches, reference_GK: np.ndarray
) -> dict[str, float]:
    """Measure how far log pi_t moves because an epoch's micro-batches are others -> {epoch's first step: drift}.

    Over the responses of the first step of each epoch but the first: the sum of |log pi_t in this step's micro-batches
    - log pi_t in the first epoch's| by the sum of their tokens; nats a token. pi_t's own weights compute both, before
    the first step: no update is in it. What a run without `reference_per_epoch` carries in its log-ratios, and one with
    it does not. Reported as `sppo/ref_drift` with that step. Collective. Each costs a forward pass over a step, so only
    the first MEASURED_EPOCHS of them are measured: a run of many short epochs would spend as long here as in training.
    """
    first_epoch_GK = reference_GK[: dataset.num_groups]
    drift = {}
    for epoch in range(1, min(batches.num_epochs, 1 + MEASURED_EPOCHS)):
        step = batches.first_step(epoch)
        (plan,) = batches.steps(first=step, last=step, reference_GK=reference_GK)
        per_epoch = len(reference_GK) > dataset.num_groups
        log_prob_N = (plan.targets.reference_log_prob if per_epoch else log_probs(policy, plan).float()).numpy()
        difference = torch.from_numpy(log_prob_N - first_epoch_GK[plan.group, plan.response])
        drift[str(step)] = drift_per_token(difference, plan.num_response_tokens)
    return drift


def _directory(dataset: PreferenceDataset, config: TrainingConfig) -> Path:
    """Choose where the reference lies: beside the data, or under --save where the dataset is read-only."""
    return dataset.directory if os.access(dataset.directory, os.W_OK) else config.save
