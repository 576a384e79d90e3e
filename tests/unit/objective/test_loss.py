"""Proves the losses against arithmetic and against the peers' published formulas, written out naively here.

Does not prove that training feeds them the right rows: see tests/unit/data and tests/distributed.
"""

import math

import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective import (
    Targets,
    dpo_loss,
    ipo_loss,
    log_partition,
    preference_matrix,
    sppo_loss,
    win_rates,
)
from megatron_sppo.objective.table import OBJECTIVES, find_objective

ETA = 1000.0
FAMILY = ("rspo", "inpo", "onpo", "mnpo", "nash_md")
"""Those that look at a further reference: test_family.py."""


def random_pairs(num_pairs=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ratio = torch.randn(2 * num_pairs, dtype=torch.float64, generator=generator) * 100
    preference_w = 0.5 + torch.rand(num_pairs, dtype=torch.float64, generator=generator) / 2
    preference = torch.stack([preference_w, 1 - preference_w], dim=1).reshape(-1)
    chosen = torch.tensor([True, False]).repeat(num_pairs)
    return ratio, preference, chosen


def targets(win_rate, *, preference=None, chosen=None, eta=ETA, other=None):
    """Targets of responses whose baseline is eta / 2; `other` is by how much a further reference lies below pi_t."""
    preference = win_rate if preference is None else preference
    return Targets(
        win_rate=win_rate,
        log_z=torch.full_like(win_rate, eta / 2),
        preference=preference,
        chosen=preference > 0.5 if chosen is None else chosen,
        reference_log_prob=torch.full_like(win_rate, torch.nan if other is None else 0.0),
        other_log_prob=None if other is None else -other.unsqueeze(1),
    )


def row(name, *, eta=ETA, beta=0.1):
    return find_objective(name, eta=eta, beta=beta)


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
    wanted = row("sppo").target(targets(rates))
    torch.testing.assert_close(wanted.sum(dim=1), torch.zeros(16, dtype=torch.float64), atol=1e-9, rtol=0)


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
    ours = row(name).loss(ratio, targets(probability)).mean()
    torch.testing.assert_close(ours, official)


def test_sppo_hard_equals_trl():
    """TRL DPOTrainer, loss_type sppo_hard: (r_w - 0.5 / beta)^2 + (r_l + 0.5 / beta)^2, mean over pairs, not halved."""
    ratio, _, chosen = random_pairs()
    beta = 1 / ETA
    trl = ((ratio[0::2] - 0.5 / beta) ** 2 + (ratio[1::2] + 0.5 / beta) ** 2).mean()
    torch.testing.assert_close(row("sppo_hard").loss(ratio, targets(ratio, chosen=chosen)).mean(), trl)


def test_dpo_and_ipo_equal_their_formulas_and_couple_consecutive_rows():
    ratio, _, _ = random_pairs(num_pairs=8)
    ratio = ratio / 100
    margin = ratio[0::2] - ratio[1::2]
    dpo = torch.tensor([math.log(1 + math.exp(-0.3 * m)) for m in margin.tolist()], dtype=torch.float64)
    ipo = torch.tensor([(m - 1 / 0.6) ** 2 for m in margin.tolist()], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(ratio[0::2], ratio[1::2], beta=0.3), dpo)
    torch.testing.assert_close(ipo_loss(ratio[0::2], ratio[1::2], beta=0.3), ipo)
    torch.testing.assert_close(row("dpo", beta=0.3).loss(ratio, targets(ratio)), dpo)
    torch.testing.assert_close(row("ipo", beta=0.3).loss(ratio, targets(ratio)), ipo)


def test_objectives_differ_where_it_matters():
    """A peer's fall-back trained sigmoid DPO under every name: no two names may give one loss here."""
    ratio, preference, chosen = random_pairs(num_pairs=4)
    ratio = ratio / 100
    win_rate = 0.5 + (preference - 0.5) / 3
    alone = targets(win_rate, preference=preference, chosen=chosen, eta=2.0)
    beside = targets(win_rate, preference=preference, chosen=chosen, eta=2.0, other=ratio.flip(0) / 2)
    losses = {}
    for name in OBJECTIVES:
        given = beside if name in FAMILY else alone
        losses[name] = round(row(name, eta=2.0, beta=0.5).loss(ratio, given).mean().item(), 9)
    assert len(set(losses.values())) == len(OBJECTIVES) == 10, losses


def test_bf16_ratios_are_widened_before_anything_is_subtracted():
    loss = sppo_loss(torch.tensor([500.0], dtype=torch.bfloat16), torch.tensor([0.9]), eta=ETA)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(100.0**2, rel=1e-6)


def test_an_empty_batch_gives_an_empty_loss_with_a_gradient():
    for name, objective in OBJECTIVES.items():
        ratio = torch.zeros(0, requires_grad=True)
        other = torch.zeros(0) if name in FAMILY else None
        loss = objective.loss(ratio, targets(torch.zeros(0), other=other))
        assert loss.shape == (0,), name
        loss.sum().backward()
        assert ratio.grad.shape == (0,)


@pytest.mark.parametrize("name", ["sigmoid", "SPPO", "", "sppo_pair"])
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(ConfigError, match="is unknown. Use --objective with one of: sppo, sppo_single, sppo_hard"):
        row(name)


def test_the_loss_is_the_weighted_square_of_the_distance_to_the_target_where_there_is_one():
    ratio, preference, chosen = random_pairs(num_pairs=4)
    given = targets(0.5 + (preference - 0.5) / 3, preference=preference, chosen=chosen)
    for name in (name for name in OBJECTIVES if name not in FAMILY):
        target = row(name).target(given)
        assert (target is None) == (name in ("dpo", "ipo")) == (row(name).rows_per_loss == 2)
        if target is not None:
            weight = 2 if name == "sppo_hard" else 1
            torch.testing.assert_close(row(name).loss(ratio, given), weight * (ratio - target) ** 2)


def test_targets_are_picked_and_moved_column_by_column():
    given = targets(torch.tensor([0.1, 0.6, 0.9])).of(torch.tensor([2, 0]))
    assert given.win_rate.tolist() == pytest.approx([0.9, 0.1]) and given.chosen.tolist() == [True, False]
    assert given.other_log_prob is None
    both = targets(torch.tensor([0.1, 0.6]), other=torch.tensor([3.0, 4.0])).of(torch.tensor([1]))
    assert both.other_log_prob.tolist() == [[-4.0]]
    assert {column.device.type for column in vars(both.to("meta")).values()} == {"meta"}
