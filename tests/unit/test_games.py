"""Proves invariant 7 on tabular games: the exact update of eq. 3.1 drives the averaged policy's duality gap down.

Does not prove anything about training a network: the paper's regression approximates this update.
"""

import math

import pytest
import torch

from benchmarks.games import multiplicative_weights_step, self_play, von_neumann_winner
from megatron_sppo.errors import DataError
from megatron_sppo.objective import duality_gap

ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
BIASED = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def random_game(num_actions, seed):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(num_actions, num_actions, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(num_actions, dtype=torch.float64)


def naive_gap(payoff, policy):
    """max over pure a of P(a > pi) minus min over pure b of P(pi > b), by loops."""
    size = range(len(policy))
    best = max(sum(payoff[a][j] * policy[j] for j in size) for a in size)
    worst = min(sum(policy[i] * payoff[i][b] for i in size) for b in size)
    return best - worst


def test_gap_of_rock_paper_scissors_by_hand():
    """Uniform: every answer wins 1/2, gap 0. Pure rock: paper wins 1, rock wins 0 against it: gap 1."""
    assert duality_gap(ROCK_PAPER_SCISSORS, torch.full((3,), 1 / 3)).item() == pytest.approx(0, abs=1e-7)
    assert duality_gap(ROCK_PAPER_SCISSORS, torch.tensor([1.0, 0.0, 0.0])).item() == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_gap_equals_the_naive_loops(seed):
    payoff = random_game(7, seed)
    policies = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    expected = [naive_gap(payoff.tolist(), policy) for policy in policies.tolist()]
    torch.testing.assert_close(duality_gap(payoff, policies), torch.tensor(expected, dtype=torch.float64))
    assert (duality_gap(payoff, policies) >= 0).all()


def test_update_equals_the_formula():
    payoff, policy = random_game(4, 0), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    rates = [sum(payoff[i][j].item() * policy[j].item() for j in range(4)) for i in range(4)]
    weights = [policy[i].item() * math.exp(3.0 * rates[i]) for i in range(4)]
    expected = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
    torch.testing.assert_close(multiplicative_weights_step(policy.log(), payoff, eta=3.0).exp(), expected)


@pytest.mark.parametrize(
    ("payoff", "start"), [(ROCK_PAPER_SCISSORS, BIASED), *[(random_game(size, size), None) for size in (3, 5, 10, 20)]]
)
def test_gap_of_the_average_policy_falls_as_one_over_root_t(payoff, start):
    """Theorem 3.1. Multiplicative weights on gains in [0, 1] have mean regret <= D / (eta T) + eta / 8 on both sides:
    with eta = sqrt(8 D / T) the gap is at most 2 sqrt(D / (2 T)); D = log(1 / min start), log A from uniform.
    """
    num_actions = len(payoff)
    divergence = math.log(num_actions) if start is None else -math.log(start.min().item())
    for num_iterations in (64, 256, 1024, 4096):
        eta = math.sqrt(8 * divergence / num_iterations)
        played = self_play(payoff, eta=eta, num_iterations=num_iterations, initial_policy=start)
        bound = 2 * math.sqrt(divergence / (2 * num_iterations))
        assert 0 <= played.gaps[-1].item() <= bound
        assert played.average_policy.sum().item() == pytest.approx(1)
        assert played.gaps[-1].item() == pytest.approx(naive_gap(payoff.tolist(), played.average_policy.tolist()))


def test_the_last_policy_of_a_cyclic_game_runs_away_while_the_average_does_not():
    """Why the theorem speaks of the average: on rock-paper-scissors the plain update spirals outwards."""
    played = self_play(ROCK_PAPER_SCISSORS, eta=0.5, num_iterations=2000, initial_policy=BIASED)
    assert duality_gap(ROCK_PAPER_SCISSORS, played.last_policy) > 0.9
    assert played.gaps[-1] < 0.5 < duality_gap(ROCK_PAPER_SCISSORS, played.last_policy)


def test_von_neumann_winner_of_a_weighted_circle_is_known():
    """P = 1/2 + [[0, a, -b], [-a, 0, c], [b, -c, 0]]: the winner is (c, b, a) / (a + b + c); every row of the skew
    part is orthogonal to it, e.g. a * b - b * a = 0.
    """
    a, b, c = 0.1, 0.3, 0.4
    skew = torch.tensor([[0, a, -b], [-a, 0, c], [b, -c, 0]], dtype=torch.float64)
    winner = von_neumann_winner(0.5 + skew, tolerance=1e-8)
    torch.testing.assert_close(winner, torch.tensor([c, b, a], dtype=torch.float64) / (a + b + c), atol=1e-5, rtol=0)


def test_von_neumann_winner_of_a_transitive_game_is_the_best_action():
    strength = torch.tensor([0.0, 2.0, 1.0, -1.0])
    winner = von_neumann_winner(torch.sigmoid(strength[:, None] - strength[None, :]))
    assert winner.argmax().item() == 1 and winner[1] > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_von_neumann_winner_of_a_random_game_cannot_be_beaten(seed):
    payoff = random_game(6, seed)
    assert naive_gap(payoff.tolist(), von_neumann_winner(payoff, tolerance=1e-4).tolist()) <= 1e-4


def test_what_is_no_game_or_no_answer_is_refused():
    with pytest.raises(DataError, match="differs from 1 by"):
        duality_gap(torch.ones(2, 2), torch.tensor([0.5, 0.5]))
    with pytest.raises(DataError, match="square matrix"):
        duality_gap(torch.ones(2, 3), torch.tensor([0.5, 0.5]))
    with pytest.raises(DataError, match="after 4 steps"):
        von_neumann_winner(random_game(6, 0), tolerance=1e-9, max_iterations=4)
