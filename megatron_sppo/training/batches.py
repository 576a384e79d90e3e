"""Which responses each optimizer step sees, and this rank's share of them as micro-batches.

The global batches depend on the data, the seed and the global batch size alone, never on the layout: any rank can say
what any step holds, so resuming needs no more than the step's number.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sppo import flops
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import (
    MicroBatch,
    collate,
    context_parallel_share,
    epoch_order,
    plan_step,
    rows_of_units,
)
from megatron_sppo.data.selection import RowTargets, TrainingIndex, row_targets, training_index
from megatron_sppo.model.config import token_multiple
from megatron_sppo.objective.loss import OBJECTIVES
from megatron_sppo.objective.win_rate import estimated_baseline_over_eta, parse_baseline
from megatron_sppo.training import parallel
from megatron_sppo.training.config import TrainingConfig

logger = logging.getLogger(__name__)

# N = responses of the global batch


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step: the whole global batch by description, this rank's part of it by tensors."""

    rows: np.ndarray
    """[N] int64, rows of the training index."""
    group: np.ndarray
    """[N] prompt group of each row."""
    response: np.ndarray
    """[N] which of the group's K responses."""
    win_rate: Tensor
    """[N] float32."""
    log_z: Tensor
    """[N] float32, nats."""
    preference: Tensor
    """[N] float32, over the pair's other response; NaN without pairs."""
    chosen: Tensor
    """[N] bool."""
    reference_log_prob: Tensor
    """[N] float32, log pi_t in nats; NaN before the reference pass."""
    num_response_tokens: Tensor
    """[N] int64."""
    num_tokens: int
    """Real tokens of the global batch, prompts included."""
    num_pairs: int
    """Pairs of positions of the global batch that see each other: n (n + 1) / 2 of a document, for FLOPs."""
    micro_batches: list[MicroBatch]
    """This data-parallel rank's share."""
    padding_fraction: float
    """Share of this rank's computed tokens that are padding."""


class Batches:
    """All steps of a run over one dataset."""

    def __init__(self, dataset: PreferenceDataset, config: TrainingConfig, *, max_length: int) -> None:
        """List the rows of an epoch and their targets.

        Args:
            max_length: positions of the model, in tokens; holds where the config sets no smaller seq_length.
        """
        objective = OBJECTIVES[config.objective.objective]
        self.selection = config.batch.selection or str(dataset.manifest.selection)
        if config.batch.selection is None and self.selection == "all" and objective.needs_pairs:
            self.selection = "extremes"  # not every pair of a prompt: what the pairwise baselines are trained on
        self.index: TrainingIndex = training_index(
            dataset,
            self.selection,
            pairs=objective.needs_pairs,
            seq_length=config.batch.seq_length or max_length,
            max_prompt_length=config.batch.max_prompt_length,
        )
        self.targets: RowTargets = row_targets(
            dataset, self.index, eta=config.objective.eta, baseline=parse_baseline(config.objective.baseline)
        )
        self._dataset = dataset
        self._config = config
        self._report()

    def _report(self) -> None:
        """Say what is trained on, and count what is not."""
        index, config = self.index, self._config
        logger.info(
            "%d responses of %d prompts (%s), %d steps; left out: %d tied prompts, %d tied pairs, %d too long rows",
            index.num_rows,
            self._dataset.num_groups,
            self.selection,
            self.train_iters,
            index.num_dropped_ties,
            index.num_tied_pairs,
            index.num_too_long,
        )
        if config.objective.baseline == "estimate":
            win_rate_GK = torch.from_numpy(self._dataset.all_win_rates())
            over_eta = estimated_baseline_over_eta(win_rate_GK, eta=config.objective.eta)
            logger.info("baseline estimate: log Z / eta is %.4f on average, half would be 0.5", over_eta)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may hold fewer responses."""
        return -(-self.index.num_rows // self._config.batch.global_batch_size)

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the whole run."""
        batch = self._config.batch
        epochs = self.steps_per_epoch * batch.num_epochs
        return epochs if batch.train_iters is None else min(batch.train_iters, epochs)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the global batches and their targets."""
        batch, objective = self._config.batch, self._config.objective
        return {
            "dataset_hash": self._dataset.dataset_hash,
            "selection": str(self.selection),
            "num_rows": self.index.num_rows,
            "global_batch_size": batch.global_batch_size,
            "seed": batch.seed,
            "objective": objective.objective,
            "eta": objective.eta,
            "beta": objective.beta,
            "baseline": objective.baseline,
        }

    def steps(self, *, first: int, last: int, reference_GK: np.ndarray | None = None) -> Iterator[StepPlan]:
        """Yield the plans of steps `first`..`last`, counted from 1."""
        for step in range(first, last + 1):
            yield self._plan(step, reference_GK)

    def _plan(self, step: int, reference_GK: np.ndarray | None) -> StepPlan:
        index, config = self.index, self._config
        epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
        order = epoch_order(index.num_rows // index.unit_size, seed=config.batch.seed, epoch=epoch)
        units_per_step = config.batch.global_batch_size // index.unit_size
        units = order[step_of_epoch * units_per_step : (step_of_epoch + 1) * units_per_step]
        rows = rows_of_units(units, unit_size=index.unit_size)
        group, response = index.group[rows], index.response[rows]
        micro_batches = self._micro_batches(rows, reference_GK)
        real = sum(int(index.lengths[batch.rows].sum()) for batch in micro_batches)
        reference = np.full(len(rows), np.nan, np.float32) if reference_GK is None else reference_GK[group, response]
        return StepPlan(
            rows=rows,
            group=group,
            response=response,
            win_rate=torch.from_numpy(self.targets.win_rate[rows]),
            log_z=torch.from_numpy(self.targets.log_z[rows]),
            preference=torch.from_numpy(self.targets.preference[rows]),
            chosen=torch.from_numpy(index.chosen[rows]),
            reference_log_prob=torch.from_numpy(reference),
            num_response_tokens=torch.from_numpy(index.response_lengths[rows]),
            num_tokens=int(index.lengths[rows].sum()),
            num_pairs=sum(flops.attended_pairs(int(length)) for length in index.lengths[rows]),
            micro_batches=micro_batches,
            padding_fraction=1 - real / sum(batch.tokens.numel() for batch in micro_batches),
        )

    def _micro_batches(self, rows: np.ndarray, reference_GK: np.ndarray | None) -> list[MicroBatch]:
        config, layout = self._config, self._config.parallel
        shares = plan_step(
            rows,
            self.index.lengths,
            data_parallel_size=parallel.data_parallel_size(),
            micro_batch_size=config.batch.micro_batch_size,
            unit_size=config.objective.unit_size,
        )
        share = shares[parallel.data_parallel_rank()]
        multiple = token_multiple(
            config.model,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            sequence_parallel=layout.sequence_parallel,
        )
        context_size = layout.context_parallel_size
        document_multiple = 2 * context_size if context_size > 1 else 1
        multiple = math.lcm(multiple * context_size, document_multiple)
        shapes = self._shapes(shares, multiple=multiple, document_multiple=document_multiple)
        whole = [
            collate(
                self._dataset,
                self.index,
                part,
                packed=config.batch.packing,
                length=length,
                multiple=multiple,
                document_multiple=document_multiple,
                num_batch_rows=num_batch_rows,
                targets=self.targets,
                reference_GK=reference_GK,
            )
            for part, (length, num_batch_rows) in zip(share, shapes, strict=True)
        ]
        if context_size == 1:
            return whole
        rank = parallel.context_parallel_rank()
        return [context_parallel_share(batch, rank=rank, size=context_size) for batch in whole]

    def _shapes(
        self, shares: list[list[np.ndarray]], *, multiple: int, document_multiple: int
    ) -> list[tuple[int | None, int | None]]:
        """Say which shape each micro-batch of this rank must have -> (columns, rows); None: what its rows need."""
        packed, layout = self._config.batch.packing, self._config.parallel
        share = shares[parallel.data_parallel_rank()]
        together = [[part] for part in share]
        if layout.expert_model_parallel_size > 1:
            # Ranks that share out experts gather each other's tokens, as many from each.
            together = [list(parts) for parts in zip(*shares, strict=True)]
        if layout.pipeline_model_parallel_size > 1:
            # Pipeline stages exchange tensors of one shape throughout a step.
            together = [[part for parts in together for part in parts]] * len(share)
        elif layout.expert_model_parallel_size == 1:
            return [(None, None)] * len(share)
        measure = np.sum if packed else np.max
        lengths = -(-self.index.lengths // document_multiple) * document_multiple
        shapes: list[tuple[int | None, int | None]] = []
        for parts in together:
            longest = max(int(measure(lengths[part], initial=1)) for part in parts)
            num_batch_rows = None if packed else max(len(part) for part in parts)
            shapes.append((-(-longest // multiple) * multiple, num_batch_rows))
        return shapes
