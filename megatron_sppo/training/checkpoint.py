"""Loads checkpoints of Megatron-Core's distributed format in any layout: weights, or all that a run goes on with.

They are written by `saving`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.model.gpt import PolicyModel
from megatron_sppo.training.optimizer import allocate_state, separate_steps
from megatron_sppo.training.policy import Policy, zero_padded_vocabulary
from megatron_sppo.training.progress import Progress

logger = logging.getLogger(__name__)

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The sharding that resumes in another layout; `dp_reshardable` restores a wrong Adam step on torch's AdamW."""
_MISFITS = (dist_checkpointing.core.CheckpointingException, KeyError, ValueError)
"""What mcore raises where keys or shapes differ; torch wraps it in a CheckpointException of all ranks' failures."""


def load_weights(policy: Policy, checkpoint: Path) -> None:
    """Load the model of one `iter_*` directory into this rank's part of the policy: `load_stages`. Collective."""
    load_stages(policy.stages, checkpoint)


def load_stages(stages: Sequence[PolicyModel], checkpoint: Path) -> None:
    """Load the model of one `iter_*` directory, saved under whichever layer spec, into this rank's stages. Collective.

    Raises:
        ConfigError: the checkpoint holds another architecture.
    """
    _adopt_model(stages, _load(describe_model(stages), checkpoint))


def read_progress(checkpoint: Path) -> Progress:
    """Read where the run that wrote an `iter_*` directory stood -> Progress.

    Raises:
        DataError: the checkpoint holds weights only.
    """
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    if "sppo" not in common:
        raise DataError(f"{checkpoint} holds no training state. Use it with --load and choose another --save.")
    return Progress.from_json(common["sppo"], step=int(common["iteration"]))


@torch.no_grad()
def resume(checkpoint: Path, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Restore weights, optimizer, schedule and RNG from an `iter_*` directory of `save`, in any layout. Collective."""
    model_state = describe_model(policy.stages)
    allocate_state(optimizer)
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=OPTIMIZER_SHARDING)
    loaded = _load({**model_state, "optimizer": optimizer_state}, checkpoint)
    _adopt_model(policy.stages, loaded)
    for group in _saved_groups(loaded["optimizer"]):
        # They come with the rates of the run that saved them, by which 0.19.2 also tells them apart; the command line
        # decides.
        group |= {"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr}
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    scheduler.step(increment=0)
    torch.set_rng_state(loaded["rng"])


def _saved_groups(state: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups in an optimizer's state, which wrappers nest under `optimizer` or by number."""
    if "param_groups" in state:
        yield from state["param_groups"]
    else:
        for part in state.values():
            if isinstance(part, Mapping):
                yield from _saved_groups(part)


def describe_model(stages: Sequence[PolicyModel]) -> dict[str, Any]:
    """Describe the stages to the checkpoint -> by Megatron-LM's names: `model`; `model0`, `model1`, ... interleaved."""
    if len(stages) == 1:
        return {"model": stages[0].sharded_state_dict()}
    return {f"model{index}": stage.sharded_state_dict() for index, stage in enumerate(stages)}


def _adopt_model(stages: Sequence[PolicyModel], loaded: Mapping[str, Any]) -> None:
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded["model" if len(stages) == 1 else f"model{index}"])
    zero_padded_vocabulary(stages)


def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    absent = _set_absent_states_apart(state, checkpoint)
    try:
        loaded = dist_checkpointing.load(state, str(checkpoint))
    except (*_MISFITS, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if not all(isinstance(cause, _MISFITS) for cause in causes):
            raise
        reason = " ".join(str(causes[0]).split())[:300]
        raise ConfigError(f"{checkpoint} does not hold this model: {reason}. Import the model again.") from error
    for name, keys in absent.items():
        loaded[name] |= dict.fromkeys(keys)
    return loaded


def _set_absent_states_apart(state: Mapping[str, Any], checkpoint: Path) -> dict[str, set[str]]:
    """Take out of the models' parts the states of modules that the checkpoint has none of -> {part: their keys}.

    Transformer Engine's norms save an empty state where they stand alone, and ours for the torch spec none: what one
    spec saved, the other is to load. Weights are never let off: Megatron-Core names what is missing.
    """
    stored = dist_checkpointing.serialization.load_sharded_metadata(str(checkpoint))
    absent: dict[str, set[str]] = {}
    for name, part in state.items():
        if name.startswith("model"):
            keys = {k for k, v in part.items() if isinstance(v, ShardedObject) and v.unique_key not in stored}
            absent[name] = {key for key in keys if "._extra_state" in key}
            for key in absent[name]:
                del part[key]
    return absent
