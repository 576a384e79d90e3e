"""What is remarkable about a judge's verdicts, and what to do about it: one table for stderr, diagnostics.json, report.

Verdicts without any signal stop a run before it writes: training on them moves nothing, and says so nowhere.

# G = groups, K = responses per prompt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import DataError
from megatron_sppo.objective import preference_matrix, win_rates
from megatron_sppo.objective.diagnostics import TIE_TOLERANCE, ScoredBlock, describe_preferences

TIED = 0.2
"""A fifth of the judge's work is lost; a judge with graded verdicts ties on identical texts alone."""
ORDER_BOUND = 0.3
"""Strong language models name another winner in about a third of the pairs when the order is turned (arXiv:2306.05685);
a coin does in half of them."""
CUT = 0.1
"""A few answers never end; where every tenth does not, it is --max-tokens that ends them."""
UNREASONED = 0.5
"""Most answers do not hold what --judge-after names."""
ONE_SIDED_PAIRS = 15
"""In one order, so many pairs that the same place wins are no chance: a coin falls so once in 16,000 times."""
UNREADABLE_REMEDY = (
    "Let the judge answer with one letter: turn its reasoning off on the server, or give it room, "
    "--verdict-tokens 1024."
)
NAMED_REASONS = 3
"""Why prompts were set aside: so many reasons are named, the commonest first; all stand in the manifest."""
_GROUPS_PER_BLOCK = 1 << 16
"""Prompts whose matrices are described at once: more are described in parts, in flat memory."""
_GROUPS_PER_READ = 1 << 10
_PLAIN_COUNTS = (
    "pairs", "identical_pairs", "truncated_sources", "truncated_candidates", "neutralised_markers", "leaning_answers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JudgeDiagnostic:
    """One number of diagnostics.json."""

    name: str
    label: str
    remedy: str = ""
    above: float | None = None
    """Remarkable above this; of a correlation the absolute value counts."""
    below: float | None = None
    """Remarkable below this."""
    short: str = ""
    """Its name in the figure; empty: it is not drawn."""

    @property
    def is_in_nats(self) -> bool:
        """Whether it is measured in nats; the others are shares, correlations and numbers."""
        return "nats" in self.label

    def is_remarkable(self, value: Any) -> bool:
        """Whether a value calls for the remedy."""
        if not isinstance(value, (int, float)):
            return False
        return (self.above is not None and abs(value) > self.above) or (self.below is not None and value < self.below)


JUDGE_DIAGNOSTICS = (
    JudgeDiagnostic(
        name="cycle_rate", label="triples of answers that beat each other in a circle", above=0.05, short="3-cycles",
        remedy="Keep --preset paper: the official rule's one score an answer would call these circles ties.",
    ),
    JudgeDiagnostic(
        name="curl_rms", label="how far logits are from any scores (curl, nats)", above=1.0, short="curl",
        remedy="Keep --preset paper, and take objective sppo rather than dpo: no reward explains this judge.",
    ),
    JudgeDiagnostic(
        name="cyclic_energy", label="share of the logits that no score per answer explains", above=0.1,
        short="cyclic share", remedy="As for circles, where there are any. Otherwise log-odds do not add up: noise "
        "of near-duplicates (sample hotter), or shares of checks that are passed, whose odds never do.",
    ),
    JudgeDiagnostic(name="transitive_energy", label="share of the logits that one score per answer explains"),
    JudgeDiagnostic(
        name="order_inconsistency", label="position bias, mean |L_ij + L_ji| (nats)", above=1.0, short="position bias",
        remedy="Never use --one-order with this judge; a stronger judge minds the order less.",
    ),
    JudgeDiagnostic(
        name="order_disagreement", label="pairs in which another answer wins when the order is turned",
        above=ORDER_BOUND, short="order decides",
        remedy="The judge looks at the place more than at the answers: take a stronger one, and never --one-order.",
    ),
    JudgeDiagnostic(
        name="one_order_agreement", label="pairs whose winner one order finds as well", below=0.95, short="one order",
        remedy="Judge again without --one-order: it names other winners.",
    ),
    JudgeDiagnostic(
        name="tie_rate", label="pairs at exactly one half", above=TIED, short="ties",
        remedy="Ties teach nothing: raise --temperature, or take --selection extremes, which drops tied prompts.",
    ),
    JudgeDiagnostic(
        name="length_correlation", label="correlation of win rate and length", above=0.3, short="length correlation",
        remedy="The judge pays for length (or shortness): watch the answer length, limit --max-tokens.",
    ),
    JudgeDiagnostic(
        name="duplicate_rate", label="answers that repeat another of their prompt", above=0.1, short="duplicates",
        remedy="Raise --temperature or --top-p, or drop prompts with one possible answer.",
    ),
    JudgeDiagnostic(
        name="cut_rate", label="answers that ended at --max-tokens", above=CUT, short="ended at max-tokens",
        remedy="The judge compares beginnings, and the policy learns no end: sample again with a larger --max-tokens.",
    ),
    JudgeDiagnostic(
        name="leaning_answers", label="answers whose win rate is not one half", below=1,
        remedy="Nothing can be learned from this judge: take another.",
    ),
    JudgeDiagnostic(
        name="num_quarantined", label="prompts set aside", above=0,
        remedy="The reasons stand in the dataset's manifest.json under quarantined.",
    ),
    JudgeDiagnostic(
        name="unjudged", label="prompts left out of a comparison", above=0,
        remedy="A line above says why, for each of them.",
    ),
    JudgeDiagnostic(
        name="cross_tie_rate", label="pairs of different answers at exactly one half", above=TIED,
        remedy="They draw the win rate to one half: take a judge that tells these answers apart.",
    ),
    JudgeDiagnostic(
        name="truncation_rate", label="answers that the judge saw cut", above=0, short="cut answers",
        remedy="PairRM reads 412 tokens of an answer and not its end, a reward model as much as fits, and not the "
        "beginning of its prompt: lower --max-tokens.",
    ),
    JudgeDiagnostic(name="pairs", label="ordered pairs asked"),
    JudgeDiagnostic(name="identical_pairs", label="pairs of identical texts, tied unasked"),
    JudgeDiagnostic(
        name="truncated_sources", label="prompts that the judge saw cut", above=0,
        remedy="PairRM reads 1224 tokens of a prompt: leave longer ones out.",
    ),
    JudgeDiagnostic(name="truncated_candidates", label="answers that the judge saw cut"),
    JudgeDiagnostic(
        name="neutralised_markers", label="texts with the judge's own markers, made harmless", above=0,
        remedy="Somebody writes to the judge: look where these prompts come from.",
    ),
    JudgeDiagnostic(
        name="bare_verdicts", label="verdicts without log-probabilities", above=0,
        remedy="Serve the judge with log-probabilities: a bare verdict does not say how sure it was.",
    ),
    JudgeDiagnostic(
        name="unreadable_rate", label="verdicts that were neither A nor B, counted as ties", above=0,
        short="unreadable", remedy=UNREADABLE_REMEDY,
    ),
    JudgeDiagnostic(name="unreadable_verdicts", label="unreadable verdicts"),
    JudgeDiagnostic(
        name="unfinished_rate", label="answers without an end of their reasoning, judged as empty", above=0,
        remedy="Sample again with a larger --max-tokens.",
    ),
    JudgeDiagnostic(
        name="unreasoned_rate", label="answers without reasoning, judged whole", above=UNREASONED,
        remedy="--judge-after names a text that these answers do not hold: look at them.",
    ),
    JudgeDiagnostic(
        name="empty_conclusions", label="answers with nothing behind their reasoning, judged as empty", above=0,
        remedy="Look at them: --judge-after may name a text that ends the answer.",
    ),
    JudgeDiagnostic(
        name="missing_matrices", label="prompts without a stored matrix", above=0,
        remedy="Give matrices:FILE of these very rollouts.",
    ),
)  # fmt: skip


def warnings(diagnostics: Mapping[str, Any]) -> list[str]:
    """Word what is remarkable -> one sentence and its remedy each."""
    return [
        f"{diagnostic.label}: {_in_words(diagnostics[diagnostic.name], diagnostic)}. {diagnostic.remedy}"
        for diagnostic in JUDGE_DIAGNOSTICS
        if diagnostic.is_remarkable(diagnostics.get(diagnostic.name))
    ]


def _in_words(value: float, diagnostic: JudgeDiagnostic) -> str:
    if isinstance(value, int):
        return str(value)
    is_share = not diagnostic.is_in_nats and not diagnostic.name.endswith("correlation")
    return f"{100 * value:.1f} %" if is_share else f"{value:.2f}"


def fraction(part: int, whole: int) -> float | None:
    """Divide -> fraction, None of nothing."""
    return part / whole if whole else None


def verdict_shares(counts: Counter[str]) -> dict[str, float | None]:
    """Turn what a judge counted into shares -> by the names of JUDGE_DIAGNOSTICS, None where nothing was counted."""
    verdicts = counts["logprob_verdicts"] + counts["bare_verdicts"] + counts["unreadable_verdicts"]
    split = counts["concluded_answers"] + counts["unfinished_reasoning"] + counts["answers_without_reasoning"]
    return {
        "unreadable_rate": fraction(counts["unreadable_verdicts"], verdicts),
        "unfinished_rate": fraction(counts["unfinished_reasoning"], split),
        "unreasoned_rate": fraction(counts["answers_without_reasoning"], split),
        "cut_rate": fraction(counts["cut_answers"], counts["answers"]),
    }


def describe_judge(dataset: PreferenceDataset, counts: Counter[str]) -> dict[str, Any]:
    """Describe the judge on a dataset's prompts -> what diagnostics.json holds, plain numbers only.

    Args:
        counts: what the judge counted, and `signal_counts`.
    """
    described = describe_preferences(_scored(dataset), responses=_told_apart(dataset))
    diagnostics: dict[str, Any] = {
        "judge": dataset.manifest.judge,
        "num_prompts": dataset.num_groups,
        "num_responses": dataset.num_responses,
        "num_quarantined": len(dataset.manifest.quarantined),
        **described,
        "truncation_rate": fraction(counts["truncated_candidates"], dataset.response_lengths.size),
        "one_order_agreement": fraction(counts["one_order_agreed"], counts["one_order_checked"]),
        **verdict_shares(counts),
        **{name: counts.get(name, 0) for name in (*_PLAIN_COUNTS, *sorted(set(counts) - set(_PLAIN_COUNTS)))},
    }
    reasons = Counter(row["reason"] for row in dataset.manifest.quarantined)
    return {
        **diagnostics,
        "warnings": warnings(diagnostics),
        "quarantine_reasons": dict(reasons.most_common(NAMED_REASONS)),
        "counts": dict(sorted(counts.items())),
    }


def _scored(dataset: PreferenceDataset) -> Iterator[ScoredBlock]:
    for start in range(0, dataset.num_groups, _GROUPS_PER_BLOCK):
        groups = slice(start, start + _GROUPS_PER_BLOCK)
        yield ScoredBlock(
            judge_logits_GKK=torch.from_numpy(dataset.all_judge_logits(groups)),
            preferences_GKK=torch.from_numpy(dataset.all_preferences(groups)),
            win_rate_GK=torch.from_numpy(dataset.all_win_rates(groups)),
            response_lengths_GK=torch.from_numpy(dataset.response_lengths[groups]),
        )


def _told_apart(dataset: PreferenceDataset) -> Iterator[Sequence[Hashable]]:
    """Give every prompt's answers by what tells them apart: their lengths, or their ids where two are as long."""
    for start in range(0, dataset.num_groups, _GROUPS_PER_READ):
        groups = slice(start, start + _GROUPS_PER_READ)
        tokens, lengths = dataset.all_tokens(groups), dataset.lengths[groups]
        for length, ids in zip(
            lengths[:, 1:].tolist(), np.split(tokens, np.cumsum(lengths.sum(axis=1))[:-1]), strict=True
        ):
            if len(set(length)) == len(length):
                yield length
            else:
                yield [part.tobytes() for part in np.split(ids[-sum(length) :], np.cumsum(length)[:-1])]


def signal_counts(judge_logits_GKK: np.ndarray, *, rule: str) -> Counter[str]:
    """Count what there is to learn from a judge's verdicts -> pairs i < j and answers, by kind, zeros too."""
    logits = torch.tensor(judge_logits_GKK)
    preferences = preference_matrix(logits, rule=rule)
    upper = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    first, second = logits[:, upper], logits.transpose(-1, -2)[:, upper]
    return Counter(
        compared_pairs=first.numel(),
        tied_pairs=int(((preferences[:, upper] - 0.5).abs() <= TIE_TOLERANCE).sum()),
        order_bound_pairs=int((torch.sign(first) * torch.sign(second) > 0).sum()),
        earlier_wins=int((first > 0).sum()),
        later_wins=int((first < 0).sum()),
        leaning_answers=int(((win_rates(preferences) - 0.5).abs() > TIE_TOLERANCE).sum()),
    )


def check_signal(counts: Counter[str], *, judge: str, one_order: bool) -> None:
    """Refuse verdicts that nothing can be learned from.

    Args:
        counts: `signal_counts`, and what the judge counted.
        one_order: each pair was asked once: that the earlier answer always wins says nothing of the answers then.

    Raises:
        DataError: with the counts, the likely cause and what helps against it.
    """
    pairs, ties = counts["compared_pairs"], counts["tied_pairs"]
    earlier, later = counts["earlier_wins"], counts["later_wins"]
    if one_order and earlier + later >= ONE_SIDED_PAIRS and not (earlier and later):
        place = "first" if earlier else "second"
        fact, remedy = (
            f"the answer shown {place} wins all {earlier + later} pairs",
            "Ask in both orders: leave --one-order out.",
        )
    elif counts["leaning_answers"]:
        return
    else:
        fact, remedy = _why_nothing_leans(counts, pairs=pairs, ties=ties)
    kept = "the judge is asked anew" if counts["unreadable_verdicts"] else "the scores are kept"
    raise DataError(
        f"{judge} gives no signal: {fact}; training on it would change nothing. {remedy} "
        f"Or go on with --allow-no-signal: {kept}."
    )


def _why_nothing_leans(counts: Counter[str], *, pairs: int, ties: int) -> tuple[str, str]:
    if not pairs:
        return "each prompt has one answer, and nothing to compare it with", "Sample more: --num-responses 5."
    fact = f"{ties} of {pairs} pairs are ties, and every answer's win rate is one half"
    verdicts = counts["logprob_verdicts"] + counts["bare_verdicts"] + counts["unreadable_verdicts"]
    if 2 * counts["unreadable_verdicts"] > verdicts:
        return f"{fact} ({counts['unreadable_verdicts']} of {verdicts} verdicts are neither A nor B)", UNREADABLE_REMEDY
    if 2 * counts["order_bound_pairs"] > pairs:
        of_order = f"in {counts['order_bound_pairs']} of {pairs} the same place wins in both orders"
        return f"{fact} ({of_order})", "Take a judge that reads the answers."
    split = counts["concluded_answers"] + counts["unfinished_reasoning"] + counts["answers_without_reasoning"]
    empty = counts["unfinished_reasoning"] + counts["empty_conclusions"]
    if 2 * empty > split:
        fact = f"{fact} ({empty} of {split} answers hold nothing behind their reasoning)"
        return fact, "Let it end: sample with a larger --max-tokens, or look at what --judge-after names."
    # Ordered pairs are counted, of answers with the same text.
    if counts["identical_pairs"] > pairs:
        return f"{fact} ({counts['identical_pairs'] // 2} of identical texts)", "Sample hotter: a higher --temperature."
    return fact, "Take a judge that tells these answers apart."
