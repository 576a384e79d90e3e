"""Which responses each optimizer step sees, and this rank's share of them as micro-batches.

The global batches depend on the data, the seed and the global batch size alone, never on the layout: any rank can say
what any step holds, so resuming needs no more than the step's number.
"""

import dataclasses
import logging
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from megatron_sppo import flops
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import MicroBatch, collate, in_order_of_ranks
from megatron_sppo.data.selection import TrainingIndex, row_targets, training_index
from megatron_sppo.data.steps import (
    divide_shared_step,
    divide_step,
    epoch_rows,
    follows_its_prompt,
    step_units,
    tokens_of_parts,
)
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import token_multiple
from megatron_sppo.objective import Targets
from megatron_sppo.objective.names import parse_baseline
from megatron_sppo.objective.win_rate import estimated_baseline_over_eta
from megatron_sppo.training import parallel
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.context_parallel import columns_of_rank
from megatron_sppo.training.step_plan import StepPlan

logger = logging.getLogger(__name__)

# N = responses of the global batch


class Batches:
    """All steps of a run over one dataset."""

    def __init__(
        self, dataset: PreferenceDataset, config: TrainingConfig, *, max_length: int, crossover_length: float = math.inf
    ) -> None:
        """List the rows of an epoch and their targets.

        Args:
            max_length: positions of the model, in tokens; holds where the config sets no smaller seq_length.
            crossover_length: tokens of a document whose attention takes as long as all else (`data.packing`), for
                micro-batches and ranks of like cost; infinite: of like tokens.

        Raises:
            ConfigError: a response, or a pair, is longer than a pack.
        """
        objective = config.objective.row
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
        self._targets: Targets = row_targets(
            dataset, self.index, eta=config.objective.eta, baseline=parse_baseline(config.objective.baseline)
        )
        self._dataset = dataset
        self._config = config
        self._crossover_length = crossover_length
        self._last_order: tuple[int, np.ndarray] | None = None
        self._document_multiple, self._multiple = _token_multiples(config)
        self._check_budget()
        self._report()

    @property
    def _budget(self) -> int | None:
        """Tokens that a pack may have, of all context-parallel ranks together; None: packs are filled by responses."""
        size = self._config.batch.packed_sequence_size
        return None if size is None else size // self._multiple * self._multiple

    def _check_budget(self) -> None:
        """Refuse a pack that does not hold the longest response, or the longest pair where the loss couples pairs."""
        if self._budget is None:
            return
        index, rows_per_loss = self.index, self._config.objective.row.rows_per_loss
        lengths = -(-index.lengths // self._document_multiple) * self._document_multiple
        lengths = lengths.reshape(-1, rows_per_loss).sum(axis=1)
        if self._config.batch.share_prompts:
            lengths = lengths - (rows_per_loss - 1) * index.prompt_lengths[::rows_per_loss]
        longest = int(lengths.max())
        if longest > self._budget:
            fitting = -(-longest // self._multiple) * self._multiple
            raise ConfigError(
                f"packed_sequence_size ({self._config.batch.packed_sequence_size} tokens) does not hold the longest "
                f"{'pair' if rows_per_loss == 2 else 'prompt and response'}, {longest} tokens in multiples of "
                f"{self._multiple}. Use --packed-sequence-size {fitting}, or a smaller --seq-length."
            )

    def _report(self) -> None:
        """Say what is trained on, and count what is not."""
        index, config = self.index, self._config
        logger.info(
            "%s at %s: %d responses of %d prompts (%s), %d steps; left out: %d tied prompts, %d tied pairs, "
            "%d too long rows",
            config.objective.objective,
            config.objective.row.strength,
            index.num_rows,
            self._dataset.num_groups,
            self.selection,
            self.train_iters,
            index.num_dropped_ties,
            index.num_tied_pairs,
            index.num_too_long,
        )
        batch = config.batch
        if batch.train_iters is not None and batch.num_epochs is not None:
            by_epochs = self.steps_per_epoch * batch.num_epochs
            logger.info(
                "train_iters is %d, num_epochs %d is %d steps: %s ends the run",
                batch.train_iters,
                batch.num_epochs,
                by_epochs,
                "train_iters" if batch.train_iters < by_epochs else "num_epochs",
            )
        if index.num_rows < batch.global_batch_size:
            logger.warning(
                "a step has all %d responses that there are, fewer than global_batch_size (%d)",
                index.num_rows,
                batch.global_batch_size,
            )
        if config.objective.baseline == "estimate":
            win_rate_GK = torch.from_numpy(self._dataset.all_win_rates())
            over_eta = estimated_baseline_over_eta(win_rate_GK, eta=config.objective.eta)
            logger.info("baseline estimate: log Z / eta is %.4f on average, half would be 0.5", over_eta)

    @property
    def num_groups(self) -> int:
        """G, the dataset's prompts."""
        return self._dataset.num_groups

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may hold fewer responses."""
        return -(-self.index.num_rows // self._config.batch.global_batch_size)

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the whole run."""
        return self._config.batch.num_steps(self.steps_per_epoch)

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins."""
        return -(-self.train_iters // self.steps_per_epoch)

    def first_step(self, epoch: int) -> int:
        """Say with which step an epoch begins -> int; both are counted as the run does: steps from 1, epochs from 0."""
        return 1 + epoch * self.steps_per_epoch

    @property
    def micro_batch_key(self) -> dict[str, int | None]:
        """What decides which responses of a step share a micro-batch, and its padding; a resumed run may change it."""
        batch = self._config.batch
        return {
            "data_parallel_size": parallel.data_parallel_size(),
            "micro_batch_size": batch.micro_batch_size if self._budget is None else None,
            "packed_sequence_size": self._budget,
            "token_multiple": self._multiple,
        }

    @property
    def row_key(self) -> dict[str, Any]:
        """What says which rows there are to train on."""
        dataset_hash, num_rows = self._dataset.dataset_hash, self.index.num_rows
        return {"dataset_hash": dataset_hash, "selection": str(self.selection), "num_rows": num_rows}

    def steps(self, *, first: int, last: int, reference_GK: np.ndarray | None = None) -> Iterator[StepPlan]:
        """Yield the plans of steps `first`..`last`: `plans`."""
        return self.plans(range(first, last + 1), reference_GK=reference_GK)

    def plans(self, steps: Iterable[int], *, reference_GK: np.ndarray | None = None) -> Iterator[StepPlan]:
        """Yield the plans of steps, counted from 1; one after another, since the order of one epoch alone is kept.

        Args:
            reference_GK: log pi_t; or one for each epoch, one after another: [epochs * G, K]. With further references
                [..., K, 1 + R], pi_t's first.
        """
        num_groups = self.num_groups
        for step in steps:
            of_epoch, epoch = reference_GK, self.epoch_of(step)
            if reference_GK is not None and len(reference_GK) > num_groups:
                of_epoch = reference_GK[epoch * num_groups : (epoch + 1) * num_groups]
                assert len(of_epoch) == num_groups, f"no reference of epoch {epoch}"
            yield self.plan_of(self.rows_of(step), of_epoch)

    def epoch_of(self, step: int) -> int:
        """Say which epoch a step belongs to -> int, from 0."""
        return (step - 1) // self.steps_per_epoch

    def rows_of(self, step: int) -> np.ndarray:
        """List the rows of a step's global batch -> [N] int64."""
        size, step_of_epoch = self._config.batch.global_batch_size, (step - 1) % self.steps_per_epoch
        return self._order(self.epoch_of(step))[step_of_epoch * size : (step_of_epoch + 1) * size]

    def plan_of(self, rows: np.ndarray, reference_GK: np.ndarray | None = None) -> StepPlan:
        """Plan one pass over given rows of the training index, units side by side -> StepPlan."""
        index = self.index
        shares = self._shares(rows)
        num_tokens, num_computed_tokens, attended_positions = self._counts(rows, shares)
        micro_batches = self._micro_batches(shares, reference_GK)
        real = sum(micro_batch.num_tokens for micro_batch in micro_batches)
        computed = sum(micro_batch.tokens.numel() for micro_batch in micro_batches)
        return StepPlan(
            rows=rows,
            group=index.group[rows],
            response=index.response[rows],
            targets=self._targets_of(rows, reference_GK),
            num_response_tokens=torch.from_numpy(index.response_lengths[rows]),
            num_tokens=num_tokens,
            num_computed_tokens=num_computed_tokens,
            attended_positions=attended_positions,
            micro_batches=micro_batches,
            padding_fraction=1 - real / (computed * self._config.parallel.context_parallel_size),
        )

    def _counts(self, rows: np.ndarray, shares: list[list[np.ndarray]]) -> tuple[int, int, int]:
        """Count a global batch -> (tokens, tokens that are computed, positions that are attended to)."""
        index = self.index
        num_tokens = int(index.lengths[rows].sum())
        attended = int(flops.attended_positions(index.lengths[rows]).sum())
        if not self._config.batch.share_prompts:
            return num_tokens, num_tokens, attended
        parts = [part for share in shares for part in share]
        ordered = np.concatenate(parts)
        again = follows_its_prompt(index, ordered, np.cumsum([0, *map(len, parts)]))
        seen_before = index.prompt_lengths[ordered[again]]
        return (
            num_tokens,
            num_tokens - int(seen_before.sum()),
            attended - int(flops.attended_positions(seen_before).sum()),
        )

    def _targets_of(self, rows: np.ndarray, reference_GK: np.ndarray | None) -> Targets:
        """Pick rows' targets, log pi_t among them where it is known -> Targets."""
        targets = self._targets.of(torch.from_numpy(rows))
        if reference_GK is None:
            return targets
        reference = torch.from_numpy(reference_GK[self.index.group[rows], self.index.response[rows]])
        if reference.ndim == 1:
            return dataclasses.replace(targets, reference_log_prob=reference)
        of_pi_t, others = reference[:, 0].contiguous(), reference[:, 1:].contiguous()
        return dataclasses.replace(targets, reference_log_prob=of_pi_t, other_log_prob=others)

    def _order(self, epoch: int) -> np.ndarray:
        """List an epoch's rows as they are trained on -> [rows]; the last epoch asked for is kept.

        The thread that makes batches ahead may ask for another epoch in between: what is kept is looked at once.
        """
        batch, last = self._config.batch, self._last_order
        if last is None or last[0] != epoch:
            last = epoch, epoch_rows(self.index, seed=batch.seed, epoch=epoch, by_prompt=batch.share_prompts)
            self._last_order = last
        return last[1]

    def _shares(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """Divide a global batch -> for each data-parallel rank, the rows of its micro-batches."""
        batch, budget, num_ranks = self._config.batch, self._budget, parallel.data_parallel_size()
        layout, rows_per_loss = self._config.parallel, self._config.objective.row.rows_per_loss
        interleaved = layout.virtual_pipeline_model_parallel_size is not None
        # The interleaved schedule takes micro-batches in groups of as many as there are stages (mcore 0.16.1, 0.19.2).
        count_multiple = layout.pipeline_model_parallel_size if interleaved else 1
        if batch.share_prompts:
            assert budget is not None
            return divide_shared_step(
                self.index,
                rows,
                data_parallel_size=num_ranks,
                count_multiple=count_multiple,
                packed_sequence_size=budget,
                rows_per_loss=rows_per_loss,
                crossover_length=self._crossover_length,
            )
        units = step_units(
            rows,
            self.index.lengths,
            rows_per_loss=rows_per_loss,
            document_multiple=self._document_multiple,
            crossover_length=self._crossover_length,
        )
        return divide_step(
            units,
            data_parallel_size=num_ranks,
            count_multiple=count_multiple,
            micro_batch_size=batch.micro_batch_size if budget is None else None,
            packed_sequence_size=budget,
        )

    def _micro_batches(self, shares: list[list[np.ndarray]], reference_GK: np.ndarray | None) -> list[MicroBatch]:
        batch, layout = self._config.batch, self._config.parallel
        context_size = layout.context_parallel_size
        parts = shares[parallel.data_parallel_rank()]
        targets, place = self._targets_of(np.concatenate(parts), reference_GK), 0
        whole = []
        for part, (length, num_batch_rows) in zip(parts, self._shapes(shares), strict=True):
            here = slice(place, place := place + len(part))
            whole.append(
                collate(
                    self._dataset,
                    self.index,
                    part,
                    targets=targets.each(operator.itemgetter(here)),
                    packed=batch.packing,
                    share_prompts=batch.share_prompts,
                    length=length,
                    multiple=self._multiple,
                    document_multiple=self._document_multiple,
                    num_batch_rows=num_batch_rows,
                )
            )
        if context_size > 1:
            rank = parallel.context_parallel_rank()
            whole = [columns_of_rank(batch, rank=rank, size=context_size) for batch in whole]
        if layout.sequence_parallel:
            whole = [in_order_of_ranks(batch, size=layout.tensor_model_parallel_size) for batch in whole]
        return [batch.pinned() for batch in whole] if torch.cuda.is_available() else whole

    def _shapes(self, shares: list[list[np.ndarray]]) -> list[tuple[int | None, int | None]]:
        """Say which shape each micro-batch of this rank must have -> (columns, rows); None: what its rows need."""
        batch, layout = self._config.batch, self._config.parallel
        num_micro_batches = len(shares[0])
        if layout.pipeline_model_parallel_size == layout.expert_model_parallel_size == 1:
            return [(None, None)] * num_micro_batches
        # Ranks that share out experts gather each other's tokens, as many from each.
        together = shares if layout.expert_model_parallel_size > 1 else [shares[parallel.data_parallel_rank()]]
        parts = [part for share in together for part in share]
        num_columns = self._num_columns(parts).reshape(-1, num_micro_batches).max(axis=0, initial=1)
        num_rows = np.array([len(part) for part in parts]).reshape(-1, num_micro_batches).max(axis=0)
        if layout.pipeline_model_parallel_size > 1:
            # Pipeline stages exchange tensors of one shape throughout a step.
            num_columns[:], num_rows[:] = num_columns.max(), num_rows.max()
        lengths = (-(-num_columns // self._multiple) * self._multiple).tolist()
        return list(zip(lengths, [None] * num_micro_batches if batch.packing else num_rows.tolist(), strict=True))

    def _num_columns(self, parts: list[np.ndarray]) -> np.ndarray:
        """Count the columns that each of several micro-batches needs -> [parts] int64."""
        batch, document_multiple = self._config.batch, self._document_multiple
        if batch.packing:
            return tokens_of_parts(
                self.index, parts, share_prompts=batch.share_prompts, document_multiple=document_multiple
            )
        longest = np.array([self.index.lengths[part].max(initial=1) for part in parts])
        return -(-longest // document_multiple) * document_multiple


def _token_multiples(config: TrainingConfig) -> tuple[int, int]:
    """Say what a document's and a micro-batch's tokens must be multiples of -> (document's, micro-batch's).

    Of all context-parallel ranks together: each holds two chunks of every document; of the whole where prompts are
    shared.
    """
    layout = config.parallel
    per_rank = token_multiple(
        config.model,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
    )
    context_size = layout.context_parallel_size
    chunks = 2 * context_size if context_size > 1 else 1
    return 1 if config.batch.share_prompts else chunks, math.lcm(per_rank * context_size, chunks)
