"""What is written down of each step: its line and its responses' numbers on disk, the tracker, the bar and the log."""

import logging
import math
from typing import Any

from tqdm import tqdm

from megatron_sppo.errors import DataError
from megatron_sppo.tracking.run import TrackedRun
from megatron_sppo.training import parallel
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.metrics import StepFiles

logger = logging.getLogger(__name__)


class Ledger:
    """Rank 0 writes; all ranks have one, and end together where its disk refuses."""

    def __init__(self, config: TrainingConfig, tracked: TrackedRun, *, step: int, train_iters: int) -> None:
        """Open the files behind the step that is the last of a checkpoint, 0 for none. Collective.

        Raises:
            OSError, DataError: on all ranks; they cannot be written or read.
        """
        writes = parallel.is_rank_zero()
        with parallel.failing_together(OSError, DataError):
            self._files = StepFiles(config.save, step + 1) if writes else None
        self._tracked, self._log_interval, self._train_iters = tracked, config.run.log_interval, train_iters
        self._refused: OSError | DataError | None = None
        self._bar = tqdm(total=train_iters, initial=step, desc="train", unit="step", disable=None if writes else True)

    @property
    def is_refused(self) -> bool:
        """Tell whether this rank's disk has refused a line: the others hear of it with the next step's numbers."""
        return self._refused is not None

    def write(self, step: int, metrics: dict[str, float], columns: dict[str, Any]) -> None:
        """Write a step down; a refusal is kept for `check`.

        Args:
            columns: numbers of the step's responses, [N] each.
        """
        if self._files is None:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # of a bad step
        try:
            self._files.write(step, finite, columns)
        except (OSError, DataError) as error:
            self._refused = error
        self._tracked.log(step, finite)
        self._bar.update()
        self._bar.set_postfix(loss=f"{metrics['loss']:.4g}", grad_norm=f"{metrics['grad_norm']:.3g}")
        if step % self._log_interval == 0:
            logger.info(self._line(step, metrics))

    def sync(self) -> None:
        """Bring all lines to the disk: a run resumed from a checkpoint would lack them. Collective.

        Raises:
            OSError, DataError: on all ranks; the disk refuses, or has refused a line.
        """
        if self._files is not None and self._refused is None:
            try:
                self._files.sync()
            except (OSError, DataError) as error:
                self._refused = error
        self.check()

    def check(self) -> None:
        """Raise on all ranks what rank 0's disk refused. Collective."""
        parallel.raise_together(self._refused)

    def close(self) -> None:
        """Close bar and files. Collective.

        Raises:
            OSError, DataError: on all ranks; the disk has refused a line.
        """
        self._bar.close()
        if self._files is not None:
            self._files.close()
        self.check()

    def _line(self, step: int, metrics: dict[str, float]) -> str:
        names = ("loss", "lr", "grad_norm", "rewards/margins", "perf/tokens_per_second")
        shown = " | ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
        return f"step {step}/{self._train_iters} | {shown}"
