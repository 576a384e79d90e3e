"""Whether one thing is better than another, where few seeds or prompts are all there is: exact tests, no distributions.

Differences are paired: the same seed (or prompt) under both. Holm's step-down keeps the chance of any false finding
among all comparisons of a table at the level that is named.
"""

import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np

EXACT_UP_TO = 14
"""Differences whose signs are flipped in every way; beyond, this many random ones: `RANDOM_FLIPS`."""
RANDOM_FLIPS = 20_000


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of "the differences are as likely to have either sign" (Fisher's randomisation test) -> (0, 1].

    The share of all ways to flip signs whose |mean| is at least the one found. With n differences it is never below
    2 / 2^n: five seeds alone cannot give less than 0.0625.
    """
    assert differences
    values = np.array(differences, dtype=np.float64)
    if len(values) <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
        return float(_at_least(signs @ values, values).mean())
    signs = np.random.default_rng(0).choice(np.array([1, -1]), size=(RANDOM_FLIPS, len(values)))
    return float((1 + _at_least(signs @ values, values).sum()) / (1 + RANDOM_FLIPS))  # the one that was found counts


def _at_least(sums: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.abs(sums) >= abs(values.sum()) * (1 - 1e-12)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values for being several (Holm 1979) -> {name: adjusted p}, in the order given."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean by resampling the values -> (low, high)."""
    generator, number = random.Random(seed), len(values)
    means = sorted(sum(generator.choices(values, k=number)) / number for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]
