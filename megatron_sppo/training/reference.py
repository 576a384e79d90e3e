"""log pi_t of every response that will be trained on: computed once, by the model, layout and precision of training.

The numbers lie beside the data with a fingerprint of all that they depend on. A mismatch is refused, never recomputed
in silence: a reference of another model or precision shows as nats in the loss.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

from megatron_sppo.data import reference as sidecar
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import DataError
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.forward_step import run_micro_batches
from megatron_sppo.training.policy import Policy, weights_hash

logger = logging.getLogger(__name__)


def fingerprint(
    policy: Policy, dataset: PreferenceDataset, config: TrainingConfig, *, selection: str
) -> dict[str, Any]:
    """Name all that reference log-probabilities depend on -> JSON dict. Collective.

    The layout is not part of it: other layouts give the same numbers up to rounding, which the first step reports as
    `sppo/ref_drift_step0`.
    """
    model, batch = config.model, config.batch
    return {
        "weights_hash": weights_hash(policy.stages),
        "dataset_hash": dataset.dataset_hash,
        "selection": selection,
        "seq_length": batch.seq_length,
        "max_prompt_length": batch.max_prompt_length,
        "params_dtype": model.params_dtype,
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe if model.fp8 != "none" else None,
        "packing": batch.packing,
        "packed_sequence_size": batch.packed_sequence_size,
        "share_prompts": batch.share_prompts,
    }


def load_or_compute(
    policy: Policy, dataset: PreferenceDataset, batches: Batches, expected: dict[str, Any], *, config: TrainingConfig
) -> np.ndarray:
    """Read the reference log-probabilities, or run the reference pass and write them -> [G, K] float32, nats.

    Responses that no step visits are NaN. Collective.

    Args:
        expected: `fingerprint` of this run.
    """
    directory = _directory(dataset, config)
    stored = sidecar.read_reference(directory, expected)
    torch.distributed.barrier()  # every rank has looked before one writes
    if stored is not None:
        logger.info("reference log-probabilities read from %s", directory)
        return stored
    values = compute(policy, dataset, batches)
    if parallel.is_rank_zero():
        sidecar.write_reference(directory, values, expected)
    torch.distributed.barrier()
    return values


def read_for_resume(dataset: PreferenceDataset, expected: dict[str, Any], *, config: TrainingConfig) -> np.ndarray:
    """Read the reference that an interrupted run trained against -> [G, K] float32, nats.

    Raises:
        DataError: it is gone or is not the one that the checkpoint names. Computing it again is impossible: the policy
            has moved on.
    """
    directory = _directory(dataset, config)
    stored = sidecar.read_reference(directory, expected)
    if stored is None:
        raise DataError(
            f"{directory} has no reference log-probabilities, but the checkpoint to resume from was trained against "
            "some. Restore reference.*, or start anew with another --save."
        )
    return stored


@torch.no_grad()
def compute(policy: Policy, dataset: PreferenceDataset, batches: Batches) -> np.ndarray:
    """Run the reference pass over one epoch's steps -> [G, K] float32 with NaN where no step looks. Collective."""
    values = np.full((dataset.num_groups, dataset.num_responses), np.nan, dtype=np.float32)
    last = batches.steps_per_epoch
    quiet = None if parallel.is_rank_zero() else True
    for plan in tqdm(batches.steps(first=1, last=last), total=last, desc="reference", unit="step", disable=quiet):
        log_prob_N = run_micro_batches(policy, plan, loss=lambda _, log_prob: log_prob, forward_only=True)
        values[plan.group, plan.response] = log_prob_N.float().numpy()
    return values


def _directory(dataset: PreferenceDataset, config: TrainingConfig) -> Path:
    """Choose where the reference lies: beside the data, or under --save where the dataset is read-only."""
    return dataset.directory if os.access(dataset.directory, os.W_OK) else config.save
