"""The gate for near-identical answers: what counts as alike, and that it levels these pairs and no others."""

import numpy as np
import pytest

from megatron_sppo.judge.conclusion import ConclusionJudge
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Unjudged
from megatron_sppo.judge.similarity import SimilarityGate, resemblance, word_pairs
from megatron_sppo.objective import preference_matrix
from tests.unit.judge.groups import group_of

LONG = "The sea looks blue because water absorbs red light more strongly than blue light."


class Sure:
    """Is certain of every pair of places, and cannot judge prompts called "bad"."""

    name, fingerprint = "sure", "sure"

    def __init__(self) -> None:
        self.counts = load_judge("rules:concise").counts

    def judge_logits(self, groups):
        count = len(groups[0].responses)
        certain = np.triu(np.full((count, count), 5, dtype=np.float32), 1)
        verdict = certain - certain.T + np.eye(count, dtype=np.float32) * 0
        return [Unjudged(reason="no") if group.prompt_id == "bad" else verdict.copy() for group in groups]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b c", "a b c", 1),
        ("A  b\nC", "a b c", 1),
        ("yes", "no", 0),
        # ^a ab bc c$ and ^a ab bd d$: two of six.
        ("a b c", "a b d", 2 / 6),
        # ^a aa aa a$ and ^a aa a$: three of four, each as often as it occurs.
        ("a a a", "a a", 3 / 4),
        ("a b c", "c b a", 0),
        ("", "a", 0),
        ("", "", 1),
        # Where there are no spaces, characters are words: ^1 12 23 3$ and ^1 12 24 4$.
        ("\u5929\u6c14\u597d", "\u5929\u6c14\u574f", 2 / 6),
    ],
)
def test_resemblance_is_the_share_of_word_pairs_that_both_have(first: str, second: str, expected: float) -> None:
    pairs = word_pairs(first), word_pairs(second)
    assert resemblance(*pairs) == resemblance(*reversed(pairs)) == pytest.approx(expected)


def test_near_identical_answers_are_ties_and_all_others_stay() -> None:
    """LONG has 15 words with its full stop and 16 pairs; another last word changes 2 of them: 14 / 18."""
    texts = [LONG, LONG.replace("blue light.", "blue lamps."), "Water is blue.", LONG]
    alike = resemblance(word_pairs(texts[0]), word_pairs(texts[1]))
    assert alike == pytest.approx(14 / 18)
    (ours,) = SimilarityGate(Sure(), 0.75).judge_logits([group_of("why?", texts)])
    (theirs,) = Sure().judge_logits([group_of("why?", texts)])
    levelled = {(0, 1), (1, 0), (1, 3), (3, 1)}
    for pair in np.ndindex(4, 4):
        assert ours[pair] == (0 if pair in levelled else theirs[pair]), pair
    assert ours.dtype == np.float32
    import torch

    assert preference_matrix(torch.tensor(ours))[0, 1] == 0.5


def test_the_threshold_itself_is_alike_and_what_is_levelled_is_counted() -> None:
    texts = ["a b c", "a b d"]  # 1/3
    for threshold, count in ((1 / 3, 2), (0.34, 0)):
        judge = SimilarityGate(Sure(), threshold)
        judge.judge_logits([group_of("?", texts)])
        assert judge.counts["similar_pairs"] == count


def test_a_prompt_that_the_judge_cannot_judge_stays_set_aside() -> None:
    (verdict,) = SimilarityGate(Sure(), 0.5).judge_logits([group_of("?", ["a b", "a b."], prompt_id="bad")])
    assert isinstance(verdict, Unjudged)


def test_it_is_off_unless_asked_for_and_then_another_judge() -> None:
    plain, gated = load_judge("rules:concise"), load_judge("rules:concise", similarity_gate=0.9)
    assert not isinstance(plain, SimilarityGate)
    assert (
        len({plain.fingerprint, gated.fingerprint, load_judge("rules:concise", similarity_gate=0.8).fingerprint}) == 3
    )
    assert gated.name == "rules:concise, alike from 0.9"


def test_what_is_compared_are_the_conclusions_that_are_judged() -> None:
    judge = load_judge("rules:cyclic", similarity_gate=0.9, after="</think>")
    assert isinstance(judge, ConclusionJudge)
    judge.judge_logits([group_of("?", ["one way</think>the same", "quite another way</think>the  same"])])
    assert judge.counts["similar_pairs"] == 2
