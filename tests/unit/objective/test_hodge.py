"""Proves HodgeRank on constructed games, and against a least-squares solver that knows no closed form."""

import numpy as np
import pytest
import torch

from megatron_sppo.objective.hodge import hodge_split

ROCK_PAPER_SCISSORS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)


def antisymmetric(size, seed):
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values - values.T


def test_a_game_of_scores_has_no_cyclic_part():
    score = torch.tensor([0.7, -1.2, 0.1, 3.0], dtype=torch.float64)
    split = hodge_split(score[:, None] - score[None, :])
    assert split.cyclic.abs().max() < 1e-15
    assert torch.allclose(split.score, score - score.mean(), atol=1e-15)


def test_rock_paper_scissors_is_all_cycle():
    split = hodge_split(2.5 * ROCK_PAPER_SCISSORS)
    assert torch.equal(split.transitive, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(split.cyclic, 2.5 * ROCK_PAPER_SCISSORS)


def test_a_mixture_comes_apart_into_what_it_was_made_of():
    score = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    split = hodge_split(score[:, None] - score[None, :] + 0.5 * ROCK_PAPER_SCISSORS)
    assert torch.allclose(split.cyclic, 0.5 * ROCK_PAPER_SCISSORS, atol=1e-15)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_scores_are_those_of_least_squares_and_the_parts_orthogonal(size):
    flow = antisymmetric(size, seed=size)
    split = hodge_split(flow)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    design = np.zeros((len(pairs), size))
    for row, (i, j) in enumerate(pairs):
        design[row, i], design[row, j] = 1, -1
    solved = np.linalg.lstsq(design, np.array([flow[i, j] for i, j in pairs]), rcond=None)[0]
    assert split.score.numpy() == pytest.approx(solved - solved.mean(), abs=1e-12)
    assert float((split.transitive * split.cyclic).sum()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(split.transitive + split.cyclic, flow)
    assert split.cyclic.sum(dim=1).abs().max() < 1e-12


def test_leading_axes_are_split_each_on_its_own():
    flows = torch.stack([antisymmetric(4, seed) for seed in range(6)]).reshape(2, 3, 4, 4)
    assert torch.equal(hodge_split(flows).cyclic[1, 2], hodge_split(flows[1, 2]).cyclic)
