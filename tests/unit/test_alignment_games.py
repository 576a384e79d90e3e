"""Proves that the exact games are what they are called, and that the experiment runs, in a short form.

Numbers of the long form are in benchmarks/results/alignment; that docs/alignment.md has no others, in test_docs.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import alignment_games as games
from megatron_sppo.objective import duality_gap
from megatron_sppo.objective.diagnostics import cyclic_energy
from megatron_sppo.objective.table import find_objective


@pytest.mark.parametrize(("judge", "energy"), [("transitive", 0.0), ("cyclic", 1.0), ("mixed", 0.5)])
def test_a_judge_has_the_share_of_circles_that_its_name_says(judge: str, energy: float) -> None:
    logits = games.judge_logits(judge, 3)
    assert torch.equal(logits, -logits.transpose(1, 2))
    assert cyclic_energy(logits) == pytest.approx(energy, abs=1e-9)
    off_diagonal = logits.square().sum() / (8 * 8 * 7)
    assert off_diagonal.item() == pytest.approx(4.0)


def test_the_gap_of_a_prompt_is_that_of_its_own_game() -> None:
    payoff = torch.sigmoid(games.judge_logits("mixed", 1))
    with torch.no_grad():
        policy = games.Policy(1)().exp()
    expected = torch.stack([duality_gap(one, pi) for one, pi in zip(payoff, policy, strict=True)])
    torch.testing.assert_close(games.gaps(payoff, policy), expected)


def test_rows_are_all_answers_best_and_worst_or_all_pairs_with_ties_left_out() -> None:
    rate = torch.tensor([[0.5, 0.2, 0.8], [0.5, 0.5, 0.5]])
    sppo, inpo = (find_objective(name, eta=1, beta=1) for name in ("sppo", "inpo"))
    everything, extremes = (games.Entry(objective="x", selection=name) for name in ("all", "extremes"))
    assert games.rows_of(rate, everything, sppo).tolist() == list(range(6))
    assert games.rows_of(rate, extremes, sppo).tolist() == [2, 1]
    assert games.rows_of(rate, everything, inpo).tolist() == [0, 1, 2, 0, 2, 1]


def test_sppo_solves_a_transitive_game() -> None:
    settings = games.Settings(lr=0.03, eta=2, iterations=30, draws=8, answers_trained=40)
    current, average = games.play(games.SPPO, "transitive", 1, settings)
    assert current[-1] < 0.15 < 0.3 < current[0] and len(average) == 30


def test_the_short_form_makes_every_comparison_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(games, "LEARNING_RATES", (0.03,))
    monkeypatch.setattr(games, "STRENGTHS", (2.0,))
    config = games.GamesConfig(seeds=2, iterations=2, draws=1, answers_trained=4, horizons=(1, 2))
    result = json.loads(json.dumps(games.experiment(config)))
    assert len(result["objectives"]) == 3 * 8 and len(result["iterations"]) == 3 * 2 * 2
    assert len(result["against_sppo"]) == 12 and len(result["against_few"]) == 6
    assert all(row["p"] <= row["p_holm"] <= 1 for row in result["against_sppo"])
    games.plot(result["objectives"], tmp_path / "games.png")
    assert (tmp_path / "games.png").stat().st_size > 1000
