"""The stages of a run as commands that a person could type, in their order."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sppo import config as config_files
from megatron_sppo.data.schema import parse_selection
from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.load import load_judge
from megatron_sppo.rollout.config import Sampling
from megatron_sppo.selfplay.config import SelfPlayConfig, named_values, option_flags
from megatron_sppo.selfplay.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
"""Repository root: the tools lie beside the package, not in it."""

SCRIPTS = {
    "convert": "tools/convert.py",
    "rollouts": "tools/generate_rollouts.py",
    "score": "tools/score_pairrm.py",
    "train": "examples/pretrain_sppo.py",
    "inspect": "tools/inspect_log_ratio.py",
    "evaluate": "tools/evaluate.py",
    "report": "tools/report.py",
}
REPORT_NAME = "report.html"

_EVALUATION_SEED = 1_000_003
"""Added to the run's seed: held-out answers are never sampled with a training rollout's seed."""


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Where a run keeps what."""

    run_dir: Path

    @property
    def base(self) -> Path:
        """The start model as a Megatron checkpoint."""
        return self.run_dir / "base"

    @property
    def base_rollouts(self) -> Path:
        """Held-out answers of the start model."""
        return self.run_dir / "base_eval" / "rollouts"

    @property
    def heldout(self) -> Path:
        """Prompts of the evaluation."""
        return self.run_dir / "prompts" / "heldout.jsonl"

    @property
    def training_config(self) -> Path:
        """What is passed to the training command's --config."""
        return self.run_dir / "training.yaml"

    def prompts(self, iteration: int) -> Path:
        """Prompts of one iteration -> path."""
        return self.run_dir / "prompts" / f"iter_{iteration}.jsonl"

    def of(self, iteration: int, name: str) -> Path:
        """`iter_T/NAME`, NAME one of rollouts, dataset, checkpoint, hf, eval -> path."""
        return self.run_dir / f"iter_{iteration}" / name

    def token_log_ratios(self, iteration: int) -> Path:
        """Log-ratio of each token of some training answers, policy against its predecessor -> path."""
        return self.of(iteration, "token_log_ratios.jsonl")

    def result(self, iteration: int) -> Path:
        """Result of an iteration's evaluation -> path."""
        return self.of(iteration, "eval") / "result.json"

    def heldout_rollouts(self, iteration: int) -> Path:
        """Held-out answers of the policy after an iteration; 0 is the start model -> path."""
        return self.base_rollouts if iteration == 0 else self.of(iteration, "eval") / "rollouts"

    def hugging_face(self, config: SelfPlayConfig, iteration: int) -> Path:
        """Hugging Face directory of the policy after an iteration; 0 is the start model -> path."""
        return config.run.model if iteration == 0 else self.of(iteration, "hf")

    def checkpoint(self, iteration: int) -> Path:
        """Megatron checkpoint of the policy after an iteration; 0 is the start model -> path."""
        return self.base if iteration == 0 else self.of(iteration, "checkpoint")


def check_scripts() -> None:
    """Refuse an installation that left the tools behind.

    Raises:
        ConfigError: names the script that is not there.
    """
    for script in SCRIPTS.values():
        if not (ROOT / script).is_file():
            raise ConfigError(
                f"{ROOT / script} does not exist: self-play runs the tools of the repository, which a plain package "
                "installation leaves out. Clone the repository and use: pip install -e ."
            )


def start_stages(config: SelfPlayConfig, paths: RunPaths, *, evaluates: bool) -> Iterator[Stage]:
    """List what comes before the first iteration -> stages."""
    model = config.run.model
    yield Stage(
        name="import",
        command=(*_python("convert"), "import", "--hf", str(model), "--megatron", str(paths.base)),
        inputs=(model,),
        outputs=(paths.base,),
    )
    if evaluates:
        yield _heldout_rollouts(config, paths, 0, name="base-eval-rollouts")


def iteration_stages(config: SelfPlayConfig, paths: RunPaths, iteration: int, *, evaluates: bool) -> Iterator[Stage]:
    """List the stages of iteration 1, 2, ... -> stages."""
    prefix = f"iter_{iteration}"
    rollouts, dataset = paths.of(iteration, "rollouts"), paths.of(iteration, "dataset")
    model, checkpoint = paths.hugging_face(config, iteration - 1), paths.of(iteration, "checkpoint")
    yield Stage(
        name=f"{prefix}-rollouts",
        command=_rollout_command(
            config,
            *(model, paths.prompts(iteration), rollouts, config.rollout.num_responses, config.run.seed + iteration),
            allow_no_signal=config.scoring.allow_no_signal,
        ),
        inputs=(model, paths.prompts(iteration)),
        outputs=(rollouts,),
    )
    yield Stage(
        name=f"{prefix}-dataset",
        command=_scoring_command(config, rollouts, dataset),
        inputs=(rollouts,),
        outputs=(dataset,),
    )
    yield Stage(
        name=f"{prefix}-train",
        command=_training_command(config, paths, iteration),
        inputs=(paths.checkpoint(iteration - 1), dataset),
        outputs=(checkpoint,),
    )
    if config.evaluation.inspected_prompts:
        yield Stage(
            name=f"{prefix}-inspect",
            command=_inspection_command(config, paths, iteration),
            inputs=(checkpoint, paths.checkpoint(iteration - 1), dataset),
            outputs=(paths.token_log_ratios(iteration),),
        )
    yield Stage(
        name=f"{prefix}-export",
        command=(
            *(*_python("convert"), "export", "--megatron", str(checkpoint)),
            *("--hf", str(paths.of(iteration, "hf")), "--template", str(config.run.model)),
        ),
        inputs=(checkpoint,),
        outputs=(paths.of(iteration, "hf"),),
    )
    if evaluates:
        yield _heldout_rollouts(config, paths, iteration, name=f"{prefix}-eval-rollouts")
        yield _evaluation(config, paths, iteration)


def report_command(run_dir: Path) -> tuple[str, ...]:
    """Spell the command that writes report.html -> tokens."""
    return (*_python("report"), "--run", str(run_dir))


def _evaluation(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> Stage:
    policy, base, previous = (paths.heldout_rollouts(number) for number in (iteration, 0, iteration - 1))
    return Stage(
        name=f"iter_{iteration}-eval",
        command=(
            *(*_python("evaluate"), "--policy", str(policy), "--base", str(base), "--previous", str(previous)),
            *("--judge", config.eval_judge, "--preset", config.scoring.preset, *_judge_flags(config)),
            *("--output", str(paths.result(iteration)), "--seed", str(config.run.seed)),
            *("--bootstrap-resamples", str(config.evaluation.bootstrap_resamples)),
        ),
        inputs=(policy, base, previous),
        outputs=(paths.result(iteration),),
    )


def _heldout_rollouts(config: SelfPlayConfig, paths: RunPaths, iteration: int, *, name: str) -> Stage:
    model, output = paths.hugging_face(config, iteration), paths.heldout_rollouts(iteration)
    seed = config.run.seed + _EVALUATION_SEED
    return Stage(
        name=name,
        command=_rollout_command(
            config,
            *(model, paths.heldout, output, config.eval_num_responses, seed),
            allow_no_signal=True,  # a policy that always answers the same can still be judged against another
        ),
        inputs=(model, paths.heldout),
        outputs=(output,),
    )


def _rollout_command(
    config: SelfPlayConfig,
    model: Path,
    prompts: Path,
    output: Path,
    num_responses: int,
    seed: int,
    *,
    allow_no_signal: bool,
) -> tuple[str, ...]:
    rollout, own = config.rollout, config.run.rollout_command
    command = [
        *(shlex.split(own) if own else _python("rollouts")),
        *("--model", str(model), "--prompts", str(prompts), "--output", str(output)),
        *("--num-responses", str(num_responses), "--max-tokens", str(rollout.max_tokens)),
        *("--temperature", str(rollout.temperature), "--top-p", str(rollout.top_p), "--seed", str(seed)),
    ]
    if rollout.server:
        command += ["--server", *rollout.server]
    if rollout.rollout_tensor_parallel_size != 1:
        command += ["--tensor-parallel-size", str(rollout.rollout_tensor_parallel_size)]
    if allow_no_signal and not own:  # a command of the user's own promises no such flag
        command.append("--allow-no-signal")
    return (*command, *option_flags(rollout.rollout_options, place="rollout_options"))


def _scoring_command(config: SelfPlayConfig, rollouts: Path, dataset: Path) -> tuple[str, ...]:
    scoring = config.scoring
    return (
        *(*_python("score"), "--rollouts", str(rollouts), "--judge", scoring.judge, "--output", str(dataset)),
        *("--preset", scoring.preset, "--selection", scoring.selection, *_judge_flags(config)),
        *option_flags(scoring.scoring_options, place="scoring_options"),
    )


def _judge_flags(config: SelfPlayConfig) -> tuple[str, ...]:
    """Spell what holds for judging in training and in evaluation -> tokens."""
    scoring, flags = config.scoring, []
    if scoring.judge_after is not None:
        flags += ["--judge-after", scoring.judge_after]
    if scoring.verdict_tokens != 1:
        flags += ["--verdict-tokens", str(scoring.verdict_tokens)]
    if scoring.allow_no_signal:
        flags.append("--allow-no-signal")
    return tuple(flags)


def _training_command(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> tuple[str, ...]:
    return (
        *(*_launched(config, "train"), "--config", str(paths.training_config)),
        *("--load", str(paths.checkpoint(iteration - 1))),
        *("--data", str(paths.of(iteration, "dataset")), "--save", str(paths.of(iteration, "checkpoint"))),
    )


def _inspection_command(config: SelfPlayConfig, paths: RunPaths, iteration: int) -> tuple[str, ...]:
    return (
        *(*_launched(config, "inspect"), "--config", str(paths.training_config)),
        *("--load", str(paths.checkpoint(iteration)), "--reference", str(paths.checkpoint(iteration - 1))),
        *("--data", str(paths.of(iteration, "dataset")), "--output", str(paths.token_log_ratios(iteration))),
        *("--num-prompts", str(config.evaluation.inspected_prompts)),
    )


def _launched(config: SelfPlayConfig, name: str) -> list[str]:
    """Spell how a script that runs on all training ranks is started -> tokens."""
    script, processes = str(ROOT / SCRIPTS[name]), config.run.training_processes
    if config.run.training_launcher:
        return [*shlex.split(config.run.training_launcher), script]
    if processes > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        return [sys.executable, *torchrun, script]
    return [sys.executable, script]


def check_rollouts_and_judges(config: SelfPlayConfig) -> None:
    """Find settings of sampling and judging that a later stage would refuse; what lies on a hub is not asked for.

    Raises:
        ConfigError: a value out of its range, or a judge that does not exist.
    """
    rollout, scoring = config.rollout, config.scoring
    Sampling(
        num_responses=min(rollout.num_responses, config.eval_num_responses),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.max_tokens,
        seed=config.run.seed,
    )
    parse_selection(scoring.selection)
    for spec in {scoring.judge, config.eval_judge}:
        kind = spec.partition(":")[0]
        if kind == "matrices":
            raise ConfigError(
                f"{spec} is a file of preferences between answers that exist: it cannot judge new ones. "
                "Use --judge pairrm:HUB_ID_OR_DIR or another judge that reads."
            )
        if kind not in ("pairrm", "reward", "endpoint"):
            load_judge(spec, preset=scoring.preset)


def check_training_settings(config: SelfPlayConfig, file: Path) -> None:
    """Read `file` as the training command will, before anything is computed.

    Raises:
        ConfigError: a key or value that training does not take.
    """
    from megatron_sppo.training.config import TrainingConfig  # imports Megatron-Core: seconds

    argv = ["--config", str(file), *("--load", "LOAD", "--data", "DATA", "--save", "SAVE")]
    if named := {"load", "data", "save"} & set(named_values(config.training, place="training")):
        raise ConfigError(f"training sets {sorted(named)[0]}, which self-play decides itself. Remove it.")
    try:
        config_files.parse(TrainingConfig, name="pretrain_sppo.py", description="", argv=argv)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(file), "section training")) from None


def _python(script: str) -> tuple[str, str]:
    return sys.executable, str(ROOT / SCRIPTS[script])
