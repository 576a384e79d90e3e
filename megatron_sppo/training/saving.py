"""Saves a run's checkpoints: published whole, each byte looked at once, and if wanted while training goes on.

A save goes to `.iter_0000010.partial`: every rank writes what is its own (`digesting_strategy`), data-parallel ranks
share what they have alike. When all have done, the metadata and the manifest are written, the directory is renamed,
and only then named by the tracker.
"""

import contextlib
import functools
import inspect
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sppo.checkpoints import adapter_file, megatron_checkpoint, retention
from megatron_sppo.checkpoints.distcp_writer import write_common
from megatron_sppo.command_line import death_with_parent
from megatron_sppo.errors import DataError
from megatron_sppo.storage import explain_os_error, publish_directory
from megatron_sppo.training import parallel
from megatron_sppo.training.checkpoint import OPTIMIZER_SHARDING, describe_trained, name_base
from megatron_sppo.training.digesting_strategy import DigestingStrategy
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.progress import Progress


class Saver:
    """Saves one run, one checkpoint at a time."""

    def __init__(
        self,
        root: Path,
        policy: Policy,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        progress: Progress,
        source: Path,
        in_background: bool = False,
        keep_last: int | None = None,
        needed: Sequence[Path] = (),
    ) -> None:
        """Take what is to be saved whenever `save` is called: weights, or adapters alone with a name of their base.

        Collective with adapters.

        Args:
            root: where the checkpoints go; it is this run's alone.
            progress: where the run stands.
            source: the checkpoint that this run started from: its model.json and Hugging Face side files travel along.
            in_background: let a forked process of each rank write while training goes on (`--async-save`).
            keep_last, needed: how many checkpoints of the run stay, and which in any case (`retention.keep_last`);
                None: all.
        """
        self._root, self._source = Path(root), Path(source)
        self._policy, self._optimizer, self._scheduler, self._progress = policy, optimizer, scheduler, progress
        self._in_background, self._keep_last, self._needed = in_background, keep_last, needed
        self._adapter = name_base(policy)
        self._begun: _Begun | None = None
        self._validated = False
        self._seconds = 0.0

    def is_writing(self) -> bool:
        """Tell whether this rank is still writing; nobody waits for the answer."""
        return self._begun is not None and not self._begun.writer.is_current_async_call_done(no_dist=True)

    def pop_seconds(self) -> float:
        """Return how long this rank has waited for saves since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def save(self, *, wait: bool) -> Path:
        """Save everything that the next step needs -> the `iter_*` directory. Collective.

        Args:
            wait: return when it is published. Otherwise a save in the background is published by `finish`.

        Raises:
            DataError: it could not be written, or an earlier one that was still being written.
        """
        self.finish()
        started = time.monotonic()
        step = self._progress.step
        target = megatron_checkpoint.iteration_directory(self._root, step)
        partial = Path(self._root, f".{target.name}.partial")
        with _disk_errors_explained(partial):
            with parallel.failing_together(OSError):
                if parallel.is_rank_zero():
                    for left in self._root.glob(".iter_*.partial"):  # of a run that was killed
                        shutil.rmtree(left, ignore_errors=True)
                    partial.mkdir(parents=True)
            request = _plan(self._state(), partial, validate=not self._validated)
            self._validated = True
            request.add_finalize_fn(functools.partial(self._publish, partial, step))
            if wait or not self._in_background:
                request.execute_sync()
            else:
                _tie_children_to_this_process()
                writer = TemporalAsyncCaller()
                writer.schedule_async_call(request)
                self._begun = _Begun(partial, request, writer)
        self._seconds += time.monotonic() - started
        return target

    def finish(self) -> None:
        """Wait for the save that was begun, if any, and publish it. Collective.

        Raises:
            DataError: it could not be written; the checkpoint before it is what the tracker names.
        """
        if self._begun is None:
            return
        started, begun = time.monotonic(), self._begun
        self._begun = None
        with _disk_errors_explained(begun.partial):
            begun.writer.is_current_async_call_done(blocking=True, no_dist=True)
            for function in begun.request.finalize_fns:
                function()
        self._seconds += time.monotonic() - started

    def _state(self) -> dict[str, Any]:
        self._policy.gather_weights()
        weights = describe_trained(self._policy)
        return {
            **weights,
            "optimizer": self._optimizer.sharded_state_dict(weights, metadata=OPTIMIZER_SHARDING),
            "opt_param_scheduler": self._scheduler.state_dict(),
            "iteration": self._progress.step,
            "checkpoint_version": 3.0,
            "sppo": self._progress.to_json(),
            "rng": torch.get_rng_state(),
        }

    def _publish(self, partial: Path, step: int) -> None:
        """Complete the directory, of which nothing large is read, and name it. Collective."""
        with parallel.failing_together(OSError, DataError):
            if parallel.is_rank_zero():
                # Those of the run's last checkpoint, which stays: what it was resumed from may have been removed since.
                last = megatron_checkpoint.tracked_directory(self._root) or self._source
                megatron_checkpoint.carry_model_files(last, partial)
                if self._adapter is not None:
                    adapter_file.write_adapter(partial, self._adapter)
                megatron_checkpoint.write_manifest(partial)
                publish_directory(partial, megatron_checkpoint.iteration_directory(self._root, step))
                megatron_checkpoint.publish(self._root, step)
                if self._keep_last is not None:
                    retention.keep_last(self._root, self._keep_last, newest=step, needed=self._needed)


class _Begun:
    """A save whose files are being written."""

    def __init__(self, partial: Path, request: AsyncRequest, writer: TemporalAsyncCaller) -> None:
        self.partial, self.request, self.writer = partial, request, writer


def _plan(state: dict[str, Any], directory: Path, *, validate: bool = True) -> AsyncRequest:
    """Decide which rank writes what, which is always validated -> what remains to be done. Collective.

    Args:
        validate: hold the ranks' states against each other before that, too; once in a run is enough.
    """
    failures: list[OSError] = []  # of rank 0, in what it does alone
    strategy = FullyParallelSaveStrategyWrapper(DigestingStrategy(failures), parallel.replicas())
    # 0.19.2's default strategy needs a package that 0.16.1 does not know of.
    known = inspect.signature(dist_checkpointing.save).parameters
    settings = {"async_strategy": "mcore"} if "async_strategy" in known else {}

    def raise_noted() -> None:
        parallel.raise_together(failures[0] if failures else None)

    with _common_state_by_hand(failures):
        request = dist_checkpointing.save(
            state, str(directory), strategy, validate_access_integrity=validate, async_sharded_save=True, **settings
        )
    assert request is not None
    raise_noted()
    # What follows the strategy's own: rank 0 writes metadata.json, and all wait for it.
    request.finalize_fns[1:] = [functools.partial(_describe, last, failures) for last in request.finalize_fns[1:]]
    request.add_finalize_fn(raise_noted)
    return request


@contextlib.contextmanager
def _common_state_by_hand(failures: list[OSError]) -> Iterator[None]:
    """Let rank 0 note what the disk says of common.pt instead of raising it while the other ranks plan on.

    Megatron-Core 0.16.1 writes it (dist_checkpointing/strategies/common.py) through Torch's own file, of which a full
    disk is a RuntimeError; 0.19.2 has its content among the sharded objects.
    """

    def save_common(strategy: Any, state: Any, directory: Path) -> None:
        if parallel.is_rank_zero():
            try:
                write_common(Path(directory), state)
            except OSError as error:
                failures.append(error)

    owner = getattr(common, "TorchCommonSaveStrategy", None)
    if owner is None:
        yield
        return
    theirs, owner.save_common = owner.save_common, save_common
    try:
        yield
    finally:
        owner.save_common = theirs


def _describe(describe: Callable[[], None], failures: list[OSError]) -> None:
    """Run Megatron-Core's last step of a save, where rank 0 writes, and all meet in a barrier."""
    try:
        describe()
    except OSError as error:
        failures.append(error)
        torch.distributed.barrier()  # the one that the others wait in


@functools.cache
def _tie_children_to_this_process() -> None:
    """Let the kernel end forked children when this process dies, however it dies.

    A writer that outlives a run which was killed would hold a copy of its memory, and write into a directory that the
    next run removes.
    """
    os.register_at_fork(after_in_child=death_with_parent(signal.SIGKILL))


@contextlib.contextmanager
def _disk_errors_explained(partial: Path) -> Iterator[None]:
    """Say in one line what a disk refused, and remove the half-written directory.

    Megatron-Core gathers what went wrong on the first rank alone, and wraps it.
    """
    try:
        yield
    except (OSError, DataError, RuntimeError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        if parallel.is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
        if not causes:
            raise DataError(f"{partial} could not be written. The first rank says why.") from error
        for cause in causes:
            explain_os_error(cause, partial)
            if isinstance(cause, DataError) and cause is not error:
                raise cause from error
        raise
