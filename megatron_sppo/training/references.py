"""What a run's policy is held against: log pi_t, and log pi_j of further policies that its objective looks at.

All by the one model, one after another, pi_t last: never a second model in memory. The numbers of further policies lie
beside pi_t's, in files that are named by their fingerprint, so that any number of runs may share a dataset.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError
from megatron_sppo.training import checkpoint, inputs, reference
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.stopping import StopRequest

# G = prompt groups, K = responses per prompt, R = further references


def load_or_compute(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    progress: Progress,
    weights: Sequence[Path],
    further: Sequence[Sequence[Path]],
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> np.ndarray:
    """Read or compute what a new run is held against -> [G, K], or [G, K, 1 + R]; noted in `progress`. Collective.

    The policy is pi_t afterwards. No optimizer may have been made of it yet.

    Args:
        weights: `inputs.open_weights`.
        further: `inputs.open_references`.

    Raises:
        SystemExit: as `reference.load_or_compute`.
    """
    others = []
    for source in further:
        checkpoint.load_weights(policy, *source)
        names = reference.fingerprint(policy, dataset, batches, config)
        values = reference.load_or_compute(
            policy, dataset, batches, names, config=config, stop=stop, name=reference_file.name_of(names)
        )
        others.append((names, values))
    checkpoint.load_weights(policy, *weights)
    progress.micro_batch_key = batches.micro_batch_key
    progress.reference = reference.fingerprint(policy, dataset, batches, config)
    progress.other_references = [names for names, _ in others]
    known = next((values for names, values in others if names == progress.reference), None)
    reference_GK = reference.load_or_compute(
        policy, dataset, batches, progress.reference, config=config, stop=stop, known=known
    )
    progress.ref_drift = reference.drift_by_step(policy, dataset, batches, reference_GK)
    return _beside(reference_GK, [values for _, values in others])


def read_for_resume(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    progress: Progress,
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> np.ndarray:
    """Read what an interrupted run was held against -> as `load_or_compute`. Collective.

    A run that is to be longer than it was needs those policies once more, for the responses that it did not look at.
    The policy's weights are to be loaded afterwards.

    Raises:
        ConfigError: another number of references than it began with, or another policy is given where its weights are
            needed.
        DataError, SystemExit: as `reference.read_for_resume`.
    """
    reference_GK = reference.read_for_resume(
        policy,
        dataset,
        batches,
        progress,
        config=config,
        stop=stop,
        load_pi_t=functools.partial(_load_pi_t, policy, config),
    )
    begun, given = len(progress.other_references), len(config.reference)
    if begun != given:
        raise ConfigError(
            f"{config.save} was trained with {begun} further references, and {given} are given. "
            "Use --reference as it was, or another --save."
        )
    others = [
        reference.read_or_extend(
            policy,
            dataset,
            batches,
            names,
            first=progress.step + 1,
            config=config,
            stop=stop,
            load_weights=functools.partial(_load, policy, config, root),
            flag=f"--reference {root}",
            name=reference_file.name_of(names),
        )
        for names, root in zip(progress.other_references, config.reference, strict=True)
    ]
    return _beside(reference_GK, others)


def _load_pi_t(policy: Policy, config: TrainingConfig) -> None:
    source, architecture, _ = inputs.open_source(config)
    checkpoint.load_weights(policy, *inputs.open_weights(config, architecture, source))


def _load(policy: Policy, config: TrainingConfig, root: Path) -> None:
    checkpoint.load_weights(policy, *inputs.open_reference(config, root))


def _beside(reference_GK: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Lay further references behind pi_t's numbers -> [G, K, 1 + R]; without any, [G, K] as it was."""
    return np.stack([reference_GK, *others], axis=-1) if others else reference_GK
