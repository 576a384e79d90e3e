"""How far a policy is from the solution of a two-player symmetric constant-sum matrix game.

A = actions (responses). payoff[i, j] = P(i > j), payoff + payoff.T = 1. Equations: Wu et al. 2024 (arXiv:2405.00675).
"""

from torch import Tensor

from megatron_sppo.errors import DataError


def duality_gap(payoff: Tensor, policy: Tensor) -> Tensor:
    """Exact duality gap of `policy` played by both sides -> scalar in [0, 1]; 0 only at a von Neumann winner.

    max_pi P(pi > policy) - min_pi P(policy > pi). Best answers are pure, and P(policy > j) = 1 - P(j > policy), so that
    it equals 2 * max_i (payoff @ policy)_i - 1.

    Args:
        payoff: [A, A] with payoff + payoff.T = 1.
        policy: [A], non-negative, sums to 1; leading axes of `policy` are batched: [..., A] -> [...].
    """
    assert_constant_sum(payoff)
    policy = policy.to(payoff.dtype)
    win_rate = policy @ payoff.T
    return win_rate.amax(dim=-1) - (policy @ payoff).amin(dim=-1)


def assert_constant_sum(payoff: Tensor) -> None:
    """Refuse a payoff that is no symmetric constant-sum game.

    Raises:
        DataError: payoff + payoff.T differs from 1 somewhere.
    """
    if payoff.ndim != 2 or payoff.shape[0] != payoff.shape[1]:
        raise DataError(f"payoff has shape {tuple(payoff.shape)}. Give a square matrix of P(i > j).")
    worst = float((payoff + payoff.T - 1).abs().max())
    if worst > 1e-5:
        raise DataError(
            f"payoff + payoff.T differs from 1 by {worst:.3g}. Give P(i > j) with P_ij + P_ji = 1 and P_ii = 1/2."
        )
