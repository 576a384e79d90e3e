"""Proves each diagnostic on cases whose answer is known by hand, and against naive loops on random ones."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_sppo.objective import preference_matrix, win_rates
from megatron_sppo.objective.diagnostics import (
    ScoredBlock,
    curl_rms,
    cycle_rate,
    cyclic_energy,
    cyclic_interval,
    describe_preferences,
    duplicate_rate,
    length_correlation,
    order_disagreement,
    order_inconsistency,
    tie_rate,
)

CIRCLE = torch.tensor([[0.0, 2.0, -2.0], [-2.0, 0.0, 2.0], [2.0, -2.0, 0.0]])
SCORES = torch.tensor([3.0, 1.0, 0.0, -2.0])
LADDER = SCORES[:, None] - SCORES[None, :]


def test_a_circle_is_all_cycle_and_a_ladder_none():
    """f = 2 round the circle: curl 2 + 2 + 2 = 6. Scores: f_ij + f_jk + f_ki = 0 always."""
    circle, ladder = preference_matrix(CIRCLE)[None], preference_matrix(LADDER)[None]
    assert (cycle_rate(circle), cycle_rate(ladder)) == (1.0, 0.0)
    assert curl_rms(CIRCLE[None]) == pytest.approx(6.0)
    assert curl_rms(LADDER[None]) == pytest.approx(0.0, abs=1e-6)
    assert cyclic_energy(CIRCLE[None]) == pytest.approx(1.0)
    assert cyclic_energy(LADDER[None]) == pytest.approx(0.0, abs=1e-12)


def test_the_cyclic_share_s_interval_is_that_of_a_binomial_where_each_prompt_is_one_or_the_other():
    """400 prompts of equal energy, half of them all circle: a resample's share is binomial, 1.96 * sqrt(0.25 / 400) =
    0.049 about 1/2. Of equal prompts it has no width, of ties it is not defined."""
    half = np.tile([0.0, 3.0], 200)
    low, high = cyclic_interval(half, np.full(400, 3.0), resamples=8000)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)
    assert cyclic_interval(np.ones(7), np.full(7, 4.0)) == (0.25, 0.25)
    assert cyclic_interval(np.zeros(7), np.zeros(7)) is None


def test_cycles_and_curl_equal_naive_loops():
    logits = torch.randn(9, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    flow = (logits - logits.transpose(1, 2)) / 2
    cycles, curls = [], []
    for g in range(9):
        f = flow[g].tolist()
        for i, j, k in itertools.combinations(range(5), 3):
            signs = (f[i][j] > 0, f[j][k] > 0, f[k][i] > 0)
            cycles.append(all(signs) or not any(signs))
            curls.append((f[i][j] + f[j][k] + f[k][i]) ** 2)
    assert 0 < sum(cycles) < len(cycles)
    assert cycle_rate(preference_matrix(logits)) == pytest.approx(sum(cycles) / len(cycles))
    assert curl_rms(flow) == pytest.approx(math.sqrt(sum(curls) / len(curls)))


def test_fewer_than_three_responses_have_no_triples():
    assert cycle_rate(torch.full((4, 2, 2), 0.5)) is None
    assert curl_rms(torch.zeros(4, 2, 2)) is None
    assert cyclic_energy(torch.zeros(4, 2, 2)) is None


def test_ties_are_no_cycles_and_are_counted():
    """Three responses tied with each other, a fourth that beats all: 3 of 6 pairs tie."""
    preferences = torch.full((1, 4, 4), 0.5)
    preferences[0, 3, :3], preferences[0, :3, 3] = 0.9, 0.1
    assert cycle_rate(preferences) == 0.0
    assert tie_rate(preferences) == pytest.approx(0.5)
    assert tie_rate(torch.full((1, 1, 1), 0.5)) is None


def test_order_inconsistency_is_the_mean_of_the_sum_of_both_orders():
    """|1 - 1| = 0, |2 + 1| = 3, |0 - 3| = 3: mean 2."""
    logits = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 0.0, 0.0], [1.0, -3.0, 0.0]]])
    assert order_inconsistency(logits) == pytest.approx(2.0)


def test_order_disagreement_counts_pairs_that_the_place_decides():
    """1 and -1 agree, 2 and 1 name the first place twice, 0 and -3 name nobody and one: 1 of 3; of no pair, nothing."""
    logits = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 0.0, 0.0], [1.0, -3.0, 0.0]]])
    assert order_disagreement(logits) == pytest.approx(1 / 3)
    assert order_disagreement(torch.zeros(2, 1, 1)) is None


def test_length_correlation_looks_within_prompts():
    """Prompts of very different length but a judge that likes the longer answer in each: +1; the opposite: -1."""
    rates = torch.tensor([[0.7, 0.3], [0.7, 0.3]])
    assert length_correlation(rates, torch.tensor([[12, 10], [902, 900]])) == pytest.approx(1.0)
    assert length_correlation(rates, torch.tensor([[10, 12], [900, 902]])) == pytest.approx(-1.0)
    assert length_correlation(rates, torch.tensor([[5, 5], [9, 9]])) is None
    assert length_correlation(torch.full((2, 2), 0.5), torch.tensor([[1, 2], [3, 4]])) is None


def test_duplicates_are_counted_within_a_prompt_only():
    """(1, 2) twice in the first prompt: one repeat of six responses; across prompts it is none."""
    assert duplicate_rate([[(1, 2), (1, 2), (3,)], [(1, 2), (4,), (5,)]]) == pytest.approx(1 / 6)
    assert duplicate_rate([]) is None


def test_everything_together_on_the_circle():
    preferences = preference_matrix(CIRCLE)[None]
    block = ScoredBlock(
        judge_logits_GKK=CIRCLE[None],
        preferences_GKK=preferences,
        win_rate_GK=win_rates(preferences),
        response_lengths_GK=torch.tensor([[3, 4, 5]]),
    )
    found = describe_preferences([block], responses=[["a", "b", "a"]])
    assert (found["cycle_rate"], found["order_inconsistency"], found["tie_rate"]) == (1.0, 0.0, 0.0)
    assert found["duplicate_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_responses", [1, 2, 3, 5])
def test_a_set_in_blocks_is_described_as_the_whole_of_it(num_responses):
    generator = torch.Generator().manual_seed(num_responses)
    logits = torch.randn(11, num_responses, num_responses, generator=generator)
    lengths = torch.randint(1, 9, (11, num_responses), generator=generator)
    preferences = preference_matrix(logits)
    rates, flow = win_rates(preferences), (logits - logits.transpose(1, 2)) / 2
    blocks = [
        ScoredBlock(
            judge_logits_GKK=logits[part],
            preferences_GKK=preferences[part],
            win_rate_GK=rates[part],
            response_lengths_GK=lengths[part],
        )
        for part in (slice(0, 4), slice(4, 5), slice(5, 11))
    ]
    whole = {
        "cycle_rate": cycle_rate(preferences),
        "curl_rms": curl_rms(flow),
        "cyclic_energy": cyclic_energy(flow),
        "order_inconsistency": order_inconsistency(logits),
        "order_disagreement": order_disagreement(logits),
        "tie_rate": tie_rate(preferences),
        "length_correlation": length_correlation(rates, lengths),
        "duplicate_rate": None,
    }
    found = describe_preferences(blocks, responses=[])
    of_cycles = {"transitive_energy", "cyclic_energy_low", "cyclic_energy_high"}
    assert set(found) == {*whole, *of_cycles}
    if (share := found["cyclic_energy"]) is None:
        assert {found[name] for name in of_cycles} == {None}
    else:
        assert found["transitive_energy"] == pytest.approx(1 - share)
        assert found["cyclic_energy_low"] <= share + 1e-12 and share - 1e-12 <= found["cyclic_energy_high"]
    for name, value in whole.items():
        assert found[name] is None if value is None else found[name] == pytest.approx(value, rel=1e-12), name
