"""From a judge's raw logits to the targets of the regression.

K = responses per prompt; `...` = any leading shape, usually G prompts. Equations: Wu et al. 2024 (arXiv:2405.00675).
"""

import logging
import math

import torch
from torch import Tensor

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective.names import PREFERENCE_RULES, Baseline

logger = logging.getLogger(__name__)

SATURATION_NATS = 10.0
"""Above this spread of eta * w the estimated log Z is in effect eta * max w - log K."""


def at_least_float32(values: Tensor) -> Tensor:
    """Widen bf16, fp16 and integers to float32, and leave float32 and float64 as they are -> the same shape."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def preference_matrix(judge_logits: Tensor, *, rule: str = "paper") -> Tensor:
    """Turn raw judge logits into P_ij = P(y_i > y_j | x) -> [..., K, K] in [0, 1].

    P_ij + P_ji = 1 and P_ii = 1/2 under both rules, whatever the judge's position bias: both orders are averaged.

    - "paper": sigmoid((L_ij - L_ji) / 2), each pair on its own, so intransitive preferences survive.
    - "official" (uclaml/SPPO): sigmoid(S_i - S_j) with S_i = (1/K) sum_k (L_ik - L_ki): Bradley-Terry in the group.

    Args:
        judge_logits: [..., K, K], entry [i, j] the logit of "i, shown first, beats j"; the diagonal is ignored.

    Raises:
        ConfigError: the rule is unknown.
    """
    logits = at_least_float32(torch.as_tensor(judge_logits))
    assert logits.ndim >= 2 and logits.shape[-1] == logits.shape[-2], (
        f"judge logits {tuple(logits.shape)} are not [..., K, K]"
    )
    # The diagonal is a self-comparison: L_ii - L_ii is 0 except for a NaN that a judge may leave there.
    logits = logits.masked_fill(torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device), 0.0)
    antisymmetric = logits - logits.transpose(-1, -2)
    if rule == "paper":
        return torch.sigmoid(antisymmetric / 2)
    if rule == "official":
        score = antisymmetric.mean(dim=-1)
        return torch.sigmoid(score.unsqueeze(-1) - score.unsqueeze(-2))
    raise ConfigError(f"preference rule {rule!r} is unknown. Use one of: {', '.join(PREFERENCE_RULES)}.")


def win_rates(preferences: Tensor) -> Tensor:
    """Average P_ij over the K opponents, oneself (1/2) included -> [..., K]; the K rates of a prompt sum to K/2.

    The estimate of P(y_i > pi_t | x) in the paper, section 4. Range at K = 5: [0.1, 0.9].
    """
    return at_least_float32(torch.as_tensor(preferences)).mean(dim=-1)


def log_partition(win_rate: Tensor, *, eta: float, baseline: Baseline) -> Tensor:
    """Baseline log Z of each prompt, in nats -> [...] (one value per prompt: the last axis is consumed).

    - "half": eta / 2; the target becomes eta * (w - 1/2), eq. 3.6.
    - ("constant", c): eta * c.
    - "group_mean": eta * mean_i w_i; over all K responses the same as "half".
    - "estimate": log((1/K) sum_i exp(eta * w_i)), eq. 3.5, by log-sum-exp. The axis may also hold B fresh samples.

    Args:
        win_rate: [..., K], in [0, 1].
        eta: nats per unit of preference.

    Raises:
        ConfigError: the baseline is unknown.
    """
    win_rate = at_least_float32(torch.as_tensor(win_rate))
    if baseline == "half":
        return torch.full_like(win_rate[..., 0], eta / 2)
    if baseline == "group_mean":
        return eta * win_rate.mean(dim=-1)
    if baseline == "estimate":
        return torch.logsumexp(eta * win_rate, dim=-1) - math.log(win_rate.shape[-1])
    if isinstance(baseline, tuple | list) and len(baseline) == 2 and baseline[0] == "constant":
        return torch.full_like(win_rate[..., 0], eta * float(baseline[1]))
    raise ConfigError(
        f"baseline {baseline!r} is unknown. Use half, group_mean, estimate or constant:C with a number C."
    )


def estimated_baseline_over_eta(win_rate_GK: Tensor, *, eta: float) -> float:
    """Mean of the estimated log Z / eta over the prompts, to stand beside 1/2 -> float; warn where it saturates.

    Where eta * (max w - min w) exceeds SATURATION_NATS, log Z is about eta * max w - log K: the best response's target
    is then at most log K nats and all others are pushed down.
    """
    over_eta = float(log_partition(win_rate_GK, eta=eta, baseline="estimate").mean() / eta)
    spread = eta * (win_rate_GK.amax(dim=-1) - win_rate_GK.amin(dim=-1))
    num_saturated = int((spread > SATURATION_NATS).sum())
    if num_saturated:
        logger.warning(
            "baseline estimate: eta * (max w - min w) exceeds %g nats on %d of %d prompts (largest %.4g); mean "
            "log Z / eta is %.4f against 1/2: nearly every response is pushed down. "
            "Use --baseline half, or a smaller --eta.",
            SATURATION_NATS,
            num_saturated,
            spread.numel(),
            float(spread.max()),
            over_eta,
        )
    return over_eta
