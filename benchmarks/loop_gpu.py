"""What two iterations of self-play on a GPU gave: `benchmarks/hopper.sh loop` runs them, and this after them.

    python -m benchmarks.loop_gpu --run runs/loop_gpu

The policy is to learn what the judge prefers, shorter answers (benchmarks/loop_gpu.yaml): its win rate over the start
is above one half. One engine of vLLM's samples for all stages, with the base and with each adapter.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.demo import engine_starts
from benchmarks.record import Row, describe_machine, figure, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.json_files import read_json
from megatron_sppo.selfplay.summary import read_json_lines, read_summary

NAME = "loop_gpu.py"
_row = partial(figure, "loop")


@dataclass(frozen=True, kw_only=True)
class LoopGpuConfig:
    """Which run."""

    run: Path = Path("runs/loop_gpu")
    """Directory of a finished run."""
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the GPU."""


def describe(run: Path) -> list[Row]:
    """Take figures out of a finished run -> rows."""
    summary, state = read_summary(run), read_json(run / "state.json")
    starts = engine_starts(run, state)
    rows = [_row("starts of vLLM", starts, None, "one for all stages", starts, "<= 1", starts <= 1)]
    for entry in summary["iterations"]:
        number, won = entry["iteration"], entry["win_rate_vs_base"]
        where = f"iteration {number}"
        interval = [won["low"], won["high"]]
        rows.append(
            _row(f"win rate, {where}", won["mean"], None, "the start", won["mean"], "> 0.5", won["low"] > 0.5, interval)
        )
        before, after = summary["base_mean_response_tokens"], entry["mean_response_tokens"]
        rows.append(_row(f"tokens an answer, {where}", after, before, "the start", after / before, None, None))
        for stage, seconds in entry["seconds"].items():
            rows.append(_row(f"seconds, {where}: {stage}", seconds, None, "", None, None, None))
        steps = list(read_json_lines(run / f"iter_{number}" / "checkpoint" / "metrics.jsonl"))
        speed = max(step["perf/tokens_per_second"] for step in steps)
        rows.append(_row(f"tokens/s of the fastest step, {where}", speed, None, "", None, None, None))
    return rows


def main() -> None:
    """Write benchmarks/results/<machine>/loop_gpu.json."""
    config = parse(LoopGpuConfig, name=NAME, description=str(__doc__))
    rows = describe(config.run)
    machine = config.machine or describe_machine()
    write_results("loop_gpu", rows, machine=machine, packages=["torch", "megatron-core"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
