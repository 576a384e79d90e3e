"""What a judge is.

# K = responses per prompt, U = different ones among them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

LARGEST_LOGIT = 1e6
"""Nats: beyond it a judge is broken, and float32 sums of squares overflow."""
CERTAIN_LOGIT = 20.0
"""Nats; what stands for a preference of exactly 1 or 0, and rounds to it in float32."""


@dataclass(frozen=True, kw_only=True)
class Unjudged:
    """What a judge gives for a group that it cannot judge: the group is set aside, its neighbours lose nothing."""

    reason: str
    """One clause, the remedy in it where there is one."""


Verdict = np.ndarray | Unjudged
"""float32 [K, K], or why there is none."""


@dataclass(frozen=True, kw_only=True)
class JudgeIdentity:
    """Which judge: what stored scores are known by."""

    name: str
    """The SPEC that it is loaded from: the dataset's manifest and the run's summary carry it."""
    fingerprint: str
    """Changes with everything that decides a logit (weights, limits, precision): only its own scores are resumed."""


class Judge(Protocol):
    """Compares the K responses of a prompt. Heavy imports happen in the constructor, never on import."""

    name: str
    fingerprint: str
    """Both as JudgeIdentity's."""
    counts: Counter[str]
    """What happened since loading: pairs, forwards, identical pairs, truncations, neutralised markers."""

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge every ordered pair of each group's responses -> one float32 [K, K] a group, or why there is none.

        Entry [i, j] is the raw logit of "response i in the first place beats response j in the second"; the diagonal
        and pairs of identical texts are exactly 0. It need not be antisymmetric: position bias shows in L_ij + L_ji.
        A fault of one row is its Unjudged, never an exception: others may be worth days of judging.
        """
        ...


def checker_of(judge: Judge) -> Callable[[RolloutGroup], np.ndarray | Unjudged] | None:
    """Find how a judge that checks answers does so -> its `passed`, None of judges that only compare.

    `passed` checks a group's answers -> float64 [K, C] in [0, 1], one column a check of the prompt; or why it cannot.
    """
    return getattr(judge, "passed", None)


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Tell the texts of K responses apart -> (the U different ones, for each of the K which of them it is)."""
    index_of = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return list(index_of), [index_of[text] for text in texts]


def count_pairs(counts: Counter[str], of_K: Sequence[int]) -> None:
    """Count a group's ordered pairs, and those of identical texts, which no judge is asked about."""
    counts["pairs"] += len(of_K) * (len(of_K) - 1)
    counts["identical_pairs"] += sum(number * (number - 1) for number in Counter(of_K).values())


def judge_groups(judge: Judge, groups: Sequence[RolloutGroup]) -> list[Verdict]:
    """Ask a judge for verdicts that can be counted with -> one a group, in order.

    A group with a text that is none (half a surrogate pair, NUL) is not shown to the judge; logits that are no numbers
    are no verdict. Both are Unjudged.
    """
    from megatron_sppo.rollout.records import text_fault_of_group

    faults = [text_fault_of_group(group) for group in groups]
    readable = [group for group, fault in zip(groups, faults, strict=True) if fault is None]
    given = judge.judge_logits(readable) if readable else []
    assert len(given) == len(readable), f"{judge.name} answered {len(given)} of {len(readable)} groups"
    verdicts = iter(given)
    return [_checked(next(verdicts)) if fault is None else Unjudged(reason=fault) for fault in faults]


def _checked(verdict: Verdict) -> Verdict:
    # NaN is not below the bound either.
    if isinstance(verdict, Unjudged) or bool((np.abs(verdict) <= LARGEST_LOGIT).all()):
        return verdict
    return Unjudged(
        reason=f"the judge gives it logits that are no numbers, or beyond {LARGEST_LOGIT:.0e} nats: its weights are "
        "damaged, or its --dtype is too coarse for it"
    )
