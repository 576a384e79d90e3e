"""Checkpoints by Megatron-Core's distributed format: layout-free, published whole, resumed bit for bit.

A save goes to `.iter_0000010.partial`, gets the sha256 of every file, is renamed, and only then named by the tracker.
"""

import contextlib
import inspect
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sppo.conversion import megatron_checkpoint
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.storage import explain_os_error, publish_directory
from megatron_sppo.training import parallel
from megatron_sppo.training.loop import Progress
from megatron_sppo.training.policy import Policy, zero_padded_vocabulary

logger = logging.getLogger(__name__)

_OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The sharding that resumes in another layout; `dp_reshardable` restores a wrong Adam step on torch's AdamW."""


def load_weights(policy: Policy, checkpoint: Path) -> None:
    """Load the model of one `iter_*` directory into this rank's stages. Collective.

    Raises:
        ConfigError: the checkpoint holds another architecture.
    """
    state = _model_state(policy)
    loaded = _load(state, checkpoint)
    _adopt_model(policy, loaded)


def save(
    root: Path,
    policy: Policy,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    progress: Progress,
    source: Path,
) -> Path:
    """Save everything that the next step needs -> the published `iter_*` directory. Collective.

    Args:
        progress: where the run stands.
        source: the checkpoint that this run started from: its model.json and Hugging Face side files travel along.
    """
    target = megatron_checkpoint.iteration_directory(root, progress.step)
    partial = Path(root, f".{target.name}.partial")
    if parallel.is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    model_state = _model_state(policy)
    state = {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=_OPTIMIZER_SHARDING),
        "opt_param_scheduler": scheduler.state_dict(),
        "iteration": progress.step,
        "checkpoint_version": 3.0,
        "sppo": progress.to_json(),
        "rng": torch.get_rng_state(),
    }
    with _disk_errors_explained(partial):
        _host_save(state, partial)
    torch.distributed.barrier()
    if parallel.is_rank_zero():
        megatron_checkpoint.carry_model_files(source, partial)
        megatron_checkpoint.write_manifest(partial)
        publish_directory(partial, target)
        megatron_checkpoint.publish(root, progress.step)
    torch.distributed.barrier()
    return target


def resume(
    checkpoint: Path, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> Progress:
    """Restore a run from an `iter_*` directory that `save` wrote, in any layout -> Progress. Collective."""
    model_state = _model_state(policy)
    with torch.no_grad():
        state = {
            **model_state,
            "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=_OPTIMIZER_SHARDING),
        }
        loaded = _load(state, checkpoint)
        if "sppo" not in loaded:
            raise DataError(f"{checkpoint} holds no training state. Use it with --load and choose another --save.")
        _adopt_model(policy, loaded)
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    torch.set_rng_state(loaded["rng"])
    return Progress(step=int(loaded["iteration"]), **loaded["sppo"])


def step_of(checkpoint: Path) -> int:
    """Read the optimizer step off an `iter_*` directory's name -> int."""
    return int(checkpoint.name.removeprefix("iter_"))


def _model_state(policy: Policy) -> dict[str, Any]:
    """Describe the stages to the checkpoint -> Megatron-LM's names: `model`, or `model0`, `model1`, ... when interleaved."""
    stages = policy.stages
    if len(stages) == 1:
        return {"model": stages[0].sharded_state_dict()}
    return {f"model{index}": stage.sharded_state_dict() for index, stage in enumerate(stages)}


def _adopt_model(policy: Policy, loaded: Mapping[str, Any]) -> None:
    stages = policy.stages
    for index, stage in enumerate(stages):
        stage.load_state_dict(loaded["model" if len(stages) == 1 else f"model{index}"])
    zero_padded_vocabulary(stages)


def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(checkpoint))
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{checkpoint} does not hold this model: {reason}. Import the model again.") from error


def _host_save(state: dict[str, Any], directory: Path) -> None:
    """Call the host's save synchronously; 0.19.2's default strategy needs a package that 0.16.1 does not know of."""
    settings = (
        {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
    )
    dist_checkpointing.save(state, str(directory), validate_access_integrity=True, **settings)


@contextlib.contextmanager
def _disk_errors_explained(partial: Path) -> Iterator[None]:
    """The host wraps a writer's OSError; unwrap it, remove the half-written directory, and say it in one line."""
    try:
        yield
    except (OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            explain_os_error(cause, partial)
        raise
