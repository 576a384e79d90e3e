"""Judging what follows the reasoning: which text the judge reads, and that its scores are not taken for others'."""

import functools

import numpy as np
import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.conclusion import ConclusionJudge
from megatron_sppo.judge.joined_groups import join_groups
from megatron_sppo.judge.load import load_judge
from tests.unit.judge.groups import group_of


class Reader:
    """Remembers the texts that it was shown."""

    name, fingerprint = "reader", "reader"

    def __init__(self) -> None:
        self.counts = load_judge("rules:concise").counts
        self.read: list[str] = []

    def judge_logits(self, groups):
        self.read += [response.text for group in groups for response in group.responses]
        return [np.zeros((len(group.responses),) * 2, dtype=np.float32) for group in groups]


@pytest.mark.parametrize(
    ("prompt_text", "text", "read", "count"),
    [
        (None, "<think>\nIs it?\n</think>\n\nIt is.", "It is.", "concluded_answers"),
        ("<|im_start|>assistant\n<think>\n", "Is it?\n</think>\n\nIt is.", "It is.", "concluded_answers"),
        # A second marker hides nothing from the judge.
        (None, "<think>a</think>bad</think>good", "bad</think>good", "concluded_answers"),
        (None, "<think> it never ends", "", "unfinished_reasoning"),
        ("<|im_start|>assistant\n<think>\n", "it never ends", "", "unfinished_reasoning"),
        (None, "It is.", "It is.", "answers_without_reasoning"),
        ("<|im_start|>assistant\n", " It is <think>", " It is <think>", "answers_without_reasoning"),
        (None, "<think>a</think>", "", "concluded_answers"),
    ],
)
def test_the_judge_reads_what_follows_the_first_marker(prompt_text, text: str, read: str, count: str) -> None:
    reader = Reader()
    ConclusionJudge(reader, "</think>").judge_logits([group_of("why?", [text], prompt_text=prompt_text)])
    empty = {"empty_conclusions": 1} if count == "concluded_answers" and not read else {}
    assert reader.read == [read] and reader.counts == {count: 1, **empty}


@pytest.mark.parametrize("turn", [1, -1])
def test_each_answer_is_read_by_the_template_that_it_was_sampled_with(turn: int) -> None:
    """A model whose template begins the reasoning, one without any, and a file of answers meet in any order."""
    reasons, plain = ("<|im_start|>assistant\n<think>\n", ["It ne"]), ("<|im_start|>assistant\n", ["It is."])
    sides = [group_of("why?", texts, prompt_text=prompt) for prompt, texts in (reasons, plain, (None, ["So."]))]
    reader = Reader()
    group = functools.reduce(join_groups, sides[::turn])
    ConclusionJudge(reader, "</think>").judge_logits([group])
    assert reader.read == ["", "It is.", "So."][::turn]
    assert group.prompt_text == (reasons, plain)[turn == -1][0], "judges that read the template find one"


def test_another_marker_is_another_text() -> None:
    reader = Reader()
    ConclusionJudge(reader, "[/THINK]").judge_logits([group_of("why?", ["[THINK]a", "[THINK]a[/THINK]b</think>c"])])
    assert reader.read == ["", "b</think>c"]


def test_a_marker_that_closes_nothing_opens_nothing() -> None:
    reader = Reader()
    group = group_of("why?", ["So it is.", "Hm. Answer: yes"], prompt_text="Question: why?\nAnswer:")
    ConclusionJudge(reader, "Answer:").judge_logits([group])
    assert reader.read == ["So it is.", "yes"]


def test_scores_of_conclusions_are_those_of_the_conclusions_alone() -> None:
    concluded = group_of("Why is the sky blue?", ["<think>long</think>The sky scatters blue light.", "Because."])
    plain = group_of("Why is the sky blue?", ["The sky scatters blue light.", "Because."])
    judge, whole = load_judge("rules:concise", after="</think>"), load_judge("rules:concise")
    np.testing.assert_array_equal(judge.judge_logits([concluded])[0], whole.judge_logits([plain])[0])
    assert judge.name == "rules:concise, after </think>"
    others = {load_judge("rules:concise", after=marker).fingerprint for marker in ("</think>", "[/THINK]")}
    assert len({whole.fingerprint, *others}) == 3


def test_an_empty_marker_is_refused() -> None:
    with pytest.raises(ConfigError, match="--judge-after is empty"):
        load_judge("rules:concise", after=" ")
