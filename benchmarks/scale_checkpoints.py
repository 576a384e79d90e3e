"""The stages of `benchmarks.scale` that grow with the model: what they read, write and hash of a checkpoint's bytes.

Each is the command that a user types, in this process. A place holds one model: `size` is its hidden size.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.instruments import Instruments
from benchmarks.scale_inputs import write_model
from benchmarks.scale_stages import STAGES, rollouts, score
from benchmarks.scale_steps import Run, Stage
from megatron_sppo.checkpoints import megatron_checkpoint
from megatron_sppo.commands import convert
from megatron_sppo.examples import pretrain_sppo
from megatron_sppo.json_files import write_json
from megatron_sppo.selfplay.commands import iteration_stages, start_stages
from megatron_sppo.selfplay.config import RolloutConfig, RunConfig, ScoringConfig, SelfPlayConfig
from megatron_sppo.selfplay.paths import RunPaths
from megatron_sppo.selfplay.stages import StageMachine
from megatron_sppo.training import parallel, reference
from megatron_sppo.training.config import OptimizationConfig, TrainingConfig
from megatron_sppo.training.saving import Saver

_PROMPTS = 16


def importing(run: Run) -> dict[str, float]:
    """Import a Hugging Face model."""
    write_model(run.place / "model", hidden_size=run.size, num_layers=2)
    with run.costs:
        convert.main("convert", ["import", "--hf", str(run.place / "model"), "--megatron", str(run.place / "base")])
    return _sizes(run.place)


def importing_again(run: Run) -> dict[str, float]:
    """Give the same command again, which finds the model imported."""
    with run.costs:
        convert.main("convert", ["import", "--hf", str(run.place / "model"), "--megatron", str(run.place / "base")])
    return _sizes(run.place)


def training(run: Run) -> dict[str, float]:
    """Train an epoch of five steps from the imported model, and save."""
    small = replace(run, size=_PROMPTS, tokens=8, shard_size=_PROMPTS)
    rollouts(replace(small, costs=type(run.costs)()))
    score(replace(small, costs=type(run.costs)()))
    return _train(run, 5)


def training_resumed(run: Run) -> dict[str, float]:
    """Go on from that checkpoint for one step of the next epoch, and save."""
    return _train(run, 6)


def training_in_background(run: Run) -> dict[str, float]:
    """Train four steps, the save after the second written by another process while the next two are computed."""
    return _train(run, 4, "--save-interval", "2", "--async-save", saved="saved-in-background")


def training_by_two(run: Run) -> dict[str, float]:
    """Train and save on two ranks that share out the optimizer: what a save costs each."""
    return _by_two(run, "save", 5)


def resuming_by_two(run: Run) -> dict[str, float]:
    """Go on from that checkpoint on both ranks: what the command costs each, the save that ends it too."""
    return _by_two(run, "all", 6)


def training_rmsprop(run: Run) -> dict[str, float]:
    """Train by RMSprop, its state ready to be shared out, and save."""
    return _train(run, 2, "--optimizer", "rmsprop", "--use-distributed-optimizer", saved="saved-rmsprop")


def reference_pass(run: Run) -> dict[str, float]:
    """Train one step of an epoch of five; then another run, whose reference pass is killed in its fourth step.

    Its pieces are kept after each step here; by itself a run keeps them every minute.
    """
    often = ("--reference-piece-seconds", "1e-3")
    passes: list[int] = []
    original = reference.log_probs_and_sum

    def counted(*arguments: Any, **settings: Any) -> Any:
        passes.append(1)
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    stop_at = 0
    with patch.object(reference, "log_probs_and_sum", counted):
        _remove_reference(run.place / "dataset")
        _train(run, 1, saved="saved-short")
        short = len(passes)
        passes.clear()
        _remove_reference(run.place / "dataset")
        stop_at = 4
        with contextlib.suppress(KeyboardInterrupt):
            _train(replace(run, costs=Instruments()), 5, *often, saved="saved-killed")
        parallel.shut_down()
        stop_at = 0
        _train(replace(run, costs=Instruments()), 5, *often, saved="saved-killed-2")
    return {"passes_for_one_step": float(short), "passes_for_five_steps_and_a_kill": float(len(passes))}


def _remove_reference(dataset: Path) -> None:
    for path in dataset.glob("reference*"):
        path.unlink()


def _train(run: Run, train_iters: int, *flags: str, saved: str = "saved") -> dict[str, float]:
    waited: list[float] = []
    original = Saver.save

    def timed(self: Saver, *, wait: bool) -> Path:
        began = time.perf_counter()
        try:
            return original(self, wait=wait)
        finally:
            waited.append(time.perf_counter() - began)

    with patch.object(Saver, "save", timed), run.costs:
        pretrain_sppo.main("train", _arguments(run.place, train_iters, saved, *flags))
    return _sizes(run.place, saved) | {"seconds_waited": waited[0] if waited else 0.0}


def _arguments(place: Path, train_iters: int, saved: str, *flags: str) -> list[str]:
    argv = ["--load", str(place / "base"), "--data", str(place / "dataset"), "--save", str(place / saved)]
    argv += ["--lr", "1e-6", "--params-dtype", "float32", "--global-batch-size", "16", "--micro-batch-size", "4"]
    return [*argv, "--train-iters", str(train_iters), "--no-tensorboard", *flags]


def _by_two(run: Run, what: str, train_iters: int) -> dict[str, float]:
    """Start two ranks that measure themselves -> the first one's figures, and those of the second."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "benchmarks.scale_checkpoints", what, str(run.place), str(train_iters)]
    with run.costs:
        subprocess.run([*launch, *words], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    figures = _sizes(run.place, "saved-by-two")
    for rank in range(2):
        of_rank = json.loads((run.place / f"rank-{rank}.json").read_text(encoding="utf-8"))
        figures |= {f"{name}_of_rank_{rank}": value for name, value in of_rank.items()}
    return figures


def _rank(what: str, place: Path, train_iters: int) -> None:
    """Be one of two ranks: train, and write what the save (or all of it) cost this rank."""
    costs, original = Instruments(), Saver.save

    def measured(self: Saver, *, wait: bool) -> Path:
        with costs:
            return original(self, wait=wait)

    argv = _arguments(place, train_iters, "saved-by-two", "--use-distributed-optimizer")
    if what == "save":
        with patch.object(Saver, "save", measured):
            pretrain_sppo.main("train", argv)
    else:
        with costs:
            pretrain_sppo.main("train", argv)
    write_json(place / f"rank-{os.environ['RANK']}.json", dataclasses.asdict(costs.total))


def exporting(run: Run) -> dict[str, float]:
    """Export the trained weights."""
    paths = ["--megatron", str(run.place / "saved"), "--hf", str(run.place / "hf")]
    with run.costs:
        convert.main("convert", ["export", *paths, "--template", str(run.place / "model")])
    return _sizes(run.place)


def exporting_again(run: Run) -> dict[str, float]:
    """Give the same command again, which finds the model exported."""
    return exporting(run)


def bookkeeping(run: Run) -> dict[str, float]:
    """Keep the books of one iteration of self-play, twice: as it goes, and when the same command is given again.

    The stages' outputs lie there already, and their commands do nothing.
    """
    directory = run.place / "books"
    if not directory.exists():
        (directory / "iter_1/eval").mkdir(parents=True)
        os.symlink(run.place / "base", directory / "base")
        for name, source in (("rollouts", "rollouts"), ("dataset", "dataset"), ("checkpoint", "saved"), ("hf", "hf")):
            os.symlink(run.place / source, directory / "iter_1" / name)
        os.symlink(run.place / "rollouts", directory / "iter_1/eval/rollouts")
        (directory / "base_eval").mkdir()
        os.symlink(run.place / "rollouts", directory / "base_eval/rollouts")
        for name in ("eval/result.json", "token_log_ratios.jsonl"):
            (directory / "iter_1" / name).write_text("{}")
        (directory / "prompts").mkdir()
        for name in ("iter_1", "heldout"):
            os.symlink(run.place / "prompts.jsonl", directory / f"prompts/{name}.jsonl")
    nowhere = Path("decided-by-self-play")
    config = SelfPlayConfig(
        run=RunConfig(
            model=run.place / "model", prompts=(run.place / "prompts.jsonl",), output=directory, iterations=1
        ),
        scoring=ScoringConfig(judge="rules:concise"),
        rollout=RolloutConfig(),
        training=TrainingConfig(load=nowhere, data=nowhere, save=nowhere, optimization=OptimizationConfig(lr=1e-6)),
    )
    paths = RunPaths(run_dir=directory)
    stages = [*start_stages(config, paths, evaluates=True), *iteration_stages(config, paths, 1, evaluates=True)]
    with run.costs:
        for _ in range(2):
            machine = StageMachine(directory)
            for stage in stages:
                machine.run(replace(stage, command=("true",)))
    return _sizes(run.place)


_STARTED = """
import atexit, runpy, sys, time
place = sys.argv.pop(1)
atexit.register(lambda: open(place, "w").write(f"{len(sys.modules)} {time.process_time()}"))
sys.argv[0] = "megatron-sppo"
runpy.run_module("megatron_sppo", run_name="__main__")
"""


def commands(run: Run) -> dict[str, float]:
    """Start commands as a user does, on next to nothing -> CPU seconds and imported modules of each."""
    small = replace(run, size=_PROMPTS, tokens=8, shard_size=_PROMPTS, costs=Instruments())
    for name in ("rollouts", "merge", "report"):
        STAGES[name].measure(replace(small, costs=Instruments()))
    answers, figures = str(run.place / "rollouts"), {}
    lines = {
        "score": ["--rollouts", answers, "--judge", "rules:concise", "--output", str(run.place / "scored")],
        "report": ["--run", str(run.place / "run")],
        "plan": ["--config", "examples/configs/llama3_70b_h100.yaml", "--world-size", "512"],
        "evaluate": ["--policy", answers, "--base", answers, "--previous", answers, "--judge", "rules:concise"],
        "train": ["--help"],
        "inspect": ["--help"],
        "self-play": ["--help"],
    }
    lines["evaluate"] += ["--output", str(run.place / "evaluated.json"), "--allow-no-signal"]
    with run.costs:
        for name, words in lines.items():
            argv = [sys.executable, "-c", _STARTED, str(run.place / "started"), name, *words]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            modules, seconds = (run.place / "started").read_text(encoding="ascii").split()
            figures |= {f"modules of {name}": float(modules), f"cpu_seconds of {name}": float(seconds)}
    return figures


def _sizes(place: Path, saved: str = "saved") -> dict[str, float]:
    """Measure what all is held against -> bytes of the weights, and of the newest checkpoint."""
    root = place / saved if (place / saved).exists() else place / "base"
    newest = megatron_checkpoint.iteration_directory(root, megatron_checkpoint.iterations(root)[-1])
    return {
        "weights_bytes": float((place / "model/model.safetensors").stat().st_size),
        "checkpoint_bytes": float(sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())),
        "kept_bytes": float(sum(path.stat().st_size for path in root.rglob("*") if path.is_file())),
    }


CHECKPOINTS: dict[str, Stage] = {
    "import": Stage(needs=(), measure=importing, unit="byte"),
    "import, nothing to do": Stage(needs=("import",), measure=importing_again, unit="byte"),
    "training and a save": Stage(needs=("import",), measure=training, unit="byte"),
    "resuming and a save": Stage(needs=("training and a save",), measure=training_resumed, unit="byte"),
    "save in the background": Stage(needs=("training and a save",), measure=training_in_background, unit="byte"),
    "save by two ranks": Stage(needs=("training and a save",), measure=training_by_two, unit="byte"),
    "resuming by two ranks": Stage(needs=("save by two ranks",), measure=resuming_by_two, unit="byte"),
    "save of RMSprop": Stage(needs=("training and a save",), measure=training_rmsprop, unit="byte"),
    "reference pass": Stage(needs=("training and a save",), measure=reference_pass, unit="byte"),
    "commands": Stage(needs=("import",), measure=commands, unit="command"),
    "export": Stage(needs=("training and a save",), measure=exporting, unit="byte"),
    "export, nothing to do": Stage(needs=("export",), measure=exporting_again, unit="byte"),
    "self-play's books": Stage(needs=("resuming and a save", "export"), measure=bookkeeping, unit="byte"),
}
STAGES |= CHECKPOINTS

if __name__ == "__main__":
    _rank(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
