"""A run's iterates and others judged against each other, as the report shows `tournament.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from megatron_sppo.report import plots

_MOST_WRITTEN = 8
"""Players whose matrix has its numbers written into it."""
_MOST_MATRICES = 3
_LEAST_REACH = 15.0
"""Points from 50 % that have the full colour, at least: chance is not drawn as victory."""


def tournament_figure(result: Mapping[str, Any]) -> str:
    """Draw who beats whom under each judge, and each run's iterates under all of them -> data URI."""
    curves = [curve for curve in result["over_optimisation"] if curve["points"]]
    matrices = result["judges"][:_MOST_MATRICES]
    with matplotlib.rc_context(plots.STYLE):
        figure, panels = plots.new_figure(len(matrices) + bool(curves), width=4.4, height=3.8)
        for axes, judge in zip(panels, matrices, strict=False):
            _matrix(axes, judge)
        if curves:
            _curves(panels[-1], curves)
        return plots.data_uri(figure)


def _matrix(axes: Axes, judge: Mapping[str, Any]) -> None:
    names = [plots.short_title(name) for name in judge["matrix"]["players"]]
    game = 100 * np.array(judge["matrix"]["win_rate"])
    reach = max(float(np.abs(game - 50).max()), _LEAST_REACH)
    axes.grid(visible=False)
    axes.imshow(game, vmin=50 - reach, vmax=50 + reach, cmap="RdBu_r")
    for i, j in np.ndindex(game.shape) if len(names) <= _MOST_WRITTEN else ():
        color = "white" if abs(game[i, j] - 50) > 0.65 * reach else "black"
        axes.text(j, i, f"{game[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"{plots.short_title(judge['judge'])}\nrow beats column, %", fontsize=8.5)


def _curves(axes: Axes, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw win rates against the baseline: judges that training saw in full lines, others dashed."""
    series = 0
    for curve in curves:
        steps = [point["iteration"] for point in curve["points"]]
        for number, rate in enumerate(curve["points"][0]["win_rates"]):
            rates = [point["win_rates"][number] for point in curve["points"]]
            means = 100 * np.array([one["mean"] for one in rates])
            below = means - 100 * np.array([one["low"] for one in rates])
            above = 100 * np.array([one["high"] for one in rates]) - means
            label = rate["judge"] if len(curves) == 1 else f"{Path(curve['run']).name}, {rate['judge']}"
            style: dict[str, Any] = {
                "color": plots.color_of(series),
                "marker": "osD^v"[series % 5],
                "linestyle": "-" if rate["seen"] else "--",
                "capsize": 3,
            }
            errors = [np.maximum(below, 0), np.maximum(above, 0)]
            axes.errorbar(steps, means, yerr=errors, label=plots.short_title(label), **style)
            series += 1
    axes.axhline(50, color="#7b8794", linestyle=":", linewidth=1)
    axes.set_xticks(sorted({point["iteration"] for curve in curves for point in curve["points"]}))
    axes.set(xlabel="iteration", ylabel="win rate against the baseline, %")
    axes.legend(loc="best", fontsize=8)
