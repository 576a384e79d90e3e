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

from megatron_sppo.checkpoints import adapter_file
from megatron_sppo.errors import ConfigError
from megatron_sppo.model import adapters
from megatron_sppo.model.gpt import PolicyModel
from megatron_sppo.training.optimizer import allocate_state, separate_steps
from megatron_sppo.training.policy import Policy, weights_hash, zero_padded_vocabulary
from megatron_sppo.training.verified_load import Checkpoint

logger = logging.getLogger(__name__)

OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The sharding that resumes in another layout; `dp_reshardable` restores a wrong Adam step on torch's AdamW."""
_DECIDED_ANEW = ("max_lr", "min_lr", "betas", "eps")
"""What parameter groups bring along from the run that saved them, and have alike. By the rates mcore 0.19.2 also tells
them apart. `lr` and `weight_decay` are the schedule's to set."""


def load_weights(policy: Policy, *checkpoints: Path) -> None:
    """Load `iter_*` directories into this rank's part of the policy, one after the other. Collective.

    A model puts adapters back to where they begin; adapters are laid on the model that is there.

    Raises:
        ConfigError, DataError: as `load_stages`; adapters of another base, or of other settings than the policy's.
    """
    for checkpoint in checkpoints:
        if adapter_file.is_adapter(checkpoint):
            _check_base(policy, checkpoint)
            _adopt_trained(policy, _load(describe_trained(policy), checkpoint, weights_only=True))
            continue
        load_stages(policy.stages, checkpoint)
        if policy.adapters is not None:
            for stage in policy.stages:
                stage.adapters.reset()


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
    """Restore what is trained, optimizer, schedule and RNG from an `iter_*` directory of `save`, in any layout.

    Adapters are laid on the base, which is there. Rates and decays stay those of the optimizer, which the command line
    decides. Collective.

    Raises:
        ConfigError, DataError: as `load_weights`.
    """
    if policy.adapters is not None:
        _check_base(policy, checkpoint)
    trained = describe_trained(policy)
    allocate_state(optimizer)
    optimizer_state = optimizer.sharded_state_dict(trained, is_loading=True, metadata=OPTIMIZER_SHARDING)
    loaded = _load({**trained, "optimizer": optimizer_state}, checkpoint, weights_only=False)
    _adopt_trained(policy, loaded)
    decided = {name: optimizer.param_groups[0][name] for name in _DECIDED_ANEW}
    for group in _saved_groups(loaded["optimizer"]):
        group |= decided
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
    return {name: stage.sharded_state_dict() for name, stage in zip(_names(stages), stages, strict=True)}


def describe_trained(policy: Policy) -> dict[str, Any]:
    """Describe what is trained, and so saved: the stages, or their adapters alone -> as `describe_model`."""
    if policy.adapters is None:
        return describe_model(policy.stages)
    names = _names(policy.stages)
    return {name: stage.adapters.describe() for name, stage in zip(names, policy.stages, strict=True)}


def name_base(policy: Policy) -> adapter_file.AdapterFile | None:
    """Describe the policy's adapters and the base that they lie on -> None without adapters. Collective."""
    if policy.adapters is None:
        return None
    base = adapter_file.BaseName(
        weights_hash=weights_hash(policy.stages),
        params_dtype=str(policy.config.params_dtype).removeprefix("torch."),
    )
    return adapter_file.AdapterFile(settings=policy.adapters, base=base)


def _check_base(policy: Policy, checkpoint: Path) -> None:
    """Refuse adapters that are not of the policy's kind, or not trained on the weights that it has. Collective."""
    found, ours = adapter_file.read_adapter(checkpoint), name_base(policy)
    if ours is None or found.settings != ours.settings:
        raise ConfigError(f"{checkpoint} holds other adapters than this run's. Use {found.settings.flags}.")
    theirs, here = found.base, ours.base
    if theirs.params_dtype != here.params_dtype:
        raise ConfigError(
            f"{checkpoint} holds adapters that were trained on weights in {theirs.params_dtype}, and these are in "
            f"{here.params_dtype}. Use --params-dtype {theirs.params_dtype}."
        )
    if theirs.weights_hash != here.weights_hash:
        raise ConfigError(
            f"{checkpoint} holds adapters of a base with weights {theirs.weights_hash}, and those of --load are "
            f"{here.weights_hash}. Use --load with the model that they were trained on."
        )


def _names(stages: Sequence[PolicyModel]) -> list[str]:
    return ["model"] if len(stages) == 1 else [f"model{index}" for index in range(len(stages))]


def _adopt_model(stages: Sequence[PolicyModel], loaded: Mapping[str, Any]) -> None:
    for name, stage in zip(_names(stages), stages, strict=True):
        # Adapters, where there are any, stay: a model's checkpoint has none.
        own = {key: value for key, value in stage.state_dict().items() if key.startswith(f"{adapters.NAME}.")}
        stage.load_state_dict({**loaded[name], **own})
    zero_padded_vocabulary(stages)


def _adopt_trained(policy: Policy, loaded: Mapping[str, Any]) -> None:
    if policy.adapters is None:
        return _adopt_model(policy.stages, loaded)
    for name, stage in zip(_names(policy.stages), policy.stages, strict=True):
        stage.adapters.load_state_dict(
            {key.removeprefix(f"{adapters.NAME}."): value for key, value in loaded[name].items()}
        )
    return None


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
