"""Whether a checkpoint that SIGTERM asks for is whole before whoever sent it ends the run: estimated, then measured."""

import logging
import os
import time
from pathlib import Path

import torch

from megatron_sppo.command_line import TORCHRUN_GRACE_VARIABLE, job_end_time, launch, torchrun_grace_seconds
from megatron_sppo.storage import explain_os_error, temporary_beside
from megatron_sppo.training import parallel
from megatron_sppo.training.config import OptimizationConfig
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.stopping import StopRequest

logger = logging.getLogger(__name__)

PROBE_NAME = "probe"
"""Of the file that is written to learn how fast the disk is, while it is there under a temporary name."""
_PROBE_BYTES = 64 << 20


class Grace:
    """How long a save takes, held against the time that there is for one. Rank 0 measures and says."""

    def __init__(self, directory: Path, *, num_bytes: int, grace_seconds: float) -> None:
        """Estimate from what a write to the disk takes, and warn where a save is too long for the time there is.

        Args:
            directory: where checkpoints go.
            num_bytes: of a checkpoint, `checkpoint_bytes`; the ranks write it together.
            grace_seconds: between SIGTERM and the end; torchrun may allow less.
        """
        self._directory, self._num_bytes = Path(directory), num_bytes
        self._asked_seconds, torchrun = grace_seconds, torchrun_grace_seconds()
        self._grace_seconds = grace_seconds if torchrun is None else min(grace_seconds, torchrun)
        self._seconds, self._is_measured = 0.0, False
        if parallel.is_rank_zero():
            share = -(-num_bytes // launch().world_size)
            probed = min(share, _PROBE_BYTES)
            self._seconds = _write_seconds(self._directory, probed) * share / max(probed, 1)
            self._warn_if_too_short()

    def note(self, seconds: float) -> None:
        """Take the time of a save that was waited for."""
        was_short = self._is_too_short
        self._seconds = max(seconds, self._seconds) if self._is_measured else seconds
        self._is_measured = True
        if self._is_too_short and not was_short:
            self._warn_if_too_short()

    @property
    def _is_too_short(self) -> bool:
        return self._seconds > self._grace_seconds

    def _warn_if_too_short(self) -> None:
        if not self._is_too_short or not parallel.is_rank_zero():
            return
        fitting = -(-int(2 * self._seconds) // 60) * 60
        fact, remedies = f"--grace-seconds is {self._asked_seconds:.0f}", []
        if self._grace_seconds < self._asked_seconds:
            fact = f"torchrun ends its ranks {self._grace_seconds:.0f} s after SIGTERM"
            remedies.append(f"export {TORCHRUN_GRACE_VARIABLE}={fitting} before torchrun")
        if self._seconds > self._asked_seconds:
            remedies.append(
                f"a longer lead (SBATCH_SIGNAL=B:TERM@{fitting + 60} for the scripts of examples/slurm, elsewhere "
                f"sbatch --signal=TERM@{fitting} with --grace-seconds {fitting})"
            )
        logger.warning(
            "a checkpoint of %.3g GB %s about %.0f s%s, %s: one that SIGTERM asks for may not be whole in time, and "
            "the run then goes on from the one before. Use %s, and --save-interval with --async-save",
            self._num_bytes / 1e9,
            "took" if self._is_measured else "takes",
            self._seconds,
            "" if self._is_measured else " or more, by a trial of this disk",
            fact,
            ", ".join(remedies),
        )

    def warn_at_signal(self, stop: StopRequest) -> None:
        """Say that the save which begins now may not be whole in time, if that is so."""
        now = time.monotonic()
        left = self._grace_seconds - (now - (stop.asked_at or now))
        if (end := job_end_time()) is not None:
            left = min(left, end - time.time())
        if self._seconds > left and parallel.is_rank_zero():
            logger.warning(
                "the checkpoint that begins now takes about %.0f s, and %.0f s are left before the run is ended. If "
                "that comes first, the same command goes on from the checkpoint before",
                self._seconds,
                max(left, 0.0),
            )


def checkpoint_bytes(policy: Policy, optimization: OptimizationConfig) -> int:
    """Count the bytes of a training checkpoint: weights, float32 masters of narrower ones, moments -> int. Collective.

    Of adapters alone where the weights are frozen. Without what is small: schedule, RNG, the model's own files.
    """
    moments = 2 if optimization.optimizer == "adam" else 1
    ours = 0
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                continue
            narrow = parameter.element_size() < 4
            of_one = parameter.element_size() + 4 * (moments + narrow)
            replica = parallel.is_first_replica() if getattr(parameter, "allreduce", True) else None
            is_first = parallel.is_first_expert_replica() if replica is None else replica
            ours += parameter.numel() * of_one * is_first
    total = parallel.to_device(torch.tensor([float(ours)], dtype=torch.float64))
    return int(parallel.sum_to_cpu(total)().item())


def _write_seconds(directory: Path, num_bytes: int) -> float:
    """Write as many bytes beside the checkpoints, down to the disk, and remove them -> seconds."""
    path = temporary_beside(directory / PROBE_NAME)
    block = os.urandom(min(num_bytes, 1 << 20))
    begin = time.monotonic()
    try:
        with open(path, "wb") as file:
            for _ in range(-(-num_bytes // max(len(block), 1))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return time.monotonic() - begin
    except OSError as error:
        explain_os_error(error, directory)
        raise
    finally:
        path.unlink(missing_ok=True)
