"""Proves the preference rules, win rates and baselines against hand arithmetic and naive loops.

Does not prove anything about a real judge's logits: those are random here.
"""

import logging
import math

import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective import log_partition, preference_matrix, win_rates
from megatron_sppo.objective.names import parse_baseline
from megatron_sppo.objective.win_rate import estimated_baseline_over_eta


def naive_paper(logits):
    size = len(logits)
    return [
        [1 / (1 + math.exp(-(logits[i][j] - logits[j][i]) / 2)) if i != j else 0.5 for j in range(size)]
        for i in range(size)
    ]


def naive_official(logits):
    size = len(logits)
    score = [sum(logits[i][k] - logits[k][i] for k in range(size)) / size for i in range(size)]
    return [[1 / (1 + math.exp(score[j] - score[i])) for j in range(size)] for i in range(size)]


@pytest.mark.parametrize(("rule", "naive"), [("paper", naive_paper), ("official", naive_official)])
@pytest.mark.parametrize("num_responses", [1, 2, 5])
def test_preferences_equal_the_naive_formula(rule, naive, num_responses):
    logits = torch.randn(num_responses, num_responses, generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.tensor(naive(logits.tolist()))
    torch.testing.assert_close(preference_matrix(logits, rule=rule), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_win_rates_of_a_prompt_sum_to_half_of_k(rule):
    """Invariant 1: sum_i w_i = (1/K) sum_ij P_ij = (1/K) (K (K - 1) / 2 + K / 2) = K / 2, position bias included."""
    logits = torch.randn(64, 5, 5, generator=torch.Generator().manual_seed(1)) * 4 + 0.7
    preferences = preference_matrix(logits, rule=rule)
    torch.testing.assert_close(preferences + preferences.transpose(1, 2), torch.ones(64, 5, 5), atol=1e-6, rtol=0)
    assert (preferences.diagonal(dim1=1, dim2=2) == 0.5).all()
    torch.testing.assert_close(win_rates(preferences).sum(dim=1), torch.full((64,), 2.5), atol=1e-5, rtol=0)


def test_win_rate_range_at_five_responses_is_a_tenth_to_nine_tenths():
    """A response that surely beats the four others: (4 * 1 + 1/2) / 5 = 0.9; one that surely loses: (1/2) / 5 = 0.1."""
    strength = torch.tensor([200.0, 100.0, 0.0, -100.0, -200.0])
    rates = win_rates(preference_matrix(strength[:, None] - strength[None, :]))
    torch.testing.assert_close(rates, torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]))


def test_a_three_cycle_survives_the_paper_rule_and_collapses_under_the_official_one():
    """logit(0.98) round a circle: the paper keeps 0.98, Bradley-Terry scores are all 0 and every P is 1/2."""
    strong = math.log(0.98 / 0.02)
    logits = torch.tensor([[0.0, strong, -strong], [-strong, 0.0, strong], [strong, -strong, 0.0]])
    paper, official = (preference_matrix(logits, rule=rule) for rule in ("paper", "official"))
    torch.testing.assert_close(paper[0, 1], torch.tensor(0.98))
    torch.testing.assert_close(paper[2, 0], torch.tensor(0.98))
    torch.testing.assert_close(official, torch.full((3, 3), 0.5))


def test_position_bias_cancels():
    """A bias b added to every off-diagonal logit favours whoever is shown first; (L_ij + b) - (L_ji + b) has none."""
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    biased = logits + 1.7 * (1 - torch.eye(4, dtype=torch.float64))
    for rule in ("paper", "official"):
        torch.testing.assert_close(preference_matrix(biased, rule=rule), preference_matrix(logits, rule=rule))


def test_a_judge_that_leaves_nan_on_the_diagonal_does_no_harm():
    logits = torch.zeros(3, 3).fill_diagonal_(torch.nan)
    assert (preference_matrix(logits) == 0.5).all()
    assert (preference_matrix(logits, rule="official") == 0.5).all()


def test_order_of_responses_permutes_the_win_rates_and_nothing_else():
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    for rule in ("paper", "official"):
        shuffled = win_rates(preference_matrix(logits[order][:, order], rule=rule))
        torch.testing.assert_close(shuffled, win_rates(preference_matrix(logits, rule=rule))[order])


def test_half_equals_group_mean_over_all_responses():
    rates = win_rates(preference_matrix(torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(4))))
    half = log_partition(rates, eta=1000.0, baseline="half")
    torch.testing.assert_close(half, torch.full((8,), 500.0))
    torch.testing.assert_close(log_partition(rates, eta=1000.0, baseline="group_mean"), half)


def test_constant_baseline_is_eta_times_c():
    assert log_partition(torch.tensor([0.1, 0.9]), eta=10.0, baseline=("constant", 0.75)).item() == 7.5


def test_estimate_equals_the_naive_mean_of_exponentials_where_those_do_not_overflow():
    """eta = 2, w = (0.2, 0.5, 0.8): log((e^0.4 + e^1 + e^1.6) / 3)."""
    expected = math.log((math.exp(0.4) + math.exp(1.0) + math.exp(1.6)) / 3)
    actual = log_partition(torch.tensor([0.2, 0.5, 0.8]), eta=2.0, baseline="estimate")
    assert actual.item() == pytest.approx(expected, abs=1e-6)


def test_estimate_at_published_eta_is_the_best_rate_minus_log_k():
    """eta = 1000, where exp(900) overflows float32: log Z = 900 - log 5, the winner's target is log 5 = 1.609 nats."""
    rates = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
    log_z = log_partition(rates, eta=1000.0, baseline="estimate")
    assert log_z.item() == pytest.approx(900 - math.log(5), abs=1e-3)
    assert (1000.0 * rates - log_z).max().item() == pytest.approx(math.log(5), abs=1e-3)


def test_saturated_estimate_is_warned_of_and_reported(caplog):
    rates = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    with caplog.at_level(logging.WARNING):
        over_eta = estimated_baseline_over_eta(rates, eta=1000.0)
    assert over_eta == pytest.approx(((900 - math.log(2)) / 1000 + 0.5) / 2, abs=1e-5)
    assert "1 of 2 prompts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        estimated_baseline_over_eta(rates, eta=10.0)
    assert not caplog.records


@pytest.mark.parametrize("call", [
    lambda: preference_matrix(torch.zeros(2, 2), rule="bradley"),
    lambda: log_partition(torch.zeros(2), eta=1.0, baseline="zero"),
    lambda: log_partition(torch.zeros(2), eta=1.0, baseline="constant"),
    lambda: parse_baseline("constant"),
    lambda: parse_baseline("constant:x"),
    lambda: parse_baseline("constant:nan"),
    lambda: parse_baseline("halve"),
])  # fmt: skip
def test_unknown_names_are_refused(call):
    with pytest.raises(ConfigError, match="unknown. Use "):
        call()


def test_baselines_are_read_from_text():
    assert parse_baseline("half") == "half"
    assert parse_baseline("constant:0.75") == ("constant", 0.75)
