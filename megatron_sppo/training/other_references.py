"""log pi_j of further policies that the objective looks at: by the one model, one after another, before pi_t's.

Never a second model in memory: each policy's weights are loaded in turn into the stages that are then trained. The
numbers lie beside pi_t's, in files that are named by their fingerprint, so that any number of runs may share a dataset.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

# G = prompt groups, K = responses per prompt


def load_or_compute(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    sources: Sequence[Sequence[Path]],
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Read or compute log pi of each policy -> (fingerprint, values [G, K]) in their order. Collective.

    The stages hold the last policy's weights afterwards; no optimizer may have been made of them yet.

    Args:
        sources: `inputs.open_references`.

    Raises:
        SystemExit: as `reference.load_or_compute`.
    """
    found = []
    for source in sources:
        checkpoint.load_weights(policy, *source)
        names = reference.fingerprint(policy, dataset, batches, config)
        values = reference.load_or_compute(
            policy, dataset, batches, names, config=config, stop=stop, name=reference_file.name_of(names)
        )
        found.append((names, values))
    return found


def read_for_resume(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    progress: Progress,
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> list[np.ndarray]:
    """Read what an interrupted run looked at, and compute what it is now to look at beside -> [G, K] each. Collective.

    Raises:
        ConfigError: another number of references than it began with, or another policy is given where its weights are
            needed.
        DataError, SystemExit: as `reference.read_for_resume`.
    """
    begun, given = len(progress.other_references), len(config.reference)
    if begun != given:
        raise ConfigError(
            f"{config.save} was trained with {begun} further references, and {given} are given. "
            "Use --reference as it was, or another --save."
        )
    return [
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


def _load(policy: Policy, config: TrainingConfig, root: Path) -> None:
    checkpoint.load_weights(policy, *inputs.open_reference(config, root))


def beside(reference_GK: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Lay further references behind pi_t's numbers -> [G, K, 1 + R]; without any, [G, K] as it was."""
    return np.stack([reference_GK, *others], axis=-1) if others else reference_GK
