"""Keep what a finished `make demo` gave: its table, held-out accuracy by kind of instruction, its data's hashes.

    make demo && python -m benchmarks.demo --run runs/demo
    make demo LORA=1 ITERATIONS=3 && python -m benchmarks.demo --run runs/demo-lora --output three_adapters.json

The README, docs/quickstart.md and docs/alignment.md say what stands in the file, and no more.
"""

import datetime
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import RESULTS, describe_machine
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.errors import DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Unjudged, checker_of
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.selfplay.summary import read_json_lines, read_summary, result_table
from megatron_sppo.storage import sha256_of_file

NAME = "demo.py"
START = "base_eval/rollouts"
CONFIG = "examples/configs/smollm2_demo.yaml"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Which run, and where its result is kept."""

    run: Path = Path("runs/demo")
    """Directory of a finished demo."""
    output: Path = RESULTS / "alignment/demo.json"


def accuracy_by_kind(judge: str, rollouts: Path) -> dict[str, float]:
    """Check held-out answers -> {kind of instruction: share of its instructions that were followed}."""
    passed = checker_of(load_judge(judge, preset="paper"))
    assert passed is not None, f"{judge} checks nothing"
    found: dict[str, list[float]] = defaultdict(list)
    for group in StoredGroups(rollouts).values():
        passed_KC = passed(group)
        if not isinstance(passed_KC, Unjudged):
            kinds = (group.columns or {})["instruction_id_list"]
            for kind, passed_K in zip(kinds, passed_KC.T, strict=True):
                found[kind] += passed_K.tolist()
    return {kind: statistics.fmean(values) for kind, values in sorted(found.items())}


def describe(run: Path) -> dict[str, Any]:
    """Take out of a finished run what the pages say of it -> JSON's content.

    Raises:
        DataError: it is not finished.
    """
    summary, state = read_summary(run), read_json(run / "state.json")
    if not state["finished"]:
        raise DataError(f"{run} is not finished. Run `make demo` again: it goes on where it was.")
    judge = summary["iterations"][-1]["judge"]
    numbers = [entry["iteration"] for entry in summary["iterations"]]
    places = {"start": START, **{str(number): f"iter_{number}/eval/rollouts" for number in numbers}}
    datasets = {str(n): sha256_of_file(run / f"iter_{n}" / "dataset" / "manifest.json") for n in numbers}
    steps = [list(read_json_lines(run / f"iter_{n}" / "checkpoint" / "metrics.jsonl")) for n in numbers]
    return {
        "experiment": "demo",
        "command": _command(state),
        "trained": _trained(state),
        "num_prompts": state["prompts"],
        "engine_starts": engine_starts(run, state),
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": state["versions"],
        "model_sha256": state["model_sha256"],
        "prompts_sha256": state["prompts_sha256"],
        "dataset_sha256": datasets,
        "table": result_table(summary).splitlines(),
        "summary": summary,
        "accuracy_by_kind": {name: accuracy_by_kind(judge, run / place) for name, place in places.items()},
        "loss": [[round(step["loss"], 4) for step in of_iteration] for of_iteration in steps],
    }


def _trained(state: dict[str, Any]) -> str:
    rank = state["config"]["training"]["adapters"]["lora_rank"]
    return "all weights" if rank is None else f"adapters of rank {rank}"


def _command(state: dict[str, Any]) -> str:
    """Spell how the run can be repeated -> a command line; of the start model and the prompts the hashes tell."""
    run, trained = state["config"]["run"], _trained(state)
    lora = "" if trained == "all weights" else " LORA=1"
    shipped = yaml.safe_load((RESULTS.parents[1] / CONFIG).read_text(encoding="utf-8"))["run"]
    at_most = run["max_prompts_per_iteration"]
    fewer = "" if at_most == shipped["max_prompts_per_iteration"] else f", --max-prompts-per-iteration {at_most}"
    return f"make demo{lora} ITERATIONS={run['iterations']}{fewer}"


def engine_starts(run: Path, state: dict[str, Any]) -> int:
    """Count how often vLLM was started: by the process that keeps it, or by each stage that sampled."""
    kept = run / "logs/engine.log"
    if kept.is_file():
        return kept.read_text(encoding="utf-8").count("vLLM has started")
    return sum(name.endswith("rollouts") for name in state["stages"])


def main() -> None:
    """Write the file."""
    config = parse(DemoConfig, name=NAME, description=__doc__ or "")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, describe(config.run))
    print(config.output)


if __name__ == "__main__":
    run_tool(main, name=NAME)
