"""Proves the objectives with further references against their papers' formulas, and that their optima are fixed points.

Formulas are written out here from the papers (and the authors' code where it is public), in float64. Fixed points: on a
game of four answers with exact probabilities the gradient of the expected loss vanishes at the policy that the paper
names, and at no policy beside it. Not shown: that training finds the right numbers; tests/distributed does.
"""

import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective import Targets, forward_kl_penalty, reverse_kl_penalty
from megatron_sppo.objective.table import find_objective

NUM_PAIRS, A = 12, 4


def draw(*shape, seed, scale=20.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def row(name, *, eta=1.0, beta=1.0, **settings):
    return find_objective(name, eta=eta, beta=beta, **settings)


def targets(pi_t, others, *, win_rate=None, log_z=None):
    rate = torch.full_like(pi_t, 0.5) if win_rate is None else win_rate
    return Targets(
        win_rate=rate,
        log_z=torch.zeros_like(pi_t) if log_z is None else log_z,
        preference=rate,
        chosen=rate > 0.5,
        reference_log_prob=pi_t,
        other_log_prob=others,
    )


def gaps(log_prob):
    """log pi(y_w) - log pi(y_l) of rows that are pairs."""
    return log_prob[0::2] - log_prob[1::2]


PI, PI_T, REF, BEFORE = (draw(2 * NUM_PAIRS, seed=seed) - 60 for seed in range(4))
"""log pi of the policy, pi_t, the fixed reference and pi_{t-1} on the rows of pairs, nats."""


def test_inpo_is_the_square_of_its_paper():
    """arXiv:2407.00617: h_t = log pi_w/pi_l - tau/eta log ref_w/ref_l - (eta - tau)/eta log pi_t,w/pi_t,l, and the
    loss is (h_t - 1/(2 eta))^2; eta = 0.0075 and tau = eta/3 as published. Our eta is 1/eta there.
    """
    eta, tau = 0.0075, 0.0025
    h = gaps(PI) - tau / eta * gaps(REF) - (eta - tau) / eta * gaps(PI_T)
    paper = (h - 1 / (2 * eta)) ** 2
    ours = row("inpo", eta=1 / eta).loss(PI - PI_T, targets(PI_T, REF.unsqueeze(1)))
    torch.testing.assert_close(ours, paper)
    other_tau = row("inpo", eta=1 / eta, reference_weights=(0.2,)).loss(PI - PI_T, targets(PI_T, REF.unsqueeze(1)))
    h = gaps(PI) - 0.2 * gaps(REF) - 0.8 * gaps(PI_T)
    torch.testing.assert_close(other_tau, (h - 1 / (2 * eta)) ** 2)


def test_onpo_is_the_square_of_its_paper():
    """arXiv:2502.16852: g_t = log pi_w/pi_l - log pi'_w/pi'_l, the loss is (g_t - eta/2)^2; pi_t does not occur."""
    paper = (gaps(PI) - gaps(BEFORE) - 100 / 2) ** 2
    torch.testing.assert_close(row("onpo", eta=100.0).loss(PI - PI_T, targets(PI_T, BEFORE.unsqueeze(1))), paper)


def test_mnpo_is_the_square_of_its_paper_and_of_the_authors_code():
    """arXiv:2509.23102, eq. 12 and 15: all opponents alike. The code: ratio of the reference, the rest by weights."""
    eta, ratio, weights = 0.0075, 1 / 3, (0.7, 0.3)
    given = targets(PI_T, torch.stack([REF, BEFORE], dim=1))
    alike = gaps(PI) - (gaps(PI_T) + gaps(REF) + gaps(BEFORE)) / 3
    torch.testing.assert_close(row("mnpo", eta=1 / eta).loss(PI - PI_T, given), (alike - 1 / (2 * eta)) ** 2)
    history = weights[0] * gaps(PI_T) + weights[1] * gaps(BEFORE)
    code = (gaps(PI) - ratio * gaps(REF) - (1 - ratio) * history - 1 / (2 * eta)) ** 2
    ours = row("mnpo", eta=1 / eta, reference_weights=(ratio, (1 - ratio) * weights[1]))
    torch.testing.assert_close(ours.loss(PI - PI_T, given), code)


def test_rspo_is_the_authors_loss():
    """xiaohangt/RSPO, trainer_reg.py, a pair: ((r_w - t_w)^2 + (r_l - t_l)^2) / 2 + reg_coef * (R_w + R_l), where R is
    d^2 (sppo_reversekl), exp(min(-d, 10)) (sppo_forwardimportance10), or sppo_forward1reverse5's sum; d to mu.
    """
    win_rate = torch.rand(2 * NUM_PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    eta = 30.0
    given = targets(PI_T, REF.unsqueeze(1), win_rate=win_rate, log_z=torch.full_like(PI, eta / 2))
    squares = ((PI - PI_T) - eta * (win_rate - 0.5)) ** 2
    reverse, forward = (PI - REF) ** 2, (REF - PI).clamp(max=10).exp()
    for penalty, coefficient, settings in (
        (reverse, 0.5, {"reverse_kl_weight": 0.5}),
        (forward, 0.1, {"forward_kl_weight": 0.1, "reverse_kl_weight": 0.0}),
        (forward + 5 * reverse, 0.1, {"forward_kl_weight": 0.1, "reverse_kl_weight": 0.5}),
    ):
        authors = ((squares[0::2] + squares[1::2]) / 2 + coefficient * (penalty[0::2] + penalty[1::2])).mean()
        torch.testing.assert_close(row("rspo", eta=eta, **settings).loss(PI - PI_T, given).mean(), authors)
    without = row("rspo", eta=eta, reverse_kl_weight=0.0).loss(PI - PI_T, given)
    torch.testing.assert_close(without, row("sppo", eta=eta).loss(PI - PI_T, given))


def test_dpo_and_ipo_against_a_fixed_reference_are_theirs_with_it_in_pi_t_s_place():
    for name in ("dpo", "ipo"):
        ours = row(name, beta=0.03, reference_weights=(1.0,)).loss(PI - PI_T, targets(PI_T, REF.unsqueeze(1)))
        torch.testing.assert_close(ours, row(name, beta=0.03).loss(PI - REF, targets(REF, None)))


# Fixed points: exact policies over A answers, exact preferences.

LOGITS = draw(4, A, seed=5, scale=1.0)
LOG_PI_T, LOG_REF, LOG_BEFORE = torch.log_softmax(LOGITS[:3], dim=-1)
UPPER = torch.rand(A, A, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).triu(1)
PAYOFF = UPPER + (1 - UPPER.T).tril(-1) + 0.5 * torch.eye(A, dtype=torch.float64)
FIRST, SECOND = (index.reshape(-1) for index in torch.meshgrid(torch.arange(A), torch.arange(A), indexing="ij"))
"""Every ordered pair of answers, a winner and a loser."""


def gradient_of_pairs(objective, log_optimum, others, *, weights, win_rate=None):
    """Differentiate the expected loss over all ordered pairs by the policy's logits, at a policy -> [A]."""
    theta = log_optimum.clone().requires_grad_()
    rows = torch.stack([FIRST, SECOND], dim=1).reshape(-1)
    log_pi = torch.log_softmax(theta, dim=-1)
    rate = None if win_rate is None else win_rate[rows]
    given = targets(LOG_PI_T[rows], torch.stack([other[rows] for other in others], dim=1), win_rate=rate)
    loss = (weights * objective.loss(log_pi[rows] - LOG_PI_T[rows], given)).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient


def pairs_drawn_from(log_policy):
    """Probability of each (winner, loser): two answers of a policy, labelled by the judge."""
    return log_policy.exp()[FIRST] * log_policy.exp()[SECOND] * PAYOFF[FIRST, SECOND]


ETA = 1.7
FIXED_POINTS = {
    # pi_{t+1} ~ pi_t^(1 - tau/eta) ref^(tau/eta) exp(P(y > pi_t)/eta), eta the paper's
    "inpo": ("inpo", (0.25,), [LOG_REF], 0.75 * LOG_PI_T + 0.25 * LOG_REF),
    # pi'_{t+1} ~ pi'_t exp(eta P(y > pi_t))
    "onpo": ("onpo", (), [LOG_BEFORE], LOG_BEFORE),
    # the geometric mean of the opponents, times the same
    "mnpo": ("mnpo", (), [LOG_REF, LOG_BEFORE], (LOG_PI_T + LOG_REF + LOG_BEFORE) / 3),
}


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_the_step_of_the_paper_is_where_the_expected_loss_over_judged_pairs_is_least(name):
    """Pairs of pi_t's own answers, the winner drawn by P: nowhere does the loss see a win rate."""
    objective, reference_weights, others, log_mixture = FIXED_POINTS[name]
    objective = row(objective, eta=ETA, reference_weights=reference_weights)
    optimum = torch.log_softmax(log_mixture + ETA * (PAYOFF @ LOG_PI_T.exp()), dim=-1)
    weights = pairs_drawn_from(LOG_PI_T)
    assert gradient_of_pairs(objective, optimum, others, weights=weights).abs().max() < 1e-14
    beside = optimum + torch.tensor([0.1, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert gradient_of_pairs(objective, beside, others, weights=weights).abs().max() > 1e-3


def test_nash_md_s_step_is_the_fixed_point_whatever_pairs_are_looked_at():
    """arXiv:2312.00886: pi_{t+1} ~ rho exp(eta P(y > rho)), rho ~ pi_t^(1 - eta tau) ref^(eta tau), with win rates
    against rho. Every pair's square is zero there, so any weights do.
    """
    log_mixture = torch.log_softmax(0.75 * LOG_PI_T + 0.25 * LOG_REF, dim=-1)
    win_rate = PAYOFF @ log_mixture.exp()
    optimum = torch.log_softmax(log_mixture + ETA * win_rate, dim=-1)
    objective = row("nash_md", eta=ETA, reference_weights=(0.25,))
    for weights in (pairs_drawn_from(LOG_PI_T), torch.ones(A * A, dtype=torch.float64)):
        gradient = gradient_of_pairs(objective, optimum, [LOG_REF], weights=weights, win_rate=win_rate)
        assert gradient.abs().max() < 1e-13


def test_rspo_s_step_solves_the_regularised_game_s_mirror_descent():
    """The maximum of eta <pi, P(y > pi_t)> - KL(pi || pi_t) - 2 lambda KL(pi || mu) is
    pi ~ (pi_t exp(eta w) mu^(2 lambda))^(1 / (1 + 2 lambda)); with its own log Z each answer's derivative is zero.
    """
    strength, win_rate = 2 * 0.3, PAYOFF @ LOG_PI_T.exp()
    unscaled = (LOG_PI_T + ETA * win_rate + strength * LOG_REF) / (1 + strength)
    log_z = (1 + strength) * torch.logsumexp(unscaled, dim=-1)
    optimum = torch.log_softmax(unscaled, dim=-1).requires_grad_()
    given = targets(LOG_PI_T, LOG_REF.unsqueeze(1), win_rate=win_rate, log_z=log_z.expand(A))
    row("rspo", eta=ETA, reverse_kl_weight=0.3).loss(optimum - LOG_PI_T, given).sum().backward()
    assert optimum.grad.abs().max() < 1e-13


def test_penalties_have_the_gradients_of_the_divergences_on_the_policy_s_own_answers():
    for penalty, times, divergence in (
        (reverse_kl_penalty, 2, lambda log_pi: (log_pi.exp() * (log_pi - LOG_REF)).sum()),
        (forward_kl_penalty, 1, lambda log_pi: (LOG_REF.exp() * (LOG_REF - log_pi)).sum()),
    ):
        theta = LOGITS[3].clone().requires_grad_()
        log_pi = torch.log_softmax(theta, dim=-1)
        (exact,) = torch.autograd.grad(divergence(log_pi), theta, retain_graph=True)
        sampled = (log_pi.exp().detach() * penalty(log_pi - LOG_REF)).sum()
        (estimated,) = torch.autograd.grad(sampled, theta)
        torch.testing.assert_close(estimated, times * exact)


@pytest.mark.parametrize(
    ("name", "number", "weights", "words"),
    [
        ("sppo", 1, (), "objective sppo takes 0 further references, got 1. Leave --reference out"),
        ("inpo", 0, (), "objective inpo takes 1 further references, got 0. Use --reference with 1"),
        ("rspo", 2, (), "objective rspo takes 1 further references, got 2"),
        ("rspo", 1, (0.5,), "Leave --reference-weights out"),
        ("mnpo", 0, (0.5,), "Leave --reference-weights out"),
        ("dpo", 1, (), "0 reference_weights, 0 in all, are given with 1 further references"),
        ("mnpo", 2, (0.5,), "1 reference_weights, 0.5 in all, are given with 2"),
        ("mnpo", 2, (0.5, 0.6), "2 reference_weights, 1.1 in all"),
    ],
)
def test_references_that_do_not_fit_the_objective_are_refused(name, number, weights, words):
    with pytest.raises(ConfigError, match=words):
        row(name, reference_weights=weights).mixture_weights(number)


def test_weights_that_are_not_given_are_the_papers():
    assert row("inpo").mixture_weights(1) == row("nash_md").mixture_weights(1) == (1 / 3,)
    assert row("onpo").mixture_weights(1) == (1.0,)
    assert row("mnpo").mixture_weights(3) == (0.25,) * 3 and row("mnpo").mixture_weights(0) == ()
    assert row("rspo").mixture_weights(1) == row("dpo").mixture_weights(0) == ()
