"""Proves who is let in to play, under which names, and that whoever cannot play is told in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.evaluation.players import read_field
from megatron_sppo.judge.config import EvaluateConfig
from megatron_sppo.judge.load import canonical_spec
from megatron_sppo.rollout.records import read_manifest, write_manifest
from tests.unit.selfplay.synthetic import group, write_rollouts, write_run

PROMPTS = ("p", "q", "r")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write_rollouts(Path(name), [group(p, [f"{name} {p} 1", f"{name} {p} 2"], prompt=f"Why {p}?") for p in PROMPTS])
    return tmp_path


def field(*players, **changes):
    return read_field(EvaluateConfig(judge="rules:concise", output=Path("x.json"), players=players, **changes))


def reseed(directory, seed, **changes):
    manifest = read_manifest(Path(directory))
    write_manifest(Path(directory), replace(manifest, sampling={**manifest.sampling, "seed": seed}, **changes))


def answers(rows, name="x.json", lines=False):
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    Path(name).write_text(text)
    return name


def test_the_first_player_is_the_baseline_unless_another_is_named(place):
    assert (field("a=a", "b=b").names, field("a=a", "b=b").baseline) == (["a", "b"], 0)
    assert field("a=a", "b=b", baseline="b").baseline == 1
    assert field("x=a", "y=a", "z=a").names == ["x", "y", "z"]  # one directory under several names is allowed


@pytest.mark.parametrize("lines", [False, True])
def test_answers_of_a_file_find_their_prompts_by_instruction_or_id(place, lines):
    rows = [
        {"instruction": "Why q?", "output": "Q1", "generator": "x"},
        {"instruction": "Why p?", "output": "P1"},
        {"instruction": "Why q?", "output": "Q2"},
        {"instruction": "Why r?", "output": "R", "prompt_id": "r"},
        {"instruction": "Nobody asked.", "output": "N"},
    ]
    found = field(f"x={answers(rows, lines=lines)}", "a=a")
    assert found.names == ["x", "a"]
    texts = {name: [one.text for one in of_prompt.responses] for name, of_prompt in found.players[0].groups.items()}
    assert texts == {"q": ["Q1", "Q2"], "p": ["P1"], "r": ["R"]}
    assert found.players[0].groups["p"].messages == found.players[1].groups["p"].messages
    assert found.players[0].seed is None and found.players[1].seed == 0


def test_an_answer_of_a_file_goes_on_from_no_template(place):
    thinks = [replace(group(p, ["It."], prompt=f"Why {p}?"), prompt_text="<think>\n") for p in PROMPTS]
    write_rollouts(Path("d"), thinks)
    file, thinking = field(f"x={answers([{'instruction': 'Why p?', 'output': 'P'}])}", "d=d").players
    assert (file.groups["p"].prompt_text, thinking.groups["p"].prompt_text) == (None, "<think>\n")


def test_files_of_answers_alone_meet_on_their_instructions(place):
    first = answers([{"instruction": "One?", "output": "a"}, {"instruction": "Two?", "output": "b"}], "f.json")
    second = answers([{"instruction": "Two?", "output": "c"}], "s.json")
    f, s = field(f"f={first}", f"s={second}").players
    assert list(s.groups) == [list(f.groups)[1]]
    nulls = answers([{"instruction": f"{n}?", "output": "a", "prompt_id": None} for n in range(3)], "n.json")
    assert len(field(f"n={nulls}", f"m={nulls}").players[0].groups) == 3
    twice = answers([{"instruction": f"{n}?", "output": "a", "prompt_id": 7} for n in range(2)], "t.json")
    with pytest.raises(DataError, match="the prompt_id '7' has two instructions"):
        field(f"t={twice}", f"m={nulls}")


def test_a_run_brings_its_start_and_every_iterate_and_the_judge_that_trained_it(place):
    write_run(Path("run"), num_iterations=2)
    found = read_field(EvaluateConfig(judge="rules:cyclic", output=Path("x.json"), run=(Path("run"),)))
    assert found.names == ["base", "iter_1", "iter_2"]
    assert [player.iteration for player in found.players] == [0, 1, 2]
    assert found.trained_on == {"rules:concise"}


def test_a_judge_is_the_same_under_every_spelling_of_its_file(place):
    Path("judges").mkdir()
    Path("judges/mine.py").write_text("")
    judges = Path("judges").absolute()
    assert {canonical_spec(spec) for spec in ("reward:judges", "reward:./judges/", f"reward:{judges}")} == {
        f"reward:{judges}"
    }
    assert canonical_spec("python:judges/mine.py:f") == canonical_spec(f"python:{judges}/mine.py:f")
    assert canonical_spec("python:judges/mine.py:f") != canonical_spec("python:judges/mine.py:g")
    assert [canonical_spec(spec) for spec in ("rules:concise", "pairrm:llm-blender/PairRM")] == [
        "rules:concise",
        "pairrm:llm-blender/PairRM",
    ]


def test_runs_from_the_same_start_share_it(place):
    write_run(Path("one"), num_iterations=1)
    write_run(Path("two"), num_iterations=2)
    write_run(Path("other"), num_iterations=1, hostile="x")
    config = EvaluateConfig(judge="rules:cyclic", output=Path("x.json"), run=(Path("one"), Path("two"), Path("other")))
    names = read_field(config).names
    assert names == ["one/base", "one/iter_1", "two/iter_1", "two/iter_2", "other/base", "other/iter_1"]


def test_runs_of_one_name_are_told_apart_by_where_they_lie(place):
    write_run(Path("seed0/run"), num_iterations=1)
    write_run(Path("seed1/run"), num_iterations=1)
    found = read_field(
        EvaluateConfig(judge="rules:cyclic", output=Path("x.json"), run=(Path("seed0/run"), Path("seed1/run")))
    )
    assert found.names == ["seed0/run/base", "seed0/run/iter_1", "seed1/run/iter_1"]
    with pytest.raises(ConfigError, match="run twice. Name each run once"):
        read_field(
            EvaluateConfig(
                judge="rules:cyclic", output=Path("x.json"), run=(Path("seed0/run"), Path("seed1/../seed0/run"))
            )
        )


def test_a_file_of_answers_may_hold_every_character_that_json_may(place):
    texts = {"p": "one\u2028two\x85three\x0b", "q": "four"}
    lines = [json.dumps({"instruction": f"Why {p}?", "output": text}, ensure_ascii=False) for p, text in texts.items()]
    Path("x.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert {p: group.responses[0].text for p, group in field("a=a", "x=x.jsonl").players[1].groups.items()} == texts


def test_a_second_sampling_is_of_the_same_model_under_another_seed(place):
    reseed("b", 1)
    assert field("a=a", "c=c", second_sampling=("a=b",)).players[0].second["p"].responses[0].text == "b p 1"
    with pytest.raises(DataError, match="both sampled with the seed 0: their answers are the same.*--seed 1"):
        field("a=a", "c=c", second_sampling=("a=c",))
    reseed("b", 1, model="another")
    with pytest.raises(DataError, match="another model than a .model another against tiny"):
        field("a=a", "c=c", second_sampling=("a=b",))
    reseed("b", None)
    with pytest.raises(DataError, match="the manifest of b has no sampling seed"):
        field("a=a", "c=c", second_sampling=("a=b",))
    with pytest.raises(DataError, match="whose seed nobody knows"):
        rows = [{"instruction": "Why p?", "output": "P"}]
        field("a=a", f"x={answers(rows)}", second_sampling=("x=b",))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("players", "changes", "message"),
    [
        (["a=a"], {}, "'a' is the only player.*--players a=DIR OTHER=DIR"),
        (["a", "b=b"], {}, "'a' is not NAME=ANSWERS.*--players base=heldout/base"),
        (["=a", "b=b"], {}, "is not NAME=ANSWERS"),
        (["a=a", "a=b"], {}, "two players are called 'a'"),
        (["a=a", "b=b"], {"baseline": "z"}, "--baseline 'z' is no player. Use one of: a, b"),
        (["a=a", "b=b"], {"second_sampling": ("z=c",)}, "--second-sampling z= is of no player"),
        (["a=a", "b=b"], {"second_sampling": ("c",)}, "--second-sampling 'c' is not NAME=ANSWERS"),
    ],
)
def test_names_that_cannot_be_are_refused(place, players, changes, message):
    with pytest.raises(ConfigError, match=message):
        field(*players, **changes)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing.json does not exist"),
        ("", "holds no answer"),
        ("[]", "holds no answer"),
        ("{", "is neither JSON nor JSON Lines"),
        ('[{"instruction": "Why p?"}]', "row 1 is no answer. Write"),
        ('[{"instruction": "Why p?", "output": 3}]', "row 1 is no answer"),
        ("[3]", "row 1 is no answer"),
        ('[{"instruction": "Why p?", "output": "x", "prompt_id": [1]}]', "row 1: its prompt_id is neither a string"),
        ('[{"instruction": "Another?", "output": "x"}]', "answers no prompt of the other players"),
        ('[{"instruction": "Why p?", "output": "x", "prompt_id": "q"}]', "row 1: prompt 'q' has another instruction"),
    ],
)
def test_what_is_no_file_of_answers_is_refused(place, content, message):
    if content is not None:
        Path("missing.json").write_text(content)
    with pytest.raises(DataError, match=message):
        field("a=a", "x=missing.json")


def test_an_instruction_of_two_prompts_needs_their_id(place):
    write_rollouts(Path("d"), [group(p, ["d"], prompt="The same?") for p in PROMPTS])
    rows = [{"instruction": "The same?", "output": "x"}]
    with pytest.raises(DataError, match="3 prompts end with this instruction, 'p' among them. Write \"prompt_id\""):
        field("d=d", f"x={answers(rows)}")
    assert list(field("d=d", f"x={answers([{**rows[0], 'prompt_id': 'q'}])}").players[1].groups) == ["q"]


def test_a_run_without_answers_of_an_iterate_is_told(place):
    write_run(Path("run"), num_iterations=1)
    for file in Path("run/iter_1/eval/rollouts").iterdir():
        file.unlink()
    Path("run/iter_1/eval/rollouts").rmdir()
    with pytest.raises(DataError, match="keeps no held-out answers of iteration 1"):
        read_field(EvaluateConfig(judge="rules:cyclic", output=Path("x.json"), run=(Path("run"),)))
    with pytest.raises(DataError, match="no iteration has ended"):
        read_field(EvaluateConfig(judge="rules:cyclic", output=Path("x.json"), run=(Path("a"),)))
