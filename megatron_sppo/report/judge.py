"""The judge's diagnostics over the iterations, as a figure; what they mean stands in judge/diagnostics.py."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from megatron_sppo.judge.diagnostics import JUDGE_DIAGNOSTICS, JudgeDiagnostic
from megatron_sppo.report import plots
from megatron_sppo.report.data import IterationData

_LEAST = 0.1
"""A panel reaches at least so far above and below 0: rounding is drawn as the nothing that it is."""


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
    in_nats = [diagnostic for diagnostic in drawn if diagnostic.is_in_nats]
    shares = [diagnostic for diagnostic in drawn if diagnostic not in in_nats]
    panels = [(series, unit) for series, unit in ((shares, "share, or correlation"), (in_nats, "nats")) if series]
    with matplotlib.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(len(panels), width=5.9, height=3.2)
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
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, -_LEAST), max(top, _LEAST))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the panel: nine lines leave no room within
