"""Judges that check: what the checks say, how it becomes a preference, and that what cannot be checked is said.

The checks of IFEval are the library's own; here stands that rows reach them as published, and that chance, missing data
and foreign code never decide a verdict in silence.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.accuracy import strict_accuracy
from megatron_sppo.judge.conclusion import ConclusionJudge
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Judge, Unjudged
from megatron_sppo.judge.verifiable import logits_of
from megatron_sppo.objective import hodge_split, preference_matrix, win_rates
from megatron_sppo.rollout.records import RolloutGroup
from tests.unit.judge.groups import group_of

WORDS_BELOW_5 = ("length_constraints:number_words", {"num_words": 5, "relation": "less than", "keywords": None})
NO_COMMA = ("punctuation:no_comma", {})
ENDS = ("startend:end_checker", {"end_phrase": "The end."})


@pytest.fixture(scope="module")
def ifeval() -> Iterator[Judge]:
    yield load_judge("verifiable:ifeval")


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Judge]:
    yield load_judge("verifiable:math")


def asked(texts: list[str], *instructions: tuple[str, dict[str, Any]], prompt_id: str = "p0") -> RolloutGroup:
    names, arguments = [name for name, _ in instructions], [given for _, given in instructions]
    columns = {"instruction_id_list": names, "kwargs": arguments}
    return dataclasses.replace(group_of("Say something.", texts, prompt_id=prompt_id), columns=columns)


def with_columns(texts: list[str], columns: dict[str, Any] | None) -> RolloutGroup:
    return dataclasses.replace(group_of("How much?", texts), columns=columns)


def reason_of(judge: Judge, group: RolloutGroup) -> str:
    (verdict,) = judge.judge_logits([group])
    assert isinstance(verdict, Unjudged), verdict
    return verdict.reason


def test_preferences_are_the_share_of_checks_that_one_answer_alone_passes(ifeval: Judge) -> None:
    """Three instructions. Held are 3, 1, 1 (another one) and 0: P = 1/2 + (held_i - held_j) / 6."""
    texts = ["So it ends. The end.", "a, b. The end. But no", "a, b c d e f. The end.", "a, b c d e f g"]
    (logits,) = ifeval.judge_logits(
        [asked(texts, NO_COMMA, ("length_constraints:number_words", {"num_words": 7, "relation": "less than"}), ENDS)]
    )
    held = np.array([3, 1, 1, 0])
    expected = 0.5 + (held[:, None] - held[None, :]) / 6
    preferences = preference_matrix(np_tensor(logits)).numpy()
    np.testing.assert_allclose(preferences, expected, atol=2e-7)
    assert (logits == -logits.T).all() and logits.dtype == np.float32
    assert logits[1, 2] == 0 and preferences[1, 2] == 0.5


def np_tensor(values: np.ndarray) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


def test_its_log_odds_look_cyclic_where_nobody_goes_in_a_circle() -> None:
    """docs/evaluation.md, Circles, says so, and how much of three answers."""
    flow = torch.tensor(logits_of(np.array([0, 0.5, 1])))
    cyclic = hodge_split(flow).cyclic.square().sum() / flow.square().sum()
    assert float(cyclic) == pytest.approx(0.26, abs=0.005)


def test_a_win_rate_is_one_half_plus_half_the_lead_in_accuracy() -> None:
    """w_i = mean_j P_ij = 1/2 + (s_i - mean s) / 2, so w_i - 1/2 is what the objective asks for."""
    share = np.array([1.0, 0.75, 0.25, 0.25, 0.0])
    w = win_rates(preference_matrix(np_tensor(logits_of(share)))).numpy()
    np.testing.assert_allclose(w, 0.5 + (share - share.mean()) / 2, atol=2e-7)


def test_every_check_reads_its_own_arguments_and_strictly(ifeval: Judge) -> None:
    passed = ifeval.passed(
        asked(["one two three four", "one, two", '"five words are in here"'], NO_COMMA, WORDS_BELOW_5)
    )
    assert passed.tolist() == [[1, 1], [0, 1], [1, 0]]
    # An answer in which a loose reading would drop the first line.
    group = asked(["Sure, here it is:\nno comma"], NO_COMMA)
    assert ifeval.passed(group).tolist() == [[0]]


def test_the_same_answer_gets_the_same_verdict_from_another_process(ifeval: Judge) -> None:
    """langdetect draws at random: short texts of mixed languages differ from call to call unless it is seeded."""
    texts = ["hola my friend que tal", "das ist nice und cool", "e poi the end", "oui yes ja"]
    group = asked(texts, ("language:response_language", {"language": "en"}))
    first = [ifeval.passed(group).tolist() for _ in range(3)]
    assert first == [load_judge("verifiable:ifeval").passed(group).tolist()] * 3


def test_kwargs_as_text_and_ifbench_are_read(ifeval: Judge) -> None:
    columns = {
        "instruction_id_list": ["count:word_count_range"],
        "kwargs": json.dumps([{"min_words": 2, "max_words": 3}]),
    }
    assert ifeval.passed(with_columns(["one two", "one"], columns)).tolist() == [[1], [0]]


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (None, "no instruction_id_list"),
        ({"answer": "4"}, "no instruction_id_list"),
        ({"instruction_id_list": [], "kwargs": []}, "no list of ids"),
        (
            {"instruction_id_list": ["no:such"], "kwargs": [{}]},
            "neither IFEval nor IFBench has the instruction 'no:such'",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "no list of 1 mappings"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": "{"}, "no JSON"),
        # The library draws what is missing, or is no letter, at random.
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 5}]},
            "needs num_words, relation, of which kwargs gives {'num_words': 5}",
        ),
        (
            {
                "instruction_id_list": ["keywords:letter_frequency"],
                "kwargs": [{"letter": "#", "let_frequency": 3, "let_relation": "at least"}],
            },
            "at random",
        ),
        (
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]},
            "cannot be checked (TypeError",
        ),
        # A keyword is a regular expression to the library.
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a"]}]}, "cannot be checked"),
        # A text in place of a list would be looked for letter by letter.
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "an"}]}, "with keywords 'an'"),
        ({"instruction_id_list": ["keywords:forbidden_words"], "kwargs": [{"forbidden_words": [""]}]}, "cannot be"),
        # Every answer ends with nothing.
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": ""}]}, "with end_phrase ''"),
        (
            {"instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": True}]},
            "with num_bullets True",
        ),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_checked_is_set_aside_with_its_reason(ifeval: Judge, columns: Any, reason: str) -> None:
    assert reason in reason_of(ifeval, with_columns(["an answer"], columns))
    (verdict,) = ifeval.judge_logits([asked(["its neighbours, lose", "nothing"], NO_COMMA)])
    assert verdict[1, 0] == 20


def test_data_of_nltk_that_is_not_there_is_named_and_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    judge = load_judge("verifiable:ifeval")
    sentences = ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"})
    assert reason_of(judge, asked(["One. Two."], NO_COMMA, sentences)).endswith("python -m nltk.downloader punkt_tab")


@pytest.mark.parametrize(
    ("column", "right", "answer", "passed"),
    [
        ("answer", "34", "So the answer is 34.", 1),
        ("answer", 34, "So the answer is 43.", 0),
        ("answer", r"\frac{1}{2}", "I get 0.5", 1),
        ("answer", r"\frac{1}{2}", "It is 1", 0),
        ("solution", r"Thus $x = \boxed{\sqrt{2}}$.", r"The result is $\sqrt{2}$", 1),
        ("answer", "Half of 48 is 24. 48 + 24 = 72\n#### 72", "They sold 72 clips.", 1),
        ("answer", "1,000", "1000", 1),
        ("reward_model", {"style": "rule", "ground_truth": "7"}, r"\boxed{7}", 1),
        ("final_answer", ["$x+1$"], "$1+x$", 1),
        ("ground_truth", "5", "I do not know", 0),
        ("answer", "$18", r"She makes \$18 every day.", 1),
        ("answer", "-$5", "-5", 1),
        ("answer", "10 dollars", "She has 10 dollars.", 1),
    ],
)
def test_a_result_is_compared_with_the_right_one(
    mathematics: Judge, column: str, right: Any, answer: str, passed: int
) -> None:
    assert mathematics.passed(with_columns([answer], {column: right})).tolist() == [[passed]]


@pytest.mark.parametrize(
    ("right", "one_number"),
    [
        *(("6 - 5i", "5"), ("10+5i", "10"), ("2k+2", "2"), ("2x", "2"), ("- 5", "5"), ("2*sqrt(3)", "2")),
        *(("3, 5, 7", "7"), ("1,2", "1.2"), ("(3, 4)", "4"), ("(3, 4]", "4"), ("3 and 5", "5")),
        *(("2 < x < 3", "3"), ("y = 2x + 3", "3"), ("x = 5 or x = 6", "6"), (r"\frac{3}{4}, 5", "5")),
    ],
)
def test_a_formula_is_the_right_answer_and_one_of_its_numbers_is_not(
    mathematics: Judge, right: str, one_number: str
) -> None:
    answers = [f"The result is $\\boxed{{{text}}}$." for text in (right, one_number)]
    assert mathematics.passed(with_columns(answers, {"answer": right})).tolist() == [[1], [0]]


def test_a_busy_machine_makes_no_right_answer_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify's own alarms ring by the wall clock; here any that it sets has rung already."""
    from megatron_sppo.judge.mathematics import check_mathematics

    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.raise_signal(signal.SIGALRM) if seconds else None)
    assert check_mathematics("It is $0.75$.", [], {"answer": r"\frac{3}{4}"}) == [1.0]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, "has none of the columns answer,"),
        *(({"answer": text}, f"'{text}'") for text in ("a cat", "1 1/2", "2 pi", "2 sqrt(3)", "1e5", "yes-no")),
    ],
)
def test_a_prompt_without_a_right_answer_is_set_aside(mathematics: Judge, columns: Any, reason: str) -> None:
    assert reason in reason_of(mathematics, with_columns(["5"], columns))


SCORERS = """
import os, sys, time
print("loaded")

def length(answer, messages, columns):
    print(answer)
    print(answer, file=sys.stderr)
    return min(1, len(answer) / columns["most"])

def is_even(answer, messages, columns): return len(answer) % 2 == 0
def is_number(answer, messages, columns):
    import numpy
    return numpy.float32(0.25)
def hangs(answer, messages, columns):
    while answer == "hang": pass
    return 1
def leaves(answer, messages, columns):
    print("out of memory", file=sys.stderr, flush=True)
    os._exit(3)
def exits(answer, messages, columns): sys.exit("bye")
def a_text(answer, messages, columns): return "good"
def not_a_number(answer, messages, columns): return float("nan")
def too_much(answer, messages, columns): return 1.5
def nothing(answer, messages, columns): pass
def raises(answer, messages, columns):
    return columns["missing"]
def two_numbers(answer, messages, columns):
    import numpy
    return numpy.array([0.25, 0.5])
def far_too_much(answer, messages, columns): return 10**400
def an_object(answer, messages, columns): return (answer for _ in answer)
def asks(answer, messages, columns): return float(input())
def forks(answer, messages, columns):
    os.fork()
    return columns["share"][answer]
def takes_one(answer): return 1
"""


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scorers") / "my_scorer.py"
    path.write_text(SCORERS)
    return path


@pytest.mark.parametrize(
    ("function", "passed"), [("length", [0.5, 1.0]), ("is_even", [1, 1]), ("is_number", [0.25, 0.25])]
)
def test_a_scorer_of_one_s_own_may_print_and_return_any_number(
    scorers: Path, function: str, passed: list[float]
) -> None:
    judge = load_judge(f"python:{scorers}:{function}")
    assert judge.passed(with_columns(["four", "eighteen"], {"most": 8})).tolist() == [[value] for value in passed]
    assert judge.name == f"python:my_scorer.py:{function}"


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("leaves", "ended the process it ran in (exit code 3: out of memory)"),
        ("exits", "exits() raises SystemExit: bye"),
        ("a_text", "returned 'good'"),
        ("not_a_number", "returned nan"),
        ("too_much", "returned 1.5: a score is a number in [0, 1]"),
        ("nothing", "returned None"),
        ("raises", "raises KeyError: 'missing' (line 26 of my_scorer.py)"),
        ("two_numbers", "returned array([0.25, 0.5 ]): a score is a number"),
        ("far_too_much", "returned 1000000"),
        ("an_object", "returned <generator object an_object.<locals>.<genexpr>>: a score"),  # no address in it
        ("asks", "asks() raises EOFError"),  # the requests are not its input
        ("takes_one", "takes_one() raises TypeError"),
    ],
)
def test_a_scorer_that_fails_costs_its_prompt_and_says_why(scorers: Path, function: str, reason: str) -> None:
    judge = load_judge(f"python:{scorers}:{function}")
    for _ in range(2):  # and is there for the next one
        assert reason in reason_of(judge, with_columns(["four"], {}))


def test_a_scorer_that_forks_and_returns_twice_answers_once(scorers: Path) -> None:
    judge = load_judge(f"python:{scorers}:forks")
    share = {str(number): number / 8 for number in range(8)}
    assert judge.passed(with_columns(list(share), {"share": share}))[:, 0].tolist() == list(share.values())


def test_a_scorer_that_hangs_is_ended_and_the_next_prompt_is_judged(scorers: Path) -> None:
    judge = load_judge(f"python:{scorers}:hangs", scorer_seconds=2)
    start = time.monotonic()
    assert "longer than 2 s" in reason_of(judge, with_columns(["hang"], {}))
    assert judge.passed(with_columns(["go on"], {})).tolist() == [[1]]
    assert time.monotonic() - start < 60


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("verifiable:sums", "Use verifiable:ifeval or verifiable:math"),
        ("python:scorer.py", "names no function"),
        ("python:no/such.py:score", "does not exist"),
        ("python:{scorers}:other", "has no function 'other'"),
        ("python:{broken}:score", "cannot be imported: the file raises SyntaxError"),
        (
            "python:{empty}:score",
            "cannot be imported: the file raises ModuleNotFoundError: No module named 'no_such' (line 2",
        ),
        ("python:{leaving}:score", "do not start (exit code 5). Mend the file, and run the same command again."),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_refused_in_one_line(
    scorers: Path, tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "empty.py").write_text("\nimport no_such\n")
    (tmp_path / "leaving.py").write_text("import os\nos._exit(5)\n")
    paths = {"scorers": scorers, **{name: tmp_path / f"{name}.py" for name in ("broken", "empty", "leaving")}}
    with pytest.raises(ConfigError) as caught:
        load_judge(spec.format(**paths))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_fingerprint_is_of_the_scorer_s_content_and_of_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "s.py"
    path.write_text("def score(answer, messages, columns): return 1\n")
    first = load_judge(f"python:{path}:score").fingerprint
    assert load_judge(f"python:{path}:score").fingerprint == first
    assert load_judge(f"python:{path}:score", scorer_seconds=3).fingerprint != first
    path.write_text("def score(answer, messages, columns): return 0\n")
    assert load_judge(f"python:{path}:score").fingerprint != first


def test_accuracy_is_ifeval_s_at_both_levels(ifeval: Judge) -> None:
    """Prompt a: two instructions, answers that hold 2 and 1 of them. Prompt b: one instruction, held by neither of two.
    Prompt-level 1 of 4 answers; instruction-level 3 of 6 checks."""
    groups = [
        asked(["no", "yes, no"], NO_COMMA, WORDS_BELOW_5, prompt_id="a"),
        asked(["a, b", "c, d"], NO_COMMA, prompt_id="b"),
    ]
    found = strict_accuracy(ifeval, [*groups, with_columns(["x"], None)], resamples=2000, seed=0)
    assert found is not None
    assert found["prompt_level"]["mean"] == 0.25 and found["prompt_level"]["num_prompts"] == 2
    assert found["instruction_level"]["mean"] == 0.5
    assert (found["num_instructions"], found["num_unchecked"]) == (3, 1)
    # Resamples are aa, ab, ba, bb: a alone gives 1/2 and 3/4, b alone 0.
    assert (found["prompt_level"]["low"], found["prompt_level"]["high"]) == (0, 0.5)
    assert (found["instruction_level"]["low"], found["instruction_level"]["high"]) == (0, 0.75)


def test_a_judge_that_compares_has_no_accuracy() -> None:
    assert strict_accuracy(load_judge("rules:concise"), [with_columns(["a"], None)], resamples=10, seed=0) is None


def test_what_follows_the_reasoning_is_checked_alone(ifeval: Judge) -> None:
    judge = ConclusionJudge(ifeval, "[end]")
    group = asked(["well, well [end] no comma", "no comma [end] well, well"], NO_COMMA)
    assert judge.passed is not None and judge.passed(group).tolist() == [[1], [0]]
    assert math.isclose(judge.judge_logits([group])[0][0, 1], 20)
