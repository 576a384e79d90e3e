"""Judging only what follows the reasoning: answers of a model that thinks aloud are read from `</think>` on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.protocol import checker_of

if TYPE_CHECKING:
    from megatron_sppo.judge.protocol import Judge, Verdict
    from megatron_sppo.rollout.records import Response, RolloutGroup


class ConclusionJudge:
    """A judge that is shown what stands behind the first `marker` of each answer.

    The first one: an answer could hide anything from the judge behind a second. An answer whose reasoning does not end
    has no conclusion: the judge reads an empty one. One that never began to reason is read whole.
    """

    def __init__(self, judge: Judge, marker: str) -> None:
        self._judge, self._marker = judge, marker
        self._opening = marker.replace("/", "", 1) if "/" in marker else None
        """What begins the reasoning, where its end is spelled as a closing tag."""
        self.name = f"{judge.name}, after {marker}"
        self.fingerprint = sha256_of_json({"judge": judge.fingerprint, "after": marker})
        self.counts = judge.counts
        checker = checker_of(judge)
        self.passed = None if checker is None else lambda group: checker(self._concluded(group))

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge the conclusions -> what the judge gives."""
        return self._judge.judge_logits([self._concluded(group) for group in groups])

    def _concluded(self, group: RolloutGroup) -> RolloutGroup:
        # Some chat templates begin the reasoning themselves.
        is_open = self._opening is not None and (group.prompt_text or "").rstrip().endswith(self._opening)
        responses = tuple(self._conclusion(response, is_open=is_open) for response in group.responses)
        return dataclasses.replace(group, responses=responses)

    def _conclusion(self, response: Response, *, is_open: bool) -> Response:
        _, marker, conclusion = response.text.partition(self._marker)
        if marker:
            self.counts["concluded_answers"] += 1
            if not conclusion.strip():
                self.counts["empty_conclusions"] += 1
        elif is_open or (self._opening is not None and response.text.lstrip().startswith(self._opening)):
            self.counts["unfinished_reasoning"] += 1
        else:
            self.counts["answers_without_reasoning"] += 1
            return response
        return dataclasses.replace(response, text=conclusion.strip())
