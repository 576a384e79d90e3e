"""How far a run is, told from its files: for another terminal, on any machine that sees the run's directory."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sppo.cluster.progress import clock_time, read_progress
from megatron_sppo.errors import DataError
from megatron_sppo.selfplay.process import ProcessIdentity, lives
from megatron_sppo.selfplay.stages import LOGS_NAME, STATE_NAME, read_state

_METRICS_NAME = "metrics.jsonl"
_TAIL_BYTES = 1 << 16


def run_status(run_dir: Path) -> dict[str, Any]:
    """Read how far a run is; nothing is locked or written -> what `--status --json` prints.

    `stage` is the one under way, or None: its name, log, `progress` (that of rollouts and scoring over all workers) and
    `training` (the last line of metrics.jsonl); each is None where there is none. Numbers of a stage whose process is
    gone are its last ones; `is_alive` is None where another machine runs it.

    Raises:
        DataError: there is no run, or its state is damaged.
    """
    run_dir = Path(run_dir)
    state = read_state(run_dir)
    if state is None:
        raise DataError(f"{run_dir} holds no {STATE_NAME}: no run was begun there. Use --output RUN_DIR of one.")
    stages: dict[str, dict[str, Any]] = state["stages"]
    under_way = [name for name, entry in stages.items() if entry.get("status") == "running"]
    failed = [name for name, entry in stages.items() if entry.get("status") in ("failed", "interrupted")]
    return {
        "run": str(run_dir),
        "finished": bool(state.get("finished")),
        "iterations_done": state.get("summed_up", 0),
        "stages_done": [name for name, entry in stages.items() if entry.get("status") == "done"],
        "stopped": failed[-1] if failed and not under_way else None,
        "stage": _stage(run_dir, under_way[-1], stages[under_way[-1]]) if under_way else None,
    }


def status_lines(status: dict[str, Any]) -> list[str]:
    """Word a status -> lines."""
    stage, done = status["stage"], len(status["stages_done"])
    head = f"{status['run']}: {done} stages done, {status['iterations_done']} iterations"
    if status["finished"]:
        return [f"{head}; finished"]
    if stage is None:
        return [f"{head}; {status['stopped']} was stopped" if status["stopped"] else f"{head}; no stage is under way"]
    lines = [f"{head}; {stage['name']} is under way (log: {stage['log']})"]
    if stage["is_alive"] is False:
        lines = [f"{head}; {stage['name']} was cut off: the same self-play command goes on (log: {stage['log']})"]
    if stage["progress"] is not None:
        numbers = stage["progress"]
        lines.append(f"{numbers['line']} ({clock_time(max(0.0, time.time() - numbers['updated']))} ago)")
    if stage["training"] is not None:
        last = stage["training"]
        lines.append(", ".join(f"{name} {last[name]:.6g}" for name in ("step", "loss", "lr") if name in last))
    return lines


def _stage(run_dir: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    output = _output_of(run_dir, entry)
    progress = read_progress(output) if output is not None else None
    process = entry.get("process")
    return {
        "name": name,
        "log": str(run_dir / LOGS_NAME / f"{name}.log"),
        "is_alive": lives(ProcessIdentity(**process)) if process else None,
        "progress": {**asdict(progress), "line": progress.line()} if progress is not None else None,
        "training": last_metrics(output) if output is not None else None,
    }


def _output_of(run_dir: Path, entry: dict[str, Any]) -> Path | None:
    """Find where a stage writes -> path, None where it does not say; a run may have been moved since it began."""
    for path in entry.get("writes", []):
        return run_dir / path
    command = entry.get("command", [])  # of an earlier version
    for flag in ("--output", "--save"):
        if flag in command[:-1]:
            return Path(command[command.index(flag) + 1])
    return None


def last_metrics(save: Path) -> dict[str, Any] | None:
    """Read the last whole line of a training's metrics -> its numbers, None where there is none."""
    with contextlib.suppress(OSError), open(save / _METRICS_NAME, "rb") as file:
        file.seek(max(0, (save / _METRICS_NAME).stat().st_size - _TAIL_BYTES))
        for line in reversed(file.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return None
