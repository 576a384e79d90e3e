"""A gate for near-identical answers: they are equals, whatever the judge says of them.

SPPO regresses on the judge's confidence, and degrades where a judge is confident between answers that say the same
(Chen et al. 2026, S-SPPO, arXiv:2606.01561, who anneal by embeddings). Here a pair whose words nearly all agree counts
as a tie. Likeness is the resemblance of Broder 1997 over pairs of neighbouring words: shared ones divided by all, each
as often as it occurs. It sees wording and not meaning: "it is" and "it is not" are alike in a long text.

# K = responses per prompt, U = different ones among them
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np

from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.protocol import Unjudged, Verdict, checker_of, distinct

if TYPE_CHECKING:
    from megatron_sppo.judge.protocol import Judge
    from megatron_sppo.rollout.records import RolloutGroup

GATE_VERSION = 1
"""Raised whenever likeness is measured otherwise: stored scores of another version are not resumed."""
# Scripts that put no spaces between words are taken by characters.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


class SimilarityGate:
    """A judge whose verdict on two answers is 0, a tie, where their resemblance is a threshold or more."""

    def __init__(self, judge: Judge, threshold: float) -> None:
        self._judge, self._threshold = judge, threshold
        self.name = f"{judge.name}, alike from {threshold:g}"
        self.fingerprint = sha256_of_json({"judge": judge.fingerprint, "alike": threshold, "version": GATE_VERSION})
        self.counts = judge.counts
        self.passed = checker_of(judge)

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge, then level the pairs of near-identical answers -> what the judge gives, 0 there in both orders."""
        verdicts = self._judge.judge_logits(groups)
        return [self._gated(group, verdict) for group, verdict in zip(groups, verdicts, strict=True)]

    def _gated(self, group: RolloutGroup, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Unjudged):
            return verdict
        texts, of_K = distinct([response.text for response in group.responses])
        grams = [word_pairs(text) for text in texts]
        alike_UU = np.zeros((len(texts), len(texts)), dtype=bool)
        for first, second in combinations(range(len(texts)), 2):
            is_alike = resemblance(grams[first], grams[second]) >= self._threshold
            alike_UU[first, second] = alike_UU[second, first] = is_alike
        alike_KK = alike_UU[np.ix_(of_K, of_K)]
        self.counts["similar_pairs"] += int(alike_KK.sum())
        return np.where(alike_KK, np.float32(0), verdict)


def word_pairs(text: str) -> Counter[tuple[str, str]]:
    """Count a text's pairs of neighbouring words, its beginning and end among them; case and spaces do not count."""
    return Counter(pairwise(["", *_WORD.findall(text.lower()), ""]))


def resemblance(first: Counter[tuple[str, str]], second: Counter[tuple[str, str]]) -> float:
    """Compare two texts by their word pairs -> shared / all, in [0, 1]; symmetric."""
    return (first & second).total() / (first | second).total()
