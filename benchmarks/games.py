"""Exact self-play on two-player symmetric constant-sum matrix games: the tabular truth that SPPO approximates.

A = actions (responses). payoff[i, j] = P(i > j), payoff + payoff.T = 1. Equations: Wu et al. 2024 (arXiv:2405.00675).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sppo.errors import DataError
from megatron_sppo.objective import duality_gap
from megatron_sppo.objective.game import assert_constant_sum


def multiplicative_weights_step(log_policy: Tensor, payoff: Tensor, *, eta: float) -> Tensor:
    """Apply the exact update pi_{t+1}(y) ~ pi_t(y) * exp(eta * P(y > pi_t)), eq. 3.1 -> [A], log-probabilities."""
    return torch.log_softmax(log_policy + eta * (payoff @ log_policy.exp()), dim=-1)


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """What exact self-play on a matrix game went through."""

    average_policy: Tensor
    """[A], mean of pi_1 .. pi_T: the policy that Theorem 3.1 speaks of."""
    last_policy: Tensor
    """[A], pi_{T+1}."""
    gaps: Tensor
    """[T], duality gap of the average of the first t policies."""


def self_play(payoff: Tensor, *, eta: float, num_iterations: int, initial_policy: Tensor | None = None) -> SelfPlay:
    """Iterate the exact update from `initial_policy` (uniform if None) -> SelfPlay.

    Theorem 3.1: with eta ~ 1 / sqrt(T) the gap of the average policy is O(1 / sqrt(T)).
    """
    assert_constant_sum(payoff)
    assert num_iterations > 0
    num_actions = payoff.shape[0]
    start = torch.full((num_actions,), 1 / num_actions) if initial_policy is None else initial_policy
    log_policy = start.to(payoff.dtype).log()
    total = torch.zeros_like(log_policy)
    averages = []
    for iteration in range(1, num_iterations + 1):
        total = total + log_policy.exp()
        averages.append(total / iteration)
        log_policy = multiplicative_weights_step(log_policy, payoff, eta=eta)
    return SelfPlay(
        average_policy=averages[-1], last_policy=log_policy.exp(), gaps=duality_gap(payoff, torch.stack(averages))
    )


def von_neumann_winner(payoff: Tensor, *, tolerance: float = 1e-4, max_iterations: int = 200_000) -> Tensor:
    """Find a policy that no other beats by more than `tolerance` -> [A], float64; the returned gap is checked exactly.

    Optimistic multiplicative weights, in float64: each step plays against twice the last win rates minus the ones
    before, which makes both the last and the average policy converge (Daskalakis and Panageas 2019).

    Raises:
        DataError: the tolerance was not reached; the message gives the gap that was.
    """
    assert_constant_sum(payoff)
    payoff = payoff.double()
    log_policy = torch.full((payoff.shape[0],), 1 / payoff.shape[0], dtype=torch.float64).log()
    before = payoff @ log_policy.exp()
    total, best, best_gap = torch.zeros_like(log_policy), log_policy.exp(), 1.0
    for iteration in range(1, max_iterations + 1):
        policy = log_policy.exp()
        total += policy
        now = payoff @ policy
        log_policy = torch.log_softmax(log_policy + 0.25 * (2 * now - before), dim=-1)
        before = now
        if iteration & (iteration - 1) == 0 or iteration % 1000 == 0:
            for candidate in (policy, total / iteration):
                gap = float(duality_gap(payoff, candidate))
                if gap < best_gap:
                    best, best_gap = candidate.clone(), gap
            if best_gap <= tolerance:
                return best
    raise DataError(
        f"no policy within {tolerance:g} of optimal after {max_iterations} steps (best gap {best_gap:.3g}). "
        "Raise tolerance or max_iterations."
    )
