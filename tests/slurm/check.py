"""Hold what tests/slurm/run.sh's job has left against one process: the same rollouts to the byte, each step once."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from megatron_sppo.command_line import run as run_tool


def check(run: Path, scratch: Path) -> None:
    """Raise AssertionError where something is missing, doubled or other than one process makes it."""
    summary = json.loads((run / "summary.json").read_text())
    assert [entry["iteration"] for entry in summary["iterations"]] == [1, 2]
    for entry in summary["iterations"]:
        print(f"iteration {entry['iteration']}: seconds {entry['seconds']}")
        for opponent in ("base", "previous"):
            rate = entry[f"win_rate_vs_{opponent}"]
            assert 1 <= rate["num_prompts"] <= 4 and 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1, rate
    stages = json.loads((run / "state.json").read_text())["stages"]
    assert all(stage["status"] == "done" for stage in stages.values()), stages
    held_out = stages["base-eval-rollouts"]
    check_rollouts(held_out["command"], run / "base_eval/rollouts", scratch / "alone_base")
    for iteration in (1, 2):
        lines = (run / f"iter_{iteration}/checkpoint/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        last = int((run / f"iter_{iteration}/checkpoint/latest_checkpointed_iteration.txt").read_text())
        assert last > 10 and steps == list(range(1, last + 1)), steps
        stage = stages[f"iter_{iteration}-rollouts"]
        check_rollouts(stage["command"], run / f"iter_{iteration}/rollouts", scratch / f"alone_{iteration}")
        stage = stages[f"iter_{iteration}-eval-rollouts"]
        check_rollouts(stage["command"], run / f"iter_{iteration}/eval/rollouts", scratch / f"alone_eval_{iteration}")
    assert (run / "report.html").stat().st_size > 10_000
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=(run / "trackers/mlruns").absolute().as_uri())
    told = client.search_runs([client.get_experiment_by_name("megatron-sppo").experiment_id])
    assert sorted(one.data.tags["kind"] for one in told) == ["self-play", "train", "train"]
    assert sum(file.path == "report.html" for one in told for file in client.list_artifacts(one.info.run_id)) == 1
    print(f"{len(stages)} stages done, each step once, report and trackers there")


def check_rollouts(command: list[str], written: Path, alone: Path) -> None:
    """Run a rollout stage's command again in one process, without Ray, and compare the bytes."""
    flags = command[command.index("megatron_sppo") :]
    place = flags.index("--ray")
    flags = flags[:place] + flags[place + 2 :]
    flags[flags.index("--output") + 1] = str(alone)
    subprocess.run([sys.executable, "-m", *flags], check=True, capture_output=True)
    shards = sorted(path.name for path in written.glob("shard-*.jsonl"))
    assert shards and shards == sorted(path.name for path in alone.glob("shard-*.jsonl"))
    for name in shards:
        assert (written / name).read_bytes() == (alone / name).read_bytes(), f"{written / name} differs from {alone}"
    print(f"{len(shards)} shards of two nodes are those of one process, to the byte ({shlex.join(flags[:2])})")


if __name__ == "__main__":
    run_tool(lambda: check(Path(sys.argv[1]), Path(sys.argv[2])), name="check.py")
