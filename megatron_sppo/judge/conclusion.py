"""Judging only what follows the reasoning: answers of a model that thinks aloud are read from `</think>` on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.joined_groups import prompt_texts_of
from megatron_sppo.judge.protocol import checker_of

if TYPE_CHECKING:
    from megatron_sppo.judge.protocol import Judge, Verdict
    from megatron_sppo.rollout.records import Response, RolloutGroup


class ConclusionJudge:
    """A judge that is shown the conclusions of answers, as `concluded` has them."""

    def __init__(self, judge: Judge, marker: str) -> None:
        self._judge, self._marker = judge, marker
        self.name = f"{judge.name}, after {marker}"
        self.fingerprint = sha256_of_json({"judge": judge.fingerprint, "after": marker})
        self.counts = judge.counts
        checker = checker_of(judge)
        self.passed = None if checker is None else lambda group: checker(self._concluded(group))

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge the conclusions -> what the judge gives."""
        return self._judge.judge_logits([self._concluded(group) for group in groups])

    def _concluded(self, group: RolloutGroup) -> RolloutGroup:
        return concluded(group, self._marker, counts=self.counts)


def concluded(group: RolloutGroup, marker: str | None, *, counts: Counter[str] | None = None) -> RolloutGroup:
    """Keep what stands behind the first `marker` of each answer -> the group; None keeps whole answers.

    The first one: an answer could hide anything from the judge behind a second. An answer whose reasoning does not end
    has no conclusion, and an empty text. One that never began to reason stays whole.

    Args:
        counts: where the kinds of answers are counted.
    """
    if marker is None:
        return group
    counts = Counter() if counts is None else counts
    # What begins the reasoning, where its end is spelled as a closing tag.
    opening = marker.replace("/", "", 1) if "/" in marker else None
    responses = []
    for response, prompt_text in zip(group.responses, prompt_texts_of(group), strict=True):
        # Some chat templates begin the reasoning themselves.
        is_open = opening is not None and (prompt_text or "").rstrip().endswith(opening)
        responses.append(_conclusion(response, marker, opening, is_open=is_open, counts=counts))
    return dataclasses.replace(group, responses=tuple(responses))


def _conclusion(
    response: Response, marker: str, opening: str | None, *, is_open: bool, counts: Counter[str]
) -> Response:
    _, found, conclusion = response.text.partition(marker)
    if found:
        counts["concluded_answers"] += 1
        if not conclusion.strip():
            counts["empty_conclusions"] += 1
    elif is_open or (opening is not None and response.text.lstrip().startswith(opening)):
        counts["unfinished_reasoning"] += 1
    else:
        counts["answers_without_reasoning"] += 1
        return response
    return dataclasses.replace(response, text=conclusion.strip())
