"""Does it align? Self-play of SmolLM2-135M under objectives, seeds and settings, judged by checks that a program makes.

    python -m benchmarks.alignment --work WORK_DIR --model .cache/smollm2

Declared before the first run; what is not declared here is not claimed.

- *Task*: prompts with instructions that a program checks (examples/data/instructions.jsonl, judge verifiable:ifeval).
  Held-out prompts have kinds of instructions and topics that do not occur in training.
- *Entries* (5b): sppo on all K = 4 answers; dpo, ipo, inpo and sppo_hard on best and worst, as published, with as many
  answers passed through training (two epochs where sppo has one). Three iterations of 64 prompts, answers of 64 tokens
  at most. Beside them, if asked for: sppo_extremes (5d), sppo_many (5c: nine iterations of 21 prompts).
- *Settings*: learning rate 2e-5 or 8e-5, eta 3, 30 or 300 nats a unit of preference (beta = 1/eta), for each entry the
  pair with the greatest strict instruction-level accuracy after one iteration, on a seed of its own and on held-back
  *training* prompts: the held-out prompts choose nothing. At first the grid ended at 30, and prompt-level accuracy
  chose. The runs to choose by showed sppo at its whole target at 30, 2 nats of movement in the mean, and the
  prompt-level accuracy of 96 answers, 1 to 12 %, too coarse to choose by (a standard error of 3 points). Both were
  changed for every entry before any run of the experiment itself.
- *Endpoint*: strict prompt-level accuracy on held-out prompts after the last iteration; beside it instruction-level
  accuracy and the win rate against the start model. Floor: the start model against itself with another sampling seed.
- *What counts*: five seeds (order of prompts, sampling). An entry improves on the start model, or sppo differs from
  another entry, if the sign-flip test over held-out prompts (each the mean of all seeds) has p < 0.05 after Holm's
  correction over all of these comparisons, the difference is larger than the largest one between the start model's own
  seeds, and all five seeds have its sign. All else is "no difference shown".

Every piece is one `megatron-sppo self-play`, which goes on where it was stopped; so does this command. Runs with one
seed share the start model's answers and the first iteration's. `--minutes` begins no piece after that time. The result
is written after each piece, with `complete` false until all are there.
"""

import datetime
import hashlib
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.comparisons import bootstrap_interval, holm, sign_flip_p
from benchmarks.record import RESULTS, describe_machine
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import PositiveFloat, PositiveInt, parse
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.protocol import Unjudged, checker_of
from megatron_sppo.judge.stored_groups import StoredGroups
from megatron_sppo.selfplay.summary import read_json_lines

NAME = "alignment.py"
ENTRIES: dict[str, dict[str, Any]] = {
    "sppo": {"objective": "sppo"},
    "dpo": {"objective": "dpo", "num_epochs": 2},
    "ipo": {"objective": "ipo", "num_epochs": 2},
    "inpo": {"objective": "inpo", "num_epochs": 2},
    "sppo_hard": {"objective": "sppo_hard", "num_epochs": 2},
    "sppo_extremes": {"objective": "sppo", "selection": "extremes", "num_epochs": 2},
    "sppo_many": {"objective": "sppo"},
}
"""Settings of training beside the learning rate and the strength."""
MANY = 3
"""sppo_many has so many times the iterations, each of as many times fewer prompts."""
TUNING_SEED = 100
HEAVY = ("base", "iter_*/checkpoint", "iter_*/hf", "iter_*/auxiliary", "tensorboard")
"""What of a finished run is removed: weights."""
SHARED = ("import", "base-eval-rollouts", "iter_1-rollouts", "iter_1-dataset")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Sizes of the experiment; what is declared is the default."""

    work: Path
    """Directory for the runs, some gigabytes. The same command goes on with what is there."""
    model: Path
    """Hugging Face directory of the start model: `python examples/build_smollm2.py --output .cache/smollm2`."""
    prompts: Path = Path("examples/data/instructions.jsonl")
    judge: str = "verifiable:ifeval"
    entries: tuple[str, ...] = ("sppo", "dpo", "ipo", "inpo", "sppo_hard")
    seeds: PositiveInt = 5
    iterations: PositiveInt = 3
    prompts_per_iteration: PositiveInt = 64
    num_responses: PositiveInt = 4
    max_tokens: PositiveInt = 64
    eval_num_responses: PositiveInt = 2
    tuning_prompts: PositiveInt = 48
    """Training prompts that are held back to choose the settings."""
    learning_rates: tuple[float, ...] = (2e-5, 8e-5)
    etas: tuple[float, ...] = (3.0, 30.0, 300.0)
    params_dtype: str = "bfloat16"
    rollout_command: str | None = None
    """In place of vLLM, as in self-play."""
    minutes: PositiveFloat | None = None
    """Begin no piece after so long; unset: until all is done."""
    output: Path = RESULTS / "alignment/smollm2.json"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.entries if name not in ENTRIES]:
            raise ConfigError(f"entry {unknown[0]!r} is unknown. Use --entries with some of: {', '.join(ENTRIES)}.")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One self-play run."""

    entry: str
    seed: int
    lr: float
    eta: float
    tunes: bool = False

    @property
    def name(self) -> str:
        """Of its directory, such as "sppo-seed2"; with the settings where they are being chosen."""
        return f"{self.entry}-seed{self.seed}" + (f"-lr{self.lr:g}-eta{self.eta:g}" if self.tunes else "")


def settings_of(config: AlignmentConfig, piece: Piece) -> dict[str, Any]:
    """Write a piece's self-play config -> nested dict."""
    many = MANY if piece.entry == "sppo_many" else 1
    return {
        "run": {
            "model": str(config.model),
            "prompts": [str(_tuning_prompts(config) if piece.tunes else config.prompts)],
            "output": str(_run_dir(config, piece)),
            "iterations": 1 if piece.tunes else config.iterations * many,
            "max_prompts_per_iteration": max(1, config.prompts_per_iteration // many),
            "seed": piece.seed,
            "keep_last": 1,
            "rollout_command": config.rollout_command,
        },
        "rollout": {
            "num_responses": config.num_responses,
            "max_tokens": config.max_tokens,
            "rollout_options": {} if config.rollout_command else {"dtype": config.params_dtype, "max_model_len": 512},
        },
        "scoring": {"judge": config.judge, "selection": "all", "allow_no_signal": True},
        "evaluation": {
            "heldout_prompts": config.tuning_prompts if piece.tunes else None,
            "eval_num_responses": config.eval_num_responses,
            "inspected_prompts": 0,
        },
        "training": {
            "params_dtype": config.params_dtype,
            "lr": piece.lr,
            "lr_warmup_fraction": 0.1,
            "eta": piece.eta,
            **({"beta": 1 / piece.eta} if piece.entry in ("dpo", "ipo") else {}),
            "micro_batch_size": 16,
            "global_batch_size": 16,
            "seq_length": 512,
            "seed": piece.seed,
            "keep_last": 1,
            "tensorboard": False,
            **ENTRIES[piece.entry],
        },
    }


def _run_dir(config: AlignmentConfig, piece: Piece) -> Path:
    return config.work / "runs" / piece.name


def _record_path(config: AlignmentConfig, piece: Piece) -> Path:
    return config.work / "records" / f"{piece.name}.json"


def _tuning_prompts(config: AlignmentConfig) -> Path:
    return config.work / "tuning_prompts.jsonl"


def run_piece(config: AlignmentConfig, piece: Piece) -> dict[str, Any]:
    """Run, or go on with, one self-play, and keep what counts of it -> its record; read where it is there already."""
    path = _record_path(config, piece)
    if path.is_file():
        return dict(read_json(path))
    run_dir = _run_dir(config, piece)
    _share(config, piece)
    settings = config.work / "configs" / f"{piece.name}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(yaml.safe_dump(_without_none(settings_of(config, piece))), encoding="utf-8")
    log = config.work / "logs" / f"{piece.name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with open(log, "a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_sppo", "self-play", "--config", str(settings)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            check=False,
        )
    if done.returncode:
        raise ConfigError(f"{piece.name} ended with exit code {done.returncode}. Read {log}, mend it and run again.")
    record = {**asdict(piece), "seconds": time.monotonic() - began, **describe_run(config, run_dir)}
    path.parent.mkdir(exist_ok=True)
    write_json(path, record)
    for pattern in HEAVY if piece.entry != config.entries[0] else HEAVY[1:]:  # others take the first's start model over
        for directory in run_dir.glob(pattern):
            shutil.rmtree(directory)
    return record


def _without_none(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in section.items() if v is not None} for name, section in settings.items()}


def _share(config: AlignmentConfig, piece: Piece) -> None:
    """Give a new run what another with its seed has done before it could differ: state, start model, first answers."""
    run_dir, donors = _run_dir(config, piece), sorted((config.work / "runs").glob(f"*-seed{piece.seed}*/state.json"))
    wanted = settings_of(config, piece)["run"]
    for state_path in donors if not run_dir.exists() else ():
        state, donor = read_json(state_path), state_path.parent
        begun = {**state.get("config", {}).get("run", {})}
        same = all(begun.get(k) == wanted[k] for k in ("seed", "prompts", "iterations", "max_prompts_per_iteration"))
        if not same or not (donor / "base").is_dir() or any(name not in state["stages"] for name in SHARED):
            continue
        aside = run_dir.with_name(f".{run_dir.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name in ("base", "base_eval", "iter_1/rollouts", "iter_1/dataset"):
            shutil.copytree(
                donor / name, aside / name, copy_function=os.link, ignore=shutil.ignore_patterns("reference.*")
            )
        stages = {name: state["stages"][name] for name in SHARED}
        write_json(aside / "state.json", {**state, "stages": stages, "finished": False, "summed_up": 0, "config": None})
        aside.rename(run_dir)
        return


def describe_run(config: AlignmentConfig, run_dir: Path) -> dict[str, Any]:
    """Take out of a finished run what counts -> curves over its iterations, numbers of each held-out prompt."""
    iterations = []
    for entry in read_json(run_dir / "summary.json")["iterations"]:
        place = run_dir / f"iter_{entry['iteration']}"
        steps = list(read_json_lines(place / "checkpoint" / "metrics.jsonl"))
        result = read_json(place / "eval" / "result.json")
        iterations.append(
            {
                "win_rate_vs_base": entry["win_rate_vs_base"],
                "win_rate_vs_previous": entry["win_rate_vs_previous"],
                "mean_response_tokens": entry["mean_response_tokens"],
                "accuracy": prompt_accuracies(config.judge, place / "eval" / "rollouts"),
                "win_rates": {row["prompt_id"]: row["vs_base"] for row in result["prompts"]},
                "loss": [round(step["loss"], 4) for step in steps],
                "margins": [round(step["rewards/margins"], 5) for step in steps if "rewards/margins" in step],
                "log_ratio_abs_mean": steps[-1]["sppo/log_ratio_abs_mean"],
                "dataset_sha256": hashlib.sha256((place / "dataset" / "manifest.json").read_bytes()).hexdigest(),
            }
        )
    state = read_json(run_dir / "state.json")
    return {
        "iterations": iterations,
        "base_accuracy": prompt_accuracies(config.judge, run_dir / "base_eval" / "rollouts"),
        "model_sha256": state["model_sha256"],
        "prompts_sha256": state["prompts_sha256"],
        "versions": state["versions"],
    }


def prompt_accuracies(judge: str, rollouts: Path) -> dict[str, dict[str, float]] | None:
    """Check answers -> {prompt_id: {"prompt_level", "instruction_level"}}; None where the judge checks nothing."""
    passed = checker_of(load_judge(judge, preset="paper"))
    if passed is None:
        return None
    found = {}
    for prompt_id, group in StoredGroups(rollouts).items():
        passed_MC = passed(group)
        if not isinstance(passed_MC, Unjudged):
            whole = float((passed_MC == 1).all(axis=1).mean())
            found[prompt_id] = {"prompt_level": whole, "instruction_level": float(passed_MC.mean())}
    return found


def tune(config: AlignmentConfig, entry: str, deadline: float) -> tuple[float, float] | None:
    """Choose an entry's settings on held-back training prompts -> (lr, eta); None: time is up."""
    grid = list(itertools.product(config.learning_rates, config.etas))
    if len(grid) == 1:
        return grid[0]
    scores = []
    for lr, eta in grid:
        piece = Piece(entry=entry, seed=TUNING_SEED, lr=lr, eta=eta, tunes=True)
        if time.monotonic() > deadline and not _record_path(config, piece).is_file():
            return None
        scores.append(_score(run_piece(config, piece), level="instruction_level"))
    return grid[scores.index(max(scores))]


def _score(record: Mapping[str, Any], *, level: str = "prompt_level") -> float:
    last = record["iterations"][-1]
    if last["accuracy"] is None:
        return float(last["win_rate_vs_base"]["mean"])
    return statistics.fmean(values[level] for values in last["accuracy"].values())


def floors(config: AlignmentConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hold the start model's answers under each seed against those under each other -> the A/A floor.

    Differences of accuracy that no training made, and their range over all pairs of seeds.
    """
    by_seed = {record["seed"]: record["base_accuracy"] for record in records if record["base_accuracy"] is not None}
    means = {seed: _mean(values, "prompt_level") for seed, values in by_seed.items()}
    differences = [means[a] - means[b] for a, b in itertools.permutations(means, 2)]
    return {
        "accuracy_by_seed": means,
        "largest_difference": max(differences, default=None),
        "num_seeds": len(means),
        "num_responses": config.eval_num_responses,
    }


def _mean(values: Mapping[str, Mapping[str, float]], level: str) -> float:
    return statistics.fmean(value[level] for value in values.values())


def comparisons(by_entry: Mapping[str, Sequence[Mapping[str, Any]]], floor: float | None) -> list[dict[str, Any]]:
    """Make the declared comparisons of finished entries -> one each, Holm over all of them.

    Differences are of the strict prompt-level accuracy; of the win rate against the start model (minus 1/2 where that
    is what is compared with) where the judge checks nothing.
    """
    found = []
    for name, records in by_entry.items():
        found.append({"entry": name, "against": "start model", **_differ([(_last(r), _start(r)) for r in records])})
        if name != "sppo" and "sppo" in by_entry:
            pairs = [(_last(r), _last(s)) for r, s in zip(records, by_entry["sppo"], strict=True)]
            found.append({"entry": name, "against": "sppo", **_differ(pairs)})
    adjusted = holm({f"{row['entry']}/{row['against']}": row["p"] for row in found})
    for row in found:
        row["p_holm"] = adjusted[f"{row['entry']}/{row['against']}"]
        beyond = floor is None or abs(row["difference"]) > floor
        one_sign = len({d > 0 for d in row["by_seed"]}) == 1 and all(row["by_seed"])
        row["shown"] = bool(row["p_holm"] < 0.05 and beyond and one_sign)
    return found


def _last(record: Mapping[str, Any]) -> dict[str, float]:
    last = record["iterations"][-1]
    if last["accuracy"] is None:
        return dict(last["win_rates"])
    return {prompt_id: values["prompt_level"] for prompt_id, values in last["accuracy"].items()}


def _start(record: Mapping[str, Any]) -> dict[str, float]:
    if record["base_accuracy"] is None:
        return dict.fromkeys(_last(record), 0.5)
    return {prompt_id: values["prompt_level"] for prompt_id, values in record["base_accuracy"].items()}


def _differ(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, Any]:
    """Pair two policies' numbers prompt by prompt, averaged over seeds -> difference, interval, p, and each seed's."""
    prompts = sorted(set.intersection(*(set(one) & set(other) for one, other in pairs)))
    by_prompt = [statistics.fmean(one[p] - other[p] for one, other in pairs) for p in prompts]
    return {
        "difference": statistics.fmean(by_prompt),
        "interval": bootstrap_interval(by_prompt),
        "p": sign_flip_p(by_prompt),
        "by_seed": [statistics.fmean(one[p] - other[p] for p in prompts) for one, other in pairs],
        "num_prompts": len(prompts),
    }


def summarise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a record to what the committed JSON has of it: means in place of each prompt's numbers."""
    iterations = []
    for entry in record["iterations"]:
        kept = {k: v for k, v in entry.items() if k not in ("accuracy", "win_rates")}
        if entry["accuracy"] is not None:
            levels = ("prompt_level", "instruction_level")
            kept["accuracy"] = {level: _mean(entry["accuracy"], level) for level in levels}
        iterations.append(kept)
    return {**{k: v for k, v in record.items() if k not in ("base_accuracy", "versions")}, "iterations": iterations}


def write_result(config: AlignmentConfig, tuning: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Write what is there so far: the JSON, and beside it the K x K matrices of every run that is."""
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_entry.setdefault(record["entry"], []).append(record)
    whole = {name: found for name, found in by_entry.items() if len(found) == config.seeds}
    floor = floors(config, records)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    matrices = config.output.with_name(f"{config.output.stem}_matrices.npz")
    np.savez_compressed(matrices, **dict(_matrices(config, records)))
    public = {k: v for k, v in asdict(config).items() if k not in ("work", "output", "minutes", "model", "prompts")}
    write_json(
        config.output,
        {
            "experiment": "smollm2",
            "declared": (__doc__ or "").strip(),
            "complete": set(whole) == set(config.entries),
            "config": public,
            "machine": describe_machine(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": records[0]["versions"] if records else {},
            "tuning": dict(tuning),
            "a_a_floor": floor,
            "comparisons": comparisons(whole, floor["largest_difference"]) if whole else [],
            "runs": [summarise(record) for record in records],
            "matrices": {"file": matrices.name, "sha256": hashlib.sha256(matrices.read_bytes()).hexdigest()},
        },
    )


def _matrices(config: AlignmentConfig, records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    for record in records:
        piece = Piece(**{k: record[k] for k in ("entry", "seed", "lr", "eta", "tunes")})
        for number in range(1, len(record["iterations"]) + 1):
            dataset = PreferenceDataset(_run_dir(config, piece) / f"iter_{number}" / "dataset", verify_contents=False)
            yield f"{piece.name}/iter_{number}", dataset.all_preferences().astype(np.float16)


def experiment(config: AlignmentConfig) -> bool:
    """Run every piece that is missing, in the order of the seeds -> whether all are there."""
    deadline = time.monotonic() + 60 * config.minutes if config.minutes is not None else float("inf")
    config.work.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in config.prompts.read_text(encoding="utf-8").splitlines()]
    training = [row for row in rows if row.get("split") != "heldout"]
    _tuning_prompts(config).write_text("".join(json.dumps(row) + "\n" for row in training), encoding="utf-8")
    tuning: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for entry in config.entries:
        if (chosen := tune(config, entry, deadline)) is None:
            return False
        tuning[entry] = {"lr": chosen[0], "eta": chosen[1]}
    for seed, entry in itertools.product(range(config.seeds), config.entries):
        piece = Piece(entry=entry, seed=seed, **tuning[entry])
        if time.monotonic() > deadline and not _record_path(config, piece).is_file():
            return False
        records.append(run_piece(config, piece))
        logger.info("%s: %.4f", piece.name, _score(records[-1]))
        write_result(config, tuning, records)
    return True


def main() -> None:
    """Run, or go on with, the experiment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = parse(AlignmentConfig, name=NAME, description=__doc__ or "")
    done = experiment(config)
    print(f"{config.output}: {'complete' if done else 'time is up; the same command goes on'}")


if __name__ == "__main__":
    run_tool(main, name=NAME)
