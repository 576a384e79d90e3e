"""What a run has come to: summary.json, metrics.jsonl, TensorBoard events and the table at the end."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sppo.config import to_dict
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.paths import REPORT_NAME, RunPaths
from megatron_sppo.selfplay.status import last_metrics
from megatron_sppo.storage import atomic_directory, atomic_file
from megatron_sppo.tracking.run import start

SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
SKIPPED_METRIC = "sppo/skipped_steps"
"""Bad steps that a training has left out so far."""
EVENTS_NAME = "tensorboard"
_LEVELS = ("prompt", "instruction")
_FIELDS = {"iteration", "judge", "win_rate_vs_base", "win_rate_vs_previous", "mean_response_tokens", "seconds"}
"""Of each iteration's entry, as `iteration_summary` makes it."""


def iteration_summary(paths: RunPaths, iteration: int, *, seconds: dict[str, float], judge: str) -> dict[str, Any]:
    """Sum up one iteration -> its entry in summary.json. Without an evaluation the win rates are None.

    `skipped_steps` is there where training left out bad steps (`--on-bad-step skip`).
    """
    num_skipped = (last_metrics(paths.of(iteration, "checkpoint")) or {}).get(SKIPPED_METRIC, 0)
    result = read_json(paths.result(iteration)) if paths.result(iteration).is_file() else {}
    return {
        "iteration": iteration,
        "judge": result.get("judge", judge),
        "win_rate_vs_base": result.get("win_rate_vs_base"),
        "win_rate_vs_previous": result.get("win_rate_vs_previous"),
        **{name: result[name] for name in ("a_a", "accuracy") if result.get(name) is not None},
        "mean_response_tokens": result.get("mean_response_tokens"),
        "seconds": seconds,
        **({"skipped_steps": num_skipped} if num_skipped else {}),
    }


def write_summary(
    paths: RunPaths,
    iterations: Sequence[dict[str, Any]],
    *,
    base_response_tokens: float | None,
    seconds: dict[str, float],
) -> None:
    """Write summary.json: one entry an iteration, beside it what belongs to none."""
    content = {"iterations": list(iterations), "base_mean_response_tokens": base_response_tokens, "seconds": seconds}
    write_json(paths.run_dir / SUMMARY_NAME, content, seal=True)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read summary.json -> its content.

    Raises:
        DataError: it does not exist yet, or is none.
    """
    path = Path(run_dir, SUMMARY_NAME)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: no iteration has ended. Run `megatron-sppo self-play` with --output {run_dir}."
        )
    summary: dict[str, Any] = read_json(path)
    entries = summary.get("iterations") if isinstance(summary, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and set(entry) >= _FIELDS for entry in entries):
        raise DataError(f"{path} is no summary of a run. Remove it and run the same self_play.py command again.")
    return summary


def gather_metrics(paths: RunPaths, num_iterations: int) -> None:
    """Join the training metrics of all iterations into RUN_DIR/metrics.jsonl, each line with its `iteration`."""
    with atomic_file(paths.run_dir / METRICS_NAME) as file:
        for iteration in range(1, num_iterations + 1):
            for row in read_json_lines(paths.of(iteration, "checkpoint") / METRICS_NAME):
                file.write(json.dumps({"iteration": iteration, **row}) + "\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON lines -> rows, one in memory; none where there is no file.

    Raises:
        DataError: a line is no JSON object.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is no JSON object. The file is damaged: remove the line.")
            yield row


def write_events(paths: RunPaths, iterations: Sequence[dict[str, Any]]) -> None:
    """Write RUN_DIR/tensorboard anew: win rates and answer lengths, an iteration a step.

    By TensorBoard's records, without the writer around them, which imports TensorFlow where it is installed.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    for entry in iterations:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in evaluation_metrics(entry).items()]
        events.append(Event(wall_time=now, step=entry["iteration"], summary=Summary(value=values)))
    # A reader that follows the directory takes a later name for what comes next.
    name = f"events.out.tfevents.{int(now):010d}.self-play"
    with (
        atomic_directory(paths.run_dir / EVENTS_NAME, replaces="events.*") as directory,
        open(directory / name, "wb") as file,
    ):
        records = RecordWriter(file)
        for event in events:
            records.write(event.SerializeToString())


def evaluation_metrics(result: dict[str, Any]) -> dict[str, float]:
    """List the numbers of an evaluation, of its result or its entry in summary.json -> {"evaluation/...": value}."""
    metrics: dict[str, float] = {}
    for opponent in ("base", "previous"):
        rate = result[f"win_rate_vs_{opponent}"]
        metrics |= {f"evaluation/win_rate_vs_{opponent}/{key}": rate[key] for key in ("mean", "low", "high") if rate}
    if accuracy := (result.get("accuracy") or {}).get("policy"):
        metrics |= {f"evaluation/accuracy/{level}_level": accuracy[f"{level}_level"]["mean"] for level in _LEVELS}
    if result["mean_response_tokens"] is not None:
        metrics["evaluation/mean_response_tokens"] = result["mean_response_tokens"]
    return metrics


def track(config: SelfPlayConfig, paths: RunPaths, iterations: Sequence[dict[str, Any]]) -> None:
    """Tell trackers of some iterations, an iteration a step, and hand them the report; none: only whether they answer.

    TensorBoard has its events by `write_events`.

    Raises:
        ConfigError: a tracker cannot be started.
    """
    others = tuple(name for name in config.tracking.tracker if name != "tensorboard")
    tracking = replace(config.tracking, tracker=others)
    with start(tracking, directory=paths.run_dir, kind="self-play", settings=to_dict(config)) as tracked:
        tracked.is_stopped = len(iterations) == 0 or iterations[-1]["iteration"] < config.run.iterations
        for entry in iterations:
            seconds = {f"seconds/{stage}": value for stage, value in entry["seconds"].items()}
            tracked.log(entry["iteration"], evaluation_metrics(entry) | seconds)
        if iterations:
            tracked.attach(paths.run_dir / REPORT_NAME)
            tracked.attach(paths.run_dir / SUMMARY_NAME)


def result_table(summary: dict[str, Any]) -> str:
    """Lay out a summary as plain text -> lines; strict accuracies, the start model's first, where the judge checks."""
    iterations = summary["iterations"]
    checks = any(entry.get("accuracy") for entry in iterations)
    levels = {"instructions held": "instruction_level", "prompts held": "prompt_level"} if checks else {}
    floor = any(entry.get("a_a") for entry in iterations)
    header = (
        "iteration", "win rate vs base", "vs previous", *["A/A"] * floor, *levels, "tokens", "seconds", "judge",
    )  # fmt: skip
    rows = [header]
    if checks:
        base = next(entry["accuracy"]["base"] for entry in iterations if entry.get("accuracy"))
        tokens = summary.get("base_mean_response_tokens")
        of_base = [rate_text(base[level]) for level in levels.values()]
        rows.append(("start", "-", "-", *["-"] * floor, *of_base, "-" if tokens is None else f"{tokens:.1f}", "-", "-"))
    for entry in iterations:
        accuracy = (entry.get("accuracy") or {}).get("policy")
        rows.append(
            (
                str(entry["iteration"]),
                rate_text(entry["win_rate_vs_base"]),
                rate_text(entry["win_rate_vs_previous"]),
                *[rate_text(entry.get("a_a"))] * floor,
                *(rate_text(accuracy and accuracy[level]) for level in levels.values()),
                "-" if entry["mean_response_tokens"] is None else f"{entry['mean_response_tokens']:.1f}",
                f"{sum(entry['seconds'].values()):.0f}",
                entry["judge"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rate_text(rate: dict[str, Any] | None) -> str:
    """Spell a win rate with its 95 % interval -> "55.0 % [51.7, 58.3]"."""
    if rate is None:
        return "-"
    return f"{100 * rate['mean']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
