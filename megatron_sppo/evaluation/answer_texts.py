"""What can be said of answers without a judge: how long, how often cut, how much alike.

M = a player's answers to a prompt, N = prompts
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_sppo.rollout.records import RolloutGroup

_PIECE = re.compile(r"\w+|[^\w\s]")
"""Words, and every mark by itself."""
_BLEU_ORDER = 4

NUMBERS = ("response_tokens", "response_characters", "truncation_rate", "distinct_1", "distinct_2", "self_bleu")


def describe_answers(groups: Iterable[RolloutGroup], *, has_tokens: bool) -> dict[str, np.ndarray]:
    """Measure every prompt's answers -> NUMBERS, float64 [N] each; NaN where a number is not known.

    Args:
        has_tokens: the answers were sampled here; of a file of answers neither tokens nor cuts are known.
    """
    rows = [_of_prompt(group, has_tokens=has_tokens) for group in groups]
    return {name: np.array([row[number] for row in rows]) for number, name in enumerate(NUMBERS)}


def _of_prompt(group: RolloutGroup, *, has_tokens: bool) -> tuple[float, ...]:
    answers = group.responses
    pieces = [_PIECE.findall(answer.text.lower()) for answer in answers]
    tokens = cut = float("nan")
    if has_tokens:
        tokens = float(np.mean([len(answer.token_ids) for answer in answers]))
        cut = float(np.mean([answer.finish_reason == "length" for answer in answers]))
    characters = float(np.mean([len(answer.text) for answer in answers]))
    return tokens, characters, cut, distinct(pieces, order=1), distinct(pieces, order=2), self_bleu(pieces)


def distinct(answers: Sequence[Sequence[str]], *, order: int) -> float:
    """Share of different n-grams among all of a prompt's answers -> (0, 1], NaN without any.

    distinct-n of Li et al. 2016 (arXiv:1510.03055), within a prompt and then averaged over prompts, so that it does not
    fall with the number of prompts (per-input diversity, Kirk et al. 2024, arXiv:2310.06452).
    """
    grams = [tuple(answer[i : i + order]) for answer in answers for i in range(len(answer) - order + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(answers: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each answer against the others of its prompt -> [0, 1], 1 where all are alike; NaN of one answer.

    Zhu et al. 2018 (Texygen, arXiv:1802.01886); nltk's BLEU with its first smoothing, for short answers.
    """
    if len(answers) < 2:
        return float("nan")
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction(epsilon=0.1).method1
    scores = []
    for number, answer in enumerate(answers):
        others = [*answers[:number], *answers[number + 1 :]]
        if not answer:
            scores.append(float(any(not other for other in others)))
            continue
        order = min(_BLEU_ORDER, len(answer))
        weights = (1 / order,) * order
        scores.append(float(sentence_bleu(others, answer, weights=weights, smoothing_function=smoothing)))
    return float(np.mean(scores))
