"""Proves the command among players: every number has its company, formats are the tools' own, bad input ends in a line.

The win rates' arithmetic is proved in test_tournament.py, the length-controlled rate's in test_length_control.py.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from alpaca_eval.metrics import glm_winrate as peer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from megatron_sppo.commands import evaluate
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.evaluation.answer_texts import distinct, self_bleu
from megatron_sppo.evaluation.export import lm_eval_command
from megatron_sppo.evaluation.text import tournament_text
from megatron_sppo.rollout.records import Response, RolloutGroup
from tests.unit.selfplay.synthetic import group, write_rollouts, write_run

WORDS = re.findall(r"\w+", "Cats purr because their throat muscles move quickly while they breathe, and nobody knows.")
NUM_PROMPTS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("kit"), np.random.default_rng(0)

    def answer(length):
        return " ".join(rng.choice(WORDS, int(rng.integers(length - 10, length + 10)))) + "."

    for name, length, count in (("a", 40, 2), ("b", 35, 2), ("c", 30, 3)):
        groups = [group(str(n), [answer(length) for _ in range(count)], prompt=f"Why {n}?") for n in range(NUM_PROMPTS)]
        write_rollouts(folder / name, groups)
    rows = [{"instruction": f"Why {n}?", "output": answer(38), "generator": "x"} for n in range(NUM_PROMPTS)]
    (folder / "x.json").write_text(json.dumps(rows))
    write_run(folder / "run")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def evaluated(*flags, judge="rules:concise"):
        output = tmp_path / "result.json"
        evaluate.main("evaluate", ["--judge", judge, "--output", str(output), "--bootstrap-resamples", "100", *flags])
        return json.loads(output.read_text())

    return evaluated


PLAYERS = ("--players", "a=a", "b=b", "c=c", "x=x.json")


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    flags = ["--more-judges", "rules:cyclic", "--trained-on", "rules:concise", "--export", str(folder / "export")]
    output = tmp_path_factory.mktemp("out") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        evaluate.main("evaluate", ["--judge", "rules:concise", "--output", str(output), *PLAYERS, *flags])
    return json.loads(output.read_text())


def numbers(value, path=""):
    if isinstance(value, dict):
        if "mean" in value:
            yield path, value
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from numbers(item, f"{path}[{number}]")


def test_every_number_has_its_interval_prompts_judge_and_seed(result):
    found = list(numbers(result))
    assert len(found) > 100
    for path, value in found:
        assert {"low", "high", "num_prompts", "judge", "seed"} <= set(value), path
        if value["mean"] is not None:
            assert value["num_prompts"] == NUM_PROMPTS and value["seed"] == 0, path
            assert value["low"] <= value["mean"] + 1e-9 and value["mean"] <= value["high"] + 1e-9, path
        assert (value["judge"] is None) == path.startswith(".players"), path


def test_trackers_are_told_every_number_under_a_name_of_its_own(result):
    parts = {name: result[name] for name in ("players", "judges")}
    names = [name for name, _ in evaluate._numbers(parts, "evaluation")]
    assert len(set(names)) == len(names)
    assert "evaluation/judges/rules:concise/vs_baseline/b_vs_a/mean" in names


def test_judges_are_marked_as_seen_or_unseen(result, run):
    assert [(row["judge"], row["seen"]) for row in result["judges"]] == [
        ("rules:concise", True),
        ("rules:cyclic", False),
    ]
    assert run("--players", "a=a", "b=b")["judges"][0]["seen"] is None
    of_run = run("--run", "run", "--more-judges", "rules:cyclic", "--allow-no-signal")
    assert [row["seen"] for row in of_run["judges"]] == [True, False]
    assert [point["player"] for point in of_run["over_optimisation"][0]["points"]] == ["iter_1", "iter_2"]


def test_all_pairs_meet_and_the_matrix_is_a_constant_sum_game(result):
    for judge in result["judges"]:
        pairs = {(row["player"], row["opponent"]) for row in judge["win_rates"]}
        assert pairs == {("b", "a"), ("c", "a"), ("x", "a"), ("c", "b"), ("x", "b"), ("x", "c")}
        game = np.array(judge["matrix"]["win_rate"])
        assert game + game.T == pytest.approx(np.ones((4, 4)))
        assert all("a_a" in row for row in judge["win_rates"])


def test_the_length_controlled_rate_is_alpaca_eval_s_on_the_same_answers(folder, run, monkeypatch, tmp_path):
    """Players of one answer a prompt; alpaca_eval reads the exported files and the judge's preferences."""
    found = run("--players", "x=x.json", "y=export/alpaca_eval/b.json", "--export", str(tmp_path / "export"))
    (ours,) = found["judges"][0]["length_controlled"]
    outputs = {name: json.loads((tmp_path / f"export/alpaca_eval/{name}.json").read_text()) for name in "xy"}
    preference = {row["prompt_id"]: row["vs_baseline"]["rules:concise"]["y"] for row in found["prompts"]}
    frame = pd.DataFrame(
        {
            "preference": [preference[row["prompt_id"]] + 1 for row in outputs["y"]],
            "output_1": [row["output"] for row in outputs["x"]],
            "output_2": [row["output"] for row in outputs["y"]],
            "generator_1": "x",
            "generator_2": "y",
            "annotator": "judge",
        }
    )
    gamed = {"preference": 0.5, "std_delta_len": 0.0, "instruction_difficulty": 0.0, "not_gamed_baseline": False}
    pd.DataFrame([{**gamed, "index": n, "model": "m"} for n in range(NUM_PROMPTS)]).to_csv(tmp_path / "t.csv")
    monkeypatch.setattr(peer, "hf_hub_download", lambda **_: str(tmp_path / "t.csv"))
    theirs = peer.get_length_controlled_winrate(frame, glm_name="length_controlled_minimal", save_weights_dir=None)
    assert 100 * ours["mean"] == pytest.approx(theirs["length_controlled_winrate"], abs=1e-6)
    assert 100 * found["judges"][0]["vs_baseline"][0]["mean"] == pytest.approx(theirs["win_rate"], abs=1e-9)
    extreme = peer.get_is_extreme_changes(theirs["win_rate"], theirs["length_controlled_winrate"])
    assert ours["is_extreme"] == bool(extreme)


def test_a_table_of_difficulties_is_read_for_its_own_prompts_alone(run, tmp_path):
    header = "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    rows = "".join(f"0.{n % 9 + 1},{n},{n % 3 - 1},{n % 5},False\n" for n in range(NUM_PROMPTS))
    (tmp_path / "table.csv").write_text(header + rows)
    table = ("--difficulty-table", str(tmp_path / "table.csv"))
    found = run("--players", "a=a", "b=b", "--length-control", "v1", *table)["judges"][0]["length_controlled"][0]
    assert found["regression"] == "length_controlled_v1" and set(found["weights"]) == {"length", "difficulty", "one"}
    (tmp_path / "table.csv").write_text(header + rows.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="is of 1 prompts, a answers 30"):
        run("--players", "a=a", "b=b", "--length-control", "v1", *table)


def test_exported_answers_have_the_keys_that_the_tools_read(result, folder):
    assert set(result["export"]) == {"alpaca_eval", "arena_hard", "mt_bench"}
    (alpaca, arena, mt) = (folder / "export" / form for form in ("alpaca_eval", "arena_hard", "mt_bench"))
    first = json.loads((alpaca / "a.json").read_text())[0]
    assert (first["instruction"], first["generator"]) == ("Why 0?", "a")
    row = json.loads((arena / "a.jsonl").read_text().splitlines()[0])
    assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert row["messages"][-1] == {"role": "assistant", "content": {"answer": first["output"]}}
    assert set(row["metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}
    row = json.loads((mt / "c.jsonl").read_text().splitlines()[0])
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert row["question_id"] == 0 and [choice["index"] for choice in row["choices"]] == [0, 1, 2]
    assert len(row["choices"][0]["turns"]) == 1


def test_the_printed_tables_name_judges_floors_and_the_command_against_regressions(run, capsys):
    run(*PLAYERS, "--more-judges", "rules:cyclic", "--trained-on", "rules:cyclic")
    text = capsys.readouterr().out
    columns = ("win rate vs a", "A/A, %", "length-controlled", "Bradley-Terry", "exploitability")
    marks = ("judge rules:concise, unseen in training", "judge rules:cyclic, seen")
    for words in (*columns, *marks, "cyclic share", "lm_eval --model hf"):
        assert words in text, words


def test_a_command_is_printed_for_the_model_and_for_each_adapter_on_it(result):
    adapters = (("a", None), ("b", "run/iter_1/adapter"), ("c", "run/iter_2/adapter"))
    commands = [lm_eval_command("base", name, adapter) for name, adapter in adapters]
    players = [
        player | {"model": "base", "lm_eval": command} | ({} if adapter is None else {"adapter": adapter})
        for player, command, (_, adapter) in zip(result["players"][:3], commands, adapters, strict=True)
    ]
    text = tournament_text(result | {"players": players})
    assert [line.strip() for line in text.splitlines() if "lm_eval --model" in line] == commands


def test_the_json_on_stdout_is_the_result_without_its_prompts(run, capsys):
    result = run("--players", "a=a", "b=b", "--json", "--length-control", "none")
    printed = json.loads(capsys.readouterr().out)
    assert printed == {key: value for key, value in result.items() if key not in ("prompts", "content_sha256")}
    assert "length_controlled" not in printed["judges"][0]


def test_the_same_command_gives_the_same_result_and_another_seed_other_intervals(run):
    flags = ("--players", "a=a", "b=b", "--length-control", "none")
    first = run(*flags)
    assert run(*flags) == first
    other = run(*flags, "--seed", "1")["judges"][0]["vs_baseline"][0]
    rate = first["judges"][0]["vs_baseline"][0]
    assert other["mean"] == rate["mean"] and other["low"] != rate["low"]


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ((), ConfigError, "--policy is missing.*--players NAME=DIR"),
        (("--policy", "a", "--base", "b"), ConfigError, "--previous is missing"),
        (("--policy", "a", "--players", "a=a", "b=b"), ConfigError, "names one policy.*--players policy=a"),
        (("--players", "a=a"), ConfigError, "'a' is the only player"),
        (("--players", "a=a", "b=nowhere"), DataError, "nowhere does not exist"),
        (("--players", "a=a", "b=run"), DataError, "has no manifest.json"),
        (("--players", "a=a", "b=run/base_eval/rollouts"), DataError, "no prompt that all of a, b answered"),
        (("--players", "a=a", "b=b", "--length-control", "v1"), ConfigError, "needs the difficulties"),
        (("--players", "a=a", "b=b", "--difficulty-table", "t.csv"), ConfigError, "read by --length-control mini"),
        (("--players", "a=a", "b=b", "--more-judges", "rules:concise"), ConfigError, "rules:concise is named twice"),
        (("--players", "a=a", "b=b", "--more-judges", "rules:none"), ConfigError, "rules:none is unknown"),
        (("--players", "a=a", "b=b", "--export", "x.json"), ConfigError, "is a file. Give --export a directory"),
        (("--players", "a/a=a", "a__a=b", "--export", "new"), ConfigError, "'a/a' and 'a__a' would be exported to one"),
        (("--policy", "a", "--base", "b", "--previous", "b", "--baseline", "a"), ConfigError, "--baseline is of"),
        (("--policy=a", "--base=b", "--previous=b", "--length-control=none"), ConfigError, "--length-control is of"),
    ],
)  # fmt: skip
def test_bad_input_is_told_and_nothing_is_written(run, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        run(*flags)
    assert not (tmp_path / "result.json").exists()


def test_a_foreign_file_is_not_written_over(run, tmp_path):
    (tmp_path / "result.json").write_text('{"win_rate_vs_base": 1}')
    with pytest.raises(ConfigError, match="is no report of this command"):
        run("--players", "a=a", "b=b")


def test_few_prompts_have_no_length_controlled_rate_and_say_why(folder, run, tmp_path, capsys):
    for name in ("f", "g"):
        write_rollouts(tmp_path / name, [group(str(n), [f"{name} {n} purrs."], prompt=f"Why {n}?") for n in range(3)])
    result = run("--players", f"f={tmp_path / 'f'}", f"g={tmp_path / 'g'}", "--allow-no-signal")
    (row,) = result["judges"][0]["length_controlled"]
    assert row["mean"] is None and "needs 5 pairs of answers" in row["reason"]
    assert "no length-controlled rate: the length-controlled win rate needs 5 pairs" in capsys.readouterr().out


def test_a_judge_that_checks_says_how_much_each_player_holds(run, tmp_path, capsys):
    """A scorer of the user's own that passes answers of "cats": counted here by hand."""
    (tmp_path / "scorer.py").write_text("def holds(answer, messages, columns):\n    return 'cats' in answer.lower()\n")
    for name, answers in (("f", ["Cats purr.", "No."]), ("g", ["Cats.", "Some cats."])):
        write_rollouts(tmp_path / name, [group(str(n), answers, prompt=f"Why {n}?") for n in range(6)])
    players = ("--players", f"f={tmp_path / 'f'}", f"g={tmp_path / 'g'}", "--length-control", "none")
    result = run(*players, judge=f"python:{tmp_path / 'scorer.py'}:holds")
    accuracy = result["judges"][0]["accuracy"]
    assert {name: found["prompt_level"]["mean"] for name, found in accuracy.items()} == {"f": 0.5, "g": 1.0}
    assert {"low", "high", "num_prompts", "judge", "seed"} <= set(accuracy["f"]["prompt_level"])
    # A win rate by a judge that checks is 1/2 + half the difference of the accuracies.
    assert result["judges"][0]["vs_baseline"][0]["mean"] == pytest.approx(0.75)
    assert "prompts held, %" in capsys.readouterr().out


def test_distinct_n_is_counted_by_hand():
    """a b a / a b: unigrams a, b, a, a, b: 2 of 5 differ; bigrams ab, ba, ab: 2 of 3."""
    answers = [["a", "b", "a"], ["a", "b"]]
    assert distinct(answers, order=1) == pytest.approx(2 / 5)
    assert distinct(answers, order=2) == pytest.approx(2 / 3)
    assert np.isnan(distinct([["a"]], order=2))


def test_self_bleu_is_nltk_s_of_each_answer_against_the_others():
    answers = [WORDS[:8], WORDS[2:10], WORDS[::2]]
    smoothing = SmoothingFunction().method1
    expected = np.mean(
        [sentence_bleu(answers[:i] + answers[i + 1 :], answers[i], smoothing_function=smoothing) for i in range(3)]
    )
    assert self_bleu(answers) == pytest.approx(expected)
    assert self_bleu([WORDS, WORDS]) == pytest.approx(1)
    assert np.isnan(self_bleu([WORDS]))


def test_cut_answers_and_tokens_are_means_over_prompts(run, tmp_path):
    def answers(prompt, reasons):
        responses = tuple(
            Response(text="One two.", token_ids=(1, 2, 3), finish_reason=reason, seed=None) for reason in reasons
        )
        return RolloutGroup(
            prompt_id=prompt,
            messages=({"role": "user", "content": f"Why {prompt}?"},),
            prompt_token_ids=(1,),
            responses=responses,
        )

    write_rollouts(tmp_path / "cut", [answers("0", ("length", "stop")), answers("1", ("length", "length"))])
    found = run("--players", "a=a", f"cut={tmp_path / 'cut'}", "--length-control", "none")["players"][1]
    assert found["truncation_rate"]["mean"] == pytest.approx(0.75)
    assert found["response_tokens"]["mean"] == 3 and found["response_characters"]["mean"] == 8
    assert Path(found["source"]).name == "cut"
