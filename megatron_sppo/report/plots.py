"""The report's figures: matplotlib without a display, as SVG data that a page can carry inside."""

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_sppo.report.data import MACHINE_METRICS, IterationData, PreferenceExample, StepMetrics

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_COLORS = ("#2563a8", "#d9730d", "#2f8f5b", "#8e4fb5", "#b83a4b", "#4a7c8c")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.hashsalt": "megatron_sppo",
}
_LOG_SCALE_RATIO = 30.0
_MAX_PANELS = 4
_MAX_POINTS = 2000
"""Of a line; a longer one keeps the smallest and the largest of each stretch, so that no spike is lost."""
_MAX_DOTS = 20_000
"""Of a panel of responses; of more, so many are drawn, evenly, and the outermost."""


def is_checked(entry: dict[str, Any]) -> bool:
    """Whether an iteration's entry in summary.json has accuracies of both the policy and the start model."""
    accuracy = entry.get("accuracy") or {}
    return bool(accuracy.get("policy") and accuracy.get("base"))


def accuracy_figure(iterations: Sequence[dict[str, Any]]) -> str | None:
    """Draw the held-out strict accuracies, the start model's at 0 -> data URI, or None where no judge checks."""
    checked = [entry for entry in iterations if is_checked(entry)]
    if not checked:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1)
        steps = [0, *(entry["iteration"] for entry in checked)]
        for series, level in enumerate(("instruction_level", "prompt_level")):
            rates = [checked[0]["accuracy"]["base"][level], *(entry["accuracy"]["policy"][level] for entry in checked)]
            _rates(axes[0], steps, rates, series=series, label=("of instructions", "of answers, all held")[series])
        axes[0].set_xticks(steps)
        axes[0].set_ylim(bottom=0)
        axes[0].set(xlabel="iteration", ylabel="followed, %")
        figure.legend(loc="outside upper center", ncols=2)
        return data_uri(figure)


def win_rate_figure(iterations: Sequence[dict[str, Any]]) -> str | None:
    """Draw the held-out win rates with 95 % intervals -> data URI, or None without an evaluation."""
    if not any(entry["win_rate_vs_base"] for entry in iterations):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1)
        for series, (opponent, label) in enumerate(
            (("base", "against the base"), ("previous", "against the previous"))
        ):
            entries = [entry for entry in iterations if entry[f"win_rate_vs_{opponent}"]]
            rates = [entry[f"win_rate_vs_{opponent}"] for entry in entries]
            _rates(axes[0], [entry["iteration"] for entry in entries], rates, series=series, label=label)
        axes[0].axhline(50, color=_MUTED, linestyle="--", linewidth=1)
        axes[0].set_xticks([entry["iteration"] for entry in iterations])
        axes[0].set_xlim(iterations[0]["iteration"] - 0.5, iterations[-1]["iteration"] + 0.5)
        axes[0].set(xlabel="iteration", ylabel="win rate, %")
        figure.legend(loc="outside upper center", ncols=2)
        return data_uri(figure)


def _rates(axes: Axes, steps: Sequence[int], rates: Sequence[dict[str, float]], *, series: int, label: str) -> None:
    """Draw rates with their intervals, the second of two series a little to the right of the first."""
    means = 100 * np.array([rate["mean"] for rate in rates])
    below = means - 100 * np.array([rate["low"] for rate in rates])
    above = 100 * np.array([rate["high"] for rate in rates]) - means
    style: dict[str, Any] = {"color": _COLORS[series], "marker": "os"[series], "linestyle": "-:"[series], "capsize": 4}
    bars = [np.maximum(below, 0), np.maximum(above, 0)]
    axes.errorbar(np.array(steps) + 0.06 * (2 * series - 1), means, yerr=bars, label=label, **style)


def loss_figure(metrics: StepMetrics) -> str | None:
    """Draw the loss of every step, iterations end to end -> data URI, or None without metrics."""
    losses, numbers = metrics.losses, metrics.iterations
    if not losses.size:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1)
        for series, number in enumerate(np.unique(numbers)):
            steps = np.flatnonzero(numbers == number) + 1
            marker = "." if len(steps) <= 60 else None
            label = f"iteration {number}"
            style: dict[str, Any] = {"color": color_of(series), "marker": marker, "label": label}
            axes[0].plot(*_thinned(steps, losses[numbers == number]), **style)
            if series:
                axes[0].axvline(steps[0] - 0.5, color=_MUTED, linestyle=":", linewidth=1)
        finite = losses[np.isfinite(losses) & (losses > 0)]
        if len(finite) == len(losses) and finite.max() > _LOG_SCALE_RATIO * finite.min():
            axes[0].set_yscale("log")
        axes[0].set(xlabel="optimizer step, all iterations", ylabel="loss, nats\N{SUPERSCRIPT TWO}")
        axes[0].legend(loc="best")
        return data_uri(figure)


_MACHINE_LABELS = (
    ("model FLOPs, % of 989 TFLOP/s", 100.0),
    ("power, W", 1.0),
    ("temperature, \N{DEGREE SIGN}C", 1.0),
    ("peak memory, GiB", 1.0),
)
"""Label and factor of each of MACHINE_METRICS."""


def machine_figure(metrics: StepMetrics) -> str | None:
    """Draw what the first rank's GPU did, iterations end to end -> data URI, or None where no GPU was sampled."""
    if not metrics.machine:
        return None
    labels = dict(zip(MACHINE_METRICS, _MACHINE_LABELS, strict=True))
    slow = np.flatnonzero(metrics.throttled) + 1
    # Lines that would stand in one another are drawn once.
    _, apart = np.unique(slow * (_MAX_POINTS // 4) // (len(metrics.throttled) + 1), return_index=True)
    slow = slow if len(slow) <= _MAX_POINTS // 4 else slow[apart]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(metrics.machine), width=3.2, height=2.6)
        for axes, (name, values) in zip(panels, metrics.machine.items(), strict=True):
            label, factor = labels[name]
            axes.plot(*_thinned(np.arange(1, len(values) + 1), factor * values), color=_COLORS[0])
            for step in slow:
                axes.axvline(step, color=_COLORS[1], linewidth=0.8)
            axes.set(xlabel="optimizer step", ylabel=label)
        return data_uri(figure)


def length_figure(iterations: Sequence[dict[str, Any]], base_tokens: float | None) -> str | None:
    """Draw the mean answer length, the base's first -> data URI, or None without an evaluation."""
    points = [("base", base_tokens)] if base_tokens is not None else []
    points += [(str(entry["iteration"]), entry["mean_response_tokens"]) for entry in iterations]
    points = [(name, tokens) for name, tokens in points if tokens is not None]
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1)
        colors = [_MUTED if name == "base" else _COLORS[0] for name, _ in points]
        bars = axes[0].bar([name for name, _ in points], [tokens for _, tokens in points], color=colors, width=0.5)
        axes[0].bar_label(bars, fmt="%.1f", padding=2, color=_INK)
        axes[0].margins(y=0.15)
        axes[0].grid(axis="x", visible=False)
        axes[0].set(xlabel="policy after iteration", ylabel="tokens an answer, mean")
        return data_uri(figure)


def log_ratio_figure(iterations: Sequence[IterationData]) -> str | None:
    """Draw the log-ratio of every trained response against its target -> data URI, or None where training kept none.

    A panel an iteration, the last four; the colour is the step. The dashed line is where the regression would arrive.
    """
    shown = [data for data in iterations if data.targets.size][-_MAX_PANELS:]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(shown), width=3.9)
        for axes, data in zip(panels, shown, strict=True):
            points = _scatter(axes, data)
        panels[0].set_ylabel("log-ratio, nats")
        figure.colorbar(points, ax=panels, pad=0.02, label="step", ticks=MaxNLocator(nbins=6, integer=True))
        return data_uri(figure)


def preference_figure(examples: Sequence[PreferenceExample]) -> str | None:
    """Draw preference matrices, row i against column j -> data URI, or None without one."""
    if not examples:
        return None
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, panels = new_figure(len(examples), width=2.9, height=3.5)
        for axes, example in zip(panels, examples, strict=True):
            num_responses = len(example.preferences)
            image = axes.imshow(example.preferences, vmin=0, vmax=1, cmap="RdBu_r")
            if num_responses <= 8:
                for i, j in np.ndindex(num_responses, num_responses):
                    value = example.preferences[i, j]
                    color = "white" if abs(value - 0.5) > 0.32 else _INK
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)
            labels = [f"$y_{{{number}}}$" for number in range(1, num_responses + 1)]
            axes.set_xticks(range(num_responses), labels)
            axes.set_yticks(range(num_responses), labels)
            axes.set_title(short_title(example.prompt), fontsize=8.5)
        figure.colorbar(image, ax=panels, shrink=0.6, pad=0.02, label="P(row beats column)")
        return data_uri(figure)


def regression_slope(data: IterationData) -> float | None:
    """Fit log-ratio = slope * target through the origin, on the last quarter of the steps -> slope, None without any.

    1 is the fixed point; 0 is where training starts.
    """
    late = data.steps > data.steps.max(initial=0) * 0.75
    energy = float(np.square(data.targets[late]).sum())
    return float((data.targets[late] * data.log_ratios[late]).sum()) / energy if energy else None


def _scatter(axes: Axes, data: IterationData) -> PathCollection:
    axes.axhline(0, color=_MUTED, linewidth=0.8)
    axes.axvline(0, color=_MUTED, linewidth=0.8)
    # Points are drawn as one picture: a hundred thousand SVG circles would stop a browser.
    dots = _drawn(data)
    colors: dict[str, Any] = {"c": data.steps[dots], "cmap": "viridis_r", "alpha": 0.7, "linewidths": 0}
    points = axes.scatter(data.targets[dots], data.log_ratios[dots], s=11, rasterized=True, **colors)
    ends = np.array([min(data.targets.min(), 0), max(data.targets.max(), 0)])
    bottom, top = axes.get_ylim()
    axes.plot(ends, ends, color=_MUTED, linestyle="--", linewidth=1.2)
    slope = regression_slope(data)
    label = ""
    if slope is not None:
        axes.plot(ends, slope * ends, color=_COLORS[1], linewidth=1.8)
        label = f", slope {slope:.3f}"
    axes.set_ylim(bottom, top)  # the dashed line may leave the picture: the points are what counts
    axes.set_title(f"iteration {data.iteration}{label}")
    axes.set_xlabel("target, nats")
    return points


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out points of a line that nobody could tell from their neighbours -> x and y, [_MAX_POINTS] at most."""
    if len(y) <= _MAX_POINTS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(y)), _MAX_POINTS // 2):
        values = y[part]
        known = part[~np.isnan(values)] if np.isnan(values).any() else part
        kept += sorted({known[y[known].argmin()], known[y[known].argmax()]}) if known.size else [part[0]]
    return x[kept], y[kept]


def _drawn(data: IterationData) -> np.ndarray:
    """Choose the responses that are drawn -> indices: all, or evenly many of them and the outermost."""
    if len(data.targets) <= _MAX_DOTS:
        return np.arange(len(data.targets))
    evenly = np.linspace(0, len(data.targets) - 1, _MAX_DOTS).astype(np.int64)
    ends = [place for values in (data.targets, data.log_ratios) for place in (values.argmin(), values.argmax())]
    return np.unique([*evenly, *ends])


def new_figure(num_panels: int, *, width: float = 4.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(width * num_panels, 4.2), height), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)
    return figure, list(panels[0])


def color_of(series: int) -> str:
    return _COLORS[series % len(_COLORS)]


def short_title(text: str) -> str:
    """Shorten a prompt to two lines that matplotlib takes as they are: a dollar sign would start its mathematics."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    lines = textwrap.wrap(textwrap.shorten(plain, 62, placeholder=" ..."), 32) or [""]
    return "\n".join(lines[:2]).replace("\\", "\\\\").replace("$", r"\$")


def data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
