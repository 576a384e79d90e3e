"""Checkpoints by Megatron-Core's distributed format: layout-free, published whole, resumed bit for bit.

A save goes to `.iter_0000010.partial`, gets the sha256 of every file, is renamed, and only then named by the tracker.
"""

import contextlib
import errno
import functools
import inspect
import logging
import os
import shutil
import signal
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

from megatron_sppo.checkpoints import megatron_checkpoint, retention
from megatron_sppo.command_line import death_with_parent
from megatron_sppo.model.gpt import PolicyModel
from megatron_sppo.storage import explain_os_error, publish_directory
from megatron_sppo.training import parallel
from megatron_sppo.training.optimizer import allocate_state, separate_steps
from megatron_sppo.training.policy import Policy, zero_padded_vocabulary
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.verified_load import Checkpoint

logger = logging.getLogger(__name__)

_OPTIMIZER_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The sharding that resumes in another layout; `dp_reshardable` restores a wrong Adam step on torch's AdamW."""
_NEARLY_FULL_BYTES = 64 << 20


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
    loaded = _load(_model_state(stages), checkpoint, weights_only=True, is_verified=is_verified)
    _adopt_model(stages, loaded)


def save(
    root: Path,
    policy: Policy,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    progress: Progress,
    source: Path,
    keep_last: int | None = None,
    needed: Sequence[Path] = (),
) -> Path:
    """Save everything that the next step needs -> the published `iter_*` directory. Collective.

    Args:
        progress: where the run stands.
        source: the checkpoint that this run started from: its model.json and Hugging Face side files travel along.
        keep_last, needed: how many checkpoints of the run stay, and which in any case (`retention.keep_last`); None:
            all.
    """
    policy.gather_weights()
    target = megatron_checkpoint.iteration_directory(root, progress.step)
    partial = Path(root, f".{target.name}.partial")
    if parallel.is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    model_state = _model_state(policy.stages)
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
        _mcore_save(state, partial)
    torch.distributed.barrier()
    if parallel.is_rank_zero():
        # Those of the run's last checkpoint, which stays: what it was resumed from may have been removed since.
        megatron_checkpoint.carry_model_files(megatron_checkpoint.tracked_directory(root) or source, partial)
        megatron_checkpoint.write_manifest(partial)
        publish_directory(partial, target)
        megatron_checkpoint.publish(root, progress.step)
        if keep_last is not None:
            retention.keep_last(root, keep_last, newest=progress.step, needed=needed)
    torch.distributed.barrier()
    return target


@torch.no_grad()
def resume(checkpoint: Path, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Restore weights, optimizer, schedule and RNG from an `iter_*` directory of `save`, in any layout. Collective."""
    model_state = _model_state(policy.stages)
    allocate_state(optimizer)
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=_OPTIMIZER_SHARDING)
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


def _model_state(stages: Sequence[PolicyModel]) -> dict[str, Any]:
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


def _mcore_save(state: dict[str, Any], directory: Path) -> None:
    """Call mcore's save synchronously; 0.19.2's default strategy needs a package that 0.16.1 does not know of."""
    settings = (
        {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
    )
    _tie_children_to_this_process()
    dist_checkpointing.save(state, str(directory), validate_access_integrity=True, **settings)


@functools.cache
def _tie_children_to_this_process() -> None:
    """Let the kernel end forked children when this process dies, however it dies.

    Megatron-Core writes by forked processes (strategies/filesystem_async.py); one whose parent was killed in a save
    waits for it for ever, holding a copy of its memory.
    """
    os.register_at_fork(after_in_child=death_with_parent(signal.SIGKILL))


@contextlib.contextmanager
def _disk_errors_explained(partial: Path) -> Iterator[None]:
    """Megatron-Core wraps a writer's OSError; unwrap it, remove the half-written directory, and say it in one line."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        is_full = shutil.disk_usage(partial.parent).free < _NEARLY_FULL_BYTES
        shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None and is_full:
            # torch's zip writer says "unexpected pos" (inline_container.cc) where the disk said ENOSPC.
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if cause is not None:
            explain_os_error(cause, partial)
        raise
