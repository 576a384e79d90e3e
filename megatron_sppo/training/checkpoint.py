"""Loads checkpoints of Megatron-Core's distributed format in any layout: weights, or all that a run goes on with.

They are written by `saving`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sppo.model.gpt import PolicyModel
from megatron_sppo.training.optimizer import allocate_state, separate_steps
from megatron_sppo.training.policy import Policy, zero_padded_vocabulary
from megatron_sppo.training.verified_load import Checkpoint

logger = logging.getLogger(__name__)

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The sharding that resumes in another layout; `dp_reshardable` restores a wrong Adam step on torch's AdamW."""


def load_weights(policy: Policy, checkpoint: Path) -> None:
    """Load the model of one `iter_*` directory into this rank's part of the policy: `load_stages`. Collective."""
    load_stages(policy.stages, checkpoint)


def load_stages(stages: Sequence[PolicyModel], checkpoint: Path, *, is_verified: bool = False) -> None:
    """Load the model of one `iter_*` directory, saved under whichever layer spec, into this rank's stages. Collective.

    Args:
        is_verified: files that can only be verified whole have been.

    Raises:
        ConfigError: the checkpoint holds another architecture.
        DataError: something that was read is not what was written.
    """
    loaded = _load(describe_model(stages), checkpoint, weights_only=True, is_verified=is_verified)
    _adopt_model(stages, loaded)


@torch.no_grad()
def resume(checkpoint: Path, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Restore weights, optimizer, schedule and RNG from an `iter_*` directory of `save`, in any layout. Collective."""
    model_state = describe_model(policy.stages)
    allocate_state(optimizer)
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=OPTIMIZER_SHARDING)
    loaded = _load({**model_state, "optimizer": optimizer_state}, checkpoint, weights_only=False)
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


def _load(state: dict[str, Any], checkpoint: Path, *, weights_only: bool, is_verified: bool = False) -> dict[str, Any]:
    opened = Checkpoint(checkpoint)
    absent = _set_absent_states_apart(state, opened.keys)
    loaded = opened.load(state, weights_only=weights_only, is_verified=is_verified)
    for name, keys in absent.items():
        loaded[name] |= dict.fromkeys(keys)
    return loaded


def _set_absent_states_apart(state: Mapping[str, Any], stored: set[str]) -> dict[str, set[str]]:
    """Take out of the models' parts the states of modules that the checkpoint has none of -> {part: their keys}.

    Transformer Engine's norms save an empty state where they stand alone, and ours for the torch spec none: what one
    spec saved, the other is to load. Weights are never let off: Megatron-Core names what is missing.
    """
    absent: dict[str, set[str]] = {}
    for name, part in state.items():
        if name.startswith("model"):
            keys = {k for k, v in part.items() if isinstance(v, ShardedObject) and v.unique_key not in stored}
            absent[name] = {key for key in keys if "._extra_state" in key}
            for key in absent[name]:
                del part[key]
    return absent
