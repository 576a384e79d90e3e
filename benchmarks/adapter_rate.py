"""Which learning rate adapters want: the demo's first training, of all weights and of adapters at several rates.

    make demo && python -m benchmarks.adapter_rate --run runs/demo --rates 4e-4 1e-3 2e-3

All are trained on one data set, in one order, from one model, so that their losses can be set side by side, step by
step; what the run itself trained is the first entry. It is one seed and one pass over few answers.
"""

import datetime
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, describe_machine
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.config_fields import PositiveFloat, PositiveInt
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.selfplay.summary import read_json_lines
from megatron_sppo.storage import sha256_of_file

NAME = "adapter_rate.py"


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """On what run's data, and at which rates."""

    run: Path = Path("runs/demo")
    """Run of self-play that has trained its first iteration."""
    rates: tuple[PositiveFloat, ...] = (4e-4, 1e-3, 2e-3)
    """Learning rates of adapters."""
    rank: PositiveInt = 16
    output: Path = RESULTS / "alignment/adapter_rate.json"


def train_adapters(run: Path, rate: float, rank: int) -> Path:
    """Train adapters as the run trained all weights, but for the rate; what is finished is left -> their checkpoint.

    Raises:
        subprocess.CalledProcessError: training ended with an error.
    """
    command = list(read_json(run / "state.json")["stages"]["iter_1-train"]["command"])
    words = command[command.index("train") :]
    save = run / f"adapter_rate-{rate:g}"
    data = save.with_name(f"{save.name}-data")
    if not data.is_dir():
        shutil.copytree(run / "iter_1/dataset", data)
    changed = {"--save": str(save), "--data": str(data), "--lr": f"{rate:g}"}
    for flag, value in changed.items():
        words[words.index(flag) + 1] = value
    subprocess.run([sys.executable, "-m", "megatron_sppo", *words, "--lora-rank", str(rank)], check=True)
    return save


def entry(what: str, checkpoint: Path) -> dict[str, Any]:
    """Read a training's steps -> what the pages say of it. The first two steps see the start model: their rate is 0."""
    steps = list(read_json_lines(checkpoint / "metrics.jsonl"))
    later = steps[2:]
    return {
        "what": what,
        "lr": max(step["lr"] for step in steps),
        "loss": [round(step["loss"], 4) for step in steps],
        "later_loss": [round(step["loss"], 4) for step in later],
        "later_margin": [round(step["rewards/margins"], 5) for step in later],
    }


def main() -> None:
    """Train, and write the file."""
    config = parse(RateConfig, name=NAME, description=__doc__ or "")
    state = read_json(config.run / "state.json")
    entries = [entry("all weights", config.run / "iter_1/checkpoint")]
    entries += [entry("adapters", train_adapters(config.run, rate, config.rank)) for rate in config.rates]
    content = {
        "experiment": "adapter_rate",
        "command": "python -m benchmarks.adapter_rate",
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": state["versions"],
        "model_sha256": state["model_sha256"],
        "dataset_sha256": sha256_of_file(config.run / "iter_1/dataset/manifest.json"),
        "num_prompts": state["prompts"]["iterations"][0],
        "rank": config.rank,
        "entries": entries,
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, content)
    print(config.output)


if __name__ == "__main__":
    run_tool(main, name=NAME)
