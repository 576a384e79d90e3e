"""What became of the answers: cut, empty, run on into further turns, all the same; and which shares deserve a word.

Counted while sampling, kept in the manifest, logged by whoever reads the rollouts.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from megatron_sppo.rollout.records import Response, RolloutGroup

_WARNINGS = (
    (
        "cut",
        "responses",
        0.1,
        "answers were cut at max_tokens: they have no end to be judged by. Use more --max-tokens",
    ),
    ("empty", "responses", 0.01, "answers are empty. Check the model and its chat template"),
    (
        *("turn_markers", "responses", 0.0),
        "answers hold a turn marker of the chat template: the model went on into turns of its own. Check that "
        "--model is the chat model whose template this is",
    ),
    ("uniform", "groups", 0.1, "prompts got the same answer every time: nothing to prefer. Use more --temperature"),
)
"""(count, of what, share that is still quiet, fact and remedy)."""


def count_outcomes(groups: Iterable[RolloutGroup], holds_marker: Callable[[Response], bool]) -> dict[str, int]:
    """Count what became of the answers -> groups, responses, cut, empty, turn_markers, uniform.

    Args:
        holds_marker: tells whether an answer has a turn marker before its end.
    """
    counts: Counter[str] = Counter(groups=0, responses=0, cut=0, empty=0, turn_markers=0, uniform=0)
    for group in groups:
        counts["groups"] += 1
        counts["uniform"] += (
            len(group.responses) > 1 and len({response.text.strip() for response in group.responses}) == 1
        )
        for response in group.responses:
            counts["responses"] += 1
            counts["cut"] += response.finish_reason == "length"
            counts["empty"] += not response.text.strip()
            counts["turn_markers"] += holds_marker(response)
    return dict(counts)


def outcome_warnings(outcomes: Mapping[str, int] | None, *, names: Collection[str] | None = None) -> list[str]:
    """Word the shares that a reader of the rollouts should know -> lines, perhaps none.

    Args:
        outcomes: a manifest's; None: nobody counted.
        names: the counts of interest; None: all.
    """
    lines = []
    outcomes = outcomes or {}
    for name, whole, quiet, text in _WARNINGS:
        count, total = outcomes.get(name, 0), outcomes.get(whole, 0)
        if count > quiet * total and (names is None or name in names):
            lines.append(f"{count} of {total} ({count / total:.0%}) {text}.")
    return lines


def mean_response_tokens(groups: Iterable[RolloutGroup]) -> float:
    """Average the lengths of all answers -> tokens."""
    num_tokens = num_responses = 0
    for group in groups:
        num_tokens += sum(len(response.token_ids) for response in group.responses)
        num_responses += len(group.responses)
    return num_tokens / num_responses if num_responses else 0.0
