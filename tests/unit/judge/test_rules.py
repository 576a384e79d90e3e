"""The rule judges: what wins and loses, that one is transitive and the other is not, and that both are graded.

Says nothing about whether a policy can climb them: that is the demo's to show.
"""

import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.rules import CYCLE_CHARACTERS, CYCLIC_STRENGTH, concise_score
from megatron_sppo.rollout.records import Response
from tests.unit.judge.groups import group_of, random_group

PROMPT = "Explain why the sea looks blue on a clear day."
GOOD = (
    "The sea looks blue because water absorbs red light more strongly than blue light. On a clear day it also reflects "
    "the colour of the sky, which makes the effect stronger."
)
BAD = {
    "empty": "",
    "white space": " \n ",
    "one word": "Blue.",
    "three words": "It is blue.",
    "the prompt": PROMPT,
    "the prompt twice": f"{PROMPT} {PROMPT}",
    "one word again and again": "blue " * 30 + ".",
    "one sentence again and again": "The sea is blue on a clear day. " * 6,
    "off the topic": GOOD.replace("sea", "oven").replace("blue", "round").replace("clear", "wet").replace("day", "pan"),
    "endless": GOOD + " " + " ".join(f"Moreover word{number} matters here." for number in range(60)),
    "punctuation": "... !!! ???",
}


def preferences(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(logits - logits.T) / 2))


@pytest.mark.parametrize("name", BAD)
def test_a_degenerate_answer_loses_to_a_plain_one(name: str) -> None:
    (logits,) = load_judge("rules:concise").judge_logits([group_of(PROMPT, [GOOD, BAD[name]])])
    assert preferences(logits)[0, 1] > 0.6


def test_a_cut_answer_loses_to_a_finished_one() -> None:
    finished = Response(text=GOOD, token_ids=(1,), finish_reason="stop", seed=None)
    cut = Response(text=GOOD.rsplit(" ", 3)[0], token_ids=(1,), finish_reason="length", seed=None)
    assert concise_score(PROMPT, finished) > concise_score(PROMPT, cut) + 0.1


def test_scores_lie_between_zero_and_one() -> None:
    rng = random.Random(0)
    for number in range(200):
        group = random_group(rng, number, 1, high=90)
        assert 0 <= concise_score(group.messages[-1]["content"], group.responses[0]) <= 1


@pytest.mark.parametrize("spec", ["rules:concise", "rules:cyclic"])
def test_identical_responses_get_exactly_zero_and_the_matrix_is_antisymmetric(spec: str) -> None:
    judge = load_judge(spec)
    (logits,) = judge.judge_logits([group_of(PROMPT, [GOOD, "Other words, of another length.", GOOD])])
    assert logits.dtype == np.float32 and logits.shape == (3, 3)
    assert logits[0, 2] == 0 and logits[2, 0] == 0 and (np.diag(logits) == 0).all()
    np.testing.assert_array_equal(logits, -logits.T)
    assert judge.counts["pairs"] == 6 and judge.counts["identical_pairs"] == 2


def test_one_text_is_its_own_equal_however_its_sampling_ended() -> None:
    cut, other = (group_of(PROMPT, [text], finish_reason="length").responses for text in (GOOD, "It is blue."))
    group = group_of(PROMPT, [GOOD])
    (logits,) = load_judge("rules:concise").judge_logits([replace(group, responses=(*cut, *other, *group.responses))])
    (plain,) = load_judge("rules:concise").judge_logits([replace(group, responses=(*group.responses, *other))])
    assert logits[0, 2] == logits[2, 0] == 0 and logits[0, 1] == logits[2, 1] == plain[0, 1]


def test_concise_never_prefers_in_a_circle() -> None:
    rng = random.Random(1)
    groups = [random_group(rng, number, 5) for number in range(50)]
    for logits in load_judge("rules:concise").judge_logits(groups):
        f = logits.astype(np.float64)
        for i, j, k in ((0, 1, 2), (1, 2, 3), (2, 3, 4), (0, 2, 4)):
            assert abs(f[i, j] + f[j, k] + f[k, i]) < 1e-5


def test_cyclic_prefers_in_a_circle_by_construction() -> None:
    """Lengths a third of the circle apart: each beats the next by the sine of 120 degrees."""
    third = CYCLE_CHARACTERS // 3
    texts = ["a" * 2 * third, "a" * third, "a" * 3 * third]
    (logits,) = load_judge("rules:cyclic").judge_logits([group_of(PROMPT, texts)])
    expected = CYCLIC_STRENGTH * np.sqrt(3) / 2
    np.testing.assert_allclose([logits[0, 1], logits[1, 2], logits[2, 0]], expected, rtol=1e-6)


def test_cyclic_is_a_tie_half_a_circle_and_a_whole_circle_apart() -> None:
    texts = ["a" * 10, "a" * (10 + CYCLE_CHARACTERS // 2), "a" * (10 + CYCLE_CHARACTERS)]
    (logits,) = load_judge("rules:cyclic").judge_logits([group_of(PROMPT, texts)])
    np.testing.assert_array_equal(logits, np.zeros((3, 3), dtype=np.float32))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("spec", ["rules:kind", "rules:", "rules", "", "oracle:x", "pairrm:", "endpoint:"])
def test_an_unknown_spec_is_refused_with_what_to_type(spec: str) -> None:
    with pytest.raises(ConfigError, match="Use .*rules:concise"):
        load_judge(spec)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="--preset paper"):
        load_judge("rules:concise", preset="published")
