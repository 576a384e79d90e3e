"""Proves which rows each selection takes, by hand, and the rows' targets against the stored arrays."""

import numpy as np
import pytest
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.selection import row_targets, training_index
from megatron_sppo.errors import ConfigError, DataError
from tests.unit.data.make import groups, with_win_rates, write


def rows(index):
    return list(zip(index.group.tolist(), index.response.tolist(), strict=True))


@pytest.mark.parametrize(("selection", "pairs", "expected"), [
    ("all", False, [0, 1, 2, 3, 4]),
    ("extremes", False, [3, 1]),
    ("extremes", True, [3, 1]),
    ("top-bottom:1", True, [3, 1]),
    ("top-bottom:2", True, [3, 1, 0, 4]),
    ("top-bottom:2", False, [3, 1, 0, 4]),
    ("all", True, [0, 1, 0, 2, 3, 0, 0, 4, 2, 1, 3, 1, 4, 1, 3, 2, 2, 4, 3, 4]),
])  # fmt: skip
def test_rows_of_one_prompt(tmp_path, selection, pairs, expected):
    """Order of the win rates: 3 > 0 > 2 > 4 > 1."""
    dataset = with_win_rates(tmp_path / "d", [[0.6, 0.1, 0.5, 0.9, 0.4]])
    index = training_index(dataset, selection, pairs=pairs)
    assert index.response.tolist() == expected
    assert index.rows_per_pair == (2 if pairs else 1) and index.num_rows == len(expected)


def test_ties_go_to_the_lowest_index_and_no_response_is_at_both_ends(tmp_path):
    """Rates .5 .5 .5 .6: best 3; worst the first of the tied. With two at each end: best 3, 0; worst 1, 2."""
    dataset = with_win_rates(tmp_path / "d", [[0.5, 0.5, 0.5, 0.6]])
    assert training_index(dataset, "extremes", pairs=True).response.tolist() == [3, 0]
    assert training_index(dataset, "top-bottom:2", pairs=False).response.tolist() == [3, 1, 0, 2]
    paired = training_index(dataset, "top-bottom:2", pairs=True)
    assert paired.response.tolist() == [3, 1] and paired.num_tied_pairs == 1 and paired.num_dropped_ties == 0


def test_prompts_tied_throughout_are_dropped_and_counted(tmp_path):
    dataset = with_win_rates(tmp_path / "d", [[0.5, 0.5], [0.9, 0.1], [0.3, 0.3]])
    index = training_index(dataset, "extremes", pairs=False)
    assert (rows(index), index.num_dropped_ties) == ([(1, 0), (1, 1)], 2)
    everything = training_index(dataset, "all", pairs=False)
    assert (everything.num_rows, everything.num_dropped_ties) == (6, 0)
    assert training_index(dataset, "all", pairs=True).num_dropped_ties == 2


def test_rounding_noise_is_a_tie(tmp_path):
    dataset = with_win_rates(tmp_path / "d", [[0.5, 0.5 + 1e-7], [0.9, 0.1]])
    assert training_index(dataset, "extremes", pairs=True).num_dropped_ties == 1


def test_chosen_is_the_winner_of_a_pair_or_a_rate_above_one_half(tmp_path):
    dataset = with_win_rates(tmp_path / "d", [[0.1, 0.9], [0.8, 0.2], [0.4, 0.4]])

    def chosen(selection, *, pairs):
        index = training_index(dataset, selection, pairs=pairs)
        return row_targets(dataset, index, eta=1.0).chosen.tolist()

    assert chosen("extremes", pairs=True) == [True, False, True, False]
    assert chosen("all", pairs=False) == [False, True, True, False, False, False]


def test_rows_too_long_are_left_out_and_counted_and_take_their_partner_along(tmp_path):
    """Prompt 3 tokens; responses of 2, 6, 4, 8 tokens: at 9 tokens 3 + 8 does not fit."""
    strength = np.array([1.0, 3.0, 2.0, 0.0], dtype=np.float32)
    group = ([1, 2, 3], [[5] * n for n in (2, 6, 4, 8)], strength[:, None] - strength[None, :])
    dataset = PreferenceDataset(write(tmp_path / "d", [group, ([1], group[1], group[2])]))
    everything = training_index(dataset, "all", pairs=False, seq_length=9)
    assert (rows(everything)[:4], everything.num_too_long) == ([(0, 0), (0, 1), (0, 2), (1, 0)], 1)
    assert everything.lengths.tolist() == [5, 9, 7, 3, 7, 5, 9]
    paired = training_index(dataset, "extremes", pairs=True, seq_length=9)
    assert (rows(paired), paired.num_too_long) == ([(1, 1), (1, 3)], 2)
    cut = training_index(dataset, "extremes", pairs=True, seq_length=9, max_prompt_length=1)
    assert (cut.num_too_long, cut.prompt_lengths.tolist()) == (0, [1, 1, 1, 1])


def test_impossible_selections_and_empty_results_are_refused(tmp_path):
    dataset = with_win_rates(tmp_path / "d", [[0.5, 0.5, 0.5]])
    with pytest.raises(ConfigError, match="top-bottom:2 needs 4 responses a prompt, the dataset has 3"):
        training_index(dataset, "top-bottom:2", pairs=False)
    with pytest.raises(DataError, match="1 groups are tied"):
        training_index(dataset, "extremes", pairs=False)
    with pytest.raises(DataError, match="3 rows are longer than 4 tokens"):
        training_index(dataset, "all", pairs=False, seq_length=4)
    with pytest.raises(ConfigError, match="max_prompt_length"):
        training_index(dataset, "all", pairs=False, max_prompt_length=0)
    single = with_win_rates(tmp_path / "single", [[0.5]])
    with pytest.raises(ConfigError, match="needs 2 responses"):
        training_index(single, "all", pairs=True)


@pytest.mark.parametrize("pairs", [False, True])
def test_targets_follow_their_rows(tmp_path, pairs):
    dataset = PreferenceDataset(write(tmp_path / "d", groups(num_groups=10)))
    index = training_index(dataset, "all", pairs=pairs)
    targets = row_targets(dataset, index, eta=10.0, baseline=("constant", 0.7))
    for n, (g, k) in enumerate(rows(index)):
        assert targets.win_rate[n] == dataset.win_rates(g)[k]
        assert targets.win_rate[n].item() == pytest.approx(dataset.preferences(g)[k].mean(), abs=1e-6)
        if pairs:
            partner = index.response[n ^ 1]
            assert targets.preference[n] == dataset.preferences(g)[k, partner]
            assert (targets.win_rate[n] > targets.win_rate[n ^ 1]) == (n % 2 == 0)
    assert targets.preference.isnan().all() == (not pairs)
    assert targets.reference_log_prob.isnan().all()
    assert (targets.log_z == 7.0).all()
    assert {getattr(targets, name).dtype for name in ("win_rate", "log_z", "preference")} == {torch.float32}


def test_estimated_baseline_is_taken_over_all_responses_of_the_prompt_even_when_two_are_trained_on(tmp_path):
    dataset = PreferenceDataset(write(tmp_path / "d", groups(num_groups=3)))
    index = training_index(dataset, "extremes", pairs=False)
    targets = row_targets(dataset, index, eta=5.0, baseline="estimate")
    for n, g in enumerate(index.group):
        assert targets.log_z[n].item() == pytest.approx(np.log(np.exp(5.0 * dataset.win_rates(g)).mean()), abs=1e-5)
