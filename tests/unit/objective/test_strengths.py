"""Proves the strengths against a game whose strengths are known, a general optimiser, and Ford's condition."""

import math

import numpy as np
import pytest
import torch

from megatron_sppo.errors import DataError
from megatron_sppo.objective.strengths import bradley_terry


def game_of(strength):
    strength = torch.tensor(strength, dtype=torch.float64)
    return torch.sigmoid(strength[:, None] - strength[None, :])


def test_a_game_that_is_bradley_terry_gives_its_strengths_back():
    strength = [0.4, -1.7, 0.0, 2.5, 0.1]
    found = bradley_terry(game_of(strength), anchor=2)
    assert found.numpy() == pytest.approx(strength, abs=1e-9)
    assert found[2] == 0


def test_two_players_have_the_log_odds_of_their_wins():
    """30 wins against 10: log 3, whatever the numbers of the games."""
    assert bradley_terry(torch.tensor([[0.0, 30.0], [10.0, 0.0]]), anchor=1)[0] == pytest.approx(math.log(3), abs=1e-12)


def test_the_likelihood_has_no_higher_point_near_the_strengths():
    rng = np.random.default_rng(3)
    wins = torch.from_numpy(rng.uniform(0.1, 5, (4, 4)))
    found = bradley_terry(wins, anchor=0)

    def likelihood(strength):
        odds = torch.nn.functional.logsigmoid(strength[:, None] - strength[None, :])
        return float((wins * (1 - torch.eye(4)) * odds).sum())

    best = likelihood(found)
    for _ in range(200):
        step = torch.from_numpy(rng.normal(0, 1e-3, 4))
        assert likelihood(found + step) <= best + 1e-12


def test_strong_players_far_apart_are_found_too():
    assert bradley_terry(game_of([0.0, 12.0, -9.0]), anchor=0).numpy() == pytest.approx([0.0, 12.0, -9.0], abs=1e-6)


def test_there_are_no_strengths_where_one_never_loses():
    wins = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.6], [0.0, 0.4, 0.0]])
    assert bradley_terry(wins, anchor=0).isnan().all()
    batch = torch.stack([wins.double(), game_of([0.0, 1.0, 2.0])])
    found = bradley_terry(batch, anchor=0)
    assert found[0].isnan().all() and found[1].numpy() == pytest.approx([0, 1, 2], abs=1e-9)


def test_a_circle_of_certain_wins_has_equal_strengths():
    """Everyone has beaten everyone by way of a third: a maximum exists, and by symmetry it is at 0."""
    circle = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert bradley_terry(circle, anchor=1).numpy() == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_chain_of_all_but_certain_wins_is_followed_to_its_end():
    num_players, odds = 30, 1e9
    wins = torch.diag(torch.full((num_players - 1,), odds), 1) + torch.diag(torch.ones(num_players - 1), -1)
    expected = -np.log(odds) * np.arange(num_players)
    assert bradley_terry(wins, anchor=0).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("wins", [[[0.0, -1.0], [1.0, 0.0]], [[0.0, float("nan")], [1.0, 0.0]]])
def test_what_is_no_number_of_wins_is_refused(wins):
    with pytest.raises(DataError, match="Give numbers of at least 0"):
        bradley_terry(torch.tensor(wins), anchor=0)
    with pytest.raises(DataError, match="anchor 2"):
        bradley_terry(torch.eye(2), anchor=2)
