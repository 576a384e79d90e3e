"""Held-out evaluation: how often a judge prefers one policy's answers to another's, on prompts that training never saw.

M = answers per prompt and policy, N = prompts both policies answered, R = resamples
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from megatron_sppo.config import PositiveInt, Seed, check_ranges
from megatron_sppo.errors import DataError
from megatron_sppo.judge.protocol import Judge, load_judge
from megatron_sppo.objective import preference_matrix
from megatron_sppo.rollout.records import RolloutGroup, read_rollouts
from megatron_sppo.selfplay.summary import mean_response_tokens
from megatron_sppo.storage import write_json

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
_PROMPTS_PER_CALL = 16


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """A mean over prompts with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare a policy's held-out answers with the base's and the previous policy's."""

    policy: Path
    """Rollouts of the policy that is judged."""
    base: Path
    """Rollouts of pi_1 on the same prompts."""
    previous: Path
    """Rollouts of the previous policy on the same prompts; --base itself in the first iteration."""
    judge: str
    """pairrm:HUB_ID_OR_DIR, rules:concise, rules:cyclic or endpoint:URL."""
    output: Path
    """JSON file with the result."""
    preset: Literal["paper", "official"] = "paper"
    """What the judge reads as the prompt. Preferences are those of the paper's rule in either case."""
    bootstrap_resamples: PositiveInt = 2000
    """Resamples of the interval."""
    seed: Seed = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge the policy against the base and the previous policy and write the result -> its content.

    Raises:
        DataError: rollouts that cannot be read, or no prompt that both policies answered.
        ConfigError: a judge that cannot be loaded.
    """
    judge = load_judge(config.judge, preset=config.preset)
    policy = groups_by_prompt(config.policy)
    rates: dict[str, dict[str, float]] = {}
    for name, directory in (("base", config.base), ("previous", config.previous)):
        if name == "previous" and config.previous == config.base:
            rates[name] = rates["base"]  # the first iteration: pi_1 is both
        else:
            rates[name] = cross_win_rates(judge, policy, groups_by_prompt(directory), against=name)
    intervals = {
        name: bootstrap(list(of_prompt.values()), resamples=config.bootstrap_resamples, seed=config.seed)
        for name, of_prompt in rates.items()
    }
    result = {
        "judge": judge.name,
        "win_rate_vs_base": asdict(intervals["base"]),
        "win_rate_vs_previous": asdict(intervals["previous"]),
        "mean_response_tokens": mean_response_tokens(policy.values()),
        "bootstrap_resamples": config.bootstrap_resamples,
        "prompts": [
            {
                "prompt_id": prompt_id,
                "vs_base": rates["base"].get(prompt_id),
                "vs_previous": rates["previous"].get(prompt_id),
            }
            for prompt_id in policy
        ],
    }
    write_json(config.output, result)
    return result


def groups_by_prompt(directory: Path) -> dict[str, RolloutGroup]:
    """Read rollouts -> {prompt_id: group}, in their order."""
    return {group.prompt_id: group for group in read_rollouts(directory)}


def cross_win_rates(
    judge: Judge, policy: Mapping[str, RolloutGroup], opponent: Mapping[str, RolloutGroup], *, against: str
) -> dict[str, float]:
    """Judge every answer of the policy against every one of the opponent -> {prompt_id: mean P(policy's > opponent's)}.

    P is the paper's: sigmoid((L_ij - L_ji) / 2), both orders asked. A prompt that one side lacks is left out
    and counted.

    Raises:
        DataError: no prompt has answers of both.
    """
    shared = [prompt_id for prompt_id in policy if prompt_id in opponent]
    if not shared:
        raise DataError(f"policy and {against} answered no common prompt. Sample both on the same held-out prompts.")
    if left_out := len(policy) + len(opponent) - 2 * len(shared):
        logger.warning("%d held-out answers have no counterpart against %s and are left out.", left_out, against)
    rates: dict[str, float] = {}
    with tqdm(total=len(shared), desc=f"judging against {against}", unit="prompt", disable=None) as bar:
        for start in range(0, len(shared), _PROMPTS_PER_CALL):
            prompt_ids = shared[start : start + _PROMPTS_PER_CALL]
            joined = [join_groups(policy[prompt_id], opponent[prompt_id]) for prompt_id in prompt_ids]
            for prompt_id, logits in zip(prompt_ids, judge.judge_logits(joined), strict=True):
                num_policy = len(policy[prompt_id].responses)
                preferences = preference_matrix(torch.as_tensor(logits, dtype=torch.float64))
                rates[prompt_id] = preferences[:num_policy, num_policy:].mean().item()
            bar.update(len(prompt_ids))
    return rates


def join_groups(first: RolloutGroup, second: RolloutGroup) -> RolloutGroup:
    """Put two policies' answers to one prompt into one group, the first's first -> RolloutGroup.

    Raises:
        DataError: the prompts are not the same.
    """
    if first.messages != second.messages:
        raise DataError(
            f"prompt {first.prompt_id!r} has other messages in one of the rollouts. Sample both from the same prompts."
        )
    return RolloutGroup(
        prompt_id=first.prompt_id,
        messages=first.messages,
        prompt_token_ids=first.prompt_token_ids,
        responses=(*first.responses, *second.responses),
        prompt_text=first.prompt_text,
    )


def bootstrap(values: Sequence[float], *, resamples: int, seed: int) -> WinRate:
    """Estimate the mean of per-prompt win rates and its 95 % percentile interval -> WinRate.

    Prompts are resampled, not answers: answers of one prompt are not independent.
    """
    sample_N = np.asarray(values, dtype=np.float64)
    assert sample_N.size > 0, "no values to resample"
    generator = np.random.default_rng(seed)
    means_R = np.array([generator.choice(sample_N, size=sample_N.size).mean() for _ in range(resamples)])
    low, high = np.quantile(means_R, [0.025, 0.975])
    return WinRate(mean=float(sample_N.mean()), low=float(low), high=float(high), num_prompts=sample_N.size)
