"""Proves the arithmetic of a comparison among players on made verdicts: blocks, strengths, circles, noise floor.

Not proved here: that a judge is any good; reading players from disk (test_players.py); the command (test_kit.py).
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sppo.errors import DataError
from megatron_sppo.evaluation.estimates import Resampling
from megatron_sppo.evaluation.over_optimisation import over_optimisation
from megatron_sppo.evaluation.players import Field, Player
from megatron_sppo.evaluation.standings import cyclic_share_without_noise, standings
from megatron_sppo.evaluation.tournament import hold, shared_prompts
from megatron_sppo.judge.conclusion import ConclusionJudge
from megatron_sppo.judge.evaluation import bootstrap, cross_verdicts
from megatron_sppo.judge.protocol import Unjudged
from megatron_sppo.objective.hodge import hodge_split
from tests.unit.selfplay.synthetic import group

RESAMPLING = Resampling(resamples=400, seed=3)


class ScoreJudge:
    """Reads an answer "PLAYER:SCORE": the logit is the difference of the scores, plus `circle` where one follows the
    other in rock, paper, scissors (a, b, c by name)."""

    fingerprint = "score"

    def __init__(self, name="score", *, circle=0.0, unjudged=()):
        self.name, self.circle, self.unjudged, self.counts = name, circle, set(unjudged), Counter()

    def judge_logits(self, groups):
        return [self._one(asked) for asked in groups]

    def _one(self, asked):
        if asked.prompt_id in self.unjudged:
            return Unjudged(reason="no reason")
        answers = [response.text.split(":") for response in asked.responses]
        matrix = np.zeros((len(answers), len(answers)), dtype=np.float32)
        for i, (p, a) in enumerate(answers):
            for j, (q, b) in enumerate(answers):
                turn = (ord(p[0]) - ord(q[0])) % 3
                matrix[i, j] = float(a) - float(b) + self.circle * {0: 0, 1: 1, 2: -1}[turn]
        return matrix


def player(name, answers, *, second=None, **more):
    """Make a player of {prompt_id: [scores]}."""

    def groups(table):
        return {prompt: group(prompt, [f"{name}:{score}" for score in scores]) for prompt, scores in table.items()}

    return Player(name=name, source=Path(name), groups=groups(answers), second=second and groups(second), **more)


def field_of(*players, baseline=0):
    return Field(players=players, baseline=baseline, trained_on=None)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_block_is_the_mean_over_its_pairs_whatever_the_numbers_of_answers():
    """a has 1 and 3, b has 0, c has 2, 2 and 5: P(a > c) is the mean of sigmoid over the six differences."""
    field = field_of(player("a", {"p": [1, 3]}), player("b", {"p": [0]}), player("c", {"p": [2, 2, 5]}))
    held = hold(ScoreJudge(), field, ["p"])
    expected = np.mean([sigmoid(x - y) for x in (1, 3) for y in (2, 2, 5)])
    assert held.preference_NPP[0, 0, 2] == pytest.approx(expected, abs=1e-12)
    assert held.preference_NPP[0, 2, 0] == pytest.approx(1 - expected, abs=1e-12)
    assert held.preference_NPP[0, 0, 1] == pytest.approx((sigmoid(1) + sigmoid(3)) / 2, abs=1e-12)
    assert held.flow_NPP[0, 0, 2] == pytest.approx(np.mean([x - y for x in (1, 3) for y in (2, 2, 5)]))
    assert (np.diagonal(held.preference_NPP[0]) == 0.5).all()


def test_two_players_have_the_win_rate_and_interval_of_the_plain_evaluation():
    rng = np.random.default_rng(0)
    answers = {name: {f"p{n}": rng.normal(size=2).tolist() for n in range(30)} for name in "ab"}
    field = field_of(player("a", answers["a"]), player("b", answers["b"]))
    held = hold(ScoreJudge(), field, shared_prompts(field))
    (found,) = standings(held, field, RESAMPLING)["vs_baseline"]
    verdicts, _ = cross_verdicts(ScoreJudge(), field.players[1].groups, {"a": field.players[0].groups})
    expected = bootstrap(list(verdicts["a"].win_rates.values()), resamples=400, seed=3)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
    assert (found["num_prompts"], found["judge"], found["seed"]) == (30, "score", 3)


def test_a_game_of_scores_is_transitive_and_its_best_player_not_exploitable():
    """Scores 0, 1, 2 on every prompt: strengths are the scores, the best answer to c is c itself, to a it is c."""
    field = field_of(
        *(player(name, {f"p{n}": [score] for n in range(8)}) for name, score in zip("abc", (0, 1, 2), strict=True))
    )
    found = standings(hold(ScoreJudge(), field, [f"p{n}" for n in range(8)]), field, RESAMPLING)
    assert [row["mean"] for row in found["bradley_terry"]] == pytest.approx([0, 1, 2], abs=1e-9)
    assert [row["elo"] for row in found["bradley_terry"]] == pytest.approx([0, 173.7178, 347.4356], abs=1e-3)
    assert found["cycles"]["cyclic_share"]["mean"] == pytest.approx(0, abs=1e-12)
    assert found["cycles"]["transitive_share"]["mean"] == pytest.approx(1, abs=1e-12)
    exploited = {row["player"]: row["mean"] for row in found["exploitability"]["players"]}
    assert exploited == pytest.approx({"a": 2 * sigmoid(2) - 1, "b": 2 * sigmoid(1) - 1, "c": 0}, abs=1e-6)
    assert found["exploitability"]["highest_mean_win_rate"] == "c"


def test_rock_paper_scissors_is_all_circle_and_only_equal_shares_are_safe():
    field = field_of(*(player(name, {f"p{n}": [0] for n in range(8)}) for name in "abc"))
    found = standings(hold(ScoreJudge(circle=2.0), field, [f"p{n}" for n in range(8)]), field, RESAMPLING)
    assert found["cycles"]["cyclic_share"]["mean"] == pytest.approx(1)
    assert found["cycles"]["cyclic_share_without_noise"] == pytest.approx(1)
    assert [row["mean"] for row in found["bradley_terry"]] == pytest.approx([0, 0, 0], abs=1e-9)
    gap = 2 * sigmoid(2) - 1
    assert [row["mean"] for row in found["exploitability"]["players"]] == pytest.approx([gap] * 3, abs=1e-6)
    assert found["exploitability"]["equal_shares"]["mean"] == pytest.approx(0, abs=1e-6)


def test_noise_alone_looks_cyclic_and_the_number_without_noise_does_not():
    """Scores 0, 1, 2 on 400 prompts, and circles of random strength and direction: the expected flow has none.

    Its energy is 12, that of the mean circle in expectation 6 * 36 / 400 = 0.54: a plain share of about 0.04."""
    generator = torch.Generator().manual_seed(0)
    circle = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)
    score = torch.tensor([0.0, 1, 2], dtype=torch.float64)
    plain, corrected = [], []
    for _ in range(200):
        strength = 6 * torch.randn(400, generator=generator, dtype=torch.float64)
        flow = score[:, None] - score[None, :] + strength[:, None, None] * circle
        mean = flow.mean(dim=0)
        plain.append(float(hodge_split(mean).cyclic.square().sum() / mean.square().sum()))
        corrected.append(cyclic_share_without_noise(flow))
    assert np.mean(plain) == pytest.approx(0.54 / 12.54, rel=0.25)
    assert abs(np.mean(corrected)) < np.mean(plain) / 3


def test_the_noise_floor_compares_first_answers_with_last_or_with_the_second_sampling():
    halves = player("a", {"p": [0, 5, 1]})
    seconds = player("b", {"p": [0, 5]}, second={"p": [2, 2]})
    single = player("c", {"p": [1]})
    field = field_of(halves, seconds, single)
    (a_a,) = hold(ScoreJudge(), field, ["p"]).a_a_NP
    assert a_a[0] == pytest.approx(sigmoid(0 - 1))
    assert a_a[1] == pytest.approx((sigmoid(-2) + sigmoid(3)) / 2)
    assert math.isnan(a_a[2])
    found = standings(hold(ScoreJudge(), field, ["p"]), field, RESAMPLING)
    assert found["a_a"]["c"]["mean"] is None and found["a_a"]["c"]["num_prompts"] == 0
    assert all(row["a_a"] == found["a_a"][row["player"]] for row in found["vs_baseline"] + found["win_rates"])


def test_answers_of_one_checkpoint_and_two_seeds_have_an_interval_about_one_half():
    """A/A of 400 prompts whose answers are drawn from one distribution: 1/2 lies in the 95 % interval, narrow."""
    rng = np.random.default_rng(4)
    field = field_of(
        player("a", {f"p{n}": rng.normal(size=2).tolist() for n in range(400)}),
        player("b", {f"p{n}": rng.normal(size=2).tolist() for n in range(400)}),
    )
    floor = standings(hold(ScoreJudge(), field, list(field.players[0].groups)), field, RESAMPLING)["a_a"]["a"]
    assert floor["low"] < 0.5 < floor["high"] and floor["high"] - floor["low"] < 0.06


def test_there_are_no_strengths_where_one_player_always_wins(caplog):
    field = field_of(player("a", {"p": [0]}), player("b", {"p": [900]}))
    found = standings(hold(ScoreJudge(), field, ["p"]), field, RESAMPLING)
    assert [row["mean"] for row in found["bradley_terry"]] == [None, None]
    assert "no Bradley-Terry strengths" in caplog.text
    assert found["cycles"] is None


def test_lengths_are_of_what_the_judge_reads():
    """a thinks for 5 characters before "a:1", b answers "b:25" at once: the baseline a is 1 character shorter."""
    field = field_of(player("a", {"p": ["1"]}), player("b", {"p": ["25"]}))
    field.players[0].groups["p"] = group("p", ["Hm...</think>a:1"])
    held = hold(ConclusionJudge(ScoreJudge(), "</think>"), field, ["p"], after="</think>")
    assert [comparisons.delta_length_N.tolist() for comparisons, _ in held.against_baseline] == [[0], [-1]]


def test_prompts_that_cannot_be_judged_are_left_out_and_counted(caplog):
    field = field_of(player("a", {"p": [0], "q": [0]}), player("b", {"p": [1], "q": [5]}))
    held = hold(ScoreJudge(unjudged=["q"]), field, ["p", "q"])
    assert (held.prompt_ids, held.unjudged) == (("p",), 1)
    assert "prompt q is left out: no reason" in caplog.text
    with pytest.raises(DataError, match="could judge none of 1 prompts"):
        hold(ScoreJudge(unjudged=["q"]), field, ["q"])


def test_prompts_that_not_everybody_answered_are_left_out(caplog):
    field = field_of(player("a", {"p": [0], "q": [0], "r": [1]}), player("b", {"q": [1], "r": [2], "s": [1]}))
    assert shared_prompts(field) == ["q", "r"]
    assert "1 prompts that not everybody answered" in caplog.text
    with pytest.raises(DataError, match="no prompt that all of a, b answered"):
        shared_prompts(field_of(player("a", {"p": [0]}), player("b", {"q": [0]})))


def test_the_same_prompt_id_with_another_text_is_refused():
    first, second = player("a", {"p": [0]}), player("b", {"p": [0]})
    other = Player(name="b", source=Path("b"), groups={"p": group("p", ["b:0"], prompt="Another?")})
    hold(ScoreJudge(), field_of(first, second), ["p"])
    with pytest.raises(DataError, match="other messages"):
        hold(ScoreJudge(), field_of(first, other), ["p"])


def test_a_curve_follows_a_run_under_every_judge_and_the_gap_is_what_training_s_judge_claims_more():
    """The training judge sees 2 where the other sees 0: the gap is sigmoid(2) - 1/2 on every prompt."""
    players = [player(f"{'abc'[n]}", {"p": [2.0 * n], "q": [2.0 * n]}, run="run", iteration=n) for n in range(3)]
    field = field_of(*players)

    class Indifferent(ScoreJudge):
        def _one(self, asked):
            return 0 * super()._one(asked)

    held = [hold(ScoreJudge("train"), field, ["p", "q"]), hold(Indifferent("other"), field, ["p", "q"])]
    (curve,) = over_optimisation(held, [True, False], field, RESAMPLING)
    assert [point["iteration"] for point in curve["points"]] == [1, 2]
    first = curve["points"][0]
    assert [(rate["judge"], rate["seen"]) for rate in first["win_rates"]] == [("train", True), ("other", False)]
    assert first["win_rates"][0]["mean"] == pytest.approx(sigmoid(2))
    assert first["gap"]["mean"] == pytest.approx(sigmoid(2) - 0.5)
    assert over_optimisation(held, [None, None], field, RESAMPLING)[0]["points"][0]["gap"] is None
