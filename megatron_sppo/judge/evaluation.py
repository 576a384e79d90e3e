"""Held-out evaluation: how often a judge prefers one policy's answers to another's, on prompts that training never saw.

M = answers per prompt and policy, N = prompts both policies answered, R = resamples
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.errors import DataError
from megatron_sppo.json_files import write_json
from megatron_sppo.judge.accuracy import strict_accuracy
from megatron_sppo.judge.batches import Batch, judge_in_batches
from megatron_sppo.judge.conclusion import concluded
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.diagnostics import UNREADABLE_REMEDY, fraction, verdict_shares, warnings
from megatron_sppo.judge.joined_groups import join_groups
from megatron_sppo.judge.protocol import Judge, Unjudged
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.judge.workers import PooledJudge, open_judge
from megatron_sppo.objective import preference_matrix
from megatron_sppo.objective.diagnostics import TIE_TOLERANCE
from megatron_sppo.rollout.records import RolloutGroup
from megatron_sppo.storage import refuse_foreign_file

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
class CrossVerdicts:
    """A policy against an opponent, by prompt_id."""

    win_rates: dict[str, float]
    """Mean P(policy's > opponent's)."""
    a_a: dict[str, float]
    """Mean P(policy's first answers > its last); no prompt that it answered once."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge the policy against the base and the previous policy and write the result -> its content.

    Raises:
        DataError: rollouts that cannot be read, or no prompt that both policies answered.
            Or the judge calls every pair of different answers a tie.
        ConfigError: a judge that cannot be loaded, or a pool that cannot be had.
    """
    refuse_foreign_file(config.output, ours="win_rate_vs_base", flag="--output")
    assert config.policy is not None and config.base is not None and config.previous is not None
    judge = open_judge(
        config.judge,
        pool=config.pool,
        preset=config.preset,
        after=config.judge_after,
        verdict_tokens=config.verdict_tokens,
        scorer_seconds=config.scorer_seconds,
    )
    policy = StoredGroups(config.policy)
    players = {"policy": policy, "base": StoredGroups(config.base)}
    players["previous"] = players["base"] if config.previous == config.base else StoredGroups(config.previous)
    opponents = {"base": players["base"]}
    if players["previous"] is not players["base"]:  # in the first iteration pi_1 is both
        opponents["previous"] = players["previous"]
    verdicts, counts = cross_verdicts(judge, policy, opponents, after=config.judge_after, output=config.output)
    verdicts.setdefault("previous", verdicts["base"])
    rates = {name: of_prompt.win_rates for name, of_prompt in verdicts.items()}
    if not config.allow_no_signal:
        check_signal(counts, judge=judge.name)
    intervals = {
        name: bootstrap(list(of_prompt.values()), resamples=config.bootstrap_resamples, seed=config.seed)
        for name, of_prompt in rates.items()
    }
    result: dict[str, Any] = {
        "judge": judge.name,
        "win_rate_vs_base": asdict(intervals["base"]),
        "win_rate_vs_previous": asdict(intervals["previous"]),
        "a_a": _noise_floor(verdicts["base"], config),
        **_accuracies(judge.here, players, config),
        "mean_response_tokens": policy.mean_answer_tokens,
        "bootstrap_resamples": config.bootstrap_resamples,
        "bootstrap_seed": config.seed,
        "warnings": warnings(_shares(counts, policy)),
        "prompts": [
            {
                "prompt_id": prompt_id,
                "vs_base": rates["base"].get(prompt_id),
                "vs_previous": rates["previous"].get(prompt_id),
            }
            for prompt_id in policy
        ],
    }
    for warning in result["warnings"]:
        logger.warning("%s", warning)
    write_json(config.output, result, seal=True)
    return result


def _noise_floor(verdicts: CrossVerdicts, config: EvaluateConfig) -> dict[str, Any] | None:
    """Compare the policy with itself -> an interval as of a win rate, None where it answered once."""
    if not verdicts.a_a:
        return None
    return asdict(bootstrap(list(verdicts.a_a.values()), resamples=config.bootstrap_resamples, seed=config.seed))


def _accuracies(judge: Judge | None, players: Mapping[str, StoredGroups], config: EvaluateConfig) -> dict[str, Any]:
    """Check everybody's answers -> {"accuracy": {player: strict accuracy}}, {} where the judge checks nothing."""
    if judge is None:  # a model, which only workers have
        return {}
    found: dict[str, Any] = {}
    for name, groups in players.items():
        if name == "previous" and groups is players["base"]:
            found[name] = found["base"]
        else:
            settings = {"resamples": config.bootstrap_resamples, "seed": config.seed}
            found[name] = strict_accuracy(judge, groups.values(), **settings)
    return {"accuracy": found} if found["policy"] is not None else {}


def check_signal(counts: Counter[str], *, judge: str) -> None:
    """Refuse verdicts that say nothing about the policies: their win rate would be one half, and look like parity.

    Raises:
        DataError: every pair of different answers is a tie.
    """
    different, unreadable = counts["cross_pairs"], counts["unreadable_verdicts"]
    if not different or counts["tied_cross_pairs"] < different:
        return
    words = f", {unreadable} verdicts being neither A nor B" if unreadable else ""
    remedy = UNREADABLE_REMEDY if unreadable else "Take a judge that tells these answers apart."
    raise DataError(
        f"{judge} gives no signal: all {different} pairs of different answers are ties{words}. {remedy} "
        "Or go on with --allow-no-signal."
    )


def _shares(counts: Counter[str], policy: StoredGroups) -> dict[str, float | None]:
    """Gather what is remarkable of an evaluation -> by the names of JUDGE_DIAGNOSTICS."""
    counts = counts + Counter(answers=policy.num_answers, cut_answers=policy.num_cut_answers)
    return {
        **verdict_shares(counts),
        "order_disagreement": fraction(counts["order_bound_cross_pairs"], counts["cross_pairs"]),
        "cross_tie_rate": fraction(counts["tied_cross_pairs"], counts["cross_pairs"]),
        "unjudged": counts["unjudged"],
    }


def cross_verdicts(
    judge: Judge | PooledJudge,
    policy: Mapping[str, RolloutGroup],
    opponents: Mapping[str, Mapping[str, RolloutGroup]],
    *,
    after: str | None = None,
    output: Path | None = None,
) -> tuple[dict[str, CrossVerdicts], Counter[str]]:
    """Judge every answer of the policy against every one of each opponent -> (by opponent, what the verdicts are).

    P is the paper's: sigmoid((L_ij - L_ji) / 2), both orders asked. A prompt that one side lacks is left out and
    counted, and so is one that the judge cannot judge. Groups are asked for a few at a time: they may lie on a disk.

    Args:
        after: the text that the judge reads answers from; None: whole answers.
        output: as `judge_in_batches`.

    Raises:
        DataError: no prompt has answers of both, or none could be judged. Others are the pool's.
    """
    shared = {name: _shared(policy, opponent, against=name) for name, opponent in opponents.items()}
    total = sum(map(len, shared.values()))
    rates: dict[str, dict[str, float]] = {name: {} for name in opponents}
    a_a: dict[str, dict[str, float]] = {name: {} for name in opponents}
    counts: Counter[str] = Counter()
    for pairs, judged in judge_in_batches(judge, _batches(policy, opponents, shared), total=total, output=output):
        counts += judged.counts
        for group, verdict, ours, theirs in zip(pairs.groups, judged.verdicts, pairs.ours, pairs.theirs, strict=True):
            if isinstance(verdict, Unjudged):
                counts["unjudged"] += 1
                logger.warning("prompt %s is left out: %s.", group.prompt_id, verdict.reason)
                continue
            num_policy = len(ours.responses)
            logits = torch.as_tensor(verdict, dtype=torch.float64)
            matrix = preference_matrix(logits)
            preferences = matrix[:num_policy, num_policy:]
            rates[pairs.against][group.prompt_id] = preferences.mean().item()
            if num_policy > 1:
                a_a[pairs.against][group.prompt_id] = first_against_last(matrix[:num_policy, :num_policy])
            there, back = logits[:num_policy, num_policy:], logits[num_policy:, :num_policy].T
            seen = (concluded(side, after) for side in (ours, theirs))
            count_cross_pairs(counts, there, back, preferences, *seen)
    for name, prompt_ids in shared.items():
        if not rates[name]:
            raise DataError(f"{judge.name} could judge none of {len(prompt_ids)} prompts. The warnings above say why.")
    verdicts = {
        name: CrossVerdicts(win_rates=_ordered(rates[name], prompt_ids), a_a=_ordered(a_a[name], prompt_ids))
        for name, prompt_ids in shared.items()
    }
    return verdicts, counts


def _ordered(values: Mapping[str, float], prompt_ids: Sequence[str]) -> dict[str, float]:
    """Put values into the prompts' order, whichever worker was first: the resampling draws by place."""
    return {prompt_id: values[prompt_id] for prompt_id in prompt_ids if prompt_id in values}


def _shared(policy: Mapping[str, RolloutGroup], opponent: Mapping[str, RolloutGroup], *, against: str) -> list[str]:
    """Choose the prompts that both sides have answered -> prompt_ids."""
    shared = [prompt_id for prompt_id in policy if prompt_id in opponent]
    if not shared:
        raise DataError(f"policy and {against} answered no common prompt. Sample both on the same held-out prompts.")
    if left_out := len(policy) + len(opponent) - 2 * len(shared):
        logger.warning("%d held-out answers have no counterpart against %s and are left out.", left_out, against)
    return shared


@dataclass(frozen=True, kw_only=True)
class _Pairs(Batch):
    """Some prompts, each with both sides' answers in one group."""

    against: str
    ours: tuple[RolloutGroup, ...]
    theirs: tuple[RolloutGroup, ...]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a worker does not need."""
        return vars(self) | {"ours": (), "theirs": ()}


def _batches(
    policy: Mapping[str, RolloutGroup],
    opponents: Mapping[str, Mapping[str, RolloutGroup]],
    shared: Mapping[str, list[str]],
) -> Iterator[_Pairs]:
    """Give out a few prompts at a time -> batches."""
    parts = (
        (name, prompt_ids[start : start + _PROMPTS_PER_CALL])
        for name, prompt_ids in shared.items()
        for start in range(0, len(prompt_ids), _PROMPTS_PER_CALL)
    )
    for index, (name, prompt_ids) in enumerate(parts):
        ours = tuple(policy[prompt_id] for prompt_id in prompt_ids)
        theirs = tuple(opponents[name][prompt_id] for prompt_id in prompt_ids)
        groups = tuple(map(join_groups, ours, theirs))
        yield _Pairs(index=index, groups=groups, against=name, ours=ours, theirs=theirs)


def first_against_last(preferences: Tensor) -> float:
    """Compare the first half of a policy's answers to a prompt with the last -> mean P, NaN of one answer.

    One checkpoint, other seeds: 1/2 but for noise, that of half as many answers, so never less than a win rate's own.
    An odd number's middle answer plays on neither side.

    Args:
        preferences: [M, M], P of the policy's answers among themselves.
    """
    half = preferences.shape[0] // 2
    return preferences[:half, -half:].mean().item() if half else float("nan")


def count_cross_pairs(
    counts: Counter[str],
    there: Tensor,
    back: Tensor,
    preferences: Tensor,
    policy: RolloutGroup,
    opponent: RolloutGroup,
) -> None:
    """Count the pairs of different answers, those that are tied, and those in which the same place wins both times.

    Args:
        there: [M, M'], logits of the policy's answers shown first, against the opponent's.
        back: [M, M'], logits of the opponent's shown first.
        preferences: [M, M'], P of the policy's.
        policy, opponent: as the judge saw them.
    """
    theirs = [response.text for response in opponent.responses]
    different = torch.tensor([[response.text != text for text in theirs] for response in policy.responses])
    tied = (preferences - 0.5).abs() <= TIE_TOLERANCE
    counts["cross_pairs"] += int(different.sum())
    counts["tied_cross_pairs"] += int((different & tied).sum())
    counts["order_bound_cross_pairs"] += int((different & (torch.sign(there) * torch.sign(back) > 0)).sum())


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
