"""Proves invariant 7's second half: gradient descent on eq. 3.6 plays an intransitive game as the exact update does and
comes near its von Neumann winner, where a Bradley-Terry reward model and its optimal policy do not.

A = 3 responses to one prompt, the policy a softmax over free logits; expectations are exact, so no sampling noise.
Does not prove it for a language model: tests/e2e trains those.
"""

import torch

from benchmarks.games import multiplicative_weights_step, von_neumann_winner
from megatron_sppo.objective import duality_gap, preference_matrix, sppo_loss, win_rates

# Paper beats rock narrowly, rock beats scissors clearly, scissors beats paper surely: the winner is not uniform.
PAYOFF = torch.tensor([[0.5, 0.6, 0.2], [0.4, 0.5, 0.95], [0.8, 0.05, 0.5]], dtype=torch.float64)
ETA = 0.4
NUM_ITERATIONS = 300


def fit(log_policy, win_rate):
    """Minimise E_{y ~ pi_t} (log pi_theta / pi_t - eta (w - 1/2))^2 over the logits, from theta = theta_t -> log pi."""
    logits = log_policy.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=40, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        log_ratio = torch.log_softmax(logits, dim=-1) - log_policy
        loss = (log_policy.exp() * sppo_loss(log_ratio, win_rate, eta=ETA)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), dim=-1)


def test_regression_follows_the_exact_update_and_its_average_nears_the_von_neumann_winner():
    start = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    log_policy, visited = start, []
    for _ in range(NUM_ITERATIONS):
        visited.append(log_policy.exp())
        win_rate = PAYOFF @ log_policy.exp()
        fitted = fit(log_policy, win_rate)
        exact = multiplicative_weights_step(log_policy, PAYOFF, eta=ETA)
        # log Z of eq. 3.4 is eta / 2 + O(eta^2) here (Hoeffding: eta^2 / 8 at most): the two agree to that order.
        assert (fitted - exact).abs().max() < ETA**2 / 4
        log_policy = fitted
    average = torch.stack(visited).mean(dim=0)
    winner = von_neumann_winner(PAYOFF)
    # The third response wins 0.8 * 0.7 + 0.05 * 0.2 + 0.5 * 0.1 = 0.62 against the start: gap 2 * 0.62 - 1.
    assert abs(duality_gap(PAYOFF, start.exp()) - 0.24) < 1e-9
    assert duality_gap(PAYOFF, average) < 0.05
    assert (average - winner).abs().max() < 0.1


def test_a_bradley_terry_reward_ends_at_one_response_that_another_beats():
    """Scores fitted to all pairs order the three; the policy that maximises them is pure, and its gap is large."""
    score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        modelled = torch.sigmoid(score[:, None] - score[None, :])
        loss = -(PAYOFF * modelled.log()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = torch.nn.functional.one_hot(score.argmax(), 3).double()
    assert duality_gap(PAYOFF, best) > 0.15
    modelled = preference_matrix(score.detach()[:, None] - score.detach()[None, :], rule="paper")
    assert win_rates(modelled).argmax() == score.argmax()


def test_the_paper_rule_nears_the_von_neumann_winner_and_the_official_rule_rests_elsewhere():
    """Exact expectations over K = 3 answers drawn from the policy, all 27 draws weighed, no sampling.

    Paper: the win rate of answer i in its group is 1/6 + 2/3 * P(i > pi) on average, so the game's own winner is at
    rest. Official: group means of logits weigh sure wins more, another policy is at rest, and it can be beaten.
    """
    draws = torch.cartesian_prod(*[torch.arange(3)] * 3)
    judge = torch.logit(PAYOFF)[draws.unsqueeze(-1), draws.unsqueeze(-2)]
    is_answer = torch.nn.functional.one_hot(draws, 3).double()
    average = {}
    for rule in ("paper", "official"):
        win_rate = win_rates(preference_matrix(judge, rule=rule))
        log_policy, total = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(), torch.zeros(3).double()
        for iteration in range(4000):
            policy = log_policy.exp()
            total += policy / 4000
            weight = policy[draws].prod(dim=-1)
            expected = torch.einsum("d,dk,dki->i", weight, win_rate, is_answer) / (3 * policy)
            if rule == "paper" and iteration % 100 == 0:
                torch.testing.assert_close(expected, 1 / 6 + 2 / 3 * (PAYOFF @ policy))
            log_policy = torch.log_softmax(log_policy + 0.1 * expected, dim=-1)
        average[rule] = total
    # Regret bound of multiplicative weights, gains 2/3 of the game's: 2 * 3/2 * (D / (eta T) + eta / 8), D = log 10.
    assert duality_gap(PAYOFF, average["paper"]) < 3 * (2.303 / 400 + 0.1 / 8)
    assert duality_gap(PAYOFF, average["official"]) > 10 * duality_gap(PAYOFF, average["paper"])
    winner = von_neumann_winner(PAYOFF, tolerance=1e-8)
    paper, official = ((average[rule] - winner).abs().max() for rule in ("paper", "official"))
    assert official > 5 * paper
