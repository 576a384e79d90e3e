"""Proves what is counted of answers and which shares are said. Counts are made by hand."""

import pytest

from megatron_sppo.rollout.outcomes import count_outcomes, outcome_warnings
from megatron_sppo.rollout.records import Response, RolloutGroup


def group(*texts: str, finish_reason: str = "stop") -> RolloutGroup:
    responses = tuple(Response(text=text, token_ids=(5,), finish_reason=finish_reason, seed=None) for text in texts)
    return RolloutGroup(prompt_id="p", messages=(), prompt_token_ids=(1,), responses=responses, prompt_text=None)


def test_answers_are_counted_by_what_became_of_them() -> None:
    groups = [group("a", "a\n"), group("a", " "), group("b"), group("x!", "y", finish_reason="length")]
    counts = count_outcomes(groups, lambda response: "!" in response.text)
    assert counts == {"groups": 4, "responses": 7, "cut": 2, "empty": 1, "turn_markers": 1, "uniform": 1}


QUIET = {"groups": 100, "responses": 500, "cut": 50, "empty": 5, "turn_markers": 0, "uniform": 10}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, None),
        ({"cut": 500}, r"500 of 500 \(100%\) answers were cut at max_tokens.*--max-tokens"),
        ({"empty": 6}, r"6 of 500 \(1%\) answers are empty"),
        ({"turn_markers": 1}, r"1 of 500 \(0%\) answers hold a turn marker"),
        ({"uniform": 11}, r"11 of 100 \(11%\) prompts got the same answer"),
    ],
)
def test_shares_beyond_the_quiet_ones_are_said(counts: dict[str, int], said: str | None) -> None:
    lines = outcome_warnings({**QUIET, **counts})
    assert len(lines) == (said is not None)
    if said is not None:
        import re

        assert re.match(said, lines[0])


def test_nothing_is_said_of_what_nobody_counted() -> None:
    assert outcome_warnings(None) == []
