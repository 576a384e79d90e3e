"""What the report says about the judge: each diagnostic in words, when it is remarkable, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from megatron_sppo.selfplay import report_plots as plots
from megatron_sppo.selfplay.report_data import IterationData


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
        short="cyclic share", remedy="As for circles; if answers are near-duplicates, it is noise: sample hotter.",
    ),
    JudgeDiagnostic(
        name="order_inconsistency", label="position bias, mean |L_ij + L_ji| (nats)", above=1.0, short="position bias",
        remedy="Never use --one-order with this judge; a stronger judge minds the order less.",
    ),
    JudgeDiagnostic(
        name="one_order_agreement", label="pairs whose winner one order finds as well", below=0.95, short="one order",
        remedy="Judge again without --one-order: it names other winners.",
    ),
    JudgeDiagnostic(
        name="tie_rate", label="pairs at exactly one half", above=0.2, short="ties",
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
        name="num_quarantined", label="prompts set aside", above=0,
        remedy="The reasons stand in dataset/manifest.json under quarantined.",
    ),
    JudgeDiagnostic(
        name="truncation_rate", label="share of answers that the judge saw cut", above=0.05, short="cut answers",
        remedy="The judge does not see the end: lower --max-tokens.",
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
        name="unreadable_verdicts", label="verdicts that were neither A nor B, counted as ties", above=0,
        remedy="Take a judge that follows instructions, or look at its answers in the cache.",
    ),
    JudgeDiagnostic(
        name="missing_matrices", label="prompts without a stored matrix", above=0,
        remedy="Give matrices:FILE of these very rollouts.",
    ),
)  # fmt: skip


def judge_figure(iterations: Sequence[IterationData]) -> str | None:
    """Draw the judge's diagnostics over the iterations, shares and nats apart -> data URI, or None without any."""
    described = [data for data in iterations if data.diagnostics]
    drawn = [
        diagnostic
        for diagnostic in JUDGE_DIAGNOSTICS
        if diagnostic.short and any(data.diagnostics.get(diagnostic.name) is not None for data in described)
    ]
    if not drawn:
        return None
    in_nats = [diagnostic for diagnostic in drawn if "nats" in diagnostic.label]
    shares = [diagnostic for diagnostic in drawn if diagnostic not in in_nats]
    panels = [(series, unit) for series, unit in ((shares, "share, or correlation"), (in_nats, "nats")) if series]
    with matplotlib.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(len(panels), width=4.6)
        for one, (series, unit) in zip(axes, panels, strict=True):
            _lines(one, described, series)
            one.set(xlabel="iteration", ylabel=unit)
        return plots.data_uri(figure)


def _lines(axes: Axes, described: Sequence[IterationData], series: Sequence[JudgeDiagnostic]) -> None:
    for number, diagnostic in enumerate(series):
        points = [
            (data.iteration, data.diagnostics[diagnostic.name])
            for data in described
            if data.diagnostics.get(diagnostic.name) is not None
        ]
        style: dict[str, Any] = {"marker": "osD^vPX*"[number % 8], "color": plots.color_of(number)}
        axes.plot([x for x, _ in points], [y for _, y in points], label=diagnostic.short, **style)
    axes.axhline(0, color="#7b8794", linewidth=0.8)
    axes.set_xticks([data.iteration for data in described])
    axes.margins(x=0.15, y=0.15)
    axes.legend(loc="best", fontsize=8)
