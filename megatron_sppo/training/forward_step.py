"""One micro-batch through the policy: tokens -> response log-probabilities -> log-ratios -> loss."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sppo.data.microbatch import MicroBatch
from megatron_sppo.model import gpt
from megatron_sppo.objective import sequence_sums
from megatron_sppo.training import parallel
from megatron_sppo.training.config import ObjectiveConfig
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.step_plan import StepPlan
from megatron_sppo.training.watchdog import beat

# B = sequences of a micro-batch, R = response tokens, N = responses of a global batch

Loss = Callable[[MicroBatch, Tensor], Tensor]


def sppo_forward_step(
    micro_batches: Iterator[MicroBatch], model: Any, *, loss: Loss
) -> tuple[Tensor, Callable[..., Any]]:
    """Compute a stage's output, and how the last one turns it into (loss sum, number of sequences, report).

    The number of sequences is the schedule's "token" count: with `calculate_per_token_loss` the gradient becomes the
    exact mean over those of the global batch, however unevenly micro-batches and ranks share them. Where a term joins a
    pair each of its two sequences has it, so that the mean is that over pairs: what is added beside the objective,
    such as losses of routers, is a sum over sequences whatever the objective joins.
    """
    beat("forward and backward")
    on_cpu = next(micro_batches)
    batch = on_cpu.to(parallel.device())
    output = stage_output(batch, model)

    def loss_sum(token_log_prob_R: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        partial_B = sequence_sums(token_log_prob_R, batch.sequence_index, batch.num_sequences)
        log_prob_B = parallel.sum_over_context(partial_B).float()
        terms = loss(batch, log_prob_B)
        term_B = terms.repeat_interleave(log_prob_B.numel() // max(terms.numel(), 1))
        # Context-parallel ranks compute the same terms, each with the gradient of its own tokens: count them once.
        counted = term_B.numel() if parallel.context_parallel_rank() == 0 else 0
        count = torch.full((), counted, dtype=torch.int, device=terms.device)
        # What is told is not finite where a log-ratio is not, whatever the objective makes of that: dpo's is 0 at
        # infinity. The schedule divides the loss in place (megatron-core 0.16.1, schedules.py): report copies only.
        unfit_B = 0 * (log_prob_B.detach() - batch.targets.reference_log_prob)
        told = log_prob_B.detach(), term_B.detach() + unfit_B
        return term_B.sum(), count, {"rows": on_cpu.rows, "told": torch.stack(told)}

    return output, loss_sum


def stage_output(batch: MicroBatch, model: Any) -> Tensor:
    """Run one stage on a micro-batch -> log-probabilities of its response tokens, [R], or the next stage's input."""
    return gpt.forward(
        model,
        batch.tokens,
        batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        parents=batch.parents,
        max_seqlen=batch.max_seqlen,
        lengths_B=batch.lengths,
        response=gpt.ResponseTokens(batch.response_rows, batch.labels_R, batch.rows_of_ranks),
    )


def objective_terms(rows: MicroBatch | StepPlan, log_prob_B: Tensor, *, objective: ObjectiveConfig) -> Tensor:
    """Evaluate the objective on a micro-batch or a whole step -> [B], or [B / 2] where it couples pairs; unreduced."""
    return objective.row.loss(log_prob_B - rows.targets.reference_log_prob, rows.targets)


def gradient_step(
    policy: Policy, optimizer: MegatronOptimizer, plan: StepPlan, *, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of a step's mean objective -> log pi of this rank's responses and the objective's terms.

    Both [N] float64, 0 for others' responses; of a pair both responses have its term.

    The gradient lies in the DDP buffers, averaged over sequences and reduced (`reduce_gradients`), for
    `optimizer.step()`. The CPU waits for nothing: the ranks' sums of the results, on the device, are the whole global
    batch's. Collective over all ranks; every data-parallel rank brings the same number of micro-batches.
    """
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = partial(objective_terms, objective=objective)
    log_prob_N, term_N = _run_micro_batches(policy, plan, loss=loss, forward_only=False)
    return log_prob_N, term_N


@torch.no_grad()
def log_probs(policy: Policy, plan: StepPlan) -> Tensor:
    """Run a step's micro-batches forward -> log pi of the global batch's responses, [N] float64 on the CPU. Collective.

    In the very micro-batches of `gradient_step`, so that the same weights give the same bits.
    """
    return log_probs_and_sum(policy, plan, torch.zeros(0))[0]


@torch.no_grad()
def log_probs_and_sum(policy: Policy, plan: StepPlan, said: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `log_probs` and add up what the ranks say, by the same all-reduce -> (log pi, sum of `said`). Collective.

    Args:
        said: on the CPU, as much on every rank.
    """
    log_prob_N, _ = _run_micro_batches(policy, plan, loss=lambda _, log_prob: log_prob, forward_only=True)
    both = torch.cat([log_prob_N, parallel.to_device(said.double())])
    log_prob_N, total = parallel.sum_to_cpu(both)().split([len(log_prob_N), len(said)])
    return log_prob_N, total


def _run_micro_batches(policy: Policy, plan: StepPlan, *, loss: Loss, forward_only: bool) -> Tensor:
    """Run Megatron's schedule over this rank's micro-batches -> log pi and terms as `gradient_step`, [2, N]."""
    reports = run_schedule(policy, plan.micro_batches, partial(sppo_forward_step, loss=loss), forward_only=forward_only)
    told_2N = torch.zeros(2, len(plan.rows), dtype=torch.float64, device=parallel.device())
    if parallel.reports_results():
        rows = np.concatenate([report["rows"].numpy() for report in reports])
        position = torch.from_numpy(plan.positions(rows))
        told = torch.cat([report["told"] for report in reports], dim=1)
        told_2N.index_copy_(1, parallel.to_device(position), told.double())
    return told_2N


def run_schedule(
    policy: Policy, micro_batches: list[MicroBatch], forward_step: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    """Run Megatron's schedule -> what `forward_step` reported of each micro-batch, on the last stage. Collective."""
    tokens = micro_batches[0].tokens
    num_chunks = len(policy.chunks)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in range(num_chunks)] if num_chunks > 1 else iter(micro_batches),
        model=list(policy.chunks) if num_chunks > 1 else policy.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=tokens.shape[1] * policy.config.context_parallel_size,
        micro_batch_size=tokens.shape[0],
        decoder_seq_length=tokens.shape[1] * policy.config.context_parallel_size,
        forward_only=forward_only,
    )
