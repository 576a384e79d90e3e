"""How good and how transitive the judge is here: numbers that stand beside the targets in the report.

G = prompts, K = responses per prompt. A rate is a fraction in [0, 1]; None where nothing could be counted.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6
"""|P - 1/2| up to which a pair counts as tied: the rounding of a float32 sigmoid near 1/2."""


def describe_preferences(
    judge_logits_GKK: Tensor,
    preferences_GKK: Tensor,
    win_rate_GK: Tensor,
    *,
    response_lengths_GK: Tensor,
    responses: Iterable[Sequence[Sequence[int]]],
) -> dict[str, float | None]:
    """Compute every diagnostic of a scored set -> {name: value}, each named as its function here."""
    flow = (judge_logits_GKK - judge_logits_GKK.transpose(-1, -2)) / 2
    return {
        "cycle_rate": cycle_rate(preferences_GKK),
        "curl_rms": curl_rms(flow),
        "cyclic_energy": cyclic_energy(flow),
        "order_inconsistency": order_inconsistency(judge_logits_GKK),
        "order_disagreement": order_disagreement(judge_logits_GKK),
        "tie_rate": tie_rate(preferences_GKK),
        "length_correlation": length_correlation(win_rate_GK, response_lengths_GK),
        "duplicate_rate": duplicate_rate(responses),
    }


def cycle_rate(preferences_GKK: Tensor) -> float | None:
    """Fraction of triples i, j, k with i > j > k > i (or the reverse), ties excluded -> [0, 1], None when K < 3.

    With A_ij = 1 where i beats j, trace(A^3) counts each circle three times.
    """
    num_prompts, num_responses = preferences_GKK.shape[0], preferences_GKK.shape[-1]
    num_triples = num_prompts * num_responses * (num_responses - 1) * (num_responses - 2) // 6
    if not num_triples:
        return None
    beats = (preferences_GKK > 0.5 + TIE_TOLERANCE).double()
    circles = torch.einsum("gij,gjk,gki->", beats, beats, beats) / 3
    return float(circles / num_triples)


def curl_rms(flow_GKK: Tensor) -> float | None:
    """Root mean square of f_ij + f_jk + f_ki over all triples of distinct responses -> nats, None when K < 3."""
    num_responses = flow_GKK.shape[-1]
    triples = torch.combinations(torch.arange(num_responses), r=3)
    if not len(triples) or not flow_GKK.shape[0]:
        return None
    i, j, k = triples.unbind(dim=1)
    flow = flow_GKK.double()
    return float((flow[:, i, j] + flow[:, j, k] + flow[:, k, i]).square().mean().sqrt())


def cyclic_energy(flow_GKK: Tensor) -> float | None:
    """Share of sum f_ij^2 left after the best f_ij = s_i - s_j -> [0, 1], None where every f is 0.

    Bradley-Terry has 0, rock-paper-scissors 1.
    On a complete graph the least-squares scores are s_i = mean_j f_ij (the Hodge decomposition of Jiang et al. 2011).
    """
    flow = flow_GKK.double()
    score = flow.mean(dim=-1)
    residual = flow - (score.unsqueeze(-1) - score.unsqueeze(-2))
    total = float(flow.square().sum())
    return float(residual.square().sum()) / total if total > 0 else None


def order_inconsistency(judge_logits_GKK: Tensor) -> float | None:
    """Mean |L_ij + L_ji| over pairs i < j -> nats, 0 for a judge that does not mind the order; None without pairs."""
    return _mean_over_pairs((judge_logits_GKK + judge_logits_GKK.transpose(-1, -2)).abs())


def order_disagreement(judge_logits_GKK: Tensor) -> float | None:
    """Fraction of pairs i < j with L_ij and L_ji both above or both below 0 -> [0, 1], None without pairs.

    The same place wins in both orders: a judge of places has 1, a coin 1/2.
    """
    return _mean_over_pairs(torch.sign(judge_logits_GKK) * torch.sign(judge_logits_GKK.transpose(-1, -2)) > 0)


def tie_rate(preferences_GKK: Tensor) -> float | None:
    """Fraction of pairs i < j whose preference is 1/2 -> [0, 1], None without pairs."""
    return _mean_over_pairs((preferences_GKK - 0.5).abs() <= TIE_TOLERANCE)


def length_correlation(win_rate_GK: Tensor, response_lengths_GK: Tensor) -> float | None:
    """Pearson correlation of win rate and length, both about their prompt's mean -> [-1, 1], None where undefined.

    The win rates of a prompt always have mean 1/2, so that lengths must lose their prompt's mean as well.
    """
    rate = win_rate_GK.double() - win_rate_GK.double().mean(dim=-1, keepdim=True)
    length = response_lengths_GK.double() - response_lengths_GK.double().mean(dim=-1, keepdim=True)
    scale = float(rate.square().sum().sqrt() * length.square().sum().sqrt())
    return float((rate * length).sum()) / scale if scale > 0 else None


def duplicate_rate(responses: Iterable[Sequence[Sequence[int]]]) -> float | None:
    """Fraction of responses that equal an earlier response of their prompt -> [0, 1], None without responses."""
    total = repeated = 0
    for group in responses:
        total += len(group)
        repeated += len(group) - len({tuple(response) for response in group})
    return repeated / total if total else None


def _mean_over_pairs(values_GKK: Tensor) -> float | None:
    upper = torch.ones(values_GKK.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    pairs = values_GKK[..., upper]
    return float(pairs.double().mean()) if pairs.numel() else None
