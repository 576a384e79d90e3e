"""Proves the arithmetic of the evaluation: which block of the preference matrix counts, and the bootstrap's interval.

Not proved here: that a judge is any good.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_sppo.commands.evaluate import main
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.evaluation import bootstrap, cross_verdicts, evaluate, join_groups
from megatron_sppo.rollout.records import RolloutGroup
from tests.unit.selfplay.synthetic import group, write_rollouts


class TableJudge:
    """Gives every ordered pair the logit that a table of texts holds, and remembers what it was asked."""

    name, fingerprint = "table", "table"

    def __init__(self, logits: dict[tuple[str, str], float]) -> None:
        self.logits, self.asked = logits, []
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        matrices = []
        for asked in groups:
            texts = [response.text for response in asked.responses]
            self.asked.append(texts)
            matrices.append(np.array([[self.logits.get((a, b), 0.0) for b in texts] for a in texts], dtype=np.float32))
        return matrices


def rates_of(judge, policy: Mapping[str, RolloutGroup], opponent: Mapping[str, RolloutGroup]) -> dict[str, float]:
    verdicts, _ = cross_verdicts(judge, policy, {"base": opponent})
    return verdicts["base"].win_rates


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_win_rate_is_the_mean_over_cross_pairs_of_both_orders() -> None:
    """Policy a, b against c, d: mean of sigmoid((L_ij - L_ji) / 2) over ac, ad, bc, bd; pairs within a policy, which
    have logits of 50 here, must not enter."""
    logits = {("a", "c"): 1.0, ("c", "a"): -3.0, ("a", "d"): 0.5, ("d", "b"): 2.0, ("a", "b"): 50.0, ("d", "c"): 50.0}
    judge = TableJudge(logits)
    rates = rates_of(judge, {"p": group("p", ["a", "b"])}, {"p": group("p", ["c", "d"])})
    expected = (sigmoid((1 + 3) / 2) + sigmoid(0.25) + sigmoid(0) + sigmoid(-1)) / 4
    assert rates == {"p": pytest.approx(expected, abs=1e-12)}
    assert judge.asked == [["a", "b", "c", "d"]]


def test_numbers_of_answers_may_differ_between_policies() -> None:
    judge = TableJudge({("a", "x"): 4.0})
    rates = rates_of(judge, {"p": group("p", ["a"])}, {"p": group("p", ["x", "y", "z"])})
    assert rates["p"] == pytest.approx((sigmoid(2) + 0.5 + 0.5) / 3)


def test_prompts_that_one_side_lacks_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    ours = {name: group(name, ["a"]) for name in ("p", "q")}
    theirs = {name: group(name, ["b"]) for name in ("q", "r")}
    assert list(rates_of(TableJudge({}), ours, theirs)) == ["q"]
    assert "2 held-out answers have no counterpart" in caplog.text


class Counted(Mapping):
    """Groups that count how often each is asked for."""

    def __init__(self, groups: Sequence[RolloutGroup]) -> None:
        self.groups, self.read = {group.prompt_id: group for group in groups}, Counter()

    def __getitem__(self, prompt_id: str) -> RolloutGroup:
        self.read[prompt_id] += 1
        return self.groups[prompt_id]

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self.groups

    def __iter__(self):
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def test_each_group_is_read_once_and_only_where_both_policies_have_it() -> None:
    ours = Counted([group(f"p{number}", ["a"]) for number in range(40)])
    theirs = Counted([group(f"p{number}", ["b"]) for number in range(39, 4, -1)])
    assert len(rates_of(TableJudge({}), ours, theirs)) == 35
    assert ours.read == theirs.read == Counter(f"p{number}" for number in range(5, 40))


def test_no_common_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no common prompt"):
        rates_of(TableJudge({}), {"p": group("p", ["a"])}, {"q": group("q", ["b"])})


def test_the_same_id_with_another_text_is_refused() -> None:
    with pytest.raises(DataError, match="other messages"):
        join_groups(group("p", ["a"], prompt="One?"), group("p", ["b"], prompt="Two?"))


def test_equal_conclusions_are_equals_whichever_side_reasons(tmp_path: Path) -> None:
    """One template begins the reasoning, the other does not; they meet in both orders."""
    answer = "Air scatters short waves of light more than long ones."
    sides = {"reasons": ("<think>\n", f"Hm.</think>{answer}"), "plain": ("", answer)}
    for name, (opening, text) in sides.items():
        groups = [replace(group(p, [text]), prompt_text=f"<|assistant|>{opening}") for p in ("p", "q")]
        write_rollouts(tmp_path / name, groups)
    for policy, base in (("reasons", "plain"), ("plain", "reasons")):
        places = {"policy": tmp_path / policy, "base": tmp_path / base, "previous": tmp_path / base}
        config = EvaluateConfig(
            judge="rules:concise", output=tmp_path / f"{policy}.json", judge_after="</think>", **places
        )
        result = evaluate(config)
        assert result["win_rate_vs_base"]["mean"] == 0.5
        assert not [text for text in result["warnings"] if "exactly one half" in text], "no pair is of different texts"


def test_the_bootstrap_of_a_constant_has_no_width() -> None:
    rate = bootstrap([0.25] * 7, resamples=2000, seed=3)
    assert (rate.mean, rate.low, rate.high, rate.num_prompts) == (0.25, 0.25, 0.25, 7)


def test_the_bootstrap_of_coin_flips_has_the_binomial_interval() -> None:
    """A resample of n = 400 zeros and ones, half of each, has binomial counts: mean 1/2, standard error
    sqrt(0.25 / 400) = 0.025, so that 95 % lie within 1.96 * 0.025 = 0.049."""
    rate = bootstrap([0.0, 1.0] * 200, resamples=20000, seed=0)
    assert rate.mean == 0.5
    assert rate.low == pytest.approx(0.5 - 0.049, abs=0.003)
    assert rate.high == pytest.approx(0.5 + 0.049, abs=0.003)


def test_the_bootstrap_is_the_same_for_the_same_seed() -> None:
    values = list(np.random.default_rng(1).uniform(size=30))
    assert bootstrap(values, resamples=2000, seed=5) == bootstrap(values, resamples=2000, seed=5)
    assert bootstrap(values, resamples=2000, seed=5) != bootstrap(values, resamples=2000, seed=6)


def evaluate_config(tmp_path: Path, **changes: object) -> EvaluateConfig:
    paths = {"policy": tmp_path / "policy", "base": tmp_path / "base", "previous": tmp_path / "base"}
    return EvaluateConfig(**{**paths, "judge": "rules:concise", "output": tmp_path / "result.json", **changes})


def test_the_noise_floor_compares_a_policy_s_first_answers_with_its_last() -> None:
    """Three answers: the first against the last, the middle one on neither side. Two: the first against the second.
    One: nothing. Pairs with the opponent do not enter."""
    judge = TableJudge({("a", "c"): 2.0, ("c", "a"): -2.0, ("a", "b"): 9.0, ("d", "e"): 1.0, ("a", "x"): 50.0})
    ours = {"p": group("p", ["a", "b", "c"]), "q": group("q", ["d", "e"]), "r": group("r", ["a"])}
    theirs = {name: group(name, ["x"]) for name in ours}
    found, _ = cross_verdicts(judge, ours, {"base": theirs})
    assert found["base"].a_a == {"p": pytest.approx(sigmoid(2)), "q": pytest.approx(sigmoid(0.5))}


def test_the_result_has_the_noise_floor_beside_the_win_rates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    groups = [group(f"p{n}", ["One answer.", "Another, rather longer answer here."]) for n in range(6)]
    write_rollouts(tmp_path / "policy", groups)
    write_rollouts(tmp_path / "base", [group(f"p{n}", ["the the the the"]) for n in range(6)])
    places = {"policy": "policy", "base": "base", "previous": "base"}
    paths = [f"--{name}={tmp_path / place}" for name, place in places.items()]
    main("evaluate", [*paths, "--judge", "rules:concise", f"--output={tmp_path / 'result.json'}"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["a_a"]["num_prompts"] == 6 and result["a_a"]["mean"] != 0.5
    assert capsys.readouterr().out.count("(A/A ") == 2


def test_trackers_are_told_the_win_rates_and_get_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader here: the command sees to itself
    write_rollouts(tmp_path / "policy", [group(f"p{n}", ["An answer that says something."]) for n in range(4)])
    write_rollouts(tmp_path / "base", [group(f"p{n}", ["the the the the"]) for n in range(4)])
    places = {"policy": "policy", "base": "base", "previous": "base", "output": "result.json"}
    paths = [f"--{name}={tmp_path / place}" for name, place in places.items()]
    tracker = ["--tracker", "mlflow", "--tracker-offline", "--tracker-run-name", "held out"]
    main("evaluate", [*paths, "--judge", "rules:concise", *tracker])
    result = json.loads((tmp_path / "result.json").read_text())
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "trackers" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("megatron-sppo").experiment_id])
    assert run.info.run_name == "held out" and run.data.tags["kind"] == "evaluate"
    assert run.data.metrics["evaluation/win_rate_vs_base/mean"] == result["win_rate_vs_base"]["mean"] > 0.5
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["result.json"]


def test_a_policy_against_its_own_answers_wins_exactly_half(tmp_path: Path) -> None:
    groups = [
        group(f"p{number}", [f"One answer {number}.", "Another, rather longer answer here."]) for number in range(6)
    ]
    write_rollouts(tmp_path / "policy", groups)
    write_rollouts(tmp_path / "base", groups)
    result = evaluate(evaluate_config(tmp_path))
    assert result["win_rate_vs_base"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_prompts": 6}


def test_better_answers_win_and_the_first_iteration_s_previous_policy_is_the_base(tmp_path: Path) -> None:
    good = "Cats purr because their throat muscles move quickly while they breathe in and out."
    bad = "the the the the the the the and and and and"
    prompt = "Why do cats purr?"
    write_rollouts(tmp_path / "policy", [group(f"p{n}", [good, good], prompt=prompt) for n in range(4)])
    write_rollouts(tmp_path / "base", [group(f"p{n}", [bad, bad], prompt=prompt) for n in range(4)])
    result = evaluate(evaluate_config(tmp_path))
    assert result["win_rate_vs_base"]["low"] > 0.7
    assert result["win_rate_vs_previous"] == result["win_rate_vs_base"]
    assert result["mean_response_tokens"] == len(good)  # a token is a character in these rollouts
    assert read_json(tmp_path / "result.json") == result


def test_a_judge_that_checks_gives_accuracies_beside_win_rates(tmp_path: Path) -> None:
    """The policy's answers hold both instructions, the base's one of two: P = 1/2 + (1 - 1/2) / 2 = 3/4."""
    columns = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 4, "relation": "less than"}],
    }
    for name, text in (("policy", "so it is"), ("base", "so, it is")):
        groups = [replace(group(f"p{n}", [text, text + "."]), columns=columns) for n in range(3)]
        write_rollouts(tmp_path / name, groups)
    result = evaluate(evaluate_config(tmp_path, judge="verifiable:ifeval"))
    expected = {"policy": (1, 1), "base": (0, 0.5), "previous": (0, 0.5)}
    assert result["win_rate_vs_base"]["mean"] == pytest.approx(0.75, abs=1e-6)
    for name, (prompt_level, instruction_level) in expected.items():
        accuracy = result["accuracy"][name]
        assert (accuracy["prompt_level"]["mean"], accuracy["instruction_level"]["mean"]) == (
            prompt_level,
            instruction_level,
        )
        assert accuracy["num_instructions"] == 6
