"""Settings of a self-play run: one YAML file, sections `run`, `rollout`, `scoring`, `training`, `evaluation`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from megatron_sppo import config as config_files
from megatron_sppo.config import NonNegativeInt, PositiveInt, Seed, check_ranges
from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.config import Temperature, TopP

MIN_RESAMPLES = 2000

FREE_TO_CHANGE = frozenset(
    (
        *("output", "json", "model", "prompts", "training_processes", "training_launcher", "rollout_command", "server"),
        *("rollout_tensor_parallel_size", "micro_batch_size", "tensor_model_parallel_size", "sequence_parallel"),
        *("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size"),
        *("expert_model_parallel_size", "packed_sequence_size", "inspected_prompts", "allow_no_signal"),
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    )
)
"""Where and how a run is computed, not what: it may go on with others. Model and prompts are compared by content."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is aligned, from what, and for how long."""

    model: Path
    """Hugging Face directory of the start model: pi_1, and the base of the evaluation."""
    prompts: Path
    """Prompts (JSONL, Parquet, dataset directory). Held-out rows are for the evaluation only."""
    output: Path
    """Run directory. The same command again resumes it."""
    iterations: PositiveInt = 3
    """Rounds of rollouts, scoring and training."""
    prompts_per_iteration: Literal["disjoint", "all"] = "disjoint"
    """disjoint: each iteration trains on its own part of the prompts (paper: thirds). all: on all of them."""
    max_prompts_per_iteration: PositiveInt | None = None
    """Most prompts of one iteration; the rest of its part is not used. None: all of them."""
    train_split: str | None = None
    """`split` of the prompts to train on. None: every row that is not held out."""
    heldout_split: str = "heldout"
    """`split` of the prompts for the evaluation."""
    seed: Seed = 0
    """Decides the order of the prompts, the rollouts' seeds and the bootstrap. Training has its own `seed`."""
    training_processes: PositiveInt = 1
    """Ranks of the training stage on this machine; above 1 it is started by torchrun."""
    training_launcher: str | None = None
    """Command that starts training in place of python or torchrun, such as "srun torchrun --nnodes 4 ..."."""
    rollout_command: str | None = None
    """Command in place of `python tools/generate_rollouts.py`: the seam for a sampler of your own. It is called with
    --model, --prompts, --output, --num-responses, --max-tokens, --temperature, --top-p and --seed, and writes rollouts
    as megatron_sppo/rollout/records.py describes them."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled, in training and in evaluation alike."""

    num_responses: PositiveInt = 5
    """K answers a prompt."""
    max_tokens: PositiveInt = 1024
    """Longest answer, in tokens."""
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    rollout_tensor_parallel_size: PositiveInt = 1
    """GPUs that share one sampler."""
    server: tuple[str, ...] = ()
    """URLs of running vLLM servers. They cannot take over the weights of a new iteration: one iteration only."""
    rollout_options: tuple[str, ...] = ()
    """Further settings of tools/generate_rollouts.py, NAME=VALUE (in YAML a mapping)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_responses < 2:
            raise ConfigError(
                f"num_responses is {self.num_responses}; preferences need at least 2. Use --num-responses 5."
            )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Who prefers what, and which answers are trained on."""

    judge: str
    """pairrm:HUB_ID_OR_DIR, rules:concise, rules:cyclic or endpoint:URL."""
    preset: Literal["paper", "official"] = "paper"
    """How logits become preferences, and what the judge reads as the prompt."""
    selection: str = "all"
    """all, extremes (best and worst) or top-bottom:M."""
    judge_after: str | None = None
    """Judge only what follows this text in an answer, such as "</think>", in evaluation too; default: whole answers."""
    verdict_tokens: PositiveInt = 1
    """Tokens that an endpoint may answer with, in evaluation too: more than 1 for a judge that reasons first."""
    allow_no_signal: bool = False
    """Go on where the judge prefers no answer to another, in evaluation too."""
    scoring_options: tuple[str, ...] = ()
    """Further settings of tools/score_pairrm.py, NAME=VALUE (in YAML a mapping)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation after each iteration."""

    heldout_prompts: NonNegativeInt | None = None
    """Prompts kept from training for the evaluation. None: the rows of heldout_split; N: a random choice; 0: none, and
    no evaluation."""
    eval_num_responses: PositiveInt | None = None
    """Answers a prompt and policy. None: as many as in training."""
    eval_judge: str | None = None
    """Judge of the evaluation. None: the one of training."""
    bootstrap_resamples: PositiveInt = MIN_RESAMPLES
    """Resamples of the 95 % interval."""
    inspected_prompts: NonNegativeInt = 4
    """Training prompts whose answers each iteration's report shows token by token, coloured by log-ratio; 0: none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.bootstrap_resamples < MIN_RESAMPLES:
            raise ConfigError(
                f"bootstrap_resamples is {self.bootstrap_resamples}; a 95 % interval wants at least {MIN_RESAMPLES}. "
                f"Use --bootstrap-resamples {MIN_RESAMPLES}."
            )


@dataclass(frozen=True, kw_only=True)
class SelfPlayConfig:
    """Align a model by self-play: rollouts, preferences, training and evaluation, iteration by iteration."""

    run: RunConfig
    scoring: ScoringConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: tuple[str, ...] = ()
    """Settings of examples/pretrain_sppo.py, NAME=VALUE. In YAML a mapping, such as `training: {lr: 5e-7}`."""

    def __post_init__(self) -> None:
        if self.rollout.server and self.run.iterations > 1:
            raise ConfigError(
                f"server is given with {self.run.iterations} iterations, but a server keeps the model that it was "
                "started with. Use --iterations 1, or leave --server out."
            )

    @property
    def eval_num_responses(self) -> int:
        """Answers a prompt and policy in the evaluation."""
        return self.evaluation.eval_num_responses or self.rollout.num_responses

    @property
    def eval_judge(self) -> str:
        """The evaluation's judge."""
        return self.evaluation.eval_judge or self.scoring.judge


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars stay as written: training's own flags read them."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def named_values(settings: Sequence[str], *, place: str) -> dict[str, Any]:
    """Read NAME=VALUE texts -> {name: text, None, list or dict}, as YAML would hold them.

    A mapping or list below `training:` arrives here as Python spells it, which is YAML's flow style too.

    Raises:
        ConfigError: a text without `=`.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"{place} holds {setting!r}. Write NAME=VALUE, or in YAML `{place}: {{NAME: VALUE}}`.")
        is_flow = text.startswith(("[", "{"))
        value = yaml.load(text, Loader=_TextLoader) if is_flow else text  # noqa: S506 - a SafeLoader
        values[name.removeprefix("--").replace("-", "_")] = None if value == "None" else value
    return values


def option_flags(settings: Sequence[str], *, place: str) -> list[str]:
    """Spell NAME=VALUE texts as flags of a tool -> tokens."""
    flags: list[str] = []
    for name, value in named_values(settings, place=place).items():
        flag = name.replace("_", "-")
        if isinstance(value, str) and value.lower() in ("true", "false"):
            flags.append(f"--{flag}" if value.lower() == "true" else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *value]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def record(config: SelfPlayConfig) -> dict[str, Any]:
    """Turn the config into what state.json keeps -> nested dict; NAME=VALUE settings as mappings."""
    values = config_files.to_dict(config)
    values["training"] = named_values(config.training, place="training")
    for section, name in (("rollout", "rollout_options"), ("scoring", "scoring_options")):
        values[section][name] = named_values(values[section][name], place=name)
    return values


def check_unchanged(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to go on with a run under other settings, except those that do not decide its result.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    old, new = _flat(before), _flat(now)
    for name in [*new, *(name for name in old if name not in new)]:
        leaf = name.rpartition(".")[2]
        if leaf in FREE_TO_CHANGE or old.get(name) == new.get(name) or _is_longer_run(name, old, new):
            continue
        raise ConfigError(
            f"{name} is {_spell(new.get(name))}, but {run_dir} was begun with {_spell(old.get(name))}. "
            f"Set it back, or begin another run with another --output."
        )


def _is_longer_run(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """More iterations change nothing of those done, unless the prompts are divided by their number."""
    is_all = new.get("run.prompts_per_iteration") == "all"
    return name == "run.iterations" and is_all and new[name] > old.get(name, new[name])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _spell(value: Any) -> str:
    return "not set" if value is None else str(value)
