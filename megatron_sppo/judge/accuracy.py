"""How much of what they were asked for answers hold: a number for judges that check, as IFEval reports it.

Prompt-level: the share of answers that pass every check of their prompt. Instruction-level: of all checks, the share
that is passed. Both strict, with Zhou et al. 2023 (arXiv:2311.07911), section 2.2; several answers a prompt are all
counted.

# M = answers of a prompt, C = its checks, N = prompts, R = resamples
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_sppo.judge.protocol import Judge, Unjudged, checker_of
from megatron_sppo.rollout.records import RolloutGroup

logger = logging.getLogger(__name__)


def strict_accuracy(
    judge: Judge, groups: Iterable[RolloutGroup], *, resamples: int, seed: int
) -> dict[str, Any] | None:
    """Check a policy's answers -> {"prompt_level", "instruction_level"}, each {"mean", "low", "high", "num_prompts"},
    and "num_instructions", "num_unchecked"; None where the judge checks nothing, or no prompt can be checked.

    Intervals are 95 % percentile ones over resampled prompts.
    """
    if (passed := checker_of(judge)) is None:
        return None
    rows, num_instructions, num_unchecked = [], 0, 0
    for group in groups:
        passed_MC = passed(group)
        if isinstance(passed_MC, Unjudged):
            num_unchecked += 1
            continue
        num_instructions += passed_MC.shape[1]
        whole, answers = int((passed_MC == 1).all(axis=1).sum()), passed_MC.shape[0]
        rows.append((whole, answers, float(passed_MC.sum()), passed_MC.size))
    if not rows:
        return None
    of_prompt = np.array(rows, dtype=np.float64)
    return {
        "prompt_level": _interval(of_prompt[:, 0], of_prompt[:, 1], resamples=resamples, seed=seed),
        "instruction_level": _interval(of_prompt[:, 2], of_prompt[:, 3], resamples=resamples, seed=seed),
        "num_instructions": num_instructions,
        "num_unchecked": num_unchecked,
    }


def _interval(passed_N: np.ndarray, asked_N: np.ndarray, *, resamples: int, seed: int) -> dict[str, Any]:
    """Estimate what share of all that was asked is passed, and its 95 % interval."""
    generator, num_prompts = np.random.default_rng(seed), len(passed_N)
    shares_R = np.empty(resamples)
    for resample in range(resamples):
        drawn = generator.integers(num_prompts, size=num_prompts)
        shares_R[resample] = passed_N[drawn].sum() / asked_N[drawn].sum()
    low, high = np.quantile(shares_R, [0.025, 0.975])
    mean = passed_N.sum() / asked_N.sum()
    return {"mean": float(mean), "low": float(low), "high": float(high), "num_prompts": num_prompts}
