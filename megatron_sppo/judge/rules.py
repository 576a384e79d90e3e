"""Judges made of rules: no model, no network, the same answer on every machine.

`rules:concise` is transitive: a score in [0, 1] per response, graded so that a small model sampled at temperature 1 can
climb it. `rules:cyclic` is intransitive by construction: no scalar reward can express it, and a Bradley-Terry judge
would call it a tie. Word rules suit languages that put spaces between words.

# K = responses per prompt, U = different ones among them
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.protocol import Judge, count_pairs, distinct
from megatron_sppo.judge.source import last_user_message

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import Response, RolloutGroup

RULES_VERSION = 3
"""Raised whenever a rule changes: stored scores of another version are not resumed."""

WORD_BUDGET = 30
"""rules:concise likes about so many words."""
CONCISE_SCALE = 12.0
"""Nats of judge logit between the scores 0 and 1; typical samples differ by 0.1 to 0.4."""
CYCLE_CHARACTERS = 60
"""rules:cyclic: responses whose lengths differ by a multiple of this are equals."""
CYCLIC_STRENGTH = 3.0
"""rules:cyclic: the largest judge logit, in nats."""

_FINISH_WEIGHT, _LENGTH_WEIGHT, _TOPIC_WEIGHT, _VARIETY_WEIGHT = 0.40, 0.25, 0.20, 0.15
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"')\]*\u201d\u2019]*(?=\s|$)")
_STEM_CHARACTERS = 5
_STOP_TEXT = """
a an and are as at be because been but by can could did do does for from give had has have how i if in into
is it its just make me more most my no not of on one or our out should so some someone such tell than that
the their them then there these they this to up us use was we were what when where which who why will with
would write you your about between describe explain short simple two three four five words sentence
sentences
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


def load_rules(name: str) -> Judge:
    """Load `rules:NAME` -> Judge."""
    if name == "concise":
        return ConciseJudge()
    if name == "cyclic":
        return CyclicJudge()
    raise ConfigError(f"--judge rules:{name} is unknown. Use rules:concise or rules:cyclic.")


class ConciseJudge:
    """Prefers a finished, short answer on the prompt's topic that does not repeat itself. Transitive."""

    name = "rules:concise"
    fingerprint = sha256_of_json({"rule": "concise", "version": RULES_VERSION})

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Difference of the responses' scores, in nats -> float32 [K, K] a group, antisymmetric."""
        return [self._matrix(group) for group in groups]

    def _matrix(self, group: RolloutGroup) -> np.ndarray:
        message = last_user_message(group.messages)
        texts, of_K = distinct([response.text for response in group.responses])
        count_pairs(self.counts, of_K)
        # Of one text that was cut and that ended by itself at the same token, both are as good as the finished one.
        score_U = np.zeros(len(texts))
        np.maximum.at(score_U, of_K, [concise_score(message, response) for response in group.responses])
        score_K = score_U[of_K]
        return (CONCISE_SCALE * (score_K[:, None] - score_K[None, :])).astype(np.float32)


class CyclicJudge:
    """Rock, paper, scissors on the length of a response: no best response exists. Intransitive.

    Lengths lie on a circle of CYCLE_CHARACTERS characters; a response beats those up to half the circle shorter than
    itself and loses to those up to half the circle longer: L_ij = CYCLIC_STRENGTH * sin(angle_i - angle_j).
    """

    name = "rules:cyclic"
    fingerprint = sha256_of_json({"rule": "cyclic", "version": RULES_VERSION})

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Sine of the angle between the responses' lengths, in nats -> float32 [K, K] a group, antisymmetric."""
        return [self._matrix(group) for group in groups]

    def _matrix(self, group: RolloutGroup) -> np.ndarray:
        count_pairs(self.counts, distinct([response.text for response in group.responses])[1])
        length_K = np.array([len(response.text.strip()) % CYCLE_CHARACTERS for response in group.responses])
        difference_KK = length_K[:, None] - length_K[None, :]
        # The sine of a rounded multiple of pi is not exactly 0, and opposites must be ties.
        sine_KK = np.where(
            2 * difference_KK % CYCLE_CHARACTERS == 0, 0.0, np.sin(2 * math.pi * difference_KK / CYCLE_CHARACTERS)
        )
        return (CYCLIC_STRENGTH * sine_KK).astype(np.float32)


def concise_score(message: str, response: Response) -> float:
    """Score one response to the user's last message -> float in [0, 1].

    A weighted mean of four graded features, times two gates that no feature can buy back: substance (an empty or
    one-word answer has none) and originality (the share of the answer that is not copied from the message).
    """
    words = _words(response.text)
    if not words:
        return 0.0
    message_words = _words(message)
    mean = (
        _FINISH_WEIGHT * _finish(response)
        + _LENGTH_WEIGHT * math.exp(-0.5 * (math.log(len(words) / WORD_BUDGET) / 0.5) ** 2)
        + _TOPIC_WEIGHT * _topic(message_words, words)
        + _VARIETY_WEIGHT * _variety(words)
    )
    substance = min(1.0, len(words) / 10)
    return mean * substance * _variety(words) * _originality(message_words, words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _finish(response: Response) -> float:
    """How finished the answer is: 1 stopped at a sentence's end, 0.7 stopped elsewhere, cut off: half of what is in
    whole sentences."""
    text = response.text.rstrip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    whole_share = ends[-1] / len(text) if ends else 0.0
    if response.finish_reason == "stop":
        return 1.0 if whole_share == 1.0 else 0.7
    return 0.5 * whole_share


def _topic(message_words: Sequence[str], words: Sequence[str]) -> float:
    """Share of the message's content words that the answer takes up; more than 80 % brings nothing more."""
    asked = {word[:_STEM_CHARACTERS] for word in message_words if len(word) > 2 and word not in _STOP_WORDS}
    if not asked:
        return 1.0
    answered = {word[:_STEM_CHARACTERS] for word in words}
    return min(1.0, len(asked & answered) / len(asked) / 0.8)


def _variety(words: Sequence[str]) -> float:
    """Share of the answer's word pairs that are not repetitions of an earlier one."""
    pairs = _ngrams(words, 2)
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _originality(message_words: Sequence[str], words: Sequence[str]) -> float:
    """Share of the answer's word triples that do not stand in the message; taking up 30 % of them costs nothing."""
    triples = _ngrams(words, 3)
    asked = set(_ngrams(message_words, 3))
    return min(1.0, sum(triple not in asked for triple in triples) / len(triples) / 0.7) if triples else 1.0
