"""How good and how transitive the judge is here: numbers that stand beside the targets in the report.

G = prompts, K = responses per prompt. A rate is a fraction in [0, 1]; None where nothing could be counted.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sppo.objective.hodge import hodge_split

TIE_TOLERANCE = 1e-6
"""|P - 1/2| up to which a pair counts as tied: the rounding of a float32 sigmoid near 1/2."""

INTERVAL_RESAMPLES, INTERVAL_SEED = 1000, 0
"""Of the interval of the cyclic share."""

Sums = tuple[float, ...]
"""What a number is made of: sums over prompts, so that those of two sets of prompts are added."""


@dataclass(frozen=True, kw_only=True)
class ScoredBlock:
    """Some prompts of a scored set."""

    judge_logits_GKK: Tensor
    preferences_GKK: Tensor
    win_rate_GK: Tensor
    response_lengths_GK: Tensor

    @property
    def flow_GKK(self) -> Tensor:
        """Half of L_ij - L_ji, nats."""
        return (self.judge_logits_GKK - self.judge_logits_GKK.transpose(-1, -2)) / 2


def describe_preferences(
    blocks: Iterable[ScoredBlock], *, responses: Iterable[Sequence[Hashable]]
) -> dict[str, float | None]:
    """Compute every diagnostic of a scored set -> {name: value}, each named as its function here.

    The cyclic share's complement, `transitive_energy`, and the bounds of its 95 % interval stand beside it.

    Args:
        blocks: the set's prompts, a block in memory at a time.
        responses: for each prompt, what tells its responses apart.
    """
    sums: dict[str, Sums] = {}
    cyclic, whole = [np.zeros(0)], [np.zeros(0)]
    for block in blocks:
        flow = block.flow_GKK.double()
        cyclic.append(hodge_split(flow).cyclic.square().sum(dim=(-2, -1)).numpy())
        whole.append(flow.square().sum(dim=(-2, -1)).numpy())
        for name, (sums_of, _) in _STATISTICS.items():
            of_block = sums_of(block)
            before = sums.get(name, (0.0,) * len(of_block))
            sums[name] = tuple(whole + part for whole, part in zip(before, of_block, strict=True))
    described = {name: value(*sums[name]) if sums else None for name, (_, value) in _STATISTICS.items()}
    share, interval = described["cyclic_energy"], cyclic_interval(np.concatenate(cyclic), np.concatenate(whole))
    return {
        **described,
        "transitive_energy": None if share is None else 1 - share,
        "cyclic_energy_low": interval and interval[0],
        "cyclic_energy_high": interval and interval[1],
        "duplicate_rate": duplicate_rate(responses),
    }


def cycle_rate(preferences_GKK: Tensor) -> float | None:
    """Fraction of triples i, j, k with i > j > k > i (or the reverse), ties excluded -> [0, 1], None when K < 3.

    With A_ij = 1 where i beats j, trace(A^3) counts each circle three times.
    """
    return _ratio(*_circles(preferences_GKK))


def _circles(preferences_GKK: Tensor) -> Sums:
    num_prompts, num_responses = preferences_GKK.shape[0], preferences_GKK.shape[-1]
    num_triples = num_prompts * num_responses * (num_responses - 1) * (num_responses - 2) // 6
    beats = (preferences_GKK > 0.5 + TIE_TOLERANCE).double()
    return float(torch.einsum("gij,gjk,gki->", beats, beats, beats)) / 3, num_triples


def curl_rms(flow_GKK: Tensor) -> float | None:
    """Root mean square of f_ij + f_jk + f_ki over all triples of distinct responses -> nats, None when K < 3."""
    return _root_mean(*_curls(flow_GKK))


def _curls(flow_GKK: Tensor) -> Sums:
    i, j, k = torch.combinations(torch.arange(flow_GKK.shape[-1]), r=3).unbind(dim=1)
    flow = flow_GKK.double()
    curls = flow[:, i, j] + flow[:, j, k] + flow[:, k, i]
    return float(curls.square().sum()), curls.numel()


def cyclic_energy(flow_GKK: Tensor) -> float | None:
    """Share of sum f_ij^2 left after the best f_ij = s_i - s_j -> [0, 1], None where every f is 0.

    Bradley-Terry has 0, rock-paper-scissors 1.
    On a complete graph the least-squares scores are s_i = mean_j f_ij (the Hodge decomposition of Jiang et al. 2011).
    """
    return _ratio(*_energies(flow_GKK))


def _energies(flow_GKK: Tensor) -> Sums:
    flow = flow_GKK.double()
    return float(hodge_split(flow).cyclic.square().sum()), float(flow.square().sum())


def cyclic_interval(
    cyclic_G: np.ndarray, whole_G: np.ndarray, *, resamples: int = INTERVAL_RESAMPLES, seed: int = INTERVAL_SEED
) -> tuple[float, float] | None:
    """Resample prompts -> 95 % percentile interval of `cyclic_energy`, None where it has no value itself.

    Args:
        cyclic_G: sum of squares of each prompt's cyclic part.
        whole_G: that of its whole flow.
    """
    if not whole_G.sum() > 0:
        return None
    generator, shares = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = generator.integers(0, len(whole_G), len(whole_G))
        if (whole := whole_G[rows].sum()) > 0:
            shares.append(cyclic_G[rows].sum() / whole)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def order_inconsistency(judge_logits_GKK: Tensor) -> float | None:
    """Mean |L_ij + L_ji| over pairs i < j -> nats, 0 for a judge that does not mind the order; None without pairs."""
    return _ratio(*_inconsistencies(judge_logits_GKK))


def _inconsistencies(judge_logits_GKK: Tensor) -> Sums:
    return _over_pairs((judge_logits_GKK + judge_logits_GKK.transpose(-1, -2)).abs())


def order_disagreement(judge_logits_GKK: Tensor) -> float | None:
    """Fraction of pairs i < j with L_ij and L_ji both above or both below 0 -> [0, 1], None without pairs.

    The same place wins in both orders: a judge of places has 1, a coin 1/2.
    """
    return _ratio(*_disagreements(judge_logits_GKK))


def _disagreements(judge_logits_GKK: Tensor) -> Sums:
    return _over_pairs(torch.sign(judge_logits_GKK) * torch.sign(judge_logits_GKK.transpose(-1, -2)) > 0)


def tie_rate(preferences_GKK: Tensor) -> float | None:
    """Fraction of pairs i < j whose preference is 1/2 -> [0, 1], None without pairs."""
    return _ratio(*_ties(preferences_GKK))


def _ties(preferences_GKK: Tensor) -> Sums:
    return _over_pairs((preferences_GKK - 0.5).abs() <= TIE_TOLERANCE)


def length_correlation(win_rate_GK: Tensor, response_lengths_GK: Tensor) -> float | None:
    """Pearson correlation of win rate and length, both about their prompt's mean -> [-1, 1], None where undefined.

    The win rates of a prompt always have mean 1/2, so that lengths must lose their prompt's mean as well.
    """
    return _correlation(*_length_products(win_rate_GK, response_lengths_GK))


def _length_products(win_rate_GK: Tensor, response_lengths_GK: Tensor) -> Sums:
    rate = win_rate_GK.double() - win_rate_GK.double().mean(dim=-1, keepdim=True)
    length = response_lengths_GK.double() - response_lengths_GK.double().mean(dim=-1, keepdim=True)
    return float((rate * length).sum()), float(rate.square().sum()), float(length.square().sum())


def duplicate_rate(responses: Iterable[Sequence[Hashable]]) -> float | None:
    """Fraction of responses that equal an earlier response of their prompt -> [0, 1], None without responses."""
    total = repeated = 0
    for group in responses:
        total += len(group)
        repeated += len(group) - len(set(group))
    return _ratio(repeated, total)


def _over_pairs(values_GKK: Tensor) -> Sums:
    upper = torch.ones(values_GKK.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    pairs = values_GKK[..., upper]
    return float(pairs.double().sum()), pairs.numel()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _root_mean(squares: float, number: float) -> float | None:
    return math.sqrt(squares / number) if number else None


def _correlation(products: float, squares: float, other_squares: float) -> float | None:
    return _ratio(products, math.sqrt(squares) * math.sqrt(other_squares))


_STATISTICS: dict[str, tuple[Callable[[ScoredBlock], Sums], Callable[..., float | None]]] = {
    "cycle_rate": (lambda block: _circles(block.preferences_GKK), _ratio),
    "curl_rms": (lambda block: _curls(block.flow_GKK), _root_mean),
    "cyclic_energy": (lambda block: _energies(block.flow_GKK), _ratio),
    "order_inconsistency": (lambda block: _inconsistencies(block.judge_logits_GKK), _ratio),
    "order_disagreement": (lambda block: _disagreements(block.judge_logits_GKK), _ratio),
    "tie_rate": (lambda block: _ties(block.preferences_GKK), _ratio),
    "length_correlation": (lambda block: _length_products(block.win_rate_GK, block.response_lengths_GK), _correlation),
}
"""By name: what is summed over prompts, and the number made of the sums."""
