"""Proves the losses against arithmetic and against the peers' published formulas, written out naively here.

Does not prove that training feeds them the right rows: see tests/unit/data and tests/distributed.
"""

import math

import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective import (
    dpo_loss,
    ipo_loss,
    log_partition,
    objective_loss,
    preference_matrix,
    regression_target,
    sppo_loss,
    win_rates,
)
from megatron_sppo.objective.names import OBJECTIVES

ETA = 1000.0


def random_pairs(num_pairs=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ratio = torch.randn(2 * num_pairs, dtype=torch.float64, generator=generator) * 100
    preference_w = 0.5 + torch.rand(num_pairs, dtype=torch.float64, generator=generator) / 2
    preference = torch.stack([preference_w, 1 - preference_w], dim=1).reshape(-1)
    chosen = torch.tensor([True, False]).repeat(num_pairs)
    return ratio, preference, chosen


def test_sppo_is_the_squared_residual():
    """r = 30, w = 0.7, eta = 100: target 100 * 0.2 = 20, (30 - 20)^2 = 100."""
    assert sppo_loss(torch.tensor([30.0]), torch.tensor([0.7]), eta=100.0).item() == pytest.approx(100.0, rel=1e-5)


@pytest.mark.parametrize("baseline", ["half", "group_mean", "estimate", ("constant", 0.8)])
def test_sppo_with_a_baseline_equals_the_naive_sum(baseline):
    rates = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    ratio = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    z = {
        "half": 2.5,
        "group_mean": 5 * (0.2 + 0.4 + 0.9) / 3,
        "estimate": math.log((math.exp(1.0) + math.exp(2.0) + math.exp(4.5)) / 3),
        ("constant", 0.8): 4.0,
    }[baseline]
    expected = [(r - (5 * w - z)) ** 2 for r, w in zip(ratio.tolist(), rates.tolist(), strict=True)]
    actual = sppo_loss(ratio, rates, eta=5.0, log_z=log_partition(rates, eta=5.0, baseline=baseline))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_half_targets_of_all_responses_sum_to_zero():
    """Invariant 1: sum_i eta (w_i - 1/2) = eta (K/2 - K/2)."""
    rates = win_rates(preference_matrix(torch.randn(16, 5, 5, generator=torch.Generator().manual_seed(1)).double()))
    targets = regression_target("sppo", eta=ETA, win_rate=rates)
    torch.testing.assert_close(targets.sum(dim=1), torch.zeros(16, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_tie_gives_no_gradient_at_zero():
    """Invariant 3, exactly and not to rounding: eta * (1/2 - 1/2) is 0 for every eta."""
    for eta in (1.0, 1000.0, 1e3 / 3):
        ratio = torch.zeros(4, requires_grad=True)
        sppo_loss(ratio, torch.full((4,), 0.5), eta=eta).sum().backward()
        assert torch.equal(ratio.grad, torch.zeros(4))


def test_gradient_is_zero_at_the_fixed_point():
    """Invariant 6."""
    rates = torch.rand(32, generator=torch.Generator().manual_seed(2))
    ratio = (ETA * (rates - 0.5)).requires_grad_()
    sppo_loss(ratio, rates, eta=ETA).mean().backward()
    assert torch.equal(ratio.grad, torch.zeros(32))


def test_loss_before_the_first_step_is_the_mean_square_of_the_targets():
    """Invariant 2: r = 0 gives mean(eta^2 (w - 1/2)^2); w = 0.9, 0.1, 0.5: 1e6 * (0.16 + 0.16 + 0) / 3."""
    loss = sppo_loss(torch.zeros(3), torch.tensor([0.9, 0.1, 0.5]), eta=ETA).mean()
    assert loss.item() == pytest.approx(1e6 * 0.32 / 3, rel=1e-6)


@pytest.mark.parametrize("name", ["sppo", "sppo_single"])
def test_two_response_pairs_equal_the_official_formula(name):
    """Invariant 5: uclaml/SPPO: ((r_w - (P_w - .5) / beta)^2 + (r_l - (P_l - .5) / beta)^2) / 2, mean over pairs."""
    ratio, probability, _ = random_pairs()
    beta = 1 / ETA
    official = (
        ((ratio[0::2] - (probability[0::2] - 0.5) / beta) ** 2 + (ratio[1::2] - (probability[1::2] - 0.5) / beta) ** 2)
        / 2
    ).mean()
    ours = objective_loss(name, ratio, eta=ETA, win_rate=probability, preference=probability).mean()
    torch.testing.assert_close(ours, official)


def test_sppo_hard_equals_trl():
    """TRL DPOTrainer, loss_type sppo_hard: (r_w - 0.5 / beta)^2 + (r_l + 0.5 / beta)^2, mean over pairs, not halved."""
    ratio, _, chosen = random_pairs()
    beta = 1 / ETA
    trl = ((ratio[0::2] - 0.5 / beta) ** 2 + (ratio[1::2] + 0.5 / beta) ** 2).mean()
    torch.testing.assert_close(objective_loss("sppo_hard", ratio, eta=ETA, chosen=chosen).mean(), trl)


def test_dpo_and_ipo_equal_their_formulas_and_couple_consecutive_rows():
    ratio, _, _ = random_pairs(num_pairs=8)
    ratio = ratio / 100
    margin = ratio[0::2] - ratio[1::2]
    dpo = torch.tensor([math.log(1 + math.exp(-0.3 * m)) for m in margin.tolist()], dtype=torch.float64)
    ipo = torch.tensor([(m - 1 / 0.6) ** 2 for m in margin.tolist()], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(ratio[0::2], ratio[1::2], beta=0.3), dpo)
    torch.testing.assert_close(ipo_loss(ratio[0::2], ratio[1::2], beta=0.3), ipo)
    torch.testing.assert_close(objective_loss("dpo", ratio, beta=0.3), dpo)
    torch.testing.assert_close(objective_loss("ipo", ratio, beta=0.3), ipo)


def test_objectives_differ_where_it_matters():
    """A peer's fall-back trained sigmoid DPO under every name: no two names may give one loss here."""
    ratio, preference, chosen = random_pairs(num_pairs=4)
    ratio = ratio / 100
    win_rate = 0.5 + (preference - 0.5) / 3
    given = {"win_rate": win_rate, "preference": preference, "chosen": chosen, "eta": 2.0, "beta": 0.5}
    losses = {name: round(objective_loss(name, ratio, **given).mean().item(), 9) for name in OBJECTIVES}
    assert len(set(losses.values())) == len(OBJECTIVES) == 5, losses


def test_bf16_ratios_are_widened_before_anything_is_subtracted():
    loss = sppo_loss(torch.tensor([500.0], dtype=torch.bfloat16), torch.tensor([0.9]), eta=ETA)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(100.0**2, rel=1e-6)


def test_an_empty_batch_gives_an_empty_loss_with_a_gradient():
    for name, objective in OBJECTIVES.items():
        ratio, empty = torch.zeros(0, requires_grad=True), torch.zeros(0)
        loss = objective_loss(name, ratio, eta=1.0, beta=1.0, win_rate=empty, preference=empty, chosen=empty.bool())
        assert loss.shape == (0,), objective
        loss.sum().backward()
        assert ratio.grad.shape == (0,)


@pytest.mark.parametrize("name", ["sigmoid", "SPPO", "", "sppo_pair"])
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(ConfigError, match="is unknown. Use --objective with one of: sppo, sppo_single, sppo_hard"):
        objective_loss(name, torch.zeros(2), eta=1.0, beta=1.0)


def test_pairwise_objectives_have_no_target_per_response():
    with pytest.raises(ConfigError, match="couples pairs"):
        regression_target("dpo", eta=1.0)
