"""Numbers with their uncertainty: means over prompts, their bootstrap intervals, and what goes beside each in the JSON.

N = prompts, R = resamples, `...` = whatever is measured on each prompt
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

_QUANTILES = (0.025, 0.975)
MOST_UNDEFINED = 0.025
"""Of the resamples a number may be undefined on so many and still have a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are made: prompts drawn with replacement, the same draws for every number, so that all are paired.

    The draws are those of `judge.evaluation.bootstrap` under the same seed.
    """

    resamples: int
    seed: int

    def rows(self, num_prompts: int) -> Any:
        """Draw the resamples -> iterator of int64 [N] rows."""
        generator = np.random.default_rng(self.seed)
        return (generator.choice(num_prompts, size=num_prompts) for _ in range(self.resamples))

    def means(self, values_N: np.ndarray) -> np.ndarray:
        """Average each resample -> float64 [R, ...]."""
        num_prompts = len(values_N)
        flat = values_N.reshape(num_prompts, -1)
        shares = (np.bincount(rows, minlength=num_prompts) / num_prompts for rows in self.rows(num_prompts))
        return np.stack([share @ flat for share in shares]).reshape(-1, *values_N.shape[1:])


def interval(values_R: np.ndarray) -> tuple[float | None, float | None]:
    """Take the 95 % percentile interval of resampled values -> (low, high), (None, None) where many are undefined."""
    known = values_R[~np.isnan(values_R)]
    if not len(known) or len(known) < (1 - MOST_UNDEFINED) * len(values_R):
        return None, None
    low, high = np.quantile(known, _QUANTILES)
    return float(low), float(high)


def estimate(mean: float, values_R: np.ndarray, *, num_prompts: int, seed: int, judge: str | None) -> dict[str, Any]:
    """Write a number as the result has it -> its mean, interval, number of prompts, judge and seed; NaN is None."""
    low, high = interval(values_R)
    return {
        "mean": None if np.isnan(mean) else float(mean),
        "low": low,
        "high": high,
        "num_prompts": num_prompts,
        "judge": judge,
        "seed": seed,
    }


def mean_of(values_N: np.ndarray, resampling: Resampling, *, judge: str | None = None) -> dict[str, Any]:
    """Average over the prompts that have a value -> `estimate`; its mean is None where none has."""
    known = values_N[~np.isnan(values_N)]
    if not len(known):
        return estimate(np.nan, np.full(1, np.nan), num_prompts=0, seed=resampling.seed, judge=judge)
    return estimate(known.mean(), resampling.means(known), num_prompts=len(known), seed=resampling.seed, judge=judge)
