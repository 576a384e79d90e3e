"""Held-out evaluation: how often a judge prefers one policy's answers to another's, on prompts that training never saw.

M = answers per prompt and policy, N = prompts both policies answered, R = resamples
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.cluster.progress import StageProgress, progress_file
from megatron_sppo.errors import DataError
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.diagnostics import UNREADABLE_REMEDY, fraction, verdict_shares, warnings
from megatron_sppo.judge.protocol import Judge, Unjudged, Verdict, judge_groups
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.judge.workers import PooledJudge, Progress, open_judge
from megatron_sppo.objective import preference_matrix
from megatron_sppo.objective.diagnostics import TIE_TOLERANCE
from megatron_sppo.rollout.records import Response, RolloutGroup
from megatron_sppo.storage import refuse_foreign_file, write_json

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


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge the policy against the base and the previous policy and write the result -> its content.

    Raises:
        DataError: rollouts that cannot be read, or no prompt that both policies answered.
            Or the judge calls every pair of different answers a tie.
        ConfigError: a judge that cannot be loaded, or a pool that cannot be had.
    """
    refuse_foreign_file(config.output, ours="win_rate_vs_base", flag="--output")
    policy, opponents = StoredGroups(config.policy), {"base": StoredGroups(config.base)}
    if config.previous != config.base:  # in the first iteration pi_1 is both
        opponents["previous"] = StoredGroups(config.previous)
    judge = open_judge(
        config.judge,
        pool=config.pool,
        preset=config.preset,
        after=config.judge_after,
        verdict_tokens=config.verdict_tokens,
    )
    rates, counts = cross_win_rates(judge, policy, opponents, output=config.output)
    rates.setdefault("previous", rates["base"])
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
        "mean_response_tokens": policy.mean_answer_tokens,
        "bootstrap_resamples": config.bootstrap_resamples,
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
    write_json(config.output, result)
    return result


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


def cross_win_rates(
    judge: PooledJudge,
    policy: Mapping[str, RolloutGroup],
    opponents: Mapping[str, Mapping[str, RolloutGroup]],
    *,
    output: Path,
) -> tuple[dict[str, dict[str, float]], Counter[str]]:
    """Judge every answer of the policy against every one of each opponent -> (rates, what the verdicts are).

    The rates are {opponent: {prompt_id: mean P(policy's > opponent's)}}. P is the paper's:
    sigmoid((L_ij - L_ji) / 2), both orders asked. A prompt that one side lacks is left out and counted, and so is one
    that the judge cannot judge. Each side's groups are asked for once, a few at a time: they may lie on a disk.

    Args:
        output: what comes of it: the progress is told, and workers' logs are kept, beside it.

    Raises:
        DataError: no prompt has answers of both, or none could be judged. Others are the pool's.
    """
    shared = {name: _shared(policy, opponent, against=name) for name, opponent in opponents.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in opponents}
    counts: Counter[str] = Counter()
    total = sum(map(len, shared.values()))
    stage = f"judging with {judge.name}"
    with StageProgress(
        progress_file(output), stage=stage, unit="prompts", total=total, done=0, amount_unit="pairs"
    ) as progress:
        judged = judge.work_off(_tasks(policy, opponents, shared), progress=progress, output=output)
        with contextlib.closing(judged):
            for task, result in judged:
                counts += result.counts
                for group, num_policy, verdict in zip(task.groups, task.num_policy, result.verdicts, strict=True):
                    if isinstance(verdict, Unjudged):
                        counts["unjudged"] += 1
                        logger.warning("prompt %s is left out: %s.", group.prompt_id, verdict.reason)
                        continue
                    logits = torch.as_tensor(verdict, dtype=torch.float64)
                    preferences = preference_matrix(logits)[:num_policy, num_policy:]
                    found[task.against][group.prompt_id] = preferences.mean().item()
                    _count(counts, logits, preferences, group.responses)
    for name, prompt_ids in shared.items():
        if not found[name]:
            raise DataError(f"{judge.name} could judge none of {len(prompt_ids)} prompts. The warnings above say why.")
        # In the prompts' order, whichever worker was first: the resampling draws by place.
        found[name] = {prompt_id: found[name][prompt_id] for prompt_id in prompt_ids if prompt_id in found[name]}
    return found, counts


def _shared(policy: Mapping[str, RolloutGroup], opponent: Mapping[str, RolloutGroup], *, against: str) -> list[str]:
    """Choose the prompts that both sides have answered -> prompt_ids."""
    shared = [prompt_id for prompt_id in policy if prompt_id in opponent]
    if not shared:
        raise DataError(f"policy and {against} answered no common prompt. Sample both on the same held-out prompts.")
    if left_out := len(policy) + len(opponent) - 2 * len(shared):
        logger.warning("%d held-out answers have no counterpart against %s and are left out.", left_out, against)
    return shared


def _tasks(
    policy: Mapping[str, RolloutGroup],
    opponents: Mapping[str, Mapping[str, RolloutGroup]],
    shared: Mapping[str, list[str]],
) -> "Iterator[_PairsTask]":
    """Give out a few prompts at a time -> tasks."""
    batches = (
        (name, prompt_ids[start : start + _PROMPTS_PER_CALL])
        for name, prompt_ids in shared.items()
        for start in range(0, len(prompt_ids), _PROMPTS_PER_CALL)
    )
    for index, (name, prompt_ids) in enumerate(batches):
        pairs = [(policy[prompt_id], opponents[name][prompt_id]) for prompt_id in prompt_ids]
        yield _PairsTask(
            index=index,
            against=name,
            groups=tuple(join_groups(ours, theirs) for ours, theirs in pairs),
            num_policy=tuple(len(ours.responses) for ours, _ in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class _PairsTask:
    """Some prompts, each with both sides' answers in one group."""

    index: int
    against: str
    groups: tuple[RolloutGroup, ...]
    num_policy: tuple[int, ...]
    """Of each group, how many answers are the policy's: the first ones."""

    def __str__(self) -> str:
        return f"the held-out prompts {self.groups[0].prompt_id} to {self.groups[-1].prompt_id} against {self.against}"

    @property
    def num_prompts(self) -> int:
        return len(self.groups)

    def judged(self, judge: Judge, on_progress: Progress) -> "_JudgedPairs":
        before = Counter(judge.counts)
        verdicts = judge_groups(judge, self.groups)
        num_pairs = sum(len(group.responses) * (len(group.responses) - 1) for group in self.groups)
        on_progress(len(self.groups), num_pairs)
        return _JudgedPairs(index=self.index, verdicts=tuple(verdicts), counts=judge.counts - before)


@dataclass(frozen=True, kw_only=True)
class _JudgedPairs:
    """What came of some prompts."""

    index: int
    verdicts: tuple[Verdict, ...]
    counts: Counter[str]


def _count(counts: Counter[str], logits: Tensor, preferences: Tensor, responses: Sequence[Response]) -> None:
    """Count the pairs of different answers, those that are tied, and those in which the same place wins both times."""
    num_policy = len(preferences)
    there, back = logits[:num_policy, num_policy:], logits[num_policy:, :num_policy].T
    texts = [response.text for response in responses]
    different = torch.tensor([[ours != theirs for theirs in texts[num_policy:]] for ours in texts[:num_policy]])
    tied = (preferences - 0.5).abs() <= TIE_TOLERANCE
    counts["cross_pairs"] += int(different.sum())
    counts["tied_cross_pairs"] += int((different & tied).sum())
    counts["order_bound_cross_pairs"] += int((different & (torch.sign(there) * torch.sign(back) > 0)).sum())


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
