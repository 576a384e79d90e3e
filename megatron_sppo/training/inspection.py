"""Where in a response a policy differs from the one before it: log pi_theta(y_t|...) - log pi_t(y_t|...), per token.

The sum over a response is its log-ratio, which SPPO regresses onto its target; the terms estimate the advantage of each
token under the optimal policy (equation 3.11). Computed by the model code, layout and packing of training.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.checkpoints.megatron_checkpoint import HF_DIRECTORY
from megatron_sppo.checkpoints.tokenizer import token_texts
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.microbatch import MicroBatch
from megatron_sppo.errors import DataError
from megatron_sppo.storage import atomic_file, refuse_foreign_file
from megatron_sppo.training import checkpoint, inputs, parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import InspectionConfig, ObjectiveConfig
from megatron_sppo.training.forward_step import run_schedule, stage_output
from megatron_sppo.training.policy import Policy, build_policy
from megatron_sppo.training.step_plan import StepPlan

logger = logging.getLogger(__name__)

# N = responses of a pass, R = response tokens of a micro-batch, T = response tokens of a response


def inspect(config: InspectionConfig) -> dict[str, Any]:
    """Compute and write the per-token log-ratios -> what was written, in numbers. Collective.

    A line: `{prompt_id, group, response, win_rate, log_ratio, tokens: [{id, text, log_prob, reference_log_prob,
    log_ratio}]}`; nats. `text` is null where the checkpoint carries no tokenizer.json.

    Raises:
        ConfigError: the two checkpoints hold different models; settings that cannot run.
    """
    # Every response of a prompt counts, whatever the training selected.
    refuse_foreign_file(config.output, ours="log_ratio", flag="--output")
    batch = dataclasses.replace(config.batch, selection="all")
    config = dataclasses.replace(config, objective=ObjectiveConfig(), batch=batch)
    inputs.refuse_layout(config)
    policy_source, architecture, tokenizer = inputs.open_source(config)
    (reference_sources,) = inputs.open_references(config, architecture, tokenizer)
    policy_sources = inputs.open_weights(config, architecture, policy_source)
    dataset = inputs.open_dataset(config, architecture, tokenizer)
    batches = inputs.list_batches(config, dataset, architecture)
    rows = np.flatnonzero(np.isin(batches.index.group, prompts_by_decidedness(dataset, config.num_prompts)))
    parallel.initialize(config.parallel, seed=config.batch.seed)
    adapters = config.adapters.settings(architecture)
    policy = build_policy(architecture, config.model, config.parallel, adapters=adapters)
    log_probs = []
    for sources in (policy_sources, reference_sources):
        checkpoint.load_weights(policy, *sources)
        log_probs.append(_token_log_probs(policy, batches, rows, size=config.batch.global_batch_size))
    summary: dict[str, Any] = {}
    with parallel.failing_together(OSError, DataError):
        if parallel.is_rank_zero():
            decode = token_texts(policy_source / HF_DIRECTORY)
            lines = list(_lines(dataset, batches, rows, *log_probs, decode=decode))
            with atomic_file(config.output) as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            summary = _summary(config, lines)
    parallel.shut_down()
    return summary


def prompts_by_decidedness(dataset: PreferenceDataset, num_prompts: int) -> np.ndarray:
    """Choose prompts evenly from the widest to the narrowest spread of win rates -> [num_prompts] groups at most."""
    order = np.argsort(-np.ptp(dataset.all_win_rates(), axis=-1), kind="stable")
    if num_prompts >= len(order):
        return order
    return order[np.linspace(0, len(order) - 1, num_prompts).round().astype(np.int64)]


def _token_log_probs(policy: Policy, batches: Batches, rows: np.ndarray, *, size: int) -> list[np.ndarray]:
    """Compute log pi of every response token of `rows`, `size` responses at a time -> [T] float32 for each row."""
    log_probs: list[np.ndarray] = []
    for first in range(0, len(rows), size):
        log_probs += token_log_probs(policy, batches, batches.plan_of(rows[first : first + size]))
    return log_probs


@torch.no_grad()
def token_log_probs(policy: Policy, batches: Batches, plan: StepPlan) -> list[np.ndarray]:
    """Run a plan's micro-batches forward -> log pi of each token, [T] float32 nats for each row. Collective."""
    prompt_lengths = torch.from_numpy(batches.index.prompt_lengths).to(parallel.device())
    step = partial(_forward_step, prompt_lengths=prompt_lengths)
    reports = run_schedule(policy, plan.micro_batches, step, forward_only=True)
    lengths_N = plan.num_response_tokens.numpy()
    first_N = np.cumsum(lengths_N) - lengths_N
    everything = torch.zeros(int(lengths_N.sum()), dtype=torch.float64)
    if parallel.reports_tokens():
        for report in reports:
            place_R = (
                torch.from_numpy(first_N[plan.positions(report["row_R"].cpu().numpy())]) + report["offset_R"].cpu()
            )
            everything[place_R] = report["log_prob_R"].double().cpu()
    values = parallel.sum_over_world(everything.to(parallel.device())).float().cpu().numpy()
    return np.split(values, first_N[1:])


def _forward_step(
    micro_batches: Iterator[MicroBatch], model: Any, *, prompt_lengths: Tensor
) -> tuple[Tensor, Callable[..., Any]]:
    """Compute a stage's output, and how the last one reports each token with its row and its place in the response."""
    batch = next(micro_batches).to(parallel.device())

    def report(log_prob_R: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        row_R = batch.rows[batch.sequence_index]
        # The position before a token predicts it, and a prompt's last position the first token of the response.
        position_R = batch.position_ids.T.reshape(-1)[batch.response_rows]
        offset_R = position_R - (prompt_lengths[row_R] - 1)
        count = torch.tensor(0, dtype=torch.int, device=log_prob_R.device)
        return log_prob_R.sum(), count, {"row_R": row_R, "offset_R": offset_R, "log_prob_R": log_prob_R.detach()}

    return stage_output(batch, model), report


def _lines(
    dataset: PreferenceDataset,
    batches: Batches,
    rows: np.ndarray,
    policy: list[np.ndarray],
    reference: list[np.ndarray],
    *,
    decode: Callable[[Sequence[int]], list[str]] | None,
) -> Iterator[dict[str, Any]]:
    """Describe each response -> lines of the output file."""
    prompts = dataset.lines_of(set(batches.index.group[rows].tolist()))
    for row, log_prob_T, reference_T in zip(rows, policy, reference, strict=True):
        group, response = int(batches.index.group[row]), int(batches.index.response[row])
        token_ids = dataset.response(group, response).tolist()
        texts = [None] * len(token_ids) if decode is None else decode(token_ids)
        log_ratio_T = log_prob_T.astype(np.float64) - reference_T
        yield {
            "prompt_id": prompts[group]["prompt_id"],
            "group": group,
            "response": response,
            "win_rate": float(dataset.win_rates(group)[response]),
            "log_ratio": float(log_ratio_T.sum()),
            "tokens": [
                {"id": i, "text": text, "log_prob": float(p), "reference_log_prob": float(q), "log_ratio": float(r)}
                for i, text, p, q, r in zip(token_ids, texts, log_prob_T, reference_T, log_ratio_T, strict=True)
            ],
        }


def _summary(config: InspectionConfig, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ratios = [token["log_ratio"] for line in lines for token in line["tokens"]]
    return {
        "output": str(config.output),
        "num_prompts": len({line["group"] for line in lines}),
        "num_responses": len(lines),
        "num_tokens": len(ratios),
        "abs_log_ratio_per_token": float(np.abs(ratios).mean()),
        "abs_log_ratio_per_response": float(np.mean([abs(line["log_ratio"]) for line in lines])),
    }
