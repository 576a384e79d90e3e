"""What a judge is, and how a SPEC such as `pairrm:DIR`, `rules:concise` or `endpoint:URL` becomes one.

# K = responses per prompt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_sppo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sppo.rollout.records import RolloutGroup

LARGEST_LOGIT = 1e6
"""Nats: beyond it a judge is broken, and float32 sums of squares overflow."""
SPEC_FORMS = "pairrm:HUB_ID_OR_DIR, reward:HUB_ID_OR_DIR, endpoint:URL, matrices:FILE, rules:concise or rules:cyclic"


@dataclass(frozen=True, kw_only=True)
class Unjudged:
    """What a judge gives for a group that it cannot judge: the group is set aside, its neighbours lose nothing."""

    reason: str
    """One clause, the remedy in it where there is one."""


Verdict = np.ndarray | Unjudged
"""float32 [K, K], or why there is none."""


class Judge(Protocol):
    """Compares the K responses of a prompt. Heavy imports happen in the constructor, never on import."""

    name: str
    """The SPEC that it was loaded from: the dataset's manifest and the run's summary carry it."""
    fingerprint: str
    """Changes with everything that decides a logit (weights, limits, precision): only its own scores are resumed."""
    counts: Counter[str]
    """What happened since loading: pairs, forwards, identical pairs, truncations, neutralised markers."""

    def judge_logits(self, groups: Sequence[RolloutGroup]) -> Sequence[Verdict]:
        """Judge every ordered pair of each group's responses -> one float32 [K, K] a group, or why there is none.

        Entry [i, j] is the raw logit of "response i in the first place beats response j in the second"; the diagonal
        and pairs of identical texts are exactly 0. It need not be antisymmetric: position bias shows in L_ij + L_ji.
        A fault of one row is its Unjudged, never an exception: others may be worth days of judging.
        """
        ...


def judge_groups(judge: Judge, groups: Sequence[RolloutGroup]) -> list[Verdict]:
    """Ask a judge for verdicts that can be counted with -> one a group, in order.

    A group with a text that is none (half a surrogate pair, NUL) is not shown to the judge; logits that are no numbers
    are no verdict. Both are Unjudged.
    """
    from megatron_sppo.judge.intake import text_fault_of_group

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


def load_judge(
    spec: str,
    *,
    preset: str = "paper",
    one_order: bool = False,
    dtype: str | None = None,
    max_requests: int | None = None,
    verdict_tokens: int = 1,
    after: str | None = None,
) -> Judge:
    """Load the judge that a SPEC names -> Judge. Each kind takes the settings that concern it.

    Args:
        preset: "paper" or "official": what PairRM reads, the plain user message or the templated prompt.
        one_order: ask each pair in one order only and take L_ji = -L_ij: an approximation, half the cost, position
            bias kept. PairRM and endpoints only.
        dtype: precision of a local model, "float32" or "bfloat16"; None: float32 on the CPU, bfloat16 on a GPU.
        max_requests: most requests of this process to an endpoint; None: no limit.
        verdict_tokens: tokens that an endpoint may answer with; more than 1 for one that reasons first.
        after: judge only what follows this text in an answer, such as "</think>"; None: whole answers.

    Raises:
        ConfigError: unknown SPEC or setting, or a judge that cannot be loaded.
        ConversionError: a weight of the judge is not in its files.
    """
    judge = _load(
        spec,
        preset=preset,
        one_order=one_order,
        dtype=dtype,
        max_requests=max_requests,
        verdict_tokens=verdict_tokens,
    )
    if after is None:
        return judge
    if not after.strip():
        raise ConfigError('--judge-after is empty. Use --judge-after "</think>", or leave it out.')
    from megatron_sppo.judge.conclusion import ConclusionJudge

    return ConclusionJudge(judge, after)


def _load(
    spec: str, *, preset: str, one_order: bool, dtype: str | None, max_requests: int | None, verdict_tokens: int
) -> Judge:
    if preset not in ("paper", "official"):
        raise ConfigError(f"--preset {preset!r} is unknown. Use --preset paper or --preset official.")
    kind, _, rest = spec.partition(":")
    if not rest:
        raise ConfigError(f"--judge {spec!r} is not a judge. Use {SPEC_FORMS}.")
    if kind == "rules":
        from megatron_sppo.judge.rules import load_rules

        return load_rules(rest)
    if kind == "matrices":
        from megatron_sppo.judge.matrices import MatricesJudge

        return MatricesJudge(rest, preset=preset)
    if kind == "pairrm":
        from megatron_sppo.judge.pairrm import PairRMJudge

        return PairRMJudge(rest, preset=preset, one_order=one_order, dtype=dtype)
    if kind == "reward":
        from megatron_sppo.judge.reward import RewardJudge

        return RewardJudge(rest, dtype=dtype)
    if kind == "endpoint":
        from megatron_sppo.judge.endpoint import EndpointJudge

        return EndpointJudge(
            rest, preset=preset, one_order=one_order, max_requests=max_requests, verdict_tokens=verdict_tokens
        )
    raise ConfigError(f"--judge {spec!r} is not a judge. Use {SPEC_FORMS}.")
